"""C++ of templates that needs no CUDA, compiled for the host: without nvcc and without a GPU."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
from checker import compile_cpp, write_abi

from codegen import TEMPLATES


def compiled(name: str, folder: Path) -> ctypes.CDLL:
    """Return the library of a source beside this file; of CUDA there is the name of a stream alone."""
    write_abi(folder)
    (folder / "cuda_runtime.h").write_text("using cudaStream_t = void*;\n")
    library = folder / f"lib{name}.so"
    flags = "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas"
    source = Path(__file__).with_name(f"{name}.cpp")
    compile_cpp(source, library, *flags, f"-I{TEMPLATES}", f"-I{folder}")
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="session")
def problem(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The functions of templates/problem; 64-bit numbers are passed as c_int64, arrays as `array.ctypes`."""
    loaded = compiled("problem", tmp_path_factory.mktemp("problem"))
    for name in ("query_tiles", "key_tiles"):
        getattr(loaded, name).restype = ctypes.c_int64
    for name in ("are_rows_aligned", "is_cache_aligned"):
        getattr(loaded, name).restype = ctypes.c_bool
    return loaded


@pytest.fixture(scope="session")
def plans(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The plans of templates/host."""
    return compiled("plan", tmp_path_factory.mktemp("plan"))
