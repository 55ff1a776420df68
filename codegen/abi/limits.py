"""Numbers that both sides of the ABI count with; C header and ctypes mirror are rendered from here."""

from codegen import axes
from codegen.abi.description import Limit

MAX_HEAD_DIM = Limit("max_head_dim", max(axes.HEAD_DIMS), "Elements per head, at most.")
HEAD_DIM_MULTIPLE = Limit("head_dim_multiple", 8, "Divides head dims of kernels: rows are whole 16 bytes.")
ROTARY_MULTIPLE = Limit(
    "rotary_multiple", 16, "Divides rotary_dim; or its half does, if interleaved without cache."
)
KEY_GROUP = Limit("key_group", 16, "Keys that lie side by side in a cache: pages hold whole groups.")
MAX_SPLITS = Limit(
    "max_splits", 128, "Parts that the keys of a call over a KV cache are split into, at most."
)
WORKSPACE_ROWS = Limit(
    "workspace_rows", 128, "Rows of a block of a backward's workspace; a sequence has whole ones."
)
PROBS_BLOCK = Limit("probs_block", 128, "Divides both lengths of what flash_attn_dropout_probs writes.")
MAX_SEQLEN = Limit(
    "max_seqlen",
    2**31 - max(WORKSPACE_ROWS.value, PROBS_BLOCK.value),
    "Rows of a sequence, at most: int32 also when rounded up to blocks.",
)

LIMITS = (
    MAX_HEAD_DIM,
    HEAD_DIM_MULTIPLE,
    ROTARY_MULTIPLE,
    KEY_GROUP,
    MAX_SPLITS,
    WORKSPACE_ROWS,
    PROBS_BLOCK,
    MAX_SEQLEN,
)
