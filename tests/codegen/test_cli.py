import shutil
import subprocess
import sys

import pytest

from codegen import GENERATED, PACKAGE, ROOT
from codegen import __main__ as cli


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A copy of the generated files that a command may change."""
    shutil.copytree(GENERATED, tmp_path / "generated")
    (tmp_path / "flash_attn").mkdir()
    for name in ("_abi.py", "_kernel_key.py"):
        shutil.copy(PACKAGE / name, tmp_path / "flash_attn")
    monkeypatch.setattr(cli, "GENERATED", tmp_path / "generated")
    monkeypatch.setattr(cli, "PACKAGE", tmp_path / "flash_attn")
    return tmp_path


def test_check_passes_on_current_files(tree, capsys):
    assert cli.main(["--check"]) == 0
    assert capsys.readouterr().out == ""


def test_check_fails_with_a_diff_and_regenerating_repairs(tree, capsys):
    (tree / "generated/abi.h").write_text("edited\n")
    (tree / "generated/sm80/orphan.cu").write_text("left over\n")
    (tree / "flash_attn/_abi.py").write_text("LAYOUT_HASH = 0\n")
    (tree / "flash_attn/_kernel_key.py").unlink()
    assert cli.main(["--check"]) == 1
    out, err = capsys.readouterr()
    for line in (
        "-edited",
        "-left over",
        "-LAYOUT_HASH = 0",
        "--- a/flash_attn/_abi.py",
        "+class KernelKey:",
        "+++ b/generated/abi.h",
    ):
        assert line in out.splitlines()
    assert "run python -m codegen" in err
    assert cli.main([]) == 0
    assert "4 files changed" in capsys.readouterr().out
    assert cli.main(["--check"]) == 0
    assert cli.main([]) == 0
    assert "0 files changed" in capsys.readouterr().out


def test_list_prints_one_unit_per_line(monkeypatch, capsys):
    monkeypatch.setenv("FLASH_ATTN_ARCHS", "80;86")
    monkeypatch.setenv("FLASH_ATTN_HEAD_DIMS", "64")
    assert cli.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 28
    key, path = lines[0].split("\t")
    assert key == "forward_sm80_fp16_d64_full"
    assert (ROOT / path).is_file()
    shards = []
    for i in (1, 2, 3):
        assert cli.main(["--list", "--shard", f"{i}/3"]) == 0
        shards += capsys.readouterr().out.splitlines()
    assert sorted(shards) == sorted(lines)


def test_a_wrong_environment_is_one_clear_message(monkeypatch, capsys):
    monkeypatch.setenv("FLASH_ATTN_DTYPES", "fp8")
    assert cli.main(["--list"]) == 2
    assert "FLASH_ATTN_DTYPES: unknown value 'fp8'; known: fp16, bf16" in capsys.readouterr().err


def test_building_nothing_is_an_error(monkeypatch, capsys):
    monkeypatch.setenv("FLASH_ATTN_ARCHS", "none")
    assert cli.main(["--build"]) == 2
    assert "set FLASH_ATTN_ARCHS" in capsys.readouterr().err


def test_report_without_a_build(tmp_path, capsys):
    assert cli.main(["--report", "--build-dir", str(tmp_path)]) == 2
    assert "no build log" in capsys.readouterr().err


def test_check_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "codegen", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
