"""Attention over a KV cache."""

from codegen.abi import forward
from codegen.abi.description import Field, Struct
from codegen.abi.limits import KEY_GROUP, ROTARY_MULTIPLE
from codegen.abi.parts import kernel_query, launcher, planner, strides

PARAMS = Struct(
    "CacheParams",
    "Arguments of one attention call over a KV cache. Keys that the call appends are written to the cache"
    " first; what would lie outside of it is dropped, and read as zero. In forward, k and v are the cache,"
    " (cache_entries, rows, num_heads_k, cache_head_dim), of any strides, seqlen_k is the room for one"
    " sequence, cu_seqlens_q needs pages and no appended keys, and seqused_k is null.",
    (
        Field("forward", forward.PARAMS, "q, the cache, out, and how scores are formed"),
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
        *strides("k_new", "batch", "row", "head"),
        *strides("v_new", "batch", "row", "head"),
        Field("block_table_stride", "int64", "from one sequence to the next"),
        Field("cache_entries", "int32", "entries of the cache, or pages"),
        Field("page_size", "int32", f"keys in a page, a multiple of {KEY_GROUP}; 0 = no pages"),
        Field("cache_seqlen", "int32", "keys in the cache before, where nothing else tells"),
        Field("seqlen_new", "int32", "keys that the call appends to each sequence"),
        Field("rotary_rows", "int32", "positions in the tables; later ones are not rotated"),
        Field(
            "rotary_dim", "int32", f"elements of each head that are rotated, a multiple of {ROTARY_MULTIPLE}"
        ),
        Field("rotary_interleaved", "int32", "pairs are (0, 1), (2, 3), ..; else the two halves"),
        Field("num_splits", "int32", "parts of the keys; the workspaces are used where more than 1"),
        Field("design", "int32", "Design that is to compute the call, where the kernel has both (sm90)"),
        Field("cache_head_dim", "int16", "elements per head of the keys in the cache, at most head_dim"),
        Field("cache_head_dim_v", "int16", "the same of the values"),
    ),
)

PLAN = Struct(
    "CachePlan",
    "How a call over a KV cache is best computed.",
    (
        Field("num_splits", "int32", "as the call gives it, or chosen where it gives 0"),
        Field("design", "int32", "Design that is to compute the call"),
    ),
)

LAUNCHER = launcher("cache", PARAMS, "Launches the kernels of a call over a KV cache")
KERNEL_QUERY = kernel_query("cache", PARAMS)
PLANNER = planner(
    "cache",
    PARAMS,
    PLAN,
    "num_splits (0: choose), the alignment of k and v and their strides, and what modifies scores: the scale,"
    " softcap, dropout_p, and whether alibi_slopes is null",
)
