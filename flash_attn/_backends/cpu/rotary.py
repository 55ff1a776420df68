"""Rotation of pairs by tables of cosines and sines, in torch operations.

Every function is differentiable by torch in x and in the tables.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn._calls import Angles, Rotation


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Return x (..., s, h, 2 n), all of it rotated by cos, sin (..., s, n)."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    half = x.shape[-1] // 2
    x1, x2 = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    pair = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    return torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)


def turn(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, conjugate: bool = False,
    inplace: bool = False,
) -> Tensor:  # fmt: skip
    """Return x (..., s, h, d) rotated by cos, sin (..., s, rotary_dim / 2); x itself if `inplace`.

    `conjugate` rotates back. Computed in fp32, in fp64 for fp64 input.
    """
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    if inplace and torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        source = x.clone()  # their gradients need what is overwritten
    else:
        source = x
    cos, sin = cos.to(compute), sin.to(compute)
    rotary_dim = 2 * cos.shape[-1]
    part = source[..., :rotary_dim].to(compute)
    rotated = turned(part, cos, -sin if conjugate else sin, interleaved).to(x.dtype)
    if inplace:
        x[..., :rotary_dim].copy_(rotated)
        return x
    return rotated if rotary_dim == x.shape[-1] else torch.cat([rotated, x[..., rotary_dim:]], dim=-1)


def rows(angles: Angles, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin of each token of x: (s, n), (b, s, n), or (total, n) of packed sequences.

    Tokens past the tables or past the last sequence get the identity.
    """
    if angles.cu_seqlens is not None:
        return _packed_rows(angles, x.shape[0], angles.cu_seqlens.long())
    seqlen, offsets = x.shape[1], angles.offsets
    if not isinstance(offsets, Tensor):
        return angles.cos[offsets : offsets + seqlen], angles.sin[offsets : offsets + seqlen]
    positions = offsets.long().unsqueeze(-1) + torch.arange(seqlen, device=offsets.device)
    return _at(angles, positions, positions >= 0)


def _packed_rows(angles: Angles, total: int, bounds: Tensor) -> tuple[Tensor, Tensor]:
    tokens = torch.arange(total, device=bounds.device)
    starts = bounds[:-1] - (angles.offsets.long() if isinstance(angles.offsets, Tensor) else angles.offsets)
    if starts.shape[0] == 0:
        return _at(angles, tokens, tokens < 0)
    sequence = torch.searchsorted(bounds[1:].contiguous(), tokens, right=True)
    inside = (sequence < starts.shape[0]) & (tokens >= bounds[0])
    positions = tokens - starts[sequence.clamp(max=starts.shape[0] - 1)]
    return _at(angles, positions, inside & (positions >= 0))


def _at(angles: Angles, positions: Tensor, rotates: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tables' rows at `positions`, the identity (cos 1, sin 0) where not `rotates`."""
    if angles.cos.shape[0] == 0:
        shape = (*positions.shape, angles.cos.shape[1])
        return angles.cos.new_ones(shape), angles.sin.new_zeros(shape)
    rotates = rotates & (positions < angles.cos.shape[0])
    at, rotates = torch.where(rotates, positions, 0), rotates.unsqueeze(-1)
    return torch.where(rotates, angles.cos[at], 1.0), torch.where(rotates, angles.sin[at], 0.0)


def rotate(call: Rotation) -> Tensor:
    """Rotate; see `Backend.rotate`."""
    x, angles, interleaved, conjugate, inplace = call
    return turn(x, *rows(angles, x), interleaved, conjugate, inplace)
