"""The tile of kernels with wgmma."""

from dataclasses import dataclass
from typing import ClassVar

from codegen import axes
from codegen.tile_shapes.formula import Sum, Term
from codegen.tile_shapes.tile import Tile

REGISTER_OVERHEAD = 24
"""Registers per thread besides fragments of O, S and P; those of Q and K stay in shared memory."""

SLAB = 64
"""Columns of a slab: Q, K and V are stored in whole ones."""


@dataclass(frozen=True)
class WgmmaForwardTile(Tile):
    """Tile of a forward kernel with wgmma.

    ``stages`` is the number of buffers for K, and for V; ``query_stages`` that for Q. A tile with
    ``head_dim_v`` serves heads of V up to that, one with ``max_keys`` calls whose queries see no more keys
    on average; 0 stands for the head dim of Q and K, and for any number of keys.
    """

    TEMPLATE: ClassVar[str] = "wgmma::Forward"
    stages: int
    query_stages: int
    head_dim_v: int = 0
    max_keys: int = 0

    BARRIER_BYTES: ClassVar[int] = 256
    CONSUMER_REGISTERS: ClassVar[dict[int, int]] = {2: 232, 3: 160}

    def smem(self, head_dim: int) -> Sum:
        columns, columns_v = (-(-n // SLAB) * SLAB for n in (head_dim, self.head_dim_v or head_dim))
        query_rows = {"query_stages": self.query_stages, "block_m": self.block_m}
        key_rows = {"stages": self.stages, "block_n": self.block_n}
        return Sum(
            (
                Term("Q", {"bytes": 2, **query_rows, "columns": columns}),
                Term("K", {"bytes": 2, **key_rows, "columns": columns}),
                Term("V", {"bytes": 2, **key_rows, "columns": columns_v}),
                Term("barriers", {"bytes": self.BARRIER_BYTES}),
            )
        )

    def registers(self, head_dim: int) -> Sum:
        """Registers per consumer thread below which fp32 O and S and 16-bit P must spill."""
        rows, threads = {"rows": 64}, {"threads": 128}
        return Sum(
            (
                Term("O", {**rows, "head_dim_v": self.head_dim_v or head_dim}, threads),
                Term("S", {**rows, "block_n": self.block_n}, threads),
                Term("P", {**rows, "block_n": self.block_n}, {**threads, "per_register": 2}),
                Term("overhead", {"registers": REGISTER_OVERHEAD}),
            )
        )

    def constants(self, head_dim: int) -> dict[str, int]:
        consumers = self.block_m // 64
        return {**super().constants(head_dim), "kConsumerRegisters": self.CONSUMER_REGISTERS[consumers]}

    def problems(self, family: axes.Family, head_dim: int, resident: bool) -> list[str]:
        problems = []
        available = self.CONSUMER_REGISTERS.get(self.block_m // 64)
        registers = self.registers(head_dim)
        if available is None or self.block_m % 64:
            problems.append(f"block_m = {self.block_m}, not 128 or 192: two or three warpgroups of 64 rows")
        elif registers.value > available:
            problems.append(f"registers per consumer: {registers} > {available}")
        if self.block_n % 16 or not 16 <= self.block_n <= 256:
            problems.append(f"block_n = {self.block_n}, not a multiple of 16 up to 256")
        if self.stages < 2:
            problems.append(f"stages = {self.stages}: the next V is waited for before this one is released")
        return [*problems, *self.smem_problems(family, head_dim)]
