"""The training example: the model learns, the attentions are compared rightly, bad arguments are refused."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import cuda_problem

import flash_attn
from examples import train_gpt

ROOT = Path(flash_attn.__file__).parents[1]
TINY = [
    *("--steps", "80", "--batch", "8", "--seqlen", "48"),
    *("--layers", "2", "--width", "64", "--heads", "2", "--lr", "3e-3"),
]

ENTROPY_OF_A_BYTE = 3.26
"""Nats per byte of the text: the best loss of a model that sees no context."""

TOLERANCE = 1e-4
"""Two ways of rounding fp32 give losses that differ by about 1e-6, which training amplifies by an amount that
depends on the machine. Attention that is wrong by little, such as a scale 10 % off, makes about 1e-2."""


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small gain nothing from threads, which wait for one another where cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def curve(name, *arguments):
    """The losses of a tiny training with one attention."""
    return train_gpt.train(name, train_gpt.parse([*TINY, "--attention", name, *arguments])).losses


def largest_difference(curve, other):
    return max(abs(a - b) for a, b in zip(curve, other, strict=True))


@pytest.mark.parametrize("arguments", [(), ("--packed",)], ids=["windows", "packed"])
def test_loss_falls_and_the_attentions_agree(arguments):
    flash, sdpa = (curve(name, *arguments) for name in ("flash", "sdpa"))
    assert flash[0] == pytest.approx(5.55, abs=0.2)  # log(256): it knows nothing yet
    assert sum(flash[-10:]) / 10 < ENTROPY_OF_A_BYTE - 0.1
    assert largest_difference(flash, sdpa) < TOLERANCE


def test_a_wrong_attention_would_be_seen(monkeypatch):
    steps, right = ("--steps", "40"), train_gpt.flash
    monkeypatch.setitem(train_gpt.ATTENTIONS, "flash", lambda q, *others: right(1.1 * q, *others))
    assert largest_difference(curve("flash", *steps), curve("sdpa", *steps)) > 10 * TOLERANCE


def test_the_seed_determines_the_curve():
    few = ("--steps", "2")
    assert curve("flash", *few) == curve("flash", *few)
    assert curve("flash", *few) != curve("flash", *few, "--seed", "1")


def test_documents_do_not_see_each_other():
    args = train_gpt.parse([*TINY, "--packed", "--attention", "sdpa"])
    batch = train_gpt.Text(args).batch()
    lengths = batch.cu_seqlens.diff().tolist()
    assert len(lengths) > 1 and sum(lengths) == batch.tokens.numel() == args.batch * args.seqlen
    assert min(lengths) >= 1 and max(lengths) == batch.longest <= args.seqlen
    starts = batch.cu_seqlens[:-1].long()
    assert not batch.positions[starts].any()
    for attend in train_gpt.ATTENTIONS.values():
        q, k, v = (torch.randn(batch.tokens.numel(), 2, 8) for _ in range(3))
        out = attend(q, k, v, batch)
        torch.testing.assert_close(out[starts], v[starts])  # the first token sees itself alone


def test_the_script_prints_speeds_and_the_difference():
    command = [sys.executable, "-W", "ignore", train_gpt.__file__, *TINY, "--steps", "4"]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for name in ("flash", "sdpa"):
        assert re.search(rf"^{name} +5\.\d+ +\d\.\d+ +[\d,]+ +\d+\.\d$", done.stdout, re.M)
    assert done.stderr == ""  # no bar without a terminal
    assert re.search(r"^largest difference of the two losses at a step: \d\.\de[+-]\d\d$", done.stdout, re.M)


def test_on_a_terminal_a_bar_shows_loss_and_speed(terminal):
    with terminal as shown:
        curve("flash", "--steps", "2")
    assert re.search(r"flash: +100%.* 2/2 .*loss \d\.\d+, [\d,]+ tokens/s\]", shown.getvalue())


def test_without_tqdm_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(SystemExit, match=r"tqdm.*: pip install '\.\[examples\]'"):
        runpy.run_path(train_gpt.__file__)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--attention x", r"--attention: invalid choice: 'x' \(choose from .*flash.*sdpa.*both.*\)"),
        ("--steps 1", r"--steps: must be an integer of at least 2, got '1'"),
        ("--batch many", r"--batch: must be an integer of at least 1, got 'many'"),
        ("--seqlen 65537", r"--seqlen: must be an integer of at least 1 and at most 65536, got '65537'"),
        ("--lr nan", r"--lr: must be a number above 0 and at most 1, got 'nan'"),
        ("--seed -1", r"--seed: must be an integer of at least 0 and at most \d+, got '-1'"),
        ("--width 130 --heads 4", r"--width: must be a multiple of --heads 4, got 130"),
        ("--width 1028 --heads 4", r"--width: must be at most 1024 for --heads 4, got 1028"),
        ("--wide 3", r"unrecognized arguments: --wide 3"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as exited:
        train_gpt.main(arguments.split())
    assert exited.value.code == 2
    assert re.fullmatch(rf".+: (argument )?{message}\n", capsys.readouterr().err)


def test_cuda_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exited:
        train_gpt.main(["--device", "cuda"])
    assert exited.value.code == 2
    expected = "argument --device: must be cpu where torch sees no GPU, got cuda\n"
    assert capsys.readouterr().err.endswith(expected)


def test_a_library_that_cannot_train_ends_in_one_line(monkeypatch, capsys):
    def refuse(*unused, **options):
        raise RuntimeError("the kernel is not built;\nbuild it with `this command`")

    monkeypatch.setitem(train_gpt.ATTENTIONS, "flash", refuse)
    with pytest.raises(SystemExit) as exited:
        train_gpt.main([*TINY, "--steps", "2"])
    assert exited.value.code == 2
    expected = "flash cannot train on cpu: the kernel is not built; build it with `this command`\n"
    error = capsys.readouterr().err
    assert error.endswith(expected) and error.count("\n") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("arguments", [(), ("--packed",)], ids=["windows", "packed"])
def test_on_a_gpu(require_backward, arguments):
    """Both learn as much as on the CPU; how far bf16 takes them apart is left to the tests of attention."""
    if cuda_problem():
        pytest.skip(cuda_problem())
    require_backward("cuda", torch.bfloat16, 32)
    for name in train_gpt.ATTENTIONS:
        losses = curve(name, "--device", "cuda", *arguments)
        assert losses[0] == pytest.approx(5.55, abs=0.2)
        assert sum(losses[-10:]) / 10 < ENTROPY_OF_A_BYTE - 0.1
