"""Shapes and memory layout of outputs, shared by both backends and the fake implementations."""

from __future__ import annotations

import torch
from torch import Tensor

PROBS_BLOCK = 128


def round_multiple(x: int, m: int) -> int:
    """Return the smallest multiple of `m` that is not below `x`."""
    return (x + m - 1) // m * m


def maybe_contiguous(x: Tensor | None) -> Tensor | None:
    """Return `x` with a contiguous last dimension, copied only if it has none; None stays None."""
    return x.contiguous() if x is not None and x.stride(-1) != 1 else x


def empty_out(q: Tensor, head_dim_v: int) -> Tensor:
    """Allocate the output (..., head_dim_v) for `q` (..., d).

    It is laid out as q is if the head dims are equal and q's last dimension is contiguous, else contiguous.
    """
    shape = q.shape
    if shape[-1] == head_dim_v:
        out = torch.empty_like(q)
        if out.stride()[-1] == 1:
            return out
    return q.new_empty((*shape[:-1], head_dim_v))


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of the softmax LSE: fp32, except that fp64 input (CPU only) keeps fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def probs_shape(batch: int, num_heads: int, seqlen_q: int, seqlen_k: int) -> tuple[int, int, int, int]:
    """Return the shape of S_dmask: both sequence lengths rounded up to 128."""
    return batch, num_heads, round_multiple(seqlen_q, PROBS_BLOCK), round_multiple(seqlen_k, PROBS_BLOCK)


def is_expanded(x: Tensor) -> bool:
    """Return whether a dimension of more than one element has stride 0, so that they are one in memory."""
    strides = x.stride()
    return 0 in strides and any(n > 1 and not step for n, step in zip(x.shape, strides, strict=True))


def overlap(x: Tensor, y: Tensor) -> bool:
    """Return whether two tensors of one dtype have an element of memory in common.

    Parts of a packed tensor have none, although they lie between one another.
    """
    if x.untyped_storage().data_ptr() != y.untyped_storage().data_ptr() or not (x.numel() and y.numel()):
        return False
    ranges: dict[int, tuple[int, int]] = {}
    for tensor, sign in ((x, 1), (y, -1)):
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            low, high = ranges.get(stride, (0, 0))
            ranges[stride] = low + min(0, sign * (size - 1)), high + max(0, sign * (size - 1))
    steps = [(stride, *ranges[stride]) for stride in sorted(ranges, reverse=True)]
    return _reaches(int(y.storage_offset() - x.storage_offset()), steps)


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
    """Return room for `total` rows of `batch` packed sequences, each padded to whole blocks of 128 rows."""
    return round_multiple(total + PROBS_BLOCK * batch, PROBS_BLOCK)


def empty_softmax_d(q: Tensor, batch: int | None = None) -> Tensor:
    """Allocate softmax_d for q (b, s, h, d), or for q (total, h, d) of `batch` packed sequences.

    It is (b, h, s rounded up to 128), or (h, total + 128 * batch): room for every sequence to be padded to
    128. Either way memory for whole blocks of 128 rows lies behind each head.
    """
    dtype = lse_dtype(q.dtype)
    if batch is None:
        batch, seqlen_q, num_heads, _ = q.shape
        return q.new_empty((batch, num_heads, round_multiple(seqlen_q, PROBS_BLOCK)), dtype=dtype)
    total_q, num_heads, _ = q.shape
    rows = total_q + PROBS_BLOCK * batch
    return q.new_empty((num_heads, padded_rows(total_q, batch)), dtype=dtype)[:, :rows]
