"""What tests of compiling share: an nvcc that only pretends, and sources that a real one compiles fast."""

import shutil
import sys
from pathlib import Path

import pytest

from codegen import TEMPLATES, axes
from codegen.compilation import toolchain

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
