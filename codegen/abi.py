"""The C ABI of the library, described once; the C header and the ctypes mirror are rendered from here."""

import hashlib
from dataclasses import dataclass

from codegen import axes

# type -> (C++, ctypes, struct code, bytes)
SCALARS = {
    "int16": ("int16_t", "ctypes.c_int16", "h", 2),
    "int32": ("int32_t", "ctypes.c_int32", "i", 4),
    "int64": ("int64_t", "ctypes.c_int64", "q", 8),
    "uint64": ("uint64_t", "ctypes.c_uint64", "Q", 8),
    "float32": ("float", "ctypes.c_float", "f", 4),
    "string": ("const char*", "ctypes.c_char_p", "Q", 8),
}


@dataclass(frozen=True)
class Field:
    """A struct member or argument.

    ``type`` is a key of SCALARS, a C++ pointer such as ``float*``, or a Struct, which is packed already where
    it is packed into another one.
    """

    name: str
    type: "str | Struct"
    doc: str = ""

    @property
    def _description(self) -> tuple[str, str, str, int]:
        if isinstance(self.type, Struct):
            return self.type.name, self.type.name, f"{self.type.size}s", self.type.size
        return (self.type, "ctypes.c_void_p", "Q", 8) if self.type.endswith("*") else SCALARS[self.type]

    @property
    def c_type(self) -> str:
        return self._description[0]

    @property
    def ctypes_type(self) -> str:
        return self._description[1]

    @property
    def code(self) -> str:
        return self._description[2]

    @property
    def size(self) -> int:
        return self._description[3]

    @property
    def alignment(self) -> int:
        return min(self.size, 8)


@dataclass(frozen=True)
class Struct:
    """A parameter struct, laid out as in C: fields at multiples of their alignment, the whole of 8."""

    name: str
    doc: str
    fields: tuple[Field, ...]

    def offsets(self) -> list[int]:
        """Offset of each field in bytes."""
        offsets, end = [], 0
        for field in self.fields:
            offsets.append(_round_up(end, field.alignment))
            end = offsets[-1] + field.size
        return offsets

    @property
    def size(self) -> int:
        return _round_up(self.offsets()[-1] + self.fields[-1].size, 8)

    @property
    def constant(self) -> str:
        """Name of the packer in Python: ForwardParams -> FORWARD_PARAMS."""
        return "".join("_" + c if c.isupper() else c for c in self.name).lstrip("_").upper()

    @property
    def packing(self) -> str:
        """Format for ``struct.Struct``: little endian, explicit padding, runs of one type counted."""
        codes, end = [], 0
        for field, offset in zip(self.fields, self.offsets(), strict=True):
            codes += ["x"] * (offset - end) + [field.code]
            end = offset + field.size
        codes += ["x"] * (self.size - end)
        return "<" + "".join(f"{count}{code}" if len(code) == 1 else code for code, count in _runs(codes))


@dataclass(frozen=True)
class Enum:
    """An ``enum class : int32_t`` and its IntEnum; members are in snake_case here."""

    name: str
    doc: str
    members: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Function:
    """An exported ``extern "C"`` function; ``result`` is a key of SCALARS."""

    name: str
    result: str
    arguments: tuple[Field, ...]
    doc: str

    @property
    def result_field(self) -> Field:
        return Field("result", self.result)

    @property
    def argument_tuple(self) -> str:
        """The arguments' ctypes types as Python source."""
        types = ", ".join(argument.ctypes_type for argument in self.arguments)
        return f"({types},)" if len(self.arguments) == 1 else f"({types})"


def cpp_enumerator(member: str) -> str:
    """``not_built`` -> ``kNotBuilt``."""
    return "k" + "".join(word.capitalize() for word in member.split("_"))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _runs(codes: list[str]) -> list[tuple[str, int]]:
    runs: list[tuple[str, int]] = []
    for code in codes:
        if runs and runs[-1][0] == code and len(code) == 1:
            runs[-1] = (code, runs[-1][1] + 1)
        else:
            runs.append((code, 1))
    return runs


def _strides(tensor: str, *dimensions: str) -> tuple[Field, ...]:
    return tuple(Field(f"{tensor}_{d}_stride", "int64", f"from one {d} to the next") for d in dimensions)


