"""Which tensors the CUDA backend computes with; the CPU backend has the others."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

from torch import Tensor

on_cuda: Callable[[Tensor], bool] = attrgetter("is_cuda")
"""Whether the CUDA backend computes with a tensor. Callers reach it as `_device.on_cuda`, never by a copy of
the name: the stand-in of a GPU (`_backends.cuda.gpu.stand_in`) replaces it.
"""
