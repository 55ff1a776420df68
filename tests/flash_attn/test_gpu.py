"""What is asked of a GPU at the first call on it, and the hook below the CUDA backend; without a GPU."""

from __future__ import annotations

import pytest
import torch
from standin import StandIn, make

from flash_attn import _abi, _gpu, _library, flash_attn_func


@pytest.fixture
def machine(monkeypatch):
    """A machine whose GPUs have the compute capability that is set, and whose library is a recorder."""
    loads, recorder = [], StandIn()
    monkeypatch.setattr(_gpu, "_found", {})
    monkeypatch.setattr(_library, "load", lambda: loads.append(1) or recorder)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")

    def of(*capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return recorder, loads

    return of


def test_an_old_gpu_is_refused(machine):
    _, loads = machine(7, 0)
    with pytest.raises(
        RuntimeError, match=r"^q must be on a GPU of compute capability 7\.5.*got Tesla V100.*7\.0"
    ):
        _gpu.prepared(0)
    assert not loads


def test_the_library_is_asked_for_once_a_device(machine):
    recorder, loads = machine(8, 0)
    assert _gpu.prepared(0).library is recorder
    assert _gpu.prepared(0).library is recorder and len(loads) == 1
    assert _gpu.prepared(1).library is recorder and len(loads) == 2


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)], ids=str)
@pytest.mark.parametrize("family", [_abi.Family.AUTO, _abi.Family.SM90, _abi.Family.SM80])
def test_hopper(machine, capability, family):
    recorder, _ = machine(*capability)
    recorder.family = family
    assert _gpu.prepared(0).hopper == (capability == (9, 0) and family != _abi.Family.SM80)


def test_the_hook_ends_with_its_context():
    recorder, (q, k, v) = StandIn(), make()
    before = {name: value for name, value in vars(_gpu).items() if not name.startswith("__")}
    with pytest.raises(KeyError), _gpu.stand_in(recorder):
        flash_attn_func(q, k, v)
        raise KeyError
    flash_attn_func(q, k, v)
    assert len(recorder.calls) == 1
    assert {name: value for name, value in vars(_gpu).items() if not name.startswith("__")} == before
