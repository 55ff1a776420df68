"""Rotation of pairs by tables of cosines and sines, in torch operations: arithmetic, positions, checks.

Every function is differentiable by torch in x and in the tables.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn._arguments import as_position, check_device, check_floating, check_integers, fail
from flash_attn._validation import check_lengths

Offsets = int | Tensor


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Return x (..., s, h, 2 n), all of it rotated by cos, sin (..., s, n)."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    half = x.shape[-1] // 2
    x1, x2 = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    pair = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    return torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)


def rotate(
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


def check_x(x: Any, name: str, rank: int) -> None:
    """Check that `x` is a tensor of a real floating dtype, of `rank` dimensions."""
    check_floating(x, name)
    if x.dim() != rank:
        fail(ValueError, name, f"a tensor of {rank} dimensions", f"shape {tuple(x.shape)}")


def _check_tables(cos: Tensor, sin: Tensor, x: Tensor) -> None:
    for table, name in ((cos, "cos"), (sin, "sin")):
        check_floating(table, name)
        check_device(table, name, x, "x")
    if cos.dim() != 2 or cos.shape != sin.shape:
        shapes = f"{tuple(cos.shape)} and {tuple(sin.shape)}"
        fail(ValueError, "cos and sin", "(seqlen_ro, rotary_dim / 2)", shapes)
    head_dim = x.shape[-1]
    if 2 * cos.shape[1] > head_dim:
        allowed = f"a table of at most head_dim / 2 = {head_dim / 2:g} columns"
        fail(ValueError, "cos", allowed, cos.shape[1])


def _check_index(index: Any, name: str, x: Tensor, length: int | None) -> None:
    """Check a tensor of integers of one dimension beside x, `length` of them if it is given."""
    check_integers(index, name)
    if index.dim() != 1 or length not in (None, index.shape[0]):
        expected = "any" if length is None else length
        fail(ValueError, name, f"of shape ({expected},)", tuple(index.shape))
    check_device(index, name, x, "x")


class Angles(NamedTuple):
    """Tables cos, sin (seqlen_ro, rotary_dim / 2), and where in them the tokens of a tensor stand.

    Positions past the tables are an error where they are known (on CPU); elsewhere their tokens are left as
    they are.
    """

    cos: Tensor
    sin: Tensor
    offsets: Offsets
    cu_seqlens: Tensor | None = None

    def check_contents(self, x: Tensor) -> None:
        """Check that no position leads out of the tables; reads the tensors.

        Raises:
            ValueError: one does, or `cu_seqlens` does not go up from 0 to at most the number of tokens.
        """
        rows, bounds, offsets = self.cos.shape[0], self.cu_seqlens, self.offsets
        if bounds is None and not isinstance(offsets, Tensor):
            return
        if bounds is None:
            lengths: Any = x.shape[1]
        else:
            check_lengths(bounds, "cu_seqlens", x.shape[0], x.shape[0], "max_seqlen")
            lengths = bounds.long().diff()
        starts = offsets.long() if isinstance(offsets, Tensor) else offsets
        room = rows - lengths
        outside = ((starts < 0) | (starts > room)) & (lengths != 0)
        if bool(outside.any()):
            got = starts.tolist() if isinstance(starts, Tensor) else starts
            fail(ValueError, "seqlen_offsets", f"such that positions stay below cos's {rows} rows", got)

    def rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin of each token of x: (s, n), (b, s, n), or (total, n) of packed sequences.

        Tokens past the tables or past the last sequence get the identity.
        """
        if self.cu_seqlens is not None:
            return self._packed_rows(x.shape[0], self.cu_seqlens.long())
        seqlen, offsets = x.shape[1], self.offsets
        if not isinstance(offsets, Tensor):
            return self.cos[offsets : offsets + seqlen], self.sin[offsets : offsets + seqlen]
        positions = offsets.long().unsqueeze(-1) + torch.arange(seqlen, device=offsets.device)
        return self._at(positions, positions >= 0)

    def _packed_rows(self, total: int, bounds: Tensor) -> tuple[Tensor, Tensor]:
        tokens = torch.arange(total, device=bounds.device)
        starts = bounds[:-1] - (self.offsets.long() if isinstance(self.offsets, Tensor) else self.offsets)
        if starts.shape[0] == 0:
            return self._at(tokens, tokens < 0)
        sequence = torch.searchsorted(bounds[1:].contiguous(), tokens, right=True)
        inside = (sequence < starts.shape[0]) & (tokens >= bounds[0])
        positions = tokens - starts[sequence.clamp(max=starts.shape[0] - 1)]
        return self._at(positions, inside & (positions >= 0))

    def _at(self, positions: Tensor, rotates: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tables' rows at `positions`, the identity (cos 1, sin 0) where not `rotates`."""
        if self.cos.shape[0] == 0:
            shape = (*positions.shape, self.cos.shape[1])
            return self.cos.new_ones(shape), self.sin.new_zeros(shape)
        rotates = rotates & (positions < self.cos.shape[0])
        at, rotates = torch.where(rotates, positions, 0), rotates.unsqueeze(-1)
        return torch.where(rotates, self.cos[at], 1.0), torch.where(rotates, self.sin[at], 0.0)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return what a backward must keep, in the order in which `kept` takes it."""
        offsets = self.offsets if isinstance(self.offsets, Tensor) else None
        return self.cos, self.sin, offsets, self.cu_seqlens


def kept(
    offset: Offsets, cos: Tensor, sin: Tensor, offsets: Tensor | None, cu_seqlens: Tensor | None
) -> Angles:
    """Return the angles of saved tensors; `offset` counts where it is an int."""
    return Angles(cos, sin, offset if offsets is None else offsets, cu_seqlens)


def angles_of(x: Tensor, cos: Tensor, sin: Tensor, offsets: Any, cu_seqlens: Tensor | None) -> Angles:
    """Return the angles of x (b, s, h, d), or (total, h, d) with `cu_seqlens`, checked but for contents.

    `offsets` is an integer of any kind, or a tensor of one or b integers.

    Raises:
        TypeError: tables or indices are no tensors, or of a wrong dtype.
        ValueError: they do not fit x, or the offset is known and leads out of the tables.
    """
    _check_tables(cos, sin, x)
    rows, batch, seqlen = cos.shape[0], x.shape[0], 0
    if cu_seqlens is None:
        seqlen = x.shape[1]
    else:
        _check_index(cu_seqlens, "cu_seqlens", x, None)
        batch = cu_seqlens.shape[0] - 1
        if batch < 0:
            fail(ValueError, "cu_seqlens", "of length b + 1", "an empty tensor")
    if isinstance(offsets, Tensor):
        offsets = offsets.expand(batch) if offsets.dim() == 0 else offsets
        _check_index(offsets, "seqlen_offsets", x, batch)
        if rows == 0 and x.numel():
            fail(ValueError, "cos", "a table of at least one row", tuple(cos.shape))
        return Angles(cos, sin, offsets, cu_seqlens)
    offsets = as_position(offsets, "seqlen_offsets")
    if not 0 <= offsets <= rows - seqlen:
        allowed = f"in [0, {rows - seqlen}] (rows of cos - seqlen)"
        fail(ValueError, "seqlen_offsets", allowed, offsets)
    return Angles(cos, sin, offsets, cu_seqlens)
