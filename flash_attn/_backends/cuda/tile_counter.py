"""The counters from which the blocks of a kernel draw their tiles: an int32 in device memory, zero before and
after each kernel.

Kernels on one stream run one after the other, so that they share a counter, made at the first of them.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

PER_THREAD_STREAM = 2
"""The handle cudaStreamPerThread, another stream in every thread."""


def _zero(device: int) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=torch.device("cuda", device))


_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
_is_capturing: Callable[[], bool] = getattr(
    torch._C, "_cuda_isCurrentStreamCapturing", torch.cuda.is_current_stream_capturing
)


class TileCounters:
    """A counter for each device and stream handle.

    There are few: torch hands out pooled streams, at most 32 of each device and priority. A stream of another
    library counts as long as its handle is not reused while its kernels still run.
    """

    def __init__(
        self, zero: Callable[[int], Tensor] = _zero, current_device: Callable[[], int] = _current_device,
        is_capturing: Callable[[], bool] = _is_capturing,
    ) -> None:  # fmt: skip
        self.known: dict[tuple[int, int], Tensor] = {}
        self._zero, self._current_device, self._is_capturing = zero, current_device, is_capturing

    def of(self, device: int, stream: int) -> Tensor:
        """Return the counter for a kernel on the device's current stream, whose handle is given."""
        if device == self._current_device():
            capturing = self._is_capturing()
        else:  # the check is of the current device's stream
            with torch.cuda.device(device):
                capturing = self._is_capturing()
        if capturing or stream == PER_THREAD_STREAM:
            # A graph may be replayed on any stream: its counter lies in its own memory pool.
            return self._zero(device)
        counter = self.known.get((device, stream))
        return self._make(device, stream) if counter is None else counter

    def _make(self, device: int, stream: int) -> Tensor:
        """Make the counter of a stream.

        It outlives the call, so it may not come from a memory pool that the calling thread has chosen, as
        torch.compile does where it warms up a CUDA graph. Such a choice holds for one thread.
        """
        with ThreadPoolExecutor(max_workers=1) as thread:
            made = thread.submit(self._for_any_stream, device).result()
        return self.known.setdefault((device, stream), made)

    def _for_any_stream(self, device: int) -> Tensor:
        counter = self._zero(device)
        torch.cuda.current_stream(device).synchronize()
        return counter
