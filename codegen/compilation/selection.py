"""What to build: the ``FLASH_ATTN_*`` environment as a frozen Selection."""

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from functools import cache
from typing import TypeVar

from codegen import CodegenError, axes
from codegen.targets import Selection, Target, all_targets, ordered

AXES = {
    "head_dims": "FLASH_ATTN_HEAD_DIMS",
    "dtypes": "FLASH_ATTN_DTYPES",
    "directions": "FLASH_ATTN_DIRECTIONS",
}
"""Axes that are trimmed, by the field of a Selection and of a manifest, and the variable that does it."""

VARIABLES = {
    "FLASH_ATTN_ARCHS": "all, native, none, or a list of compute capabilities such as 80;90+ptx",
    "FLASH_ATTN_CUDA_ARCHS": "another name of FLASH_ATTN_ARCHS",
    AXES["head_dims"]: "a list of head dims such as 64;128",
    AXES["dtypes"]: "a list of dtypes such as bf16",
    AXES["directions"]: f"a list of directions: {', '.join(axes.DIRECTIONS)}",
    "FLASH_ATTN_FORCE_BUILD": "compile even if a prebuilt wheel matches",
    "FLASH_ATTN_WHEEL_INDEX": "where to look for a prebuilt wheel",
    "FLASH_ATTN_FORCE_FAMILY": "kernel family to use, read at run time",
}

_Value = TypeVar("_Value", str, int)


class SelectionError(CodegenError):
    """An unknown variable or value in the environment; the message lists the known ones."""


def from_environment(
    environ: Mapping[str, str] | None = None, detect: Callable[[], list[int]] | None = None
) -> Selection:
    """The selection that the ``FLASH_ATTN_*`` variables ask for; raises SelectionError.

    ``detect`` returns the compute capabilities (80 for 8.0) of the GPUs present; called for ``native`` only.
    """
    environ = os.environ if environ is None else environ
    check_variable_names(environ)
    targets, notes = _targets(_archs_value(environ), detect or detect_gpus)
    return Selection(
        targets=targets,
        head_dims=_axis(environ, AXES["head_dims"], axes.HEAD_DIMS),
        dtypes=_axis(environ, AXES["dtypes"], axes.DTYPES),
        directions=_axis(environ, AXES["directions"], axes.DIRECTIONS),
        notes=notes,
    )


def is_native(environ: Mapping[str, str] | None = None) -> bool:
    """Whether the GPUs present decide on the targets."""
    return _items(_archs_value(os.environ if environ is None else environ)) == ["native"]


def check_variable_names(environ: Mapping[str, str]) -> None:
    """Raise SelectionError for a ``FLASH_ATTN_*`` variable that nothing reads."""
    unknown = sorted(name for name in environ if name.startswith("FLASH_ATTN_") and name not in VARIABLES)
    if unknown:
        known = "\n".join(f"  {name}: {meaning}" for name, meaning in VARIABLES.items())
        raise SelectionError(
            f"unknown environment variable {', '.join(unknown)}; the known ones are\n{known}"
        )


def _items(value: str) -> list[str]:
    return [item.lower() for item in re.split(r"[;,\s]+", value) if item]


def _axis(environ: Mapping[str, str], name: str, known: tuple[_Value, ...]) -> tuple[_Value, ...]:
    """The chosen values of one axis, in the axis's own order; unset or empty means all."""
    by_text = {str(value): value for value in known}
    chosen = _items(environ.get(name, "")) or list(by_text)
    for item in chosen:
        if item not in by_text:
            raise SelectionError(f"{name}: unknown value {item!r}; known: {', '.join(by_text)}")
    return tuple(value for text, value in by_text.items() if text in chosen)


def _archs_value(environ: Mapping[str, str]) -> str:
    values = {
        name: environ[name]
        for name in ("FLASH_ATTN_ARCHS", "FLASH_ATTN_CUDA_ARCHS")
        if environ.get(name, "").strip()
    }
    if len({tuple(_items(value)) for value in values.values()}) > 1:
        raise SelectionError("FLASH_ATTN_ARCHS and FLASH_ATTN_CUDA_ARCHS disagree: set one of them")
    return next(iter(values.values()), "native")


