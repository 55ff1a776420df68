import ctypes
import json
import os
import shutil
import subprocess
import sys

import pytest

from codegen import ROOT, abi, version
from codegen.compilation import builder, report, selection
from codegen.compilation.builder import BuildError

SMALL = {"FLASH_ATTN_ARCHS": "80;86", "FLASH_ATTN_HEAD_DIMS": "64", "FLASH_ATTN_DTYPES": "bf16"}
TRIMMED = {"FLASH_ATTN_ARCHS": "80", "FLASH_ATTN_HEAD_DIMS": "128", "FLASH_ATTN_DTYPES": "bf16"}


@pytest.fixture
def fake_build(fake_toolkit, small_templates, tmp_path):
    """Builds a selection with the fake nvcc; returns the names of the files that nvcc made in that build."""

    def run(**variables):
        log = fake_toolkit / "calls.log"
        log.unlink(missing_ok=True)
        chosen = selection.from_environment({**SMALL, **variables})
        builder.build(chosen, tmp_path / "build", tmp_path / "out", small_templates)
        return sorted(log.read_text().split()) if log.exists() else []

    return run


def test_build_makes_everything_then_nothing(fake_build, tmp_path):
    made = fake_build()
    assert made == sorted(
        [
            f"{d}_{f}_bf16_d64_{m}.o"
            for d in ("forward", "backward")
            for f in ("sm80", "sm86")
            for m in ("full", "causal", "windowed")
        ]
        + ["split_sm80_bf16_d64_windowed.o", "split_sm86_bf16_d64_windowed.o"]
        + ["dispatch.o", "library.o", "alone.o", "libflash_attn.so"]
    )
    library = tmp_path / "out" / "libflash_attn.so"
    before = library.stat()
    assert fake_build() == []
    assert library.stat().st_ino == before.st_ino


def test_a_header_rebuilds_only_its_dependents(fake_build, small_templates):
    fake_build()
    (small_templates / "problem/alone.cuh").touch()
    assert fake_build() == ["alone.o", "libflash_attn.so"]
    (small_templates / "problem/scale.cuh").touch()
    made = fake_build()
    assert len(made) == 15
    assert [name for name in made if "_bf16_" not in name] == ["libflash_attn.so"]


def test_another_release_of_nvcc_rebuilds(fake_build, fake_toolkit):
    made = fake_build()
    nvcc = fake_toolkit / "bin" / "nvcc"
    nvcc.write_text(nvcc.read_text().replace("V13.0.88", "V13.0.99"))
    assert [name for name in made if name.endswith(".o")] == [n for n in fake_build() if n.endswith(".o")]


def test_a_unit_that_leaves_the_selection_leaves_the_log(fake_build, tmp_path):
    fake_build()
    assert len(report.read_records(tmp_path / "build")) == 17
    assert fake_build(FLASH_ATTN_ARCHS="80") == ["alone.o", "dispatch.o", "libflash_attn.so", "library.o"]
    assert len(report.read_records(tmp_path / "build")) == 10
    assert len(fake_build(FLASH_ATTN_ARCHS="80", FLASH_ATTN_DIRECTIONS="forward")) == 2
    assert len(report.read_records(tmp_path / "build")) == 6


def test_a_failed_build_installs_nothing_and_recovers(fake_build, small_templates, tmp_path, capfd):
    good = (small_templates / "ops/alone.cu").read_text()
    (small_templates / "ops/alone.cu").write_text("#error no\n")
    with pytest.raises(BuildError, match="failed, see above"):
        fake_build()
    assert not (tmp_path / "out").exists()
    (small_templates / "ops/alone.cu").write_text(good)
    assert "libflash_attn.so" in fake_build()


def test_a_forbidden_warning_fails_the_build(fake_build, monkeypatch, capfd):
    monkeypatch.setenv("FAKE_NVCC_SAYS", "ptxas info : (C7510) Potential Performance Loss")
    with pytest.raises(BuildError):
        fake_build()
    assert "(C7510) Potential Performance Loss" in capfd.readouterr().out


def test_progress_and_one_line_per_unit(fake_build, capfd):
    fake_build()
    out = capfd.readouterr().out
    assert "[18/18, " in out
    assert "forward_sm80_bf16_d64_full: 0." in out


def test_build_info(fake_build, tmp_path):
    fake_build(FLASH_ATTN_ARCHS="80+ptx;sm86:90")
    info = json.loads((tmp_path / "out" / "_build.json").read_text())
    assert info["targets"] == ["sm80:80+ptx", "sm86:90"]
    assert info["archs"] == ["80+ptx", "sm86:90"]
    assert info["head_dims"] == [64] and info["dtypes"] == ["bf16"]
    assert info["directions"] == ["forward", "backward", "split"]
    assert info["nvcc"] == "13.0.88"
    assert len(info["kernels"]) == 14 and info["kernels"][0] == "forward_sm80_bf16_d64_full"
    assert info["project_version"] == version("PROJECT_VERSION")
    assert info["project_version"] and "commit" in info


