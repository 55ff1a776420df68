"""Arguments of any function: one conversion of numbers, one way to refuse, and what a tensor must be.

Each failure is an exception whose message starts with the argument's name, then says what is allowed and what
was given: TypeError for a wrong type or dtype, ValueError for a wrong value, shape or device.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number")
FP32_MAX = (2.0 - 2.0**-23) * 2.0**127
INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})


def fail(kind: type[Exception], name: str, allowed: str, got: object) -> NoReturn:
    """Raise `kind`, naming the argument, what it may be and what it was."""
    raise kind(f"{name} must be {allowed}, got {got}")


def check_tensor(x: Any, name: str) -> None:
    """Check that `x` is a tensor, and a dense one."""
    if not isinstance(x, Tensor):
        fail(TypeError, name, "a torch.Tensor", type(x).__name__)
    if x.layout != torch.strided or x.is_nested or x.is_quantized:
        kind = "nested" if x.is_nested else "quantized" if x.is_quantized else x.layout
        fail(TypeError, name, "a dense tensor", kind)


def address(x: Tensor) -> int:
    """Return where the first element of `x` lies, 0 if nowhere."""
    try:
        return x.data_ptr()
    except RuntimeError:  # of a tensor without storage
        return 0


def check_memory(x: Any, name: str) -> None:
    """Refuse a tensor without memory of its own (fake, distributed, functional), which no kernel can read."""
    if isinstance(x, Tensor) and not address(x) and x.numel():
        fail(TypeError, name, "a tensor with memory of its own", type(x).__name__)


def check_device(x: Tensor, name: str, other: Tensor, other_name: str) -> None:
    """Check that two tensors are on one device."""
    if x.device != other.device:
        fail(ValueError, name, f"on the device of {other_name} ({other.device})", x.device)


def _convert(x: Any, name: str, kind: Callable[[Any], Number], allowed: str) -> Number:
    """Return `kind(x)`: the one way of an argument that is a number (numpy's, or a tensor of one, too)."""
    if isinstance(x, (str, bytes, bytearray, memoryview, Set, Mapping)):
        fail(TypeError, name, allowed, f"{type(x).__name__} {x!r}")
    refuse_gradients(**{name: x})
    try:
        return kind(x)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        fail(TypeError, name, allowed, f"{type(x).__name__} {x!r}")


def as_int(x: Any, name: str) -> int:
    """Return `x` (int, numpy integer or integer tensor of one element) as int."""
    return x if type(x) is int else _convert(x, name, operator.index, "an integer")


def as_float(x: Any, name: str) -> float:
    """Return `x` (any real number, or tensor of one) as a float that is finite in fp32."""
    value = x if type(x) is float else _convert(x, name, float, "a number")
    if not abs(value) <= FP32_MAX:
        fail(ValueError, name, "finite in fp32", value)
    return value


def as_flag(x: Any, name: str) -> bool:
    """Return `x` (a bool, None for False, a number, or a tensor of one) as bool."""
    if type(x) is bool:
        return x
    if isinstance(x, Sequence):
        fail(TypeError, name, "a bool", f"{type(x).__name__} {x!r}")
    return x is not None and bool(_convert(x, name, float, "a bool"))


def refuse_gradients(**given: Any) -> None:
    """Refuse tensors, given by name, to which no gradient is computed where autograd would record one."""
    for name, x in given.items():
        if x is not None and isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(f"{name} must not require grad: it gets no gradient, so detach it")


def as_position(x: Any, name: str) -> Any:
    """Return `x` (an integer of any kind) as an int; a symbolic one stays as it is."""
    return x if type(x) is int or isinstance(x, torch.SymInt) else int(as_int(x, name))


def as_size(x: Any, name: str) -> Any:
    """Return a size as `as_position` does; it is not negative."""
    size = as_position(x, name)
    if size < 0:
        fail(ValueError, name, "at least 0", size)
    return size


def check_floating(x: Any, name: str) -> None:
    """Check that `x` is a tensor of a real floating dtype."""
    check_tensor(x, name)
    if not x.dtype.is_floating_point:
        fail(TypeError, name, "of a real floating dtype", x.dtype)


def check_integers(x: Any, name: str) -> None:
    """Check that `x` is a tensor of integers."""
    check_tensor(x, name)
    if x.dtype not in INTEGERS:
        fail(TypeError, name, "of an integer dtype", x.dtype)
