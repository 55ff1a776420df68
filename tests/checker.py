"""The library's check of its parameters, compiled by itself: plain C++, without nvcc and without a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from codegen import TEMPLATES, render, targets

CHECKS = {
    "forward": "ForwardParams", "backward": "BackwardParams", "cache": "CacheParams",
    "rotary": "RotaryParams", "dropout_probs": "ForwardParams", "choice": "ForwardParams",
    "plan_backward": "BackwardParams", "plan_cache": "CacheParams",
}  # fmt: skip
SOURCE = """
#include <cstdarg>
#include <cstdio>
#include "host/check_params.cu"
static char text[512];
extern "C" const char* last_error() { return text; }
flash_attn::Status flash_attn::fail(Status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  return status;
}
namespace flash_attn {
Status check_plan_backward(const char* function, const BackwardParams* params) {
  BackwardPlan plan{};
  return check_plan_backward(function, params, &plan);
}
Status check_plan_cache(const char* function, const CacheParams* params) {
  CachePlan plan{};
  return check_plan_cache(function, params, &plan);
}
}
"""


def compile_cpp(source: Path, out: Path, *arguments: str | Path) -> None:
    """Compile a C++ file, without warnings; skip the test where there is no compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    flags = "-std=c++17", "-Wall", "-Wextra", "-Werror"
    subprocess.run([compiler, *flags, *arguments, "-x", "c++", source, "-o", out], check=True)


def write_abi(folder: Path) -> None:
    """Write the abi.h that templates include, as it is rendered, into a folder."""
    (folder / "abi.h").write_text(render.render_sources(targets.full_selection())["abi.h"])


class Checker:
    """`check(operation, params)` returns (status, text) for a struct, its bytes, or None: a null pointer."""

    def __init__(self, folder: Path) -> None:
        write_abi(folder)
        exported = "\n".join(
            f'extern "C" int {name}(const flash_attn::{struct}* params) {{ return static_cast<int>('
            f'flash_attn::check_{name}("flash_attn_{name}", params)); }}'
            for name, struct in CHECKS.items()
        )
        (folder / "checks.cpp").write_text(SOURCE + exported)
        library = folder / "libchecks.so"
        compile_cpp(folder / "checks.cpp", library, "-shared", "-fPIC", f"-I{TEMPLATES}", f"-I{folder}")
        self.library = ctypes.CDLL(str(library))
        self.library.last_error.restype = ctypes.c_char_p

    def check(self, operation: str, params: ctypes.Structure | bytes | None) -> tuple[int, str]:
        given = None if params is None else ctypes.c_char_p(bytes(params))
        status = getattr(self.library, operation)(given)
        return status, self.library.last_error().decode() if status else ""
