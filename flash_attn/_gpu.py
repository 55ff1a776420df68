"""What the CUDA backend asks of the machine: which tensors it serves, and a GPU's library, stream, counters.

The backend reaches a GPU through this module's attributes alone (`_gpu.raw_stream(device)`, never a copy of
the name). So `stand_in` is the one hook below it: CPU tensors then run down the whole CUDA path, to any
object that has the functions of `_library.Library`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn import _abi, _library
from flash_attn._tile_counter import tile_counter as _tile_counter

OLDEST_CAPABILITY = (7, 5)
HOPPER = (9, 0)


class Gpu(NamedTuple):
    """A GPU that was found able to run the library, and whether it may run kernels made for Hopper."""

    library: Any
    hopper: bool


_found: dict[int, Gpu] = {}


def _prepare(device: int) -> Gpu:
    """Check a GPU and load the library, at the first call on it."""
    found = torch.cuda.get_device_capability(device)
    if found < OLDEST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise RuntimeError(
            f"q must be on a GPU of compute capability 7.5 (Turing) or newer, got {name}, which has "
            f"{'.'.join(map(str, found))}"
        )
    library = _library.load()
    hopper = found == HOPPER and library.family in (_abi.Family.AUTO, _abi.Family.SM90)
    return _found.setdefault(device, Gpu(library, hopper))


def _prepared(device: int) -> Gpu:
    return _found.get(device) or _prepare(device)


def _public_raw_stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


@cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _has_library() -> bool:
    try:
        _library.load()
    except RuntimeError:
        return False
    return True


serves: Callable[[Tensor], bool] = attrgetter("is_cuda")
"""Whether the CUDA backend computes with this tensor; else the CPU backend does."""

prepared: Callable[[int], Gpu] = _prepared
"""The library for a device, checked at the first call; a RuntimeError if it is too old or there is none."""

has_library: Callable[[], bool] = _has_library
"""Whether there is a library at all: rotary has torch operations that do without."""

capability: Callable[[int], tuple[int, int]] = torch.cuda.get_device_capability

raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _public_raw_stream)
"""The handle of a device's current stream."""

multiprocessors: Callable[[int], int] = _multiprocessors

tile_counter: Callable[[int, int], Tensor] = _tile_counter
"""The tile counter for a kernel on a device's current stream, whose handle is given."""


@contextmanager
def stand_in(
    library: Any, *, hopper: bool = False, multiprocessors: int = 132, stream: int = 4242
) -> Iterator[None]:
    """Send CPU tensors down the CUDA path, to `library`, while the context lasts. For tests."""
    counter = torch.zeros(1, dtype=torch.int32, device="cpu")
    gpu = Gpu(library, hopper)
    replaced: dict[str, Any] = {
        "serves": attrgetter("is_cpu"),
        "prepared": lambda device: gpu,
        "has_library": lambda: True,
        "capability": lambda device: HOPPER,
        "raw_stream": lambda device: stream,
        "multiprocessors": lambda device: multiprocessors,
        "tile_counter": lambda device, stream: counter,
    }
    scope = globals()
    before = {name: scope[name] for name in replaced}
    scope.update(replaced)
    try:
        yield
    finally:
        scope.update(before)
