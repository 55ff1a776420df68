import pytest

from codegen.compilation import toolchain
from codegen.compilation.selection import from_environment
from codegen.compilation.toolchain import Toolchain, ToolchainError


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


def test_no_nvcc_at_all(no_nvcc):
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
