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


def softmax_d_shape(q: Tensor) -> tuple[int, ...]:
    """Return the shape of softmax_d for q (b, s, h, d): rows rounded up to 128."""
    batch, seqlen_q, num_heads, _ = q.shape
    return batch, num_heads, round_multiple(seqlen_q, PROBS_BLOCK)


def varlen_softmax_d_shape(q: Tensor, batch: int) -> tuple[int, int]:
    """Return the shape of softmax_d for q (total, h, d): room for every sequence to be padded to 128."""
    return q.shape[1], q.shape[0] + PROBS_BLOCK * batch
