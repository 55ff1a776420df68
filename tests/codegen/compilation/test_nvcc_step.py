import json

import pytest

from codegen.compilation import nvcc_step as step

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1av' for 'sm_80'
ptxas info    : Function properties for _Z1av
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 636 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1bv' for 'sm_90'
ptxas info    : Function properties for _Z1bv
    24 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 512 bytes smem, 640 bytes cmem[0]
ptxas info    : Compile time = 70.125 ms
"""


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "unit.cu"
    path.write_text("__global__ void kernel() {}\n")
    return path


def run(source, toolkit, *flags):
    nvcc = str(toolkit / "bin" / "nvcc")
    return step.run("unit", source.with_suffix(".o"), nvcc, "13.0.88", [*flags, "-c", str(source)])


def test_ptxas_report():
    first, second = step.parse_ptxas(PTXAS)
    assert first == {"name": "_Z1av", "target": "sm_80", "stack": 0, "spills": 0, "registers": 128, "smem": 0}
    assert second == {
        "name": "_Z1bv",
        "target": "sm_90",
        "stack": 24,
        "spills": 12,
        "registers": 255,
        "smem": 512,
    }
    assert step.messages(PTXAS + "unit.cu(3): warning: odd\n") == "unit.cu(3): warning: odd"


def test_record_and_line(source, fake_toolkit, capsys):
    assert run(source, fake_toolkit) == 0
    record = json.loads(source.with_suffix(".json").read_text())
    assert record["name"] == "unit" and record["nvcc"] == "13.0.88"
    assert record["object_bytes"] == source.with_suffix(".o").stat().st_size
    assert record["wall_s"] >= 0 and record["cpu_s"] > 0 and record["peak_mb"] > 0
    assert record["kernels"][0]["registers"] == 168
    line = capsys.readouterr().out
    assert line.startswith("unit: ") and line.count("\n") == 1
    assert line.endswith("168 registers, 20 bytes spilled, 4096 bytes shared\n")


def test_dynamic_shared_memory_is_added(source, fake_toolkit, capsys):
    flags = ["-c", str(source)]
    step.run("unit", source.with_suffix(".o"), str(fake_toolkit / "bin/nvcc"), "13.0.88", flags, 65536)
    assert capsys.readouterr().out.endswith("69632 bytes shared\n")
    assert json.loads(source.with_suffix(".json").read_text())["dynamic_smem"] == 65536


def test_other_warnings_are_shown(source, fake_toolkit, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_NVCC_SAYS", "unit.cu(1): warning #177-D: variable was never referenced")
    assert run(source, fake_toolkit) == 0
    assert "#177-D" in capsys.readouterr().out


@pytest.mark.parametrize("number", range(7508, 7521))
def test_every_c75_warning_fails_with_its_text(source, fake_toolkit, monkeypatch, capsys, number):
    warning = (
        f"ptxas info    : (C{number}) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    )
    monkeypatch.setenv("FAKE_NVCC_SAYS", warning)
    assert run(source, fake_toolkit) == 1
    out = capsys.readouterr().out
    assert "unit: this warning fails the build" in out and warning in out
    assert not source.with_suffix(".o").exists()
    assert not source.with_suffix(".json").exists()


@pytest.mark.parametrize("number", [7507, 7521, 75080])
def test_neighbouring_numbers_pass(source, fake_toolkit, monkeypatch, number):
    monkeypatch.setenv("FAKE_NVCC_SAYS", f"ptxas info : (C{number}) something else")
    assert run(source, fake_toolkit) == 0


def test_errors_are_shown_and_leave_no_object(source, fake_toolkit, monkeypatch, capsys):
    source.write_text("#error no\n")
    monkeypatch.setenv("FAKE_NVCC_SAYS", "unit.cu(1): error: no")
    assert run(source, fake_toolkit) == 1
    assert "error: no" in capsys.readouterr().out
    assert not source.with_suffix(".o").exists()