FORWARD_PARAMS = Struct(
    "ForwardParams",
    "Arguments of one attention forward call. Sequences are packed (varlen) iff cu_seqlens_q is not null:"
    " then batch strides are ignored and row i of sequence b is cu_seqlens[b] + i. Strides are in elements.",
    (
        Field(
            "q",
            "const void*",
            "(batch, seqlen_q, num_heads, head_dim), or (total_q, ..) if varlen",
        ),
        Field(
            "k",
            "const void*",
            "as q, with seqlen_k, num_heads_k, total_k rows",
        ),
        Field("v", "const void*", "as k, with head_dim_v"),
        Field("out", "void*", "as q, with head_dim_v"),
        Field(
            "softmax_lse",
            "float*",
            "(batch, num_heads, seqlen_q), (num_heads, total_q), or null",
        ),
        Field(
            "cu_seqlens_q",
            "const int32_t*",
            "(batch + 1), or null: where each sequence starts in q",
        ),
        Field(
            "cu_seqlens_k",
            "const int32_t*",
            "(batch + 1), null iff cu_seqlens_q: sequence starts in k, v",
        ),
        Field("seqused_k", "const int32_t*", "(batch), or null: keys used of each sequence"),
        Field("leftpad_k", "const int32_t*", "(batch), or null: leading keys skipped of each sequence"),
        Field("alibi_slopes", "const float*", "(num_heads), or (batch, num_heads), or null"),
        Field("sinks", "const float*", "(num_heads): a score for each head that has no value, or null"),
        Field("rng_state", "const int64_t*", "(2): Philox seed and offset, read where dropout_p > 0"),
        Field(
            "probs",
            "void*",
            "output of flash_attn_dropout_probs, see there",
        ),
        Field(
            "tile_counter",
            "int32_t*",
            "zero, also after the call, used by no other meanwhile; or null",
        ),
        *_strides("q", "batch", "row", "head"),
        *_strides("k", "batch", "row", "head"),
        *_strides("v", "batch", "row", "head"),
        *_strides("out", "batch", "row", "head"),
        *_strides("lse", "batch", "head"),
        *_strides("alibi", "batch"),
        Field(
            "total_q",
            "int64",
            "rows of q; past cu_seqlens_q[batch]: out = 0, lse = +inf",
        ),
        Field("total_k", "int64", "rows of k and v"),
        Field("batch", "int32", "number of sequences"),
        Field("num_heads", "int32", "heads of q, a multiple of num_heads_k"),
        Field("num_heads_k", "int32", "heads of k and v"),
        Field("seqlen_q", "int32", "rows per sequence of q, the longest if varlen"),
        Field("seqlen_k", "int32", "rows per sequence of k, the longest if varlen"),
        Field("head_dim", "int32", "elements per head of q and k, a multiple of 8"),
        Field("head_dim_v", "int32", "the same of v and out; the kernel is the next larger for both"),
        Field("window_left", "int32", "keys visible left of the diagonal, -1 = unlimited"),
        Field("window_right", "int32", "keys visible right of the diagonal, -1 = unlimited; 0 = causal"),
        Field("dtype", "int32", "Dtype of q, k, v, out"),
        Field("device", "int32", "CUDA device ordinal"),
        Field("family", "int32", "Family to use, 0 = choose"),
        Field("softmax_scale", "float32", "factor of q k^T"),
        Field("softcap", "float32", "scores are softcap * tanh(score / softcap), 0 = off"),
        Field("dropout_p", "float32", "probability of dropping an element of P"),
        Field("dropout_rescale", "float32", "factor of those that stay, 1 / (1 - dropout_p) rounded once"),
    ),
)
BACKWARD_PARAMS = Struct(
    "BackwardParams",
    "Arguments of one attention backward call. The workspaces need not be initialised. Per head (and batch"
    " entry), they have seqlen_q rows, or if varlen total_q + 128 * batch, rounded up to a multiple of 128."
    " Then sequence b starts at row cu_seqlens_q[b] + 128 * b, rounded down to a multiple of 128."
    " key_rows is the same for k.",
    (
        Field("forward", FORWARD_PARAMS, "the forward call's, which wrote out and softmax_lse"),
        Field("dout", "const void*", "as out"),
        Field("dq", "void*", "as q, or null: not wanted"),
        Field("dk", "void*", "as k, or null: not wanted"),
        Field("dv", "void*", "as v, null iff dk is"),
        Field("softmax_d", "float*", "result: rowsum(dO * O), (batch, num_heads, rows); padding = 0"),
        Field("softmax_lse_log2", "float*", "workspace: LSE in log2 units, the same; padding = +inf"),
        Field("row_sums", "float*", "workspace: softmax_d as it is subtracted; in bf16 softmax_d itself"),
        Field("dq_accumulator", "float*", "workspace: dq, the same x the kernel's head dim"),
        Field("semaphores", "int32_t*", "workspace as softmax_d: dq is added up in order; or null"),
        Field("key_partials", "float*", "workspace: dk and dv of each of several parts, see key_rows"),
        *_strides("dout", "batch", "row", "head"),
        *_strides("dq", "batch", "row", "head"),
        *_strides("dk", "batch", "row", "head"),
        *_strides("dv", "batch", "row", "head"),
        Field("rows", "int64", "rows of the workspaces"),
        Field("key_rows", "int64", "of key_partials: (key_parts, 2, heads of k, key_rows, head dim)"),
        Field("key_parts", "int32", "of the heads that share keys, a divisor of their number"),
    ),
)
CACHE_PARAMS = Struct(
    "CacheParams",
    "Arguments of one attention call over a KV cache. Keys that the call appends are written to the cache"
    " first; what would lie outside of it is dropped, and read as zero. In forward, k and v are the cache,"
    " (cache_entries, rows, num_heads_k, cache_head_dim), of any strides, seqlen_k is the room for one"
    " sequence, cu_seqlens_q needs pages and no appended keys, and seqused_k is null.",
    (
        Field("forward", FORWARD_PARAMS, "q, the cache, out, and how scores are formed"),
        Field("cache_seqlens", "const int32_t*", "(batch): keys in the cache before, or null: cache_seqlen"),
        Field("cache_batch_idx", "const int32_t*", "(batch): entry of each sequence, or null: its own"),
        Field("block_table", "const int32_t*", "(batch, ..): pages of each sequence, null iff no page_size"),
        Field("k_new", "const void*", "(batch, seqlen_new, num_heads_k, head_dim) to append, or null"),
        Field("v_new", "const void*", "as k_new, with head_dim_v"),
        Field("rotary_cos", "const void*", "(rotary_rows, rotary_dim / 2), contiguous, or null"),
        Field("rotary_sin", "const void*", "as rotary_cos"),
        Field("q_rotated", "void*", "workspace: as q, contiguous, null iff rotary_cos"),
        Field("out_partial", "float*", "workspace: (rows of q, num_heads, num_splits, head_dim_v)"),
        Field("lse_partial", "float*", "workspace: (rows of q, num_heads, num_splits)"),
        *_strides("k_new", "batch", "row", "head"),
        *_strides("v_new", "batch", "row", "head"),
        Field("block_table_stride", "int64", "from one sequence to the next"),
        Field("cache_entries", "int32", "entries of the cache, or pages"),
        Field("page_size", "int32", "keys in a page, a multiple of 16; 0 = no pages"),
        Field("cache_seqlen", "int32", "keys in the cache before, where nothing else tells"),
        Field("seqlen_new", "int32", "keys that the call appends to each sequence"),
        Field("rotary_rows", "int32", "positions in the tables; later ones are not rotated"),
        Field("rotary_dim", "int32", "elements of each head that are rotated, a multiple of 16"),
        Field("rotary_interleaved", "int32", "pairs are (0, 1), (2, 3), ..; else the two halves"),
        Field("num_splits", "int32", "parts of the keys; the workspaces are used where more than 1"),
        Field("long_tiles", "int32", "take the tiles for many queries, where the family has them (sm90)"),
        Field("cache_head_dim", "int16", "elements per head of the keys in the cache, at most head_dim"),
        Field("cache_head_dim_v", "int16", "the same of the values"),
    ),
)
ROTARY_PARAMS = Struct(
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
        *_strides("x", "batch", "row", "head"),
        *_strides("out", "batch", "row", "head"),
        Field("rows", "int64", "of x, all sequences together"),
        Field("batch", "int32", "number of sequences"),
        Field("seqlen", "int32", "rows of each sequence, unless packed"),
        Field("num_heads", "int32", "heads of x"),
        Field("head_dim", "int32", "elements per head, a multiple of 8"),
        Field("rotary_dim", "int32", "how many of them are rotated: a multiple of 16, of 8 if interleaved"),
        Field("table_rows", "int32", "positions in the tables; rows at others stay as they are"),
        Field("offset", "int32", "position of each first token, where offsets is null"),
        Field("interleaved", "int32", "pairs are (0, 1), (2, 3), ..; else the two halves"),
        Field("conjugate", "int32", "rotate back"),
        Field("dtype", "int32", "Dtype of x and out"),
        Field("fp32_tables", "int32", "cos and sin are fp32; else of that dtype"),
        Field("device", "int32", "CUDA device ordinal"),
    ),
)
STRUCTS = (FORWARD_PARAMS, BACKWARD_PARAMS, CACHE_PARAMS, ROTARY_PARAMS)


