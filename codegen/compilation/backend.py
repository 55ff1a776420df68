"""The PEP 517 backend: a prebuilt wheel, or setuptools, with NVIDIA's compiler wheels if need be."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

from codegen import CodegenError
from codegen.compilation import cuda_driver, selection, toolchain
from codegen.wheels import prebuilt

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


def build_wheel(
    wheel_directory: str,
    config_settings: dict[str, Any] | None = None,
    metadata_directory: str | None = None,
) -> str:
    """A prebuilt wheel if one matches, or else one built by setuptools; returns its name."""
    with _one_line_errors():
        wheel = prebuilt.find(selection.from_environment())
        if wheel:
            return prebuilt.place(wheel, Path(wheel_directory))
    return str(build_meta.build_wheel(wheel_directory, config_settings, metadata_directory))


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """setuptools' own requirements and, unless a prebuilt wheel matches, those of the toolchain."""
    return [
        *build_meta.get_requires_for_build_wheel(config_settings),
        *compiler_requirements(use_prebuilt=True),
    ]


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    """setuptools' own requirements and those of the toolchain."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *compiler_requirements()]


def compiler_requirements(
    use_prebuilt: bool = False,
    downloads: Path = prebuilt.DOWNLOADS,
    detect: Callable[[], list[int]] = selection.detect_gpus,
    driver: Callable[[], cuda_driver.Cuda | None] = cuda_driver.driver_cuda,
) -> list[str]:
    """The compiler wheels, if kernels will be compiled and nvcc is neither in CUDA_HOME nor on PATH.

    ``detect`` and ``driver`` tell the GPUs of this machine and the CUDA of its driver.
    """
    with _one_line_errors():
        chosen = selection.from_environment(detect=detect)
        if not chosen.targets or toolchain.find_nvcc():
            return []
        if use_prebuilt and prebuilt.find(chosen, None, downloads, driver):
            return []
        if selection.is_native():
            toolchain.check_driver(driver())
    return [toolchain.wheel_requirement()]


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """End the build with the message alone."""
    try:
        yield
    except CodegenError as error:
        raise SystemExit(f"flash-attn: {error}") from None
