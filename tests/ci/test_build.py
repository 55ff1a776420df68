from dataclasses import replace

import pytest

from ci import CiError, build


def test_archs_without_kernels_are_left_out(small_matrix):
    ready, skipped = build.archs_of(small_matrix.build("13.0"))
    assert (ready, skipped) == (["80", "110", "120+ptx"], ["75"])


def test_a_build_is_trimmed_by_the_environment(small_matrix):
    chosen = small_matrix.build("12.9")
    assert build.variables(chosen, {})["FLASH_ATTN_ARCHS"] == "80;90"
    trimmed = build.variables(chosen, {"FLASH_ATTN_ARCHS": "80", "FLASH_ATTN_DTYPES": "bf16", "HOME": "x"})
    assert trimmed == {"FLASH_ATTN_ARCHS": "80", "FLASH_ATTN_DTYPES": "bf16", "FLASH_ATTN_FORCE_BUILD": "1"}


def test_what_cibuildwheel_is_told(small_matrix):
    platforms = small_matrix.platforms
    told = build.container_variables(small_matrix.build("12.9"), platforms, {})
    assert told == {
        "CIBW_MANYLINUX_X86_64_IMAGE": platforms["linux_x86_64"].image,
        "CIBW_ENVIRONMENT": "FLASH_ATTN_ARCHS='80;90' FLASH_ATTN_FORCE_BUILD=1",
        "CIBW_CONFIG_SETTINGS": "--build-option=--build-number=129",
    }
    prepared = replace(small_matrix.build("12.9"), prepare="install it", cuda_home="there")
    told = build.container_variables(prepared, platforms, {})
    assert told["CIBW_BEFORE_ALL"] == "install it"
    assert told["CIBW_ENVIRONMENT"].endswith(" CUDA_HOME=there")


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/0", "a/b", "-1/2", ""])
def test_a_shard_out_of_range(text):
    with pytest.raises(CiError, match="must be i/n with i from 1 to n"):
        build.check_shard(text)


def test_the_compiler_must_be_of_the_builds_cuda(small_matrix, tmp_path, monkeypatch):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    build.check_compiler(small_matrix.build("13.0"))
    with pytest.raises(CiError, match=r"the build is for CUDA 12.9, but nvcc is 13.0"):
        build.check_compiler(small_matrix.build("12.9"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))
    with pytest.raises(CiError, match="there is no"):
        build.check_compiler(small_matrix.build("13.0"))
