"""Which calls share a tile counter, without a GPU: CPU tensors for CUDA's, streams that only record."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from flash_attn._backends.cuda.tile_counter import TileCounters


class Gpus:
    """Two GPUs: which is current, whose current stream is being captured, what was made and waited for."""

    def __init__(self):
        self.current, self.capturing, self.made, self.waits = 0, {0: False, 1: False}, [], []
        self.error = None

    def zero(self, device):
        if self.error is not None:
            raise self.error
        self.made.append((device, threading.get_ident()))
        return torch.zeros(1, dtype=torch.int32)

    @contextmanager
    def on(self, device):
        before, self.current = self.current, device
        yield
        self.current = before

    def stream(self, device):
        return SimpleNamespace(synchronize=lambda: self.waits.append((device, threading.get_ident())))


@pytest.fixture
def gpus(monkeypatch):
    gpus = Gpus()
    monkeypatch.setattr(torch.cuda, "device", gpus.on)
    monkeypatch.setattr(torch.cuda, "current_stream", gpus.stream)
    return gpus


@pytest.fixture
def tile_counter(gpus):
    counters = TileCounters(gpus.zero, lambda: gpus.current, lambda: gpus.capturing[gpus.current])
    return counters.of


def test_one_for_each_stream_of_each_device(gpus, tile_counter):
    places = [(0, 10), (0, 11), (1, 10), (1, 11)]
    counters = [tile_counter(*place) for place in places]
    assert len({counter.data_ptr() for counter in counters}) == 4
    assert all(counter.dtype == torch.int32 and counter.tolist() == [0] for counter in counters)
    assert all(tile_counter(*place) is counter for place, counter in zip(places, counters, strict=True))
    assert [device for device, _ in gpus.made] == [0, 0, 1, 1]


def test_the_stream_of_each_thread_is_shared_by_none(gpus, tile_counter):
    counters = [tile_counter(0, 2) for _ in range(2)]
    assert counters[0] is not counters[1] and not gpus.waits


def test_it_is_made_in_another_thread_and_waited_for(gpus, tile_counter):
    tile_counter(0, 10)
    assert gpus.waits == gpus.made and gpus.made[0][1] != threading.get_ident()


def test_an_error_in_making_it_reaches_the_caller(gpus, tile_counter):
    gpus.error = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        tile_counter(0, 10)
    gpus.error = None
    assert tile_counter(0, 10).tolist() == [0]


@pytest.mark.parametrize("device", [0, 1])
def test_a_captured_call_has_its_own(gpus, tile_counter, device):
    """Made by the capturing thread, so that it comes from the graph's pool and is zeroed by each replay."""
    shared = tile_counter(device, 10)
    gpus.capturing[device] = True
    captured = [tile_counter(device, 10) for _ in range(2)]
    assert len({x.data_ptr() for x in (shared, *captured)}) == 3
    assert gpus.made[1:] == [(device, threading.get_ident())] * 2 and len(gpus.waits) == 1
    gpus.capturing[device] = False
    assert tile_counter(device, 10) is shared and gpus.current == 0


def test_a_capture_on_another_device_does_not_matter(gpus, tile_counter):
    gpus.capturing[0] = True
    assert tile_counter(1, 10) is tile_counter(1, 10)


def test_threads_that_start_on_one_stream_agree(gpus, tile_counter):
    start, found = threading.Barrier(8), []

    def ask():
        start.wait()
        found.append(tile_counter(0, 10).data_ptr())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1
