"""The functions of templates/problem, compiled for the host: plain C++, without nvcc and without a GPU."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
from checker import compile_cpp, write_abi

from codegen import TEMPLATES


@pytest.fixture(scope="session")
def problem(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The library of problem.cpp; 64-bit numbers are passed as c_int64, arrays as `array.ctypes`."""
    folder = tmp_path_factory.mktemp("problem")
    write_abi(folder)
    library = folder / "libproblem.so"
    flags = "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas"
    source = Path(__file__).with_name("problem.cpp")
    compile_cpp(source, library, *flags, f"-I{TEMPLATES}", f"-I{folder}")
    loaded = ctypes.CDLL(str(library))
    for name in ("query_tiles", "key_tiles"):
        getattr(loaded, name).restype = ctypes.c_int64
    for name in ("are_rows_aligned", "is_cache_aligned"):
        getattr(loaded, name).restype = ctypes.c_bool
    return loaded
