"""Attention, backward."""

from codegen.abi import forward
from codegen.abi.description import Field, Struct
from codegen.abi.limits import WORKSPACE_ROWS
from codegen.abi.parts import kernel_query, launcher, planner, strides

PARAMS = Struct(
    "BackwardParams",
    "Arguments of one attention backward call. The workspaces need not be initialised. Per head (and batch"
    f" entry), they have seqlen_q rows, or if varlen total_q + {WORKSPACE_ROWS} * batch, rounded up to a"
    f" multiple of {WORKSPACE_ROWS}. Then sequence b starts at row cu_seqlens_q[b] + {WORKSPACE_ROWS} * b,"
    f" rounded down to a multiple of {WORKSPACE_ROWS}. key_rows is the same for k.",
    (
        Field("forward", forward.PARAMS, "the forward call's, which wrote out and softmax_lse"),
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
        *strides("dout", "batch", "row", "head"),
        *strides("dq", "batch", "row", "head"),
        *strides("dk", "batch", "row", "head"),
        *strides("dv", "batch", "row", "head"),
        Field("rows", "int64", "rows of the workspaces"),
        Field("key_rows", "int64", "of key_partials: (key_parts, 2, heads of k, key_rows, head dim)"),
        Field("key_parts", "int32", "of the heads that share keys, a divisor of their number"),
    ),
)

PLAN = Struct(
    "BackwardPlan",
    "How a backward call is best computed, and what the sizes of its workspaces follow from.",
    (
        Field("key_parts", "int32", "of the heads that share keys, a divisor of their number"),
        Field("head_dim", "int32", "the kernel's: columns of dq_accumulator and key_partials"),
    ),
)

LAUNCHER = launcher("backward", PARAMS, "Launches the backward kernels")
KERNEL_QUERY = kernel_query("backward", PARAMS)
PLANNER = planner("backward", PARAMS, PLAN, "windows, and whether dk is null")
