"""`python -m flash_attn`: what it finds, what it prints, what it returns."""

import importlib
import json
import sys

import pytest
import torch

from flash_attn import __main__ as command
from flash_attn import _doctor

KEYS = [
    f"forward_sm80_{dtype}_d{d}_{mask}"
    for dtype in ("fp16", "bf16")
    for d in (64, 128)
    for mask in ("full", "causal")
]


def attention(right=True):
    speed = {"error": 1e-3, "milliseconds": 2.0}
    problem = {
        "device": "cuda:0",
        "dtype": "bf16",
        "seqlen": 8,
        "num_heads": 2,
        "head_dim": 64,
        "text": "Words",
    }
    return {**problem, "allowed": 2e-3, "right": right, "flash_attn": speed, "torch_sdpa": speed}


def report(**changes):
    built = {"version": "2.8.3", "project_version": "0.1.0", "commit": None, "library": "libflash_attn.so"}
    found = {
        "gpus": [{"name": "Some GPU", "compute_cap": "9.0"}],
        "gpus_usable": 1,
        "driver": "580.1",
        "torch": "2.13",
        "torch_cuda": "13.0",
        "python": "3.12",
        "platform": "Linux",
    }
    families = _doctor.kernels_by_family(KEYS, ["sm80:80", "sm80:90+ptx", "sm86:86"])
    whole = {
        "machine": found,
        "build": built,
        "families": families,
        "notes": ["a note"],
        "attention": attention(),
    }
    return {**whole, **changes}


def test_kernels_are_grouped_by_family():
    (group,) = _doctor.kernels_by_family(KEYS, ["sm80:80", "sm80:90+ptx", "sm86:86"])
    assert group == {
        "direction": "forward",
        "family": "sm80",
        "dtypes": ["fp16", "bf16"],
        "head_dims": [64, 128],
        "masks": ["full", "causal"],
        "targets": ["sm_80", "sm_90+ptx"],
        "count": 8,
    }
    assert _doctor.kernels_by_family([], []) == []


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (KEYS, ("bf16", 128)),
        ([key for key in KEYS if "fp16" in key], ("fp16", 128)),
        (["forward_sm86_bf16_d64_causal", "forward_sm86_bf16_d256_causal"], ("bf16", 64)),
        (["forward_sm80_bf16_d128_full"], None),
        ([], None),
    ],
)
def test_the_problem_fits_the_kernels(keys, expected):
    assert _doctor.gpu_problem(keys) == expected


@pytest.mark.parametrize(
    ("usable", "library", "running", "words"),
    [
        (0, None, [], "attention runs on the CPU"),
        (1, None, [], "FLASH_ATTN_ARCHS"),
        (1, "libflash_attn.so", [], "FLASH_ATTN_ARCHS"),
        (1, "libflash_attn.so", KEYS, "sm80 (8)"),
    ],
)
def test_notes_on_the_gpu(usable, library, running, words):
    (note,) = _doctor.gpu_notes({"gpus_usable": usable}, {"library": library}, running)
    assert words in note


def test_text_is_long_enough_and_tokens_become_qkv():
    assert len(_doctor.text(100_000).encode()) >= 100_000
    q, k, v = _doctor.text_to_qkv(_doctor.text(50), seqlen=50, num_heads=2, head_dim=16)
    assert q.shape == k.shape == v.shape == (1, 50, 2, 16)
    assert all(0.5 < x.std().item() < 2 for x in (q, k, v))
    assert not torch.equal(q, k)


def test_dense_attention_is_sdpa():
    q, k, v = (torch.randn(1, 9, 2, 8) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
    ).transpose(1, 2)
    torch.testing.assert_close(_doctor.dense_attention(q, k, v, torch.float64).float(), expected)


def test_timings_are_interleaved():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in ("ours", "theirs")}
    times = _doctor.median_milliseconds(runs, torch.device("cpu"))
    assert order == ["ours", "theirs"] * (_doctor.BATCHES + 1) and set(times) == set(runs)


def test_a_library_that_cannot_be_used_is_a_note(monkeypatch):
    def fail():
        raise RuntimeError("another layout")

    monkeypatch.setattr(_doctor.flash_attn, "build_info", fail)
    result = _doctor.examine("cpu", 16)
    assert result["notes"] == ["another layout"]
    assert result["attention"]["right"]


def test_attention_on_the_cpu(capsys):
    assert command.main(["--device", "cpu", "--seqlen", "64", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["attention"]["seqlen"] == 64
    assert printed["attention"]["flash_attn"]["error"] <= printed["attention"]["allowed"]
    assert printed["machine"]["torch"] == torch.__version__


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_the_gpu_asked_for_and_absent(capsys):
    assert command.main(["--device", "cuda"]) == 2
    assert "asked for on the GPU" in capsys.readouterr().out


def test_a_wrong_result_is_an_exit_status(monkeypatch, capsys):
    monkeypatch.setattr(_doctor, "examine", lambda *_: report(attention=attention(right=False)))
    assert command.main([]) == 1
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize("seqlen", ["0", "-3", "many"])
def test_a_wrong_seqlen_is_refused(seqlen, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["--seqlen", seqlen])
    assert "--seqlen" in capsys.readouterr().err


def test_text_report_names_everything():
    text = command.render(report())
    for words in (
        "2.8.3",
        "0.1.0",
        "Some GPU",
        "580.1",
        "CUDA 13.0",
        "sm_90+ptx",
        "a note",
        "right",
        "torch SDPA",
    ):
        assert words in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_text_report_without_gpu_kernels_or_result():
    text = command.render(report(families=[], attention=None))
    assert "none" in text
    assert "not run" in text


def test_an_unbuilt_source_tree_gives_way_to_the_installed_copy(tmp_path, monkeypatch):
    site = tmp_path / "site"
    for folder in (tmp_path / "source", site / "flash_attn", site / "flash_attn-2.8.3.dist-info"):
        folder.mkdir(parents=True)
    (site / "flash_attn-2.8.3.dist-info" / "METADATA").write_text("Name: flash-attn\nVersion: 2.8.3\n")
    main = importlib.import_module("flash_attn.__main__")
    monkeypatch.setattr(main, "__file__", str(tmp_path / "source" / "__main__.py"))
    monkeypatch.setattr(sys, "path", [str(site)])
    assert main.installed_copy() is None
    (site / "flash_attn" / "_build.json").write_text("{}")
    assert main.installed_copy() == site
    (tmp_path / "source" / "_build.json").write_text("{}")
    assert main.installed_copy() is None
