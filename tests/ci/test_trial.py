import platform
from dataclasses import replace

import pytest

from ci import CiError, trial
from ci.proof import Outcome


@pytest.fixture
def request_for(small_matrix, make_wheel):
    def make(build="130", arch=None):
        wheel = make_wheel(build, f"manylinux_2_28_{arch or platform.machine()}")
        return trial.Request(wheel, "2.13.0", small_matrix.pair("2.13.0", "13.0"))

    return make


def test_the_wheel_must_serve_the_pair_here(request_for, small_matrix):
    trial.check(request_for(), small_matrix)
    trial.check(request_for(build="129"), small_matrix)
    with pytest.raises(CiError, match="the pair is served by build 130, not 132"):
        trial.check(request_for(build="132"), small_matrix)
    other = {"x86_64": "aarch64", "aarch64": "x86_64"}[platform.machine()]
    with pytest.raises(CiError, match="cannot be tested on"):
        trial.check(request_for(arch=other), small_matrix)


@pytest.mark.parametrize(
    ("torch", "requirement"), [("2.13.0", "torch==2.13.0"), ("2.13", "torch==2.13.*"), ("newest", "torch")]
)
def test_requirements(make_wheel, torch, requirement):
    assert trial.Request(make_wheel(), torch, None).requirement == requirement


def test_the_newest_torch_is_its_own_pair(make_wheel):
    answer = {"torch": "2.16.1+cu140", "torch_cuda": "14.0", "tests": []}
    record = trial.record(
        trial.Request(make_wheel(), trial.NEWEST, None), answer, Outcome("doctor", True), 1.0
    )
    assert (record.series, record.cuda) == ("2.16", "14.0")


def test_the_record_says_what_was_tested(request_for):
    request = request_for()
    answer = {
        "torch": "2.13.0+cpu",
        "torch_cuda": None,
        "python": "3.12.1",
        "devices": ["cpu"],
        "tests": [{"name": "causal on cpu", "passed": True, "detail": "out 1e-3 of 2e-3"}],
    }
    record = trial.record(request, answer, Outcome("doctor", False), 12.34)
    assert (record.series, record.cuda, record.torch, record.torch_cuda) == (
        "2.13", "13.0", "2.13.0+cpu", None
    )  # fmt: skip
    assert record.sha256 == request.wheel.sha256
    assert [test.name for test in record.tests] == ["causal on cpu", "doctor"]
    assert not record.passed


def test_a_crash_is_a_failed_test(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'ImportError: no torch' >&2\nexit 1\n")
    python.chmod(0o755)
    answer = trial.run_checks(str(python), tmp_path)
    assert answer == {"tests": [{"name": "import", "passed": False, "detail": "ImportError: no torch"}]}
    assert trial.run_doctor(str(python), tmp_path) == Outcome(
        "python -m flash_attn", False, "ImportError: no torch"
    )


def test_an_environment_that_cannot_be_made(request_for, tmp_path):
    request = trial.Request(request_for().wheel, "2.13.0", request_for().pair, python=str(tmp_path / "none"))
    begun = []
    with pytest.raises(CiError, match="no environment could be made"):
        trial.environment(request, tmp_path, begun.append)
    assert begun == ["a fresh environment"]


def test_each_step_is_told_before_it_runs(request_for, tmp_path):
    python = tmp_path / "python"
    made = tmp_path / "venv" / "bin" / "python"
    python.write_text(f"#!/bin/sh\ntest -e {made} || {{ mkdir -p {made.parent} && cp $0 {made}; }}\n")
    python.chmod(0o755)
    request, begun = request_for(), []
    trial.environment(replace(request, python=str(python)), tmp_path, begun.append)
    assert begun == ["a fresh environment", "installing torch==2.13.0", f"installing {request.wheel.name}"]
    assert len(begun) + 2 == trial.STEPS


def test_steps_are_shown_on_a_terminal(terminal):
    with terminal as shown, trial.steps() as begin:
        begin("first")
        begin("second")
        assert "ci test: first (1 of 5)" in shown.getvalue()
        assert "ci test: second (2 of 5)" in shown.getvalue()


def test_steps_are_quiet_without_a_terminal(capsys):
    with trial.steps() as begin:
        begin("first")
    assert capsys.readouterr() == ("", "")


def test_python_variables_do_not_reach_the_environment(tmp_path, monkeypatch):
    (tmp_path / "pip.py").write_text("print('a module of PYTHONPATH ran')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(CiError, match="no released wheel of flash-attn"):
        trial.download(tmp_path, ())
