"""The compiled kernel library: where it is, whether it fits this package, and what it holds.

`libflash_attn.so` has a plain C interface (described by `_abi`, generated) and needs neither torch nor
Python. It is loaded at the first CUDA call, not at import. `FLASH_ATTN_FORCE_FAMILY` (sm80, say), read then,
forces a kernel family on any GPU that can run it.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from flash_attn import _abi

LIBRARY_NAME = "libflash_attn.so"
FORCE_FAMILY = "FLASH_ATTN_FORCE_FAMILY"
PARAMS = {
    "forward": _abi.FORWARD_PARAMS,
    "backward": _abi.BACKWARD_PARAMS,
    "cache": _abi.CACHE_PARAMS,
    "rotary": _abi.ROTARY_PARAMS,
}
NATIVE = "native"
REBUILD = "pip install --force-reinstall --no-deps ."


@dataclass(frozen=True, slots=True, eq=False)
class Library:
    """The loaded library; an operation takes packed parameters (of `PARAMS`) and a stream.

    A planner takes packed parameters and the struct into which it writes. `draws_tiles` says whether kernels
    for a device may want a tile counter.
    """

    path: Path
    forward: Callable[[bytes, int], int]
    backward: Callable[[bytes, int], int]
    cache: Callable[[bytes, int], int]
    rotary: Callable[[bytes, int], int]
    dropout_probs: Callable[[bytes, int], int]
    forward_kernel: Callable[[bytes], bytes | None]
    backward_kernel: Callable[[bytes], bytes | None]
    cache_kernel: Callable[[bytes], bytes | None]
    plan_backward: Callable[[bytes, _abi.BackwardPlan], int]
    plan_cache: Callable[[bytes, _abi.CachePlan], int]
    draws_tiles: Callable[[int, int], int]
    last_error: Callable[[], bytes]
    kernels: tuple[str, ...]
    targets: tuple[str, ...]
    family: int


def library_path() -> Path:
    """Return where the library lies, or would lie: at the top of the package."""
    return Path(_abi.__file__).with_name(LIBRARY_NAME)


def arch_of(capability: int, family: int = 0) -> str:
    """Return what FLASH_ATTN_ARCHS calls a GPU of this compute capability (90 for 9.0), in a forced family.

    That is "90", "sm86:90", or "native" for a capability that the build has no name for.
    """
    if capability not in _abi.CAPABILITIES:
        return NATIVE
    return f"{_abi.Family(family).name.lower()}:{capability}" if family else str(capability)


def kernel_head_dim(head_dim: int) -> int:
    """Return the head dim of the kernels that serve tensors of this one."""
    return next(d for d in _abi.HEAD_DIMS if d >= head_dim)


def build_command(
    arch: str = NATIVE, head_dim: int | None = None, dtype: str | None = None,
    direction: _abi.Direction = _abi.Direction.FORWARD,
) -> str:  # fmt: skip
    """Return the command that builds kernels for an item of FLASH_ATTN_ARCHS, head dim, dtype ("bf16").

    Those of the forward come along with those of another direction.
    """
    variables = [f"FLASH_ATTN_ARCHS={arch}"]
    if head_dim is not None:
        variables.append(f"FLASH_ATTN_HEAD_DIMS={kernel_head_dim(head_dim)}")
    if dtype is not None:
        variables.append(f"FLASH_ATTN_DTYPES={dtype}")
    if direction != _abi.Direction.FORWARD:
        variables.append(f"FLASH_ATTN_DIRECTIONS=forward,{direction.name.lower()}")
    return " ".join((*variables, "pip install ."))


def forced_family() -> int:
    """Return the family that FLASH_ATTN_FORCE_FAMILY names, 0 (choose) where it is unset.

    Raises:
        ValueError: a family that does not exist.
    """
    name = os.environ.get(FORCE_FAMILY, "").strip().lower()
    known = {family.name.lower(): int(family) for family in _abi.Family}
    if name and name not in known:
        raise ValueError(f"{FORCE_FAMILY} must be one of {', '.join(sorted(known))}, got {name!r}")
    return known[name] if name else 0


def _told_size(path: Path) -> int:
    """Return where a 64-bit ELF file must end at the earliest, by its headers; 0 for any other file."""
    with path.open("rb") as file:
        header = file.read(64)
        if len(header) < 64 or not header.startswith(b"\x7fELF\2\1"):
            return 0
        segments_at, sections_at = struct.unpack_from("<QQ", header, 32)
        segment_size, segments, section_size, sections = struct.unpack_from("<4H", header, 54)
        file.seek(segments_at)
        table = file.read(segments * 56)
    parts = list(struct.iter_unpack("<8xQ16xQ16x", table[: len(table) // 56 * 56]))  # (offset, bytes)
    parts += [(segments_at, segments * segment_size), (sections_at, sections * section_size)]
    return max(offset + length for offset, length in parts)


def _open(path: Path) -> ctypes.CDLL:
    if not path.exists():
        raise RuntimeError(
            f"this installation of flash-attn has no CUDA kernels (no {path.name}): build them with "
            f"`{build_command()}`; CPU tensors work without them"
        )
    try:
        size, told = path.stat().st_size, _told_size(path)
        if size < told:  # loading it would end the process: SIGBUS
            raise OSError(f"it has {size} bytes where its headers tell of {told}")
        return ctypes.CDLL(str(path), mode=ctypes.RTLD_LOCAL)
    except OSError as error:
        raise RuntimeError(f"cannot load {path}: {error}; rebuild it with `{REBUILD}`") from error


def _declare(library: ctypes.CDLL) -> None:
    for name, (result, arguments) in _abi.FUNCTIONS.items():
        function = getattr(library, name, None)
        if function is None:
            raise RuntimeError(f"{library._name} lacks {name}: rebuild it with `{REBUILD}`")
        function.restype, function.argtypes = result, list(arguments)


def _check_layout(library: ctypes.CDLL) -> None:
    """Refuse a library whose structs or enumerations are not this package's."""
    found = library.flash_attn_layout_hash()
    sizes = tuple(getattr(library, f"flash_attn_{name}_params_size")() for name in PARAMS)
    expected = tuple(packer.size for packer in PARAMS.values())
    if found != _abi.LAYOUT_HASH or sizes != expected:
        raise RuntimeError(
            f"{library._name} was built from another version of flash-attn (layout {found:016x} of {sizes} "
            f"bytes, this package has {_abi.LAYOUT_HASH:016x} of {expected}): rebuild it with `{REBUILD}`"
        )


