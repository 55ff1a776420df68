"""Plans that a test wants, whatever the library would make of a call."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from standin import StandIn

from flash_attn import _abi, _device
from flash_attn._backends.cuda import gpu


@contextmanager
def forced(num_splits: int, design: _abi.Design) -> Iterator[None]:
    """Plan every call over a cache on the default device in this way; on CPU nothing is planned.

    The library is another one meanwhile: plans are kept for each library.
    """

    def plan_cache(packed: bytes, plan: _abi.CachePlan) -> int:
        plan.num_splits, plan.design = num_splits, design
        return int(_abi.Status.OK)

    like = torch.empty(0)
    if not _device.on_cuda(like):
        yield
        return
    device = like.get_device()
    found = gpu.prepared(device)
    if isinstance(found.library, StandIn):
        library = copy.copy(found.library)
        library.plan_cache = plan_cache
        with gpu.stand_in(library):
            yield
        return
    gpu.gpus.found[device] = found._replace(library=replace(found.library, plan_cache=plan_cache))
    try:
        yield
    finally:
        gpu.gpus.found[device] = found
