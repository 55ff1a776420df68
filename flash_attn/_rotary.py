"""Rotation of pairs by tables of cosines and sines: the checks of its arguments, and what autograd keeps."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flash_attn._arguments import as_position, check_device, check_floating, check_integers, fail
from flash_attn._calls import Angles
from flash_attn._validation import check_lengths

Offsets = int | Tensor


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


def check_contents(angles: Angles, x: Tensor) -> None:
    """Check that no position leads out of the tables; reads the tensors.

    Raises:
        ValueError: one does, or `cu_seqlens` does not go up from 0 to at most the number of tokens.
    """
    rows, bounds, offsets = angles.cos.shape[0], angles.cu_seqlens, angles.offsets
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


def saved(angles: Angles) -> tuple[Tensor | None, ...]:
    """Return what a backward must keep, in the order in which `kept` takes it."""
    offsets = angles.offsets if isinstance(angles.offsets, Tensor) else None
    return angles.cos, angles.sin, offsets, angles.cu_seqlens


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