def _planner(function: Callable[..., int]) -> Callable[[bytes, ctypes.Structure], int]:
    return lambda packed, plan: function(packed, ctypes.byref(plan))


def bind(library: ctypes.CDLL, path: Path) -> Library:
    """Return the functions of a library that was loaded from `path`.

    Raises:
        RuntimeError: a function is missing, or has another layout of arguments.
    """
    _declare(library)
    _check_layout(library)
    count = library.flash_attn_kernel_count()
    targets = library.flash_attn_targets().decode()
    return Library(
        path=path,
        forward=library.flash_attn_forward,
        backward=library.flash_attn_backward,
        cache=library.flash_attn_cache,
        rotary=library.flash_attn_rotary,
        dropout_probs=library.flash_attn_dropout_probs,
        forward_kernel=library.flash_attn_forward_kernel,
        backward_kernel=library.flash_attn_backward_kernel,
        cache_kernel=library.flash_attn_cache_kernel,
        plan_backward=_planner(library.flash_attn_plan_backward),
        plan_cache=_planner(library.flash_attn_plan_cache),
        draws_tiles=library.flash_attn_draws_tiles,
        last_error=library.flash_attn_last_error,
        kernels=tuple(library.flash_attn_kernel_key(i).decode() for i in range(count)),
        targets=tuple(filter(None, targets.split(","))),
        family=forced_family(),
    )


def open_library(path: Path) -> Library:
    """Load the library at `path`.

    Raises:
        RuntimeError: it is missing, cut short, or cannot be loaded, or as in `bind`.
    """
    return bind(_open(path), path)


@cache
def load() -> Library:
    """Load the package's own library, once. Raises as `open_library` and `forced_family` do."""
    return open_library(library_path())
