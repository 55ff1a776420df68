"""Arguments of the functions around attention: sizes and tensors; see `_validation` for attention's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash_attn._validation import as_int, check_tensor, fail

INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})


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


def check_device(x: Tensor, name: str, other: Tensor, other_name: str) -> None:
    """Check that two tensors are on one device."""
    if x.device != other.device:
        fail(ValueError, name, f"on the device of {other_name} ({other.device})", x.device)
