import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ci import CiError, compiler


@pytest.fixture
def pip(monkeypatch):
    """Stands in for pip: unpacks an nvcc, or fails if told to; returns the commands that it was given."""
    asked = []

    def run(command, check):
        asked.append(command)
        nvcc = Path(command[command.index("--target") + 1]) / "nvidia/cu13/bin/nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text("")
        return subprocess.CompletedProcess(command, returncode=len(asked) == 1 and run.fails)

    run.fails = False
    monkeypatch.setattr(subprocess, "run", run)
    return asked, run


def test_wheels_of_the_builds_cuda_are_fetched_once(pip, small_matrix, tmp_path):
    asked, _ = pip
    for _ in range(2):
        home = compiler.fetch(small_matrix.build("13.0"), tmp_path)
        assert (home / "bin/nvcc").is_file()
    assert [command[-1] for command in asked] == ["cuda-toolkit[nvcc,cccl]==13.0.*"]
    assert [path.name for path in tmp_path.glob("*3.0")] == ["13.0"]


@pytest.mark.parametrize("terminal", [True, False])
def test_pip_shows_its_progress_on_a_terminal_only(pip, small_matrix, tmp_path, monkeypatch, terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    compiler.fetch(small_matrix.build("13.0"), tmp_path)
    assert ("--quiet" in pip[0][0]) == (not terminal)


def test_what_a_failure_left_is_not_taken(pip, small_matrix, tmp_path):
    asked, run = pip
    run.fails = True
    with pytest.raises(CiError, match=r"the compiler cannot be fetched: .* -m pip install failed"):
        compiler.fetch(small_matrix.build("13.0"), tmp_path)
    assert not (tmp_path / "13.0").exists()
    compiler.fetch(small_matrix.build("13.0"), tmp_path)
    assert len(asked) == 2


def test_a_cuda_without_wheels(small_matrix, tmp_path):
    with pytest.raises(CiError, match=r"CUDA 12.9: PyPI has complete compilers from 13.0 on"):
        compiler.fetch(small_matrix.build("12.9"), tmp_path)
    assert not list(tmp_path.glob("12*"))


def test_a_build_may_prepare_its_own(small_matrix, tmp_path):
    home = tmp_path / "cuda"
    prepare = f"mkdir -p {home}/bin && echo once >> {home}/bin/nvcc"
    build = replace(small_matrix.build("12.9"), prepare=prepare, cuda_home=str(home))
    for _ in range(2):
        assert compiler.fetch(build) == home
    assert (home / "bin/nvcc").read_text() == "once\n"
    with pytest.raises(CiError, match="cannot be fetched: /bin/sh"):
        compiler.fetch(replace(build, prepare="false", cuda_home=str(tmp_path / "none")))
