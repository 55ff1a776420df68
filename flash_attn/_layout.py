"""Shapes and memory layout of outputs, shared by both backends and the fake implementations."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from flash_attn._abi import HEAD_DIM_MULTIPLE, PROBS_BLOCK, WORKSPACE_ROWS


def round_multiple(x: int, m: int) -> int:
    """Return the smallest multiple of `m` that is not below `x`."""
    return (x + m - 1) // m * m


def padded_head_dim(head_dim: int) -> int:
    """Return the head dim that kernels are given: short rows get zeros appended."""
    return -(-head_dim // HEAD_DIM_MULTIPLE) * HEAD_DIM_MULTIPLE


def maybe_contiguous(x: Tensor | None) -> Tensor | None:
    """Return `x` with a contiguous last dimension, copied only if it has none; None stays None."""
    return x.contiguous() if x is not None and x.stride(-1) != 1 else x


def empty_out(q: Tensor, head_dim: int, head_dim_v: int) -> Tensor:
    """Allocate the output (..., head_dim_v) for `q` (..., head_dim).

    It is laid out as q is if the head dims are equal and q's last dimension is contiguous, else contiguous.
    """
    if head_dim == head_dim_v:
        out = torch.empty_like(q)
        if out.stride(-1) == 1:
            return out
    return q.new_empty((*q.shape[:-1], head_dim_v))


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of the softmax LSE: fp32, except that fp64 input (CPU only) keeps fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def probs_shape(batch: int, num_heads: int, seqlen_q: int, seqlen_k: int) -> tuple[int, int, int, int]:
    """Return the shape of S_dmask: both sequence lengths rounded up to PROBS_BLOCK."""
    return batch, num_heads, round_multiple(seqlen_q, PROBS_BLOCK), round_multiple(seqlen_k, PROBS_BLOCK)


@torch.inference_mode()
def write(to: Tensor, values: Tensor | float) -> None:
    """Copy `values` to a tensor that a caller owns, one made in inference mode too."""
    to[...] = values


def storage_address(x: Tensor) -> int:
    """Return where the storage of `x` lies, 0 if it has none."""
    try:
        return x.untyped_storage().data_ptr()
    except RuntimeError:
        return 0


def overlap(x: Tensor, y: Tensor) -> bool:
    """Return whether two tensors of one dtype have an element of memory in common.

    Parts of a packed tensor have none, although they lie between one another.
    """
    memory = storage_address(x)
    if not memory or memory != storage_address(y) or not (x.numel() and y.numel()):
        return False
    distance = int(y.storage_offset() - x.storage_offset())
    return _meet(distance, tuple(x.shape), x.stride(), tuple(y.shape), y.stride())


@lru_cache(maxsize=1024)
def _meet(
    distance: int, x_shape: Sequence[int], x_strides: Sequence[int], y_shape: Sequence[int],
    y_strides: Sequence[int],
) -> bool:  # fmt: skip
    ranges: dict[int, tuple[int, int]] = {}
    for shape, strides, sign in ((x_shape, x_strides, 1), (y_shape, y_strides, -1)):
        for size, stride in zip(shape, strides, strict=True):
            low, high = ranges.get(stride, (0, 0))
            ranges[stride] = low + min(0, sign * (size - 1)), high + max(0, sign * (size - 1))
    return _reaches(distance, [(stride, *ranges[stride]) for stride in sorted(ranges, reverse=True)])


def overlaps_itself(x: Tensor) -> bool:
    """Return whether an element of memory is more than one element of `x`, as where it is expanded."""
    return bool(x.numel()) and _repeats(tuple(x.shape), x.stride())


@lru_cache(maxsize=1024)
def _repeats(shape: Sequence[int], strides: Sequence[int]) -> bool:
    steps = sorted(((step, n) for n, step in zip(shape, strides, strict=True) if n > 1), reverse=True)
    for i, (stride, size) in enumerate(steps):
        finer = [(step, 1 - n, n - 1) for step, n in steps[i + 1 :]]
        if stride > sum(step * high for step, _, high in finer):
            continue  # strides nest
        if any(_reaches(n * stride, finer) for n in range(1, size)):
            return True
    return False


def _reaches(distance: int, steps: list[tuple[int, int, int]]) -> bool:
    """Return whether strides, each times a number of its range (stride, low, high), can add up to `distance`.

    The strides decrease, so that where they nest there are one or two numbers of each to try.
    """
    if not steps:
        return distance == 0
    (stride, low, high), *finer = steps
    if stride == 0:
        return _reaches(distance, finer)
    least, most = (sum(step[0] * step[i] for step in finer) for i in (1, 2))
    first, last = max(low, -((most - distance) // stride)), min(high, (distance - least) // stride)
    return any(_reaches(distance - n * stride, finer) for n in range(first, last + 1))


def padded_rows(total: int, batch: int) -> int:
    """Return room for `total` rows of `batch` packed sequences, each padded to whole blocks of rows."""
    return round_multiple(total + WORKSPACE_ROWS * batch, WORKSPACE_ROWS)


def empty_softmax_d(q: Tensor, batch: int | None = None) -> Tensor:
    """Allocate softmax_d for q (b, s, h, d), or for q (total, h, d) of `batch` packed sequences.

    It is (b, h, s rounded up to WORKSPACE_ROWS), or (h, total + WORKSPACE_ROWS * batch): room for every
    sequence to be padded. Either way memory for whole blocks of rows lies behind each head.
    """
    dtype = lse_dtype(q.dtype)
    if batch is None:
        batch, seqlen_q, num_heads, _ = q.shape
        return q.new_empty((batch, num_heads, round_multiple(seqlen_q, WORKSPACE_ROWS)), dtype=dtype)
    total_q, num_heads, _ = q.shape
    rows = total_q + WORKSPACE_ROWS * batch
    return q.new_empty((num_heads, padded_rows(total_q, batch)), dtype=dtype)[:, :rows]
