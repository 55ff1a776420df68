"""Who sees a call: kernels, or a compiler, a tracer or a transform that must see torch operations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flash_attn._dispatch import needs_dispatcher

_transforms_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def is_traced(*tensors: Tensor | None) -> bool:
    """Return whether torch must see the operations of a call, so that entries of its tensors are unknown."""
    return needs_dispatcher(*tensors) or _transforms_active()


def are_entries_known(x: Tensor, *others: Tensor | None) -> bool:
    """Return whether tensors of one device can be read: on CPU, where that costs no synchronisation."""
    return x.device.type == "cpu" and not is_traced(x, *others)
