import hashlib
import io
import json
import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from codegen import TEMPLATES, axes, toolchain, version

HERE = Path(__file__).parent

KERNEL = """\
#pragma once
#include "problem/scale.cuh"
#include "host/dispatch.h"
namespace flash_attn::mma {
template <FIELDS> struct PassTile {
  static constexpr int bytes(int d) { return BYTES; }
};
template <Dtype, int head_dim, Mask, class Tile> struct PassConfig {
  static constexpr int kDim = head_dim, kSharedBytes = Tile::bytes(head_dim);
};
template <class Config> __global__ void kernel(float* out) { *out = kScale * Config::kDim; }
template <class Config, class...>
Status launch_pass(const PassParams& params, const Device&, cudaStream_t stream, const char*) {
  kernel<Config><<<1, 1, 0, stream>>>(static_cast<float*>(params.RESULT));
  return Status::kOk;
}
}
"""

FIELDS = "int block_m, int block_n, int, int, int last"
SPLIT_FIELDS = "int block_m, int block_n, int, int warps_n, int stages, int"
FORWARD_BYTES = "2 * d * (block_m + 2 * block_n)"
BACKWARD_BYTES = "2 * (d * (2 * block_n + 4 * block_m) + last * block_m * block_n) + 16 * block_m"

SPLIT_BYTES = (
    "2 * d * (block_m + 2 * stages * block_n) > warps_n * block_m * (d + 10) * 4"
    " ? 2 * d * (block_m + 2 * stages * block_n) : warps_n * block_m * (d + 10) * 4"
)

LIBRARY = """\
#include "host/dispatch.h"
int secret() { return 1; }
extern "C" int32_t flash_attn_kernel_count() { return flash_attn::kNumKernels; }
extern "C" const char* flash_attn_kernel_key(int32_t i) { return flash_attn::kKernels[i].key; }
extern "C" uint64_t flash_attn_layout_hash() { return flash_attn::kLayoutHash; }
"""


def kernel(direction, shared_bytes, result, fields=FIELDS):
    """A kernel that stands in for those of a direction and writes to a member of its parameters."""
    kernel_pass = axes.PASSES[direction]
    text = KERNEL.replace("launch_pass", f"launch_{kernel_pass}")
    text = text.replace("PassParams", f"{kernel_pass.capitalize()}Params")
    text = text.replace("Pass", direction.capitalize())
    return text.replace("BYTES", shared_bytes).replace("RESULT", result).replace("FIELDS", fields)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """No selection and no toolchain from outside."""
    selecting = ("ARCHS", "CUDA_ARCHS", "HEAD_DIMS", "DTYPES", "DIRECTIONS")
    for name in (*selecting, "FORCE_BUILD", "WHEEL_INDEX"):
        monkeypatch.delenv(f"FLASH_ATTN_{name}", raising=False)
    monkeypatch.setenv("MAX_JOBS", "1")


@pytest.fixture
def fake_toolkit(tmp_path, monkeypatch):
    """A CUDA_HOME whose nvcc is fake_nvcc.py; returns the folder, whose calls.log lists the files it made."""
    home = tmp_path / "toolkit"
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!{sys.executable}\n" + (HERE / "fake_nvcc.py").read_text())
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setenv("FAKE_NVCC_LOG", str(home / "calls.log"))
    return home


@pytest.fixture
def small_templates(tmp_path):
    """A tree of CUDA sources that compiles in a second per file and needs no kernel of the project."""
    folder = tmp_path / "templates"
    files = {
        "host/launch.h": (TEMPLATES / "host/device.h").read_text(),
        "host/dispatch.h": (TEMPLATES / "host/dispatch.h").read_text(),
        "host/library.cu": LIBRARY,
        "mma/forward/launch.cuh": kernel("forward", FORWARD_BYTES, "out"),
        "mma/backward/launch.cuh": kernel("backward", BACKWARD_BYTES, "dq"),
        "mma/cache/launch.cuh": kernel("split", SPLIT_BYTES, "q_rotated", SPLIT_FIELDS),
        "problem/scale.cuh": "#pragma once\nconstexpr float kScale = 2.0f;\n",
        "problem/alone.cuh": "#pragma once\n",
        "ops/alone.cu": '#include "problem/alone.cuh"\n',
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def real_nvcc():
    """Skips the test where the toolchain search finds no nvcc or there is no C++ compiler."""
    if toolchain.find_nvcc() is None or shutil.which("g++") is None:
        pytest.skip("no nvcc: CUDA_HOME, PATH and the compiler wheels have none")


def wheel_name(cuda, platform="linux_x86_64", release="2.8.3", python="py3-none"):
    """File name of a wheel that a CUDA (130 for 13.0) built."""
    return f"flash_attn-{release}-{cuda}-{python}-{platform}.whl"


def wheel_bytes(name, manifest=(), **files):
    """A wheel with the contents that its name promises; ``files`` overrides members, None leaves one out."""
    python, abi, platforms = name.removesuffix(".whl").split("-")[-3:]
    tags = "".join(f"Tag: {python}-{abi}-{platform}\n" for platform in platforms.split("."))
    build = {
        "project_version": version("PROJECT_VERSION"),
        "targets": ["sm80:80", "sm80:100+ptx", "sm86:86", "sm90:90"],
        "head_dims": [64, 128],
        "dtypes": ["bf16"],
        "directions": ["forward"],
        **dict(manifest),
    }
    members = {
        "flash_attn/__init__.py": "",
        "flash_attn/libflash_attn.so": "library",
        "flash_attn/_build.json": json.dumps(build),
        "flash_attn-2.8.3.dist-info/METADATA": "Metadata-Version: 2.4\nName: flash-attn\nVersion: 2.8.3\n",
        "flash_attn-2.8.3.dist-info/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\n{tags}",
        "flash_attn-2.8.3.dist-info/RECORD": "",
        **files,
    }
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for member, text in members.items():
            if text is not None:
                archive.writestr(member, text)
    return content.getvalue()


def html_page(files):
    """The project's page of an index as PEP 503 has it; ``files`` maps names to bytes."""
    links = [
        f'<a href="{name}#sha256={hashlib.sha256(content).hexdigest()}">{name}</a><br>'
        for name, content in files.items()
    ]
    return "<!DOCTYPE html><html><body>" + "\n".join(links) + "</body></html>"


def json_page(files):
    """The same page as PEP 691 has it."""
    listed = [
        {"filename": name, "url": name, "hashes": {"sha256": hashlib.sha256(content).hexdigest()}}
        for name, content in files.items()
    ]
    return json.dumps({"meta": {"api-version": "1.0"}, "name": "flash-attn", "files": listed})


@pytest.fixture
def wheels():
    """The functions above, which make wheels and index pages."""
    return SimpleNamespace(name=wheel_name, content=wheel_bytes, html=html_page, json=json_page)


@pytest.fixture
def wheel_folder(tmp_path, wheels):
    """Writes an index of wheels (names to bytes) into a folder and returns that."""

    def write(files, page="index.html", at="simple/flash-attn"):
        folder = tmp_path / "index"
        (folder / at).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / at / name).write_bytes(content)
        text = wheels.json(files) if page.endswith("json") else wheels.html(files)
        (folder / at / page).write_text(text)
        return folder

    return write
