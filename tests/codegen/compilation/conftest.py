"""What tests of compiling share: an nvcc that only pretends, and sources that a real one compiles fast."""

import shutil
import sys
from pathlib import Path

import pytest

from codegen import TEMPLATES
from codegen.compilation import toolchain

HERE = Path(__file__).parent

KERNEL = """\
#pragma once
#include "problem/scale.cuh"
#include "host/dispatch.h"
namespace flash_attn::mma {
template <FIELDS> struct PassTile {
  static constexpr int bytes(int d) { return BYTES; }
  static constexpr int chunk(int scores) { return CHUNK; }
};
template <Dtype, int head_dim, Mask, class Tile> struct PassConfig {
  static constexpr int kDim = head_dim, kSharedBytes = Tile::bytes(head_dim);
  static constexpr int kPlainChunk = Tile::chunk(2048), kModifiedChunk = Tile::chunk(1024);
};
template <class Config> __global__ void kernel(float* out) { *out = kScale * Config::kDim; }
template <class Tiles>
Status launch_pass(const PassParams& params, const Device&, cudaStream_t stream, const char*) {
  kernel<typename Tiles::MEMBER><<<1, 1, 0, stream>>>(static_cast<float*>(params.RESULT));
  return Status::kOk;
}
}
"""

FIELDS = "int block_m, int block_n, int, int, int last"
FORWARD_BYTES = "2 * d * (block_m + 2 * block_n)"
BACKWARD_FIELDS = "int block_m, int block_n, int warps, int, int last"
BACKWARD_BYTES = "2 * (d * (2 * block_n + 4 * block_m) + last * block_m * block_n) + 16 * block_m"
BACKWARD_CHUNK = "block_m < scores * warps / 2 / block_n ? block_m : scores * warps / 2 / block_n"
CACHE_FIELDS = "int block_m, int block_n, int, int warps_n, int stages, int"
CACHE_BYTES = (
    "2 * d * (block_m + 2 * stages * block_n) > warps_n * block_m * (d + 10) * 4"
    " ? 2 * d * (block_m + 2 * stages * block_n) : warps_n * block_m * (d + 10) * 4"
)

LIBRARY = """\
#include "host/dispatch.h"
int secret() { return 1; }
using namespace flash_attn;
extern "C" int32_t flash_attn_kernel_count() {
  return kForwardKernels.count + kBackwardKernels.count + kCacheKernels.count;
}
extern "C" const char* flash_attn_kernel_key(int32_t i) {
  if (i < kForwardKernels.count) return kForwardKernels.kernels[i].key;
  i -= kForwardKernels.count;
  if (i < kBackwardKernels.count) return kBackwardKernels.kernels[i].key;
  return kCacheKernels.kernels[i - kBackwardKernels.count].key;
}
extern "C" uint64_t flash_attn_layout_hash() { return flash_attn::kLayoutHash; }
"""


def kernel(name, member, result, **words):
    """A kernel that stands in for those of a pass, with one of its tiles, and writes to a parameter."""
    text = KERNEL.replace("launch_pass", f"launch_{name}").replace("Pass", name.capitalize())
    words = {"FIELDS": FIELDS, "CHUNK": "0"} | words | {"MEMBER": member, "RESULT": result}
    for word, replacement in words.items():
        text = text.replace(word, replacement)
    return text


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
def no_nvcc(monkeypatch):
    """An environment in which there is no nvcc: neither CUDA_HOME, nor PATH, nor the compiler wheels."""
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "nvidia", None)


@pytest.fixture
def small_templates(tmp_path):
    """A tree of CUDA sources that compiles in a second per file and needs no kernel of the project."""
    folder = tmp_path / "templates"
    own = "host/launch.h", "host/dispatch.h", "host/plan.h", "problem/kv_cache.cuh", "problem/sequence.cuh"
    files = {name: (TEMPLATES / name).read_text() for name in own} | {
        "host/library.cu": LIBRARY,
        "mma/forward/launch.cuh": kernel("forward", "Default", "out", BYTES=FORWARD_BYTES),
        "mma/backward/launch.cuh": kernel(
            "backward", "Default", "dq", FIELDS=BACKWARD_FIELDS, BYTES=BACKWARD_BYTES, CHUNK=BACKWARD_CHUNK
        ),
        "mma/cache/launch.cuh": kernel(
            "cache", "Rows64", "q_rotated", FIELDS=CACHE_FIELDS, BYTES=CACHE_BYTES
        ),
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
