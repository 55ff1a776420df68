"""Tensors in every layout that a caller may hand over, with NaN around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

GUARD = 64
"""Elements before and behind a tensor; a multiple of what kernels align to."""

Strides = list[int]
Layout = Callable[[Sequence[int]], tuple[Strides, int]]


def _dense(shape: Sequence[int], order: Sequence[int], wide: int = 0, step: int = 1) -> Strides:
    """Return the strides of dimensions that lie in `order`, the innermost last.

    That has room for `wide` elements more, `step` apart.
    """
    strides, size = [0] * len(shape), step
    for i, dim in enumerate(reversed(order)):
        strides[dim] = size
        size *= shape[dim] + (0 if i else wide)
    return strides


def _in_order(order: Sequence[int], **extra: int) -> Layout:
    """Lay out the last three dimensions (s, h, d) in an order, given as -3, -2 and -1."""

    def strides(shape: Sequence[int]) -> tuple[Strides, int]:
        dims = [*range(len(shape) - 3), *(len(shape) + i for i in order)]
        return _dense(shape, dims, **extra), 0

    return strides


def _expanded(dim: int) -> Layout:
    def strides(shape: Sequence[int]) -> tuple[Strides, int]:
        one = [1 if i == len(shape) + dim else n for i, n in enumerate(shape)]
        found = _dense(one, range(len(shape)))
        found[dim] = 0
        return found, 0

    return strides


def _sliced(shape: Sequence[int]) -> tuple[Strides, int]:
    whole = [*(n + 2 for n in shape[:-1]), (shape[-1] + 15) // 8 * 8]
    strides = _dense(whole, range(len(shape)))
    return strides, sum(strides[:-1])


def _odd_ones(shape: Sequence[int]) -> tuple[Strides, int]:
    strides = _dense(shape, range(len(shape)))
    return [2 * i + 3 if n == 1 and i < len(shape) - 1 else strides[i] for i, n in enumerate(shape)], 0


def _overlapping(shape: Sequence[int]) -> tuple[Strides, int]:
    return [*(8 for _ in shape[:-1]), 1], 0


def _offset(shape: Sequence[int]) -> tuple[Strides, int]:
    return _dense(shape, range(len(shape))), 1


PLAIN: dict[str, Layout] = {
    "contiguous": _in_order((-3, -2, -1)),
    "offset by an element": _offset,
    "odd rows": _in_order((-3, -2, -1), wide=3),
    "sliced": _sliced,
    "heads first": _in_order((-2, -3, -1)),
    "odd ones": _odd_ones,
}
"""Layouts with a contiguous last dimension in which no two elements are one."""

WRITABLE: dict[str, Layout] = PLAIN | {
    "last strided": _in_order((-3, -1, -2)),
    "channels last": _in_order((-2, -1, -3)),
    "every other": _in_order((-3, -2, -1), step=2),
}

LAYOUTS: dict[str, Layout] = WRITABLE | {
    "expanded rows": _expanded(-3),
    "expanded heads": _expanded(-2),
    "overlapping": _overlapping,
    "negative": _in_order((-3, -2, -1)),
}


class Placed(NamedTuple):
    """A tensor, all of its memory, and which elements of that are the tensor's."""

    view: Tensor
    buffer: Tensor
    touched: Tensor

    def like(self, buffer: Tensor) -> Tensor:
        """Return the view at the same place of another buffer."""
        return buffer.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset())


def place(
    shape: Sequence[int], layout: str = "contiguous", dtype: torch.dtype = torch.bfloat16,
    generator: torch.Generator | None = None, device: torch.device | str = "cpu", fill: float | None = None,
) -> Placed:  # fmt: skip
    """Place a tensor of random values, or of `fill`, among NaN."""
    strides, offset = LAYOUTS[layout](shape)
    reach = sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + 1 if 0 not in shape else 0
    offset += GUARD
    touched = torch.zeros(offset + reach + GUARD, dtype=torch.bool, device=device)
    places = torch.arange(len(touched), device=device).as_strided(tuple(shape), strides, offset)
    touched[places.flatten()] = True
    values = torch.randn(len(touched), generator=generator, device=device) if fill is None else fill
    buffer = torch.where(touched, values, torch.nan).to(dtype)
    view = buffer.as_strided(tuple(shape), strides, offset)
    return Placed(torch._neg_view(view) if layout == "negative" else view, buffer, touched)
