"""The counters from which the blocks of a Hopper kernel draw their tiles: an int32 in device memory, zero
before and after each kernel.

Kernels on one stream run one after the other, so that they share a counter, made at the first of them.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_counters: dict[tuple[int, int], Tensor] = {}
"""The counter of each device and stream handle. It stays small: torch hands out pooled streams, at most 32 of
each device and priority. A stream of another library counts as long as its handle is not reused while its
kernels still run.
"""

PER_THREAD_STREAM = 2
"""The handle cudaStreamPerThread, another stream in every thread."""


_is_capturing: Callable[[], bool] = getattr(
    torch._C, "_cuda_isCurrentStreamCapturing", torch.cuda.is_current_stream_capturing
)
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


def _zero(device: int) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=torch.device("cuda", device))


def _zero_for_any_stream(device: int) -> Tensor:
    counter = _zero(device)
    torch.cuda.current_stream(device).synchronize()
    return counter


def _new_counter(device: int, stream: int) -> Tensor:
    """Make the counter of a stream.

    It outlives the call, so it may not come from a memory pool that the calling thread has chosen, as
    torch.compile does where it warms up a CUDA graph. Such a choice holds for one thread.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        return _counters.setdefault((device, stream), thread.submit(_zero_for_any_stream, device).result())


def tile_counter(device: int, stream: int) -> Tensor:
    """Return the counter for a kernel on the device's current stream, whose handle is given."""
    if device == _current_device():
        capturing = _is_capturing()
    else:  # the check is of the current device's stream
        with torch.cuda.device(device):
            capturing = _is_capturing()
    if capturing or stream == PER_THREAD_STREAM:
        # A graph may be replayed on any stream: its counter lies in its own memory pool.
        return _zero(device)
    counter = _counters.get((device, stream))
    return _new_counter(device, stream) if counter is None else counter
