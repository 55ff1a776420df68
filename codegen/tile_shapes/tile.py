"""What all tiles have."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from codegen import axes
from codegen.tile_shapes.formula import Sum


@dataclass(frozen=True)
class Tile(ABC):
    """A thread block's share of the work: ``block_m`` queries meet ``block_n`` keys at a time.

    The fields are the arguments of the C++ template ``TEMPLATE`` + Tile, in order. ``TEMPLATE`` + Config
    describes a kernel with such a tile.
    """

    TEMPLATE: ClassVar[str]
    block_m: int
    block_n: int

    @abstractmethod
    def smem(self, head_dim: int) -> Sum:
        """Dynamic shared memory of a block, in bytes."""

    @abstractmethod
    def registers(self, head_dim: int) -> Sum:
        """Registers per thread below which accumulators must spill."""

    @abstractmethod
    def problems(self, family: axes.Family, head_dim: int, resident: bool) -> list[str]:
        """What keeps the tile from running on the family, with the arithmetic.

        With ``resident``, all blocks that it asks for must fit on a multiprocessor of each of its devices.
        """

    def smem_bytes(self, head_dim: int) -> int:
        """The value of ``smem``: what a launch asks for."""
        return self.smem(head_dim).value

    def constants(self, head_dim: int) -> dict[str, int]:
        """Members of the C++ Config that must have the values with which this module counts."""
        return {"kSharedBytes": self.smem_bytes(head_dim)}

    def smem_problems(self, family: axes.Family, head_dim: int) -> list[str]:
        """What keeps a block from having its shared memory."""
        smem = self.smem(head_dim)
        if smem.value <= family.smem_per_block:
            return []
        return [f"shared memory per block: {smem} > {family.smem_per_block} bytes"]
