"""What an address in packed parameters may reach: memory of tensors that a caller holds.

Whatever a kernel reads or writes stays referenced by a local variable until it is enqueued. So the tensors in
the local variables of the calling frames are all the memory there is, each to its last byte.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

FRAMES = 16
"""How far up the stack a tensor may be held."""

ALIGNMENT = 16
STRIDE_MULTIPLE = 8


class Refused(Exception):
    """What a kernel would fault on, or read wrong."""


def need(true: object, text: str) -> None:
    if not true:
        raise Refused(text)


def _tensors(x: Any, depth: int = 3) -> Iterator[Tensor]:
    if type(x) in (Tensor, torch.nn.Parameter):
        yield x
    elif depth and isinstance(x, (tuple, list)):
        for item in x:
            yield from _tensors(item, depth - 1)
    elif depth and isinstance(x, dict):
        yield from _tensors(tuple(x.values()), depth)


def overlaps_itself(x: Tensor) -> bool:
    """Return whether two elements of x are one in memory."""
    steps = sorted((stride, n) for n, stride in zip(x.shape, x.stride(), strict=True) if n > 1)
    span = 1
    for stride, n in steps:
        if stride < span:
            places = torch.arange(1)
            for step, size in steps:
                places = (places[:, None] + torch.arange(size) * step).flatten()
            return len(places.unique()) < len(places)
        span += stride * (n - 1)
    return False


class Memory:
    """The memory of the tensors that the callers of this function hold."""

    def __init__(self) -> None:
        frame, self.held = sys._getframe(1), {}
        for _ in range(FRAMES):
            if frame is None:
                break
            for x in _tensors(list(frame.f_locals.values())):
                self._hold(x)
            frame = frame.f_back

    def _hold(self, x: Tensor) -> None:
        try:
            storage = x.untyped_storage()
            start = storage.data_ptr()
        except (RuntimeError, NotImplementedError):  # of a wrapper: it has none
            return
        if x.device.type == "cpu" and start:
            self.held[start] = max(storage, self.held.get(start, storage), key=len)

    def view(
        self, name: str, address: int, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """Return the tensor of that shape and strides, in elements, at an address."""
        need(min(shape, default=0) >= 0, f"{name} has shape {tuple(shape)}")
        if 0 in shape:
            return torch.empty(*shape, dtype=dtype, device="cpu")
        need(address, f"{name} is null")
        need(address % dtype.itemsize == 0, f"{name} is at {address:#x}, no multiple of {dtype.itemsize}")
        negative = any(stride < 0 for n, stride in zip(shape, strides, strict=True) if n > 1)
        need(not negative, f"{name} has strides {tuple(strides)}")
        steps = [stride if n > 1 else 1 for n, stride in zip(shape, strides, strict=True)]
        size = dtype.itemsize * (sum((n - 1) * step for n, step in zip(shape, steps, strict=True)) + 1)
        for start, storage in self.held.items():
            if start <= address and address + size <= start + len(storage):
                offset, rest = divmod(address - start, dtype.itemsize)
                need(not rest, f"{name} is at {address:#x}, between elements")
                return torch.empty(0, dtype=dtype, device="cpu").set_(storage, offset, tuple(shape), steps)
        raise Refused(f"{name}, {size} bytes at {address:#x}, is not in memory that somebody holds")

    def dense(self, name: str, address: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the contiguous tensor at an address."""
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        return self.view(name, address, shape, strides, dtype)

    def integers(self, name: str, address: int, count: int) -> list[int]:
        return self.dense(name, address, (count,), torch.int32).tolist()

    def poison(self, name: str, address: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Fill a workspace, whose contents may not matter, with NaN."""
        self.dense(name, address, shape, dtype).fill_(math.nan)

    def heads(
        self, fields: SimpleNamespace, name: str, shape: Sequence[int], dtype: torch.dtype, *,
        packed: bool = False, aligned: bool = True, written: bool = False,
    ) -> Tensor:  # fmt: skip
        """Return the tensor (batch, rows, heads, head dim) whose address and strides `fields` has.

        `packed` ignores the stride of the batch; `aligned` is what copies of 16 bytes ask for; what is to be
        written is poisoned, so that it shows if it is read later, under another name.
        """
        address = getattr(fields, name)
        strides = [getattr(fields, f"{name}_{axis}_stride") for axis in ("batch", "row", "head")]
        if packed:
            strides[0] = 0
        if aligned and 0 not in shape:
            need(address % ALIGNMENT == 0, f"{name} is at {address:#x}, no multiple of {ALIGNMENT}")
            odd = [s for n, s in zip(shape, strides, strict=False) if n > 1 and s % STRIDE_MULTIPLE]
            need(not odd, f"{name} has strides {strides}, not all multiples of {STRIDE_MULTIPLE}")
        x = self.view(name, address, shape, (*strides, 1), dtype)
        if written:
            need(not overlaps_itself(x), f"{name} is written to, but overlaps itself: strides {strides}")
            x.fill_(math.nan)
        return x
