"""Results are compared before they are timed; a README that cannot take the table is refused first."""

import argparse
from functools import partial

import pytest
import torch
from conftest import cuda_problem

from benchmarks import speed
from benchmarks.__main__ import main, parser
from benchmarks.providers import CUDNN, DETERMINISTIC, OURS, STANDARD, TORCH_FA2, TORCH_SDPA, Call, Problem
from benchmarks.settings import WORK


def results(*tensors):
    return Call(lambda: tensors)


@pytest.mark.parametrize("peer", [TORCH_FA2, CUDNN])
@pytest.mark.parametrize("name", [OURS, DETERMINISTIC])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_every_result_must_agree(peer, name, at):
    right = [torch.randn(2, 30, 4, 16) for _ in range(3)]
    calls = {OURS: results(*right), name: results(*right), peer: results(*(x * 1.009 for x in right))}
    speed.check_agreement(calls)
    one_head_wrong = [x.clone() for x in right]
    one_head_wrong[at][0, :, 0] *= 1.1
    with pytest.raises(AssertionError, match=f"{name} and {peer} differ"):
        speed.check_agreement({**calls, name: results(*one_head_wrong)})
    not_a_number = [x * (float("nan") if i == at else 1) for i, x in enumerate(right)]
    with pytest.raises(AssertionError, match="differ"):
        speed.check_agreement({**calls, name: results(*not_a_number)})


@pytest.fixture
def on_cpu(tmp_path):
    """Tiny problems on the CPU, where calls take the times that a test gives; returns `run(arguments)`."""

    def problem(setting, dtype):
        return Problem(*(torch.randn(1, 8, 2, 16) for _ in range(4)), causal=setting.causal)

    def circumstances(family, dtype):
        known = ("device", "driver", "torch", "cudnn", "project_version", "commit", "date")
        return {**dict.fromkeys(known, "x"), "dtype": dtype, "family": "chosen by the library"}

    times = {OURS: 1.0, DETERMINISTIC: 1.25, TORCH_SDPA: 2.0, STANDARD: 4.0}
    timed = partial(
        speed.measure, make=problem, medians=lambda calls, budget: {name: times[name] for name in calls}
    )

    def run(*arguments: str, measure=timed) -> int:
        args: argparse.Namespace = parser(arguments[0]).parse_args([*arguments, "--output", str(tmp_path)])
        return speed.run(args, measure, (STANDARD, TORCH_SDPA), circumstances)

    return run


@pytest.mark.parametrize("direction", WORK)
def test_a_run_writes_the_table(on_cpu, tmp_path, capsys, direction):
    readme = tmp_path / "README.md"
    readme.write_text(f"a\n<!-- benchmark:{direction} -->\n<!-- /benchmark:{direction} -->\n")
    assert on_cpu(direction, "--quick", "--readme", str(readme)) == 0
    assert "| 64, causal " in readme.read_text()
    out = capsys.readouterr().out
    assert "flash_attn / torch SDPA: geometric mean 2.000" in out
    row = next(line.split() for line in out.splitlines() if line.startswith("128 "))
    assert row[:3] == ["128", "full", "512"] and row[-2:] == ["4.00", "2.00"]
    assert (tmp_path / f"{direction}.json").is_file()


def test_the_cost_of_determinism(on_cpu, tmp_path, capsys):
    assert on_cpu("backward", "--deterministic", "--head-dims", "64", "--seqlens", "512") == 0
    assert "deterministic / flash_attn: geometric mean 0.800" in capsys.readouterr().out
    assert (tmp_path / "backward-deterministic.json").is_file()


def test_a_readme_without_markers_is_refused_first(on_cpu, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="benchmark:backward"):
        on_cpu("backward", "--readme", str(readme), measure=lambda *unused: pytest.fail("measured"))


@pytest.mark.gpu
@pytest.mark.parametrize("direction", WORK)
def test_on_a_gpu(require_backward, tmp_path, capsys, direction):
    """Real calls agree with torch's, and every provider gets a speed."""
    if cuda_problem():
        pytest.skip(cuda_problem())
    require_backward("cuda", torch.bfloat16, 64)
    few = ["--head-dims", "64", "--seqlens", "512", "--budget", "0.01", "--deterministic"]
    assert main([direction, *few, "--output", str(tmp_path)]) == 0
    assert "deterministic / torch FA2: geometric mean" in capsys.readouterr().out
