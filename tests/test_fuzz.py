"""The project's fuzz: a moment of it, and that it sees what is wrong."""

from __future__ import annotations

import ctypes
import re
from dataclasses import replace

import pytest
import torch
from conftest import cuda_problem
from fuzz.__main__ import FAMILIES, main, run_case
from standin import StandIn, attention

from flash_attn._backends.cuda import attention_backward


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_a_few_cases_of_each_family(family, device):
    wrong = [run_case(family, seed, device) for seed in range(6)]
    assert wrong == [None] * 6


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_all_families_for_a_second(device, capsys):
    assert main(["--device", device, "--seconds", "1"]) == 0
    assert f"{device}, seed 0: " in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(bool(cuda_problem()), reason=str(cuda_problem()))
def test_a_moment_on_a_gpu():
    assert main(["--device", "cuda", "--seconds", "10"]) == 0


def failures(family):
    return " ".join(filter(None, (run_case(family, seed, "sim") for seed in range(40))))


def test_copies_that_kernels_cannot_read_are_found(monkeypatch):
    """Padding keeps a layout of channels last."""
    pad = torch.nn.functional.pad
    aligned = lambda x, name: pad(x.resolve_neg(), (0, -x.shape[-1] % 8))  # noqa: E731
    monkeypatch.setattr(attention_backward, "aligned", aligned)
    assert "the stand-in refuses backward: dout has strides" in failures("func")


def test_a_wrong_result_is_found(monkeypatch):
    right = attention.options_of
    monkeypatch.setattr(
        attention, "options_of", lambda *call: replace(right(*call), window_size=(-1, -1))
    )  # fmt: skip
    assert "out is off by" in failures("varlen")


def test_an_input_that_is_written_to_is_found(monkeypatch):
    right = StandIn.forward

    def forward(library, packed, stream):
        status = right(library, packed, stream)
        ctypes.memset(library.calls[-1][0].q, 1, 2)
        return status

    monkeypatch.setattr(StandIn, "forward", forward)
    assert "an input, or memory beside it, was written to" in failures("used_keys")


def test_a_failure_says_how_to_repeat_it(monkeypatch, capsys):
    def fail(case):
        raise ZeroDivisionError("by zero")

    monkeypatch.setitem(FAMILIES, "loss", (fail, 1))
    assert main(["--family", "loss", "--seconds", "0.01"]) == 1
    name = re.match(r"FAIL (loss:\d+) on cpu: ZeroDivisionError: by zero \|", capsys.readouterr().out)[1]
    assert main(["--repro", name]) == 1 and name in capsys.readouterr().out


@pytest.mark.parametrize("name", ["loss", "loss:", "loss:-1", "others:3"])
def test_what_cannot_be_repeated_is_refused(name, capsys):
    with pytest.raises(SystemExit):
        main(["--repro", name])
    assert "--repro must be FAMILY:SEED, FAMILY one of func, " in capsys.readouterr().err
