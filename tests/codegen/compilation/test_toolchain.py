import subprocess
import sys

import pytest
from packaging.tags import platform_tags

from codegen import ROOT
from codegen.compilation import backend, cuda_driver, selection, toolchain
from codegen.compilation.selection import from_environment
from codegen.compilation.toolchain import Toolchain, ToolchainError
from codegen.wheels import prebuilt


def fake_nvcc(folder, says="release 13.0, V13.0.88"):
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho '{says}'\n")
    nvcc.chmod(0o755)
    return nvcc


def test_order_is_cuda_home_then_path_then_wheels(tmp_path):
    home, path, nvidia = tmp_path / "home", tmp_path / "path", tmp_path / "nvidia"
    in_home, in_path, in_wheel = fake_nvcc(home), fake_nvcc(path), fake_nvcc(nvidia / "cu13")
    environ = {"CUDA_HOME": str(home), "PATH": str(in_path.parent)}
    assert toolchain.find_nvcc(environ, [nvidia]) == in_home
    del environ["CUDA_HOME"]
    assert toolchain.find_nvcc(environ, [nvidia]) == in_path
    environ["PATH"] = ""
    assert toolchain.find_nvcc(environ, [nvidia]) == in_wheel
    assert toolchain.find_nvcc(environ, []) is None


def test_the_newest_wheel_wins(tmp_path):
    fake_nvcc(tmp_path / "cu12")
    newest = fake_nvcc(tmp_path / "cu13")
    assert toolchain.find_nvcc({}, [tmp_path]) == newest


def test_cuda_home_without_nvcc_is_an_error(tmp_path):
    with pytest.raises(ToolchainError, match="CUDA_HOME is"):
        toolchain.find_nvcc({"CUDA_HOME": str(tmp_path), "PATH": "/usr/bin"}, [])


def test_wheels_need_their_library_folder(tmp_path, monkeypatch):
    home = tmp_path / "cu13"
    fake_nvcc(home)
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert toolchain.find_toolchain().library_dir is None
    (home / "lib").mkdir()
    (home / "lib" / "libcudart_static.a").touch()
    found = toolchain.find_toolchain()
    assert found.library_dir == home / "lib"
    assert (found.release, found.cuda) == ("13.0.88", (13, 0))
    (home / "lib64").mkdir()
    assert toolchain.find_toolchain().library_dir is None


def test_no_nvcc_at_all(monkeypatch):
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: None)
    with pytest.raises(ToolchainError, match=r"pip install 'cuda-toolkit\[nvcc,cccl\]==13\.0\.\*'"):
        toolchain.find_toolchain()


@pytest.mark.parametrize("says", ["hello", ""])
def test_an_nvcc_that_tells_no_release(tmp_path, monkeypatch, says):
    fake_nvcc(tmp_path, says)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(ToolchainError, match="does not tell a release"):
        toolchain.find_toolchain()


@pytest.mark.parametrize(
    ("release", "archs", "words"),
    [
        ("11.8.89", "80", "this project needs CUDA 12.0 or newer; .* is 11.8.89"),
        ("12.6.20", "80;100", "target sm80:100 needs CUDA 12.8 or newer"),
        ("12.9.41", "sm80:110+ptx", r"target sm80:110\+ptx needs CUDA 13.0 or newer"),
    ],
)
def test_nvcc_too_old(tmp_path, release, archs, words):
    with pytest.raises(ToolchainError, match=words):
        toolchain.check_targets(
            Toolchain(tmp_path / "nvcc", release), from_environment({"FLASH_ATTN_ARCHS": archs})
        )


def test_nvcc_new_enough(tmp_path):
    toolchain.check_targets(Toolchain(tmp_path, "13.0.88"), from_environment({"FLASH_ATTN_ARCHS": "all"}))
    toolchain.check_targets(
        Toolchain(tmp_path, "12.0.1"), from_environment({"FLASH_ATTN_ARCHS": "80;86;89;90"})
    )


def test_compiler_wheels_are_required_only_where_kernels_need_them(monkeypatch, fake_toolkit):
    monkeypatch.setenv("FLASH_ATTN_ARCHS", "80")
    assert backend.compiler_requirements() == []
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(toolchain, "_nvidia_folders", list)
    assert backend.compiler_requirements() == ["cuda-toolkit[nvcc,cccl]==13.0.*"]
    monkeypatch.setenv("FLASH_ATTN_ARCHS", "none")
    assert backend.compiler_requirements() == []


def test_native_is_refused_where_the_driver_is_too_old_for_the_wheels(monkeypatch):
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: None)
    monkeypatch.setattr(selection, "detect_gpus", lambda: [90])
    monkeypatch.setattr(cuda_driver, "driver_cuda", lambda: (12, 4))
    words = r"need driver 580 \(CUDA 13.0\) or newer, but this one supports CUDA 12.4"
    for use_prebuilt in (False, True):
        with pytest.raises(SystemExit, match=words):
            backend.compiler_requirements(use_prebuilt)
    monkeypatch.setenv("FLASH_ATTN_ARCHS", "90")
    assert len(backend.compiler_requirements()) == 1
    monkeypatch.delenv("FLASH_ATTN_ARCHS")
    for enough in ((13, 0), (13, 2), None):
        monkeypatch.setattr(cuda_driver, "driver_cuda", lambda enough=enough: enough)
        assert len(backend.compiler_requirements()) == 1


def test_a_prebuilt_wheel_needs_no_compiler(monkeypatch, wheels, wheel_folder, tmp_path):
    name = wheels.name(120, list(platform_tags())[-1])
    monkeypatch.setenv("FLASH_ATTN_WHEEL_INDEX", str(wheel_folder({name: wheels.content(name)})))
    monkeypatch.setenv("FLASH_ATTN_ARCHS", "80")
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: None)
    monkeypatch.setattr(prebuilt.find, "__defaults__", (None, tmp_path / "downloads"))
    assert len(backend.compiler_requirements()) == 1
    assert backend.compiler_requirements(use_prebuilt=True) == []
    monkeypatch.setenv("FLASH_ATTN_FORCE_BUILD", "1")
    assert len(backend.compiler_requirements(use_prebuilt=True)) == 1


def test_the_backend_imports_neither_torch_nor_jinja():
    script = "import codegen.compilation.backend, sys; assert not {'torch', 'jinja2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
