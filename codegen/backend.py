"""The PEP 517 backend: setuptools, plus NVIDIA's compiler wheels where kernels need an nvcc."""

from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

from codegen import CodegenError, selection, toolchain

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """setuptools' own requirements and those of the toolchain."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *compiler_requirements()]


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    """setuptools' own requirements and those of the toolchain."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *compiler_requirements()]


def compiler_requirements() -> list[str]:
    """The compiler wheels, if the selection has kernels and nvcc is neither in CUDA_HOME nor on PATH."""
    try:
        if not selection.from_environment().targets or toolchain.find_nvcc():
            return []
    except CodegenError as error:
        raise SystemExit(f"flash-attn: {error}") from None
    return toolchain.wheel_requirements()
