"""The NVIDIA driver of this machine: the CUDA release that it supports, and what built programs need."""

import ctypes
from functools import cache

Cuda = tuple[int, int]

COMPRESSED_SINCE = (12, 8)
"""First CUDA release whose nvcc takes ``--compress-mode``."""

DRIVERS = {(12, 0): "525", (12, 4): "550.54", (13, 0): "580"}
"""First driver that supports a CUDA release."""


@cache
def driver_cuda() -> Cuda | None:
    """The CUDA release that the installed driver supports; None without a driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(number)) or not number.value:
        return None
    return number.value // 1000, number.value % 1000 // 10


def needed_cuda(built_by: Cuda) -> Cuda:
    """The oldest CUDA release that a driver must support to run what this CUDA release built.

    Any driver of the same major release will do, except that the compressed code of 12.8 and 12.9 needs 12.4.
    """
    if COMPRESSED_SINCE <= built_by < (13, 0):
        return (12, 4)
    return (built_by[0], 0)


def needed_driver(built_by: Cuda) -> str:
    """``needed_cuda`` in words, with the driver's own number where it is known."""
    needed = needed_cuda(built_by)
    number = f" {DRIVERS[needed]}" if needed in DRIVERS else ""
    return f"driver{number} (CUDA {needed[0]}.{needed[1]}) or newer"