def enums() -> tuple[Enum, ...]:
    """Every enum of the ABI; dtypes, masks and families follow the axes."""
    families = (("auto", 0), *((name, int(name.removeprefix("sm"))) for name in axes.FAMILIES))
    status = ("ok", "not_built", "unsupported_device", "cuda_error", "invalid_argument")
    return (
        Enum("Dtype", "Element type of q, k, v and out.", _numbered(axes.DTYPES)),
        Enum("Mask", "Mask class: what a kernel is compiled to mask.", _numbered(axes.MASKS)),
        Enum("Family", "Kernel family; auto = the best one for the device.", families),
        Enum("Direction", "Pass that a kernel computes.", _numbered(axes.DIRECTIONS)),
        Enum("Status", "Result of a call; flash_attn_last_error() has the text.", _numbered(status)),
    )


def _numbered(names: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    return tuple((name, number) for number, name in enumerate(names))


_PARAMS = Field("params", "const flash_attn::ForwardParams*")
_BACKWARD_PARAMS = Field("params", "const flash_attn::BackwardParams*")
_SPLIT_PARAMS = Field("params", "const flash_attn::CacheParams*")
_ROTARY_PARAMS = Field("params", "const flash_attn::RotaryParams*")
_STREAM = Field("stream", "void*")
_CALL = (_PARAMS, _STREAM)

FUNCTIONS = (
    Function("flash_attn_forward", "int32", _CALL, "Launches the forward kernel; returns a Status."),
    Function(
        "flash_attn_backward",
        "int32",
        (_BACKWARD_PARAMS, _STREAM),
        "Launches the backward kernels; returns a Status.",
    ),
    Function(
        "flash_attn_cache",
        "int32",
        (_SPLIT_PARAMS, _STREAM),
        "Launches the kernels of a call over a KV cache; returns a Status.",
    ),
    Function(
        "flash_attn_rotary",
        "int32",
        (_ROTARY_PARAMS, _STREAM),
        "Rotates x into out; returns a Status.",
    ),
    Function(
        "flash_attn_dropout_probs",
        "int32",
        _CALL,
        "Writes probs (sign bit = dropped) from q, k, softmax_lse, rng_state; returns a Status. probs is"
        " contiguous, (batch, num_heads, seqlen_q, seqlen_k), both lengths rounded up to a multiple of 128.",
    ),
    Function(
        "flash_attn_forward_kernel",
        "string",
        (_PARAMS,),
        "Key of the kernel that flash_attn_forward would run, or null (see flash_attn_last_error).",
    ),
    Function(
        "flash_attn_backward_kernel",
        "string",
        (_BACKWARD_PARAMS,),
        "Key of the kernel that flash_attn_backward would run, or null (see flash_attn_last_error).",
    ),
    Function(
        "flash_attn_cache_kernel",
        "string",
        (_SPLIT_PARAMS,),
        "Key of the kernel that flash_attn_cache would run, or null (see flash_attn_last_error).",
    ),
    Function("flash_attn_last_error", "string", (), "Text of this thread's last error."),
    Function(
        "flash_attn_layout_hash",
        "uint64",
        (),
        "kLayoutHash of the library's abi.h.",
    ),
    Function("flash_attn_forward_params_size", "int64", (), "sizeof(ForwardParams) in bytes."),
    Function("flash_attn_backward_params_size", "int64", (), "sizeof(BackwardParams) in bytes."),
    Function("flash_attn_cache_params_size", "int64", (), "sizeof(CacheParams) in bytes."),
    Function("flash_attn_rotary_params_size", "int64", (), "sizeof(RotaryParams) in bytes."),
    Function("flash_attn_kernel_count", "int32", (), "Number of kernels in the library."),
    Function("flash_attn_kernel_key", "string", (Field("index", "int32"),), "Key of one kernel."),
    Function("flash_attn_targets", "string", (), 'Compiled targets, such as "sm80:80,sm80:90+ptx".'),
)


def layout_text() -> str:
    """Canonical text of everything that both sides of the ABI must agree on."""
    lines = []
    for struct in STRUCTS:
        lines.append(f"struct {struct.name} {struct.size}")
        for field, offset in zip(struct.fields, struct.offsets(), strict=True):
            lines.append(f"{offset} {field.c_type} {field.name}")
    for enum in enums():
        lines.append(f"enum {enum.name} " + " ".join(f"{name}={value}" for name, value in enum.members))
    for function in FUNCTIONS:
        arguments = " ".join(f"{argument.c_type} {argument.name}" for argument in function.arguments)
        lines.append(f"function {function.name} {function.result} {arguments}".rstrip())
    return "\n".join(lines) + "\n"


def layout_hash() -> int:
    """64-bit hash of the layout text: the library refuses to run under a mirror with another one."""
    return int.from_bytes(hashlib.sha256(layout_text().encode()).digest()[:8], "big")
