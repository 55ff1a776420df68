"""The axes of the kernel matrix as data: families, architectures, dtypes, head dims, masks, directions."""

from collections.abc import Mapping
from dataclasses import dataclass

KIB = 1024

DTYPES = ("fp16", "bf16")
HEAD_DIMS = (32, 64, 96, 128, 192, 256)
DIRECTIONS = ("forward", "backward", "split")
MASKS = ("full", "causal", "windowed")

PASSES = {"forward": "forward", "backward": "backward", "split": "cache"}
"""What the kernels of a direction are called in C++: folder, launcher and parameter struct."""


DRAWING_DESIGNS = frozenset({"wgmma"})
"""Kernel designs whose thread blocks draw tiles from a counter in the GPU's memory."""


@dataclass(frozen=True)
class Family:
    """GPUs that share kernels and tiles, and their limits.

    ``directions`` maps each direction that has been written for the family to the kernel design that serves
    it: a folder under ``templates/`` and C++ namespace. A family without any is known but cannot be built.
    ``code_suffix`` "a" asks nvcc for instructions that only the family's own architectures have: no other
    GPU, newer ones included, runs that code or its PTX.
    """

    name: str
    dtypes: tuple[str, ...]
    directions: Mapping[str, str]
    smem_per_block: int
    smem_per_sm: int
    regs_per_sm: int = 65536
    regs_per_thread: int = 255
    smem_reserved_per_block: int = 1 * KIB
    code_suffix: str = ""

    @property
    def draws_tiles(self) -> bool:
        """Whether a kernel of the family draws tiles from a counter."""
        return not DRAWING_DESIGNS.isdisjoint(self.directions.values())


@dataclass(frozen=True)
class Arch:
    """A compute capability, the family that serves it and the first CUDA that knows it."""

    capability: int
    family: str
    min_cuda: tuple[int, int]


FAMILIES = {
    family.name: family
    for family in (
        Family("sm75", ("fp16",), {}, 64 * KIB, 64 * KIB),
        Family("sm80", DTYPES, {"forward": "mma", "backward": "mma", "split": "mma"}, 163 * KIB, 164 * KIB),
        Family("sm86", DTYPES, {"forward": "mma", "backward": "mma", "split": "mma"}, 99 * KIB, 100 * KIB),
        Family(
            "sm90",
            DTYPES,
            {"forward": "wgmma", "backward": "mma", "split": "wgmma"},
            227 * KIB,
            228 * KIB,
            code_suffix="a",
        ),
    )
}

ARCHS = {
    arch.capability: arch
    for arch in (
        Arch(75, "sm75", (10, 0)),
        Arch(80, "sm80", (11, 0)),
        Arch(86, "sm86", (11, 1)),
        Arch(89, "sm86", (11, 8)),
        Arch(90, "sm90", (12, 0)),
        Arch(100, "sm80", (12, 8)),
        Arch(110, "sm80", (13, 0)),
        Arch(120, "sm86", (12, 8)),
    )
}


EMBEDDED = frozenset({72, 87})
"""Capabilities of embedded GPUs, on which no cubin of their major version's other GPUs runs."""


def built_families() -> list[Family]:
    """The families that have kernels."""
    return [family for family in FAMILIES.values() if family.directions]


def is_legal(family: str, direction: str, dtype: str, mask: str) -> bool:
    """Whether a family has kernels for this direction, dtype and mask; every head dim exists for each."""
    row = FAMILIES[family]
    return direction in row.directions and dtype in row.dtypes and mask in masks_of(direction)


def masks_of(direction: str) -> tuple[str, ...]:
    """The mask classes with kernels of their own; with split keys, the general one serves all masks."""
    return ("windowed",) if direction == "split" else MASKS