def test_the_library_is_replaced_not_overwritten(tmp_path):
    library, out = tmp_path / "libflash_attn.so", tmp_path / "out"
    library.write_bytes(b"one")
    builder.install(library, out)
    mapped = (out / library.name).open("rb")
    library.write_bytes(b"two")
    os.utime(library, (2, 2))
    builder.install(library, out)
    assert mapped.read() == b"one"
    assert (out / library.name).read_bytes() == b"two"
    assert [path.name for path in out.iterdir()] == [library.name]


def exported(library):
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True
    )
    return {line.split()[-1] for line in listed.stdout.splitlines()}


def test_small_library_with_real_nvcc(real_nvcc, small_templates, tmp_path):
    chosen = selection.from_environment({**SMALL, "FLASH_ATTN_ARCHS": "80;sm86:90+ptx"})
    builder.build(chosen, tmp_path / "build", tmp_path / "out", small_templates)
    path = tmp_path / "out" / "libflash_attn.so"
    assert exported(path) == {"flash_attn_kernel_count", "flash_attn_kernel_key", "flash_attn_layout_hash"}
    library = ctypes.CDLL(str(path))
    library.flash_attn_kernel_key.restype = ctypes.c_char_p
    assert library.flash_attn_kernel_count() == 14
    assert library.flash_attn_kernel_key(13) == b"split_sm86_bf16_d64_windowed"
    kernels = {
        r["name"]: [k["target"] for k in r["kernels"]] for r in report.read_records(tmp_path / "build")
    }
    assert kernels["forward_sm80_bf16_d64_full"] == ["sm_80"]
    assert kernels["backward_sm86_bf16_d64_full"] == ["sm_90"]


@pytest.fixture(scope="module")
def trimmed(tmp_path_factory):
    """The project's own kernels, one dtype and one head dim, for sm_80."""
    if builder.toolchain.find_nvcc() is None or shutil.which("g++") is None:
        pytest.skip("no nvcc: CUDA_HOME, PATH and the compiler wheels have none")
    chosen = selection.from_environment(TRIMMED)
    folder = tmp_path_factory.mktemp("trimmed")
    builder.build(chosen, folder / "build", folder / "out")
    return folder


def test_trimmed_library_exports_the_abi_and_nothing_else(trimmed):
    assert exported(trimmed / "out" / "libflash_attn.so") == {function.name for function in abi.FUNCTIONS}


def test_trimmed_library_depends_on_the_system_only(trimmed):
    library = trimmed / "out" / "libflash_attn.so"
    listed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    needed = {line.split("[")[1].split(".so")[0] for line in listed.splitlines() if "(NEEDED)" in line}
    system = {"libc", "libm", "libdl", "libpthread", "librt", "libgcc_s", "libstdc++", "ld-linux-x86-64"}
    assert needed <= system


def test_trimmed_library_loads_without_a_gpu_and_knows_its_kernels(trimmed):
    library = ctypes.CDLL(str(trimmed / "out" / "libflash_attn.so"))
    library.flash_attn_layout_hash.restype = ctypes.c_uint64
    for struct in abi.PARAMS:
        size = getattr(library, f"flash_attn_{struct.constant.lower()}_size")
        size.restype = ctypes.c_int64
        assert size() == struct.size
    library.flash_attn_kernel_key.restype = library.flash_attn_targets.restype = ctypes.c_char_p
    assert library.flash_attn_layout_hash() == abi.layout_hash()
    keys = [library.flash_attn_kernel_key(i).decode() for i in range(library.flash_attn_kernel_count())]
    assert keys == json.loads((trimmed / "out" / "_build.json").read_text())["kernels"]
    assert library.flash_attn_targets() == b"sm80:80"


def test_trimmed_library_refuses_to_plan_nothing(trimmed):
    library = ctypes.CDLL(str(trimmed / "out" / "libflash_attn.so"))
    library.flash_attn_last_error.restype = ctypes.c_char_p
    for function in (library.flash_attn_plan_backward, library.flash_attn_plan_cache):
        room = ctypes.create_string_buffer(512)
        assert function(None, room) == 4 and b": params must not" in library.flash_attn_last_error()
        assert function(room, None) == 4 and b": plan must not" in library.flash_attn_last_error()
    assert library.flash_attn_draws_tiles(-1, 0) == -1


def test_trimmed_build_keeps_within_the_limits_of_a_unit(trimmed):
    for record in report.read_records(trimmed / "build"):
        seconds = 90 if record["name"].startswith("backward") else 60
        assert record["cpu_s"] < seconds and record["peak_mb"] < 1536, record["name"]


def test_rebuilding_nothing_compiles_nothing(trimmed):
    arguments = ["--build", "--build-dir", str(trimmed / "build")]
    script = f"import pathlib, codegen.__main__ as cli; cli.PACKAGE = pathlib.Path({str(trimmed / 'out')!r})"
    command = [sys.executable, "-c", f"{script}; raise SystemExit(cli.main({arguments!r}))"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **TRIMMED}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "no work to do" in done.stdout
