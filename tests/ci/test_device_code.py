import sys

import pytest

from ci import CiError, device_code

ENTRY = (
    "FUNC  GLOBAL DEFAULT ENTRY  "
    "_ZN10flash_attn3mma14forward_kernelINS_{}ENS_11PlainScoresEEEvNS0_16ForwardArgumentsE"
)
DUMP = f"""\
Fatbin elf code:
================
arch = sm_80
compressed
symbols:
FUNC          WEAK    DEFAULT    -       $__internal_0_$__cuda_sm20_rcp_rn_f32_slowpath
{ENTRY.format("23ForwardSm80Bf16D256Full7Default")}

Fatbin elf code:
================
arch = sm_90
symbols:
{ENTRY.format("23ForwardSm80Bf16D256Full5Roomy")}
FUNC  GLOBAL DEFAULT ENTRY  _ZN10flash_attn20dropout_probs_kernelENS_5OtherE
"""


def test_the_kernels_of_the_device_code():
    kernels, targets = ["forward_sm80_bf16_d256_full"], ["sm80:80", "sm80:90+ptx", "sm86:86"]
    assert device_code.parse(DUMP) == device_code.expected(kernels, targets)
    assert device_code.parse(DUMP) == {f"forward_sm80_bf16_d256_full sm_{cc}" for cc in (80, 90)}
    assert device_code.expected(["forward_sm86_bf16_d64_full"], ["sm80:80"]) == frozenset()


@pytest.mark.parametrize("target", ["sm80:81", "sm80", "sm80:80:90", "sm80:x", ""])
def test_a_manifest_with_a_wrong_target(target):
    with pytest.raises(CiError, match=f"unknown target '{target}' in its manifest"):
        device_code.expected(["forward_sm80_bf16_d128_full"], [target])


@pytest.mark.parametrize("kernel", ["dispatch", "forward_sm80_bf16_d0128_full", ""])
def test_a_manifest_with_a_wrong_kernel(kernel):
    with pytest.raises(CiError, match=f"unknown kernel '{kernel}' in its manifest"):
        device_code.expected(["forward_sm80_bf16_d128_full", kernel], ["sm80:80"])


def test_reading_a_library(cuobjdump, tmp_path):
    (tmp_path / "dump").write_text(DUMP)
    cuobjdump(f'test "$1" = --dump-elf-symbols && cat {tmp_path}/dump')
    assert len(device_code.read(tmp_path / "library.so")) == 2
    cuobjdump("echo \"cuobjdump info: File 'library.so' does not contain device code\"; exit 255")
    assert device_code.read(tmp_path / "library.so") == frozenset()
    cuobjdump("echo broken >&2; exit 1")
    with pytest.raises(CiError, match="cuobjdump failed: broken"):
        device_code.read(tmp_path / "library.so")


def test_a_relative_home_serves_in_any_folder(cuobjdump, monkeypatch, tmp_path):
    cuobjdump("pwd -P")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_HOME", ".")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    said = device_code.run(device_code.find_cuobjdump(), tmp_path / "library.so", folder=folder)
    assert said.strip() == str(folder.resolve())


def test_a_cuobjdump_that_does_not_run(tmp_path):
    with pytest.raises(CiError, match=r"cuobjdump failed: .*No such file"):
        device_code.run(tmp_path / "cuobjdump", tmp_path / "library.so")


def test_no_cuobjdump(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "nvidia", None)
    assert device_code.read(tmp_path / "library.so") is None
