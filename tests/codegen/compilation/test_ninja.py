import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from codegen import CodegenError
from codegen.compilation import ninja
from codegen.compilation.selection import from_environment
from codegen.compilation.toolchain import Toolchain
from codegen.targets import Target
from codegen.units import list_units


def test_gencode_is_one_per_code():
    targets = [Target("sm86", 90, ptx=True), Target("sm80", 80), Target("sm80", 90)]
    assert ninja.gencode_flags(targets) == (
        "-gencode=arch=compute_80,code=[sm_80]",
        "-gencode=arch=compute_90,code=[sm_90,compute_90]",
    )


def test_each_unit_is_compiled_for_its_family_and_shared_files_for_all(small_templates, tmp_path):
    chosen = from_environment({"FLASH_ATTN_ARCHS": "80;86;89", "FLASH_ATTN_HEAD_DIMS": "64;256"})
    sources = ninja.sources(chosen, list_units(chosen), tmp_path / "generated", small_templates)
    codes = {source.name: "".join(source.gencode) for source in sources}
    assert (
        "sm_80" in codes["forward_sm80_fp16_d64_full"] and "sm_86" not in codes["forward_sm80_fp16_d64_full"]
    )
    assert (
        "sm_80" not in codes["forward_sm86_fp16_d64_full"] and "sm_89" in codes["forward_sm86_fp16_d64_full"]
    )
    for name in ("dispatch", "library", "alone"):
        assert all(code in codes[name] for code in ("sm_80", "sm_86", "sm_89"))
    assert "d256" in sources[0].name


def test_paths_with_spaces_and_dollars_are_escaped(tmp_path):
    folder = Path("/a b/c$d")
    source = ninja.Source("unit", folder / "unit.cu", ("-gencode=arch=compute_80,code=[sm_80]",))
    text = ninja.build_file([source], Toolchain(folder / "nvcc", "13.0.88", folder / "lib"), [folder], folder)
    assert "build /a$ b/c$$d/objects/unit.o: compile /a$ b/c$$d/unit.cu" in text
    assert "nvcc = '/a b/c$$d/nvcc'" in text
    assert "library_dirs = '-L/a b/c$$d/lib'" in text


def test_the_writer_is_of_the_python_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ninja", None)
    with pytest.raises(CodegenError, match="pip install ninja"):
        ninja.build_file([], Toolchain(tmp_path / "nvcc", "13.0.88"), [], tmp_path)


@pytest.mark.parametrize("name", ["plain", "two  spaces", "a$b", "a$ b$", "a$$ b:c"])
def test_ninja_reads_paths_as_they_are(tmp_path, fake_toolkit, name):
    folder = tmp_path / name
    folder.mkdir()
    for file in ("unit.cu", "exports.map"):
        (folder / file).touch()
    source = ninja.Source("unit", folder / "unit.cu", ())
    (folder / "build.ninja").write_text(
        ninja.build_file([source], Toolchain(folder / "nvcc", "13.0.88"), [folder], folder)
    )
    command = [sys.executable, "-m", "ninja", "-f", folder / "build.ninja", "-n", "-v"]
    planned = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    words = shlex.split(planned.splitlines()[0].partition("] ")[2])
    assert words[-1] == str(folder / "unit.cu") and f"-I{folder}" in words
    assert words[words.index("--object") + 1] == str(folder / "objects/unit.o")


@pytest.mark.parametrize(
    ("release", "compressed"), [("12.6.20", False), ("12.8.61", True), ("13.0.88", True)]
)
def test_code_is_compressed_where_nvcc_can(tmp_path, release, compressed):
    text = ninja.build_file([], Toolchain(tmp_path / "nvcc", release), [], tmp_path)
    assert ("--compress-mode=size" in text) == compressed


def test_jobs():
    gib = 2**30
    cores = len(os.sched_getaffinity(0))
    assert ninja.jobs({"MAX_JOBS": "7"}, 1 * gib) == 7
    assert ninja.jobs({}, 1000 * gib) == cores
    assert ninja.jobs({}, 1.6 * gib) == 1
    assert ninja.jobs({}, 0) == 1
    assert ninja.jobs({"MAX_JOBS": ""}, 1000 * gib) == cores
    for wrong in ("0", "-1", "many"):
        with pytest.raises(CodegenError, match="MAX_JOBS must be a positive number"):
            ninja.jobs({"MAX_JOBS": wrong})


def test_available_memory_is_some():
    assert 0 < ninja.available_memory() < 2**50
