"""The library's plans of calls, each asked for once: which design computes a call, in how many parts.

A plan follows from shapes alone (`templates/host/plan.h`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from flash_attn import _abi
from flash_attn._backends.cuda.params import fail
from flash_attn._backends.cuda.tensors import DTYPES


class CachePlan(NamedTuple):
    """Into how many parts keys are split, and the design (`_abi.Design`) whose kernel computes them."""

    num_splits: int
    design: int


class BackwardPlan(NamedTuple):
    """Into how many parts the heads that share keys are split, and the head dim of workspaces."""

    key_parts: int
    head_dim: int


@lru_cache(maxsize=4096)
def plan_cache(
    library: Any, device: int, dtype: torch.dtype, batch: int, seqlen_q: int, num_heads: int,
    num_heads_k: int, capacity: int, head_dims: tuple[int, int], num_splits: int, aligned: bool,
    softmax_scale: float, softcap: float, has_slopes: bool,
) -> CachePlan:  # fmt: skip
    """Return how to compute a call over a KV cache with room for `capacity` keys a sequence.

    `num_splits` 0 leaves the number to the plan; `aligned` says that kernels may copy the cache in blocks.

    Raises:
        RuntimeError: the library has no kernel for it.
    """
    forward = _abi.ForwardParams(
        batch=batch, seqlen_q=seqlen_q, seqlen_k=capacity, num_heads=num_heads, num_heads_k=num_heads_k,
        head_dim=head_dims[0], head_dim_v=head_dims[1], window_left=-1, window_right=-1, dtype=DTYPES[dtype],
        device=device, family=library.family, softmax_scale=softmax_scale, softcap=softcap,
        alibi_slopes=int(has_slopes), k_row_stride=0 if aligned else 1,
    )  # fmt: skip
    params = _abi.CacheParams(
        forward=forward, num_splits=num_splits, cache_head_dim=head_dims[0], cache_head_dim_v=head_dims[1]
    )
    plan = _abi.CachePlan()
    status = library.plan_cache(bytes(params), plan)
    if status:
        fail(status, dtype, device, max(head_dims), library, _abi.Direction.SPLIT)
    return CachePlan(plan.num_splits, plan.design)


@lru_cache(maxsize=4096)
def plan_backward(
    library: Any, device: int, dtype: torch.dtype, batch: int, seqlen_k: int, num_heads: int,
    num_heads_k: int, head_dim: int, window_left: int, window_right: int, wants_keys: bool,
) -> BackwardPlan:  # fmt: skip
    """Return how to compute a backward; `wants_keys` says that gradients of k and v are.

    Raises:
        RuntimeError: the library has no kernel for it.
    """
    forward = _abi.ForwardParams(
        batch=batch, seqlen_k=seqlen_k, num_heads=num_heads, num_heads_k=num_heads_k, head_dim=head_dim,
        head_dim_v=head_dim, window_left=window_left, window_right=window_right, dtype=DTYPES[dtype],
        device=device, family=library.family,
    )  # fmt: skip
    params = _abi.BackwardParams(forward=forward, dk=int(wants_keys), dv=int(wants_keys))
    plan = _abi.BackwardPlan()
    status = library.plan_backward(bytes(params), plan)
    if status:
        fail(status, dtype, device, head_dim, library, _abi.Direction.BACKWARD)
    return BackwardPlan(plan.key_parts, plan.head_dim)
