"""Autograd of rotation: by the kernel or by torch operations, in place or not, differentiable repeatedly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flash_attn import _backends
from flash_attn._arguments import as_flag
from flash_attn._backends import cpu
from flash_attn._calls import Angles, Rotation
from flash_attn._dispatch import are_entries_known, is_traced
from flash_attn._rotary import Offsets, check_contents, kept, saved

Select = Callable[[Tensor], tuple[Tensor, ...]]


class _Turn(NamedTuple):
    """What a rotation is told beside its tensors; `select` returns the parts of x to rotate, None is all."""

    select: Select | None
    interleaved: bool
    conjugate: bool
    offset: Offsets


def _by_operations(x: Tensor, tables: Sequence[Tensor | None]) -> bool:
    """Return whether torch must see operations that it knows.

    It must where the call is traced, in forward-mode AD, and where a table wants a gradient.
    """
    return (
        is_traced(x, *tables)
        or getattr(forward_ad, "_current_level", -1) >= 0
        or (torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tables]))
    )


def _is_read_only(x: Tensor) -> bool:
    """Return whether autograd forbids to write to x: a leaf that requires grad, or a view of one.

    A compiler cannot ask for the base of a view: there a view of a leaf is left to torch, which refuses it.
    """
    if not (x.requires_grad and torch.is_grad_enabled()):
        return False
    if x.is_leaf or torch.compiler.is_compiling():
        return x.is_leaf
    return x._base is not None and x._base.is_leaf


def _rotate(
    x: Tensor, turn: _Turn, tables: Sequence[Any], inplace: bool, by_operations: bool = False
) -> Tensor:
    """Return x rotated, x itself if `inplace`; `tables` has four tensors (`saved`) of each part."""
    select, interleaved, conjugate, offset = turn
    backend = cpu if by_operations else _backends.of(x)
    if select is None:
        return backend.rotate(Rotation(x, kept(offset, *tables), interleaved, conjugate, inplace))
    target = x if inplace else x.clone()
    for i, part in enumerate(select(target)):
        angles = kept(offset, *tables[4 * i : 4 * i + 4])
        backend.rotate(Rotation(part, angles, interleaved, conjugate, True))
    return target


class _Rotation(torch.autograd.Function):
    """`_rotate`, differentiable in x any number of times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, turn: _Turn, inplace: bool, read_only: bool, *tables: Any) -> Tensor:
        ctx.save_for_backward(*tables)
        ctx.turn = turn
        if read_only:
            x = x.detach()  # the same memory and version, so that what others saved of x is known to be lost
        elif inplace:
            ctx.mark_dirty(x)
        return _rotate(x, turn, tables, inplace)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        tables, turn = ctx.saved_tensors, ctx.turn
        back = turn._replace(conjugate=not turn.conjugate)
        return _differentiable(dout, back, tables, inplace=False), *(None,) * (3 + len(tables))


def _differentiable(x: Tensor, turn: _Turn, tables: Sequence[Any], inplace: bool) -> Tensor:
    """Return x rotated, x itself if `inplace`; recorded by autograd where it must be.

    Where autograd forbids to write to x, its memory is rotated all the same, and what is returned has the
    gradient: another tensor over that memory, or a copy where torch must see operations.
    """
    by_operations = _by_operations(x, tables)
    read_only = inplace and _is_read_only(x)
    if by_operations:
        rotated = _rotate(x, turn, tables, inplace and not read_only, by_operations)
        if read_only:
            with torch.no_grad():
                x.detach().copy_(rotated)
        return rotated
    if x.requires_grad and torch.is_grad_enabled():
        return _Rotation.apply(x, turn, inplace, read_only, *tables)
    return _rotate(x, turn, tables, inplace)


def rotate_parts(
    x: Tensor, parts: Sequence[tuple[Tensor, Angles]], select: Select | None, interleaved: Any,
    conjugate: Any = False, inplace: Any = True,
) -> Tensor:  # fmt: skip
    """Rotate x, or its parts that `select` returns, given with their angles, once those are checked.

    Raises:
        TypeError: a flag is no flag.
        ValueError: a position is known to be outside of the tables.
    """
    if not type(interleaved) is type(conjugate) is type(inplace) is bool:
        interleaved, conjugate = as_flag(interleaved, "interleaved"), as_flag(conjugate, "conjugate")
        inplace = as_flag(inplace, "inplace")
    tables = [t for _, angles in parts for t in saved(angles)]
    _, _, offset, bounds = parts[0][1]
    if isinstance(offset, Tensor) or bounds is not None:
        if are_entries_known(x, *tables):
            for part, angles in parts:
                check_contents(angles, part)
        offset = 0 if isinstance(offset, Tensor) else offset
    turn = _Turn(select, interleaved, conjugate, offset)
    return _differentiable(x, turn, tables, inplace)
