"""Rotation of heads by their position."""

from codegen.abi.description import Field, Struct
from codegen.abi.limits import HEAD_DIM_MULTIPLE, ROTARY_MULTIPLE
from codegen.abi.parts import launcher, strides

PARAMS = Struct(
    "RotaryParams",
    "Arguments of one rotation of heads by their position. Sequences are packed iff cu_seqlens is not null:"
    " then batch strides are ignored, and rows past the last sequence stay as they are. Strides are in"
    " elements.",
    (
        Field("x", "const void*", "(batch, seqlen, num_heads, head_dim), or (rows, ..) if packed"),
        Field("out", "void*", "as x; may be x"),
        Field("cos", "const void*", "(table_rows, rotary_dim / 2), contiguous"),
        Field("sin", "const void*", "as cos"),
        Field("offsets", "const int32_t*", "(batch): position of each first token, or null: offset"),
        Field("cu_seqlens", "const int32_t*", "(batch + 1), or null: where each sequence starts"),
        *strides("x", "batch", "row", "head"),
        *strides("out", "batch", "row", "head"),
        Field("rows", "int64", "of x, all sequences together"),
        Field("batch", "int32", "number of sequences"),
        Field("seqlen", "int32", "rows of each sequence, unless packed"),
        Field("num_heads", "int32", "heads of x"),
        Field("head_dim", "int32", f"elements per head, a multiple of {HEAD_DIM_MULTIPLE}"),
        Field(
            "rotary_dim",
            "int32",
            f"how many of them are rotated: a multiple of {ROTARY_MULTIPLE},"
            f" of {ROTARY_MULTIPLE.value // 2} if interleaved",
        ),
        Field("table_rows", "int32", "positions in the tables; rows at others stay as they are"),
        Field("offset", "int32", "position of each first token, where offsets is null"),
        Field("interleaved", "int32", "pairs are (0, 1), (2, 3), ..; else the two halves"),
        Field("conjugate", "int32", "rotate back"),
        Field("dtype", "int32", "Dtype of x and out"),
        Field("fp32_tables", "int32", "cos and sin are fp32; else of that dtype"),
        Field("device", "int32", "CUDA device ordinal"),
    ),
)

LAUNCHER = launcher("rotary", PARAMS, "Rotates x into out")