def _targets(value: str, detect: Callable[[], list[int]]) -> tuple[tuple[Target, ...], tuple[str, ...]]:
    items = _items(value)
    if items == ["none"]:
        return (), ()
    if items == ["all"]:
        return all_targets(), ()
    if items == ["native"]:
        return _native_targets(detect())
    return ordered(_target(item) for item in items), ()


def _target(item: str) -> Target:
    """``80``, ``80+ptx``, ``sm86:90`` or ``sm86:90+ptx`` as a Target."""
    match = re.fullmatch(r"(?:(?P<family>\w+):)?(?P<capability>\d+)(?P<ptx>\+ptx)?", item)
    arch = axes.ARCHS.get(int(match["capability"])) if match else None
    if match is None or arch is None:
        known = ", ".join(map(str, axes.ARCHS))
        raise SelectionError(
            f"FLASH_ATTN_ARCHS: unknown value {item!r}; known: all, native, none (each alone), or a list of"
            f" {known}, each optionally followed by +ptx or preceded by a family such as sm86:"
        )
    family = axes.FAMILIES.get(match["family"] or arch.family)
    if family is None:
        raise SelectionError(
            f"FLASH_ATTN_ARCHS: unknown family in {item!r}; known: {', '.join(axes.FAMILIES)}"
        )
    if not family.directions:
        built = ", ".join(f.name for f in axes.built_families())
        raise SelectionError(
            f"FLASH_ATTN_ARCHS: {item} belongs to family {family.name}, which has no kernels yet"
            f" (families with kernels: {built})"
        )
    if family.code_suffix and (match["ptx"] or arch.family != family.name):
        raise SelectionError(
            f"FLASH_ATTN_ARCHS: {item}: kernels of family {family.name} run on no other GPU than their own:"
            f" allowed is {family.name}:{family.name.removeprefix('sm')}, without +ptx"
        )
    return Target(family.name, arch.capability, match["ptx"] is not None)


def _native_targets(capabilities: list[int]) -> tuple[tuple[Target, ...], tuple[str, ...]]:
    """Targets for the GPUs present; a GPU without kernels is skipped with a note."""
    if not capabilities:
        return (), ("no GPU found (FLASH_ATTN_ARCHS=80;90 builds kernels all the same)",)
    targets, notes = [], []
    for capability in sorted(set(capabilities)):
        arch = _compatible_arch(capability)
        if arch and axes.FAMILIES[arch.family].directions:
            targets.append(Target(arch.family, arch.capability))
        else:
            notes.append(
                f"the GPU of compute capability {capability // 10}.{capability % 10} has no kernels: skipped"
            )
    return ordered(targets), tuple(notes)


def _compatible_arch(capability: int) -> axes.Arch | None:
    """The newest known architecture whose cubins run there: same major version, minor not above it."""
    if capability in axes.EMBEDDED:
        return axes.ARCHS.get(capability)
    known = [a for c, a in axes.ARCHS.items() if c // 10 == capability // 10 and c <= capability]
    return max(known, key=lambda arch: arch.capability, default=None)


@cache
def detect_gpus() -> list[int]:
    """Compute capabilities (90 for 9.0) of the GPUs present, from libcuda or else nvidia-smi."""
    try:
        return _gpus_from_driver(ctypes.CDLL("libcuda.so.1"))
    except OSError:
        return _gpus_from_smi()


def _gpus_from_driver(cuda: ctypes.CDLL) -> list[int]:
    major_attribute, minor_attribute = 75, 76
    count, value = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return []
    capabilities = []
    for device in range(count.value):
        numbers = []
        for attribute in (major_attribute, minor_attribute):
            cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            numbers.append(value.value)
        capabilities.append(numbers[0] * 10 + numbers[1])
    return capabilities


def _gpus_from_smi() -> list[int]:
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return []
    query = [smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
    listed = subprocess.run(query, capture_output=True, text=True, check=False)
    return [int(line.replace(".", "")) for line in listed.stdout.split() if re.fullmatch(r"\d+\.\d", line)]
