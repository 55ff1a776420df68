import json
import sys
import zipfile

import pytest

if sys.version_info < (3, 11):
    pytest.importorskip("tomli")

from ci import matrix
from ci.proof import Outcome, Record
from ci.wheel import open_wheel
from codegen import abi

KEYS = ["forward_sm80_bf16_d128_full", "forward_sm80_bf16_d128_causal"]
MATRIX = """\
[platforms]
linux_x86_64 = { runner = "runner", image = "quay.example/image@sha256:%s" }
[[build]]
cuda = "12.9"
archs = ["80", "90"]
pypi = true
[[build]]
cuda = "13.0"
archs = ["75", "80", "110", "120+ptx"]
[torch]
"2.12" = { cuda = ["12.6", "13.2"], python = ["3.10", "3.14"] }
"2.13" = { cuda = ["13.0"], python = ["3.11", "3.14"] }
""" % ("0" * 64)


@pytest.fixture
def matrix_file(tmp_path):
    path = tmp_path / "matrix.toml"
    path.write_text(MATRIX)
    return path


@pytest.fixture
def small_matrix(matrix_file):
    return matrix.read(matrix_file)


@pytest.fixture
def make_wheel(tmp_path):
    """Writes a wheel that holds no more than its description; returns it opened."""

    def make(
        build="130",
        platform="manylinux_2_28_x86_64",
        folder="wheels",
        library=b"library",
        nvcc="13.0.88",
        written_build=None,
    ):
        path = tmp_path / folder / f"flash_attn-2.8.3-{build}-py3-none-{platform}.whl"
        path.parent.mkdir(exist_ok=True)
        tags = "".join(f"Tag: py3-none-{tag}\n" for tag in platform.split("."))
        manifest = {"nvcc": nvcc, "kernels": KEYS, "targets": ["sm80:80"]}
        with zipfile.ZipFile(path, "w") as archive:
            info = "flash_attn-2.8.3.dist-info"
            archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nBuild: {written_build or build}\n{tags}")
            archive.writestr(
                f"{info}/METADATA", "Name: flash-attn\nVersion: 2.8.3\nRequires-Python: >=3.10\n"
            )
            archive.writestr("flash_attn/_build.json", json.dumps(manifest))
            archive.writestr("flash_attn/libflash_attn.so", library)
        return open_wheel(path) if written_build is None else path

    return make


@pytest.fixture
def make_record():
    """A record that proves a wheel for torch 2.13 with CUDA 13.0, but for what is given."""

    def make(wheel, **fields):
        values = {
            "series": "2.13",
            "cuda": "13.0",
            "torch": "2.13.0+cu130",
            "torch_cuda": "13.0",
            "python": "3.11.7",
            "platform": "linux_x86_64",
            "devices": ("cpu",),
            "wheel": wheel.name,
            "sha256": wheel.sha256,
            "date": "2026-11-21T12:00:00+00:00",
            "seconds": 1.0,
            "tests": (Outcome("import", True),),
        }
        return Record(**{**values, **fields})

    return make


@pytest.fixture
def exported():
    """What a library exports that is as it should be."""
    return frozenset(function.name for function in abi.FUNCTIONS)


@pytest.fixture
def cuobjdump(tmp_path, monkeypatch):
    """Puts a program that stands in for cuobjdump into CUDA_HOME."""

    def make(script):
        program = tmp_path / "bin" / "cuobjdump"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))

    return make
