"""What is asked of a GPU at the first call on it, and the hook below the CUDA backend; without a GPU."""

from __future__ import annotations

import pytest
import torch
from standin import StandIn, make

from flash_attn import flash_attn_func
from flash_attn._backends.cuda import gpu


@pytest.fixture
def machine(monkeypatch):
    """The GPUs of a machine that have the compute capability that is set, whose library is a stand-in."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")

    def of(*capability, **options):
        library, loads = StandIn(**options), []
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return gpu.Gpus(lambda: loads.append(1) or library), library, loads

    return of


def test_an_old_gpu_is_refused(machine):
    gpus, _, loads = machine(7, 0)
    with pytest.raises(
        RuntimeError, match=r"^q must be on a GPU of compute capability 7\.5.*got Tesla V100.*7\.0"
    ):
        gpus.prepared(0)
    assert not loads


def test_the_library_is_asked_for_once_a_device(machine):
    gpus, library, loads = machine(8, 0)
    assert gpus.prepared(0).library is library
    assert gpus.prepared(0).library is library and len(loads) == 1
    assert gpus.prepared(1).library is library and len(loads) == 2


@pytest.mark.parametrize("hopper", [False, True])
def test_the_library_says_whether_kernels_draw_tiles(machine, hopper):
    gpus, _, _ = machine(9, 0, hopper=hopper)
    assert gpus.prepared(0).draws_tiles is hopper


def test_a_gpu_that_cuda_does_not_know_is_asked_again(machine):
    gpus, library, _ = machine(9, 0)
    library.draws_tiles = lambda device, family: -1
    with pytest.raises(RuntimeError, match=r"^flash_attn: kernel"):
        gpus.prepared(0)
    del library.draws_tiles
    assert gpus.prepared(0).library is library


def test_the_hook_ends_with_its_context():
    recorder, (q, k, v) = StandIn(), make()
    before = {name: value for name, value in vars(gpu).items() if not name.startswith("__")}
    with pytest.raises(KeyError), gpu.stand_in(recorder):
        flash_attn_func(q, k, v)
        raise KeyError
    flash_attn_func(q, k, v)
    assert len(recorder.calls) == 1
    assert {name: value for name, value in vars(gpu).items() if not name.startswith("__")} == before
