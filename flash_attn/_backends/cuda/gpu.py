"""What the CUDA backend asks of the machine: a GPU's library, stream and tile counters.

The backend reaches a GPU through this module's attributes alone (`gpu.raw_stream(device)`, never a copy of
the name). So `stand_in` is the one hook below it: CPU tensors then run down the whole CUDA path, to any
object that has the functions of `library.Library`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn import _device
from flash_attn._backends.cuda.library import load
from flash_attn._backends.cuda.tile_counter import TileCounters

OLDEST_CAPABILITY = (7, 5)


class Gpu(NamedTuple):
    """The library for a GPU, and whether a kernel of it draws tiles from a counter there."""

    library: Any
    draws_tiles: bool


class Gpus:
    """The GPUs that were found able to run the library."""

    def __init__(self, load: Callable[[], Any] = load) -> None:
        self.found: dict[int, Gpu] = {}
        self._load = load

    def prepared(self, device: int) -> Gpu:
        """Return a GPU; it is checked, and the library loaded, at the first call on it.

        Raises:
            RuntimeError: it is too old, there is no library, or CUDA does not tell what it is.
        """
        return self.found.get(device) or self._prepare(device)

    def _prepare(self, device: int) -> Gpu:
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_CAPABILITY:
            name = torch.cuda.get_device_name(device)
            raise RuntimeError(
                f"q must be on a GPU of compute capability 7.5 (Turing) or newer, got {name}, which has "
                f"{'.'.join(map(str, capability))}"
            )
        library = self._load()
        draws_tiles = library.draws_tiles(device, library.family)
        if draws_tiles < 0:
            raise RuntimeError(f"flash_attn: {(library.last_error() or b'').decode()}")
        return self.found.setdefault(device, Gpu(library, draws_tiles > 0))


def _public_raw_stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


@cache
def _has_library() -> bool:
    try:
        load()
    except RuntimeError:
        return False
    return True


gpus, tile_counters = Gpus(), TileCounters()

prepared: Callable[[int], Gpu] = gpus.prepared
"""A GPU with its library; see `Gpus.prepared`."""

has_library: Callable[[], bool] = _has_library
"""Whether there is a library at all: rotary has torch operations that do without."""

capability: Callable[[int], tuple[int, int]] = torch.cuda.get_device_capability

raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _public_raw_stream)
"""The handle of a device's current stream."""

tile_counter: Callable[[int, int], Tensor] = tile_counters.of
"""The tile counter for a kernel on a device's current stream, whose handle is given."""


@contextmanager
def stand_in(library: Any, *, stream: int = 4242) -> Iterator[None]:
    """Send CPU tensors down the CUDA path, to `library`, while the context lasts. For tests."""
    counter = torch.zeros(1, dtype=torch.int32, device="cpu")
    found = Gpu(library, library.draws_tiles(-1, library.family) > 0)
    replaced: dict[str, Any] = {
        "prepared": lambda device: found,
        "has_library": lambda: True,
        "capability": lambda device: (9, 0),
        "raw_stream": lambda device: stream,
        "tile_counter": lambda device, stream: counter,
    }
    scope = globals()
    before, served = {name: scope[name] for name in replaced}, _device.on_cuda
    scope.update(replaced)
    _device.on_cuda = attrgetter("is_cpu")
    try:
        yield
    finally:
        scope.update(before)
        _device.on_cuda = served
