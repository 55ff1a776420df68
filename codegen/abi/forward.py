"""Attention, forward."""

from codegen.abi.description import Field, Struct
from codegen.abi.limits import HEAD_DIM_MULTIPLE
from codegen.abi.parts import kernel_query, launcher, strides

PARAMS = Struct(
    "ForwardParams",
    "Arguments of one attention forward call. Sequences are packed (varlen) iff cu_seqlens_q is not null:"
    " then batch strides are ignored and row i of sequence b is cu_seqlens[b] + i. Strides are in elements.",
    (
        Field("q", "const void*", "(batch, seqlen_q, num_heads, head_dim), or (total_q, ..) if varlen"),
        Field("k", "const void*", "as q, with seqlen_k, num_heads_k, total_k rows"),
        Field("v", "const void*", "as k, with head_dim_v"),
        Field("out", "void*", "as q, with head_dim_v"),
        Field("softmax_lse", "float*", "(batch, num_heads, seqlen_q), (num_heads, total_q), or null"),
        Field("cu_seqlens_q", "const int32_t*", "(batch + 1), or null: where each sequence starts in q"),
        Field(
            "cu_seqlens_k", "const int32_t*", "(batch + 1), null iff cu_seqlens_q: sequence starts in k, v"
        ),
        Field("seqused_k", "const int32_t*", "(batch), or null: keys used of each sequence"),
        Field("leftpad_k", "const int32_t*", "(batch), or null: leading keys skipped of each sequence"),
        Field("alibi_slopes", "const float*", "(num_heads), or (batch, num_heads), or null"),
        Field("sinks", "const float*", "(num_heads): a score for each head that has no value, or null"),
        Field("rng_state", "const int64_t*", "(2): Philox seed and offset, read where dropout_p > 0"),
        Field("probs", "void*", "output of flash_attn_dropout_probs, see there"),
        Field("tile_counter", "int32_t*", "zero, also after the call, used by no other meanwhile; or null"),
        *strides("q", "batch", "row", "head"),
        *strides("k", "batch", "row", "head"),
        *strides("v", "batch", "row", "head"),
        *strides("out", "batch", "row", "head"),
        *strides("lse", "batch", "head"),
        *strides("alibi", "batch"),
        Field("total_q", "int64", "rows of q; past cu_seqlens_q[batch]: out = 0, lse = +inf"),
        Field("total_k", "int64", "rows of k and v"),
        Field("batch", "int32", "number of sequences"),
        Field("num_heads", "int32", "heads of q, a multiple of num_heads_k"),
        Field("num_heads_k", "int32", "heads of k and v"),
        Field("seqlen_q", "int32", "rows per sequence of q, the longest if varlen"),
        Field("seqlen_k", "int32", "rows per sequence of k, the longest if varlen"),
        Field("head_dim", "int32", f"elements per head of q and k, a multiple of {HEAD_DIM_MULTIPLE}"),
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

LAUNCHER = launcher("forward", PARAMS, "Launches the forward kernel")
KERNEL_QUERY = kernel_query("forward", PARAMS)
