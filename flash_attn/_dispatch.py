"""Which calls only torch's dispatcher understands: those of compilers, tracers and tensors without memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flash_attn import _device

PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None)})
"""Types of arguments that are what they seem: memory on a device, or nothing."""

is_tracing: Callable[[], bool] = getattr(torch._C, "_is_tracing", torch.jit.is_tracing)
_transforms_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)


def is_watched() -> bool:
    """Return whether a compiler, a tracer or a dispatch mode must see what is called."""
    return torch.compiler.is_compiling() or _dispatch_modes() > 0 or is_tracing()


def needs_dispatcher(*tensors: Any) -> bool:
    """Return whether a call with these arguments, some of them None perhaps, needs its custom op.

    It does for a compiler, a tracer, a dispatch mode, and where an argument is a tensor subclass or the first
    one is on the meta device: only the dispatcher knows what these are made of.
    """
    if is_watched():
        return True
    for x in tensors:
        if type(x) not in PLAIN and isinstance(x, Tensor):
            return True
    return bool(tensors) and isinstance(tensors[0], Tensor) and tensors[0].is_meta


def is_traced(*tensors: Tensor | None) -> bool:
    """Return whether torch must see the operations of a call, so that entries of its tensors are unknown."""
    return needs_dispatcher(*tensors) or _transforms_active()


def are_entries_known(x: Tensor, *others: Tensor | None) -> bool:
    """Return whether tensors of one device can be read: by the CPU backend, without a synchronisation."""
    return x.device.type == "cpu" and not is_traced(x, *others) and not _device.on_cuda(x)
