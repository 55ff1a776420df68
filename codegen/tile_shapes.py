"""The shapes of tiles: what each costs in shared memory and registers, and why it may not fit a family."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

from codegen import axes

REGISTER_OVERHEAD = 40
"""Registers per thread besides the fp32 accumulators: addresses, softmax state, fragments of the operands."""

HOPPER_REGISTER_OVERHEAD = 24
"""The same for kernels with wgmma, whose Q and K fragments stay in shared memory."""


class Tile(Protocol):
    """A frozen dataclass whose fields are the arguments of the C++ template ``TEMPLATE`` + Tile, in order.

    ``TEMPLATE`` + Config describes a kernel with such a tile.
    """

    TEMPLATE: ClassVar[str]

    @property
    def block_m(self) -> int:
        """Rows of queries."""

    def smem_bytes(self, head_dim: int) -> int:
        """Dynamic shared memory of a block."""

    def problems(self, family: axes.Family, head_dim: int, resident: bool) -> list[str]:
        """What keeps the tile from running on the family, with the arithmetic.

        With ``resident``, all blocks that it asks for must fit on a multiprocessor of each of its devices.
        """


@dataclass(frozen=True)
class ForwardTile:
    """Tile of a forward kernel with mma.sync.

    ``min_blocks`` is the number of thread blocks per multiprocessor that ``__launch_bounds__`` asks for.
    With ``warps_per_row`` = 2, a pair of warps shares rows: each computes half of the columns of S and of O.
    """

    TEMPLATE: ClassVar[str] = "mma::Forward"
    block_m: int
    block_n: int
    warps: int
    min_blocks: int
    warps_per_row: int = 1

    @property
    def rows_per_warp(self) -> int:
        return self.block_m * self.warps_per_row // self.warps

    def smem_bytes(self, head_dim: int) -> int:
        """Q, K and V, two bytes an element, and what pairs exchange."""
        return 2 * (self.block_m * head_dim + 2 * self.block_n * head_dim) + self.pair_bytes

    @property
    def pair_bytes(self) -> int:
        """Shared memory in which pairs exchange P, two bytes an element, and an fp32 per row and warp."""
        return self.block_m * self.block_n * 2 + self.block_m * 2 * 4 if self.warps_per_row == 2 else 0

    def register_floor(self, head_dim: int) -> int:
        """Registers per thread below which the fp32 O and S fragments must spill."""
        columns = (head_dim + self.block_n) // self.warps_per_row
        return self.rows_per_warp * columns // 32 + REGISTER_OVERHEAD

    def problems(self, family: axes.Family, head_dim: int, resident: bool) -> list[str]:
        pairs = f" + {self.pair_bytes} for pairs" if self.pair_bytes else ""
        shared = (
            f"2 * (block_m * d + 2 * block_n * d){pairs}"
            f" = 2 * ({self.block_m} * {head_dim} + 2 * {self.block_n} * {head_dim}){pairs}"
            f" = {self.smem_bytes(head_dim)}"
        )
        registers = (
            "rows_per_warp * (d + block_n) / warps_per_row / 32 + overhead"
            f" = {self.rows_per_warp} * ({head_dim} + {self.block_n}) / {self.warps_per_row} / 32"
            f" + {REGISTER_OVERHEAD} = {self.register_floor(head_dim)}"
        )
        return [
            *self._shape_problems(head_dim),
            *_copy_problems(self, head_dim),
            *_smem_problems(self, family, head_dim, shared, resident),
            *_register_problems(self, family, head_dim, registers),
        ]

    def _shape_problems(self, head_dim: int) -> list[str]:
        problems = []
        if self.warps_per_row not in (1, 2):
            problems.append(f"warps_per_row = {self.warps_per_row}, not 1 or 2")
        if self.block_m * self.warps_per_row % (16 * self.warps):
            problems.append(
                "rows per warp: block_m * warps_per_row / warps"
                f" = {self.block_m} * {self.warps_per_row} / {self.warps}"
                f" = {self.block_m * self.warps_per_row / self.warps:g}, not a multiple of 16"
            )
        if self.block_n % (16 * self.warps_per_row):
            problems.append(
                f"keys per warp: block_n / warps_per_row = {self.block_n} / {self.warps_per_row}"
                f" = {self.block_n / self.warps_per_row:g}, not a multiple of 16"
            )
        if self.warps_per_row == 2 and head_dim % 128:
            problems.append(
                f"columns of O per warp: head_dim / 2 = {head_dim} / 2 = {head_dim / 2:g},"
                " not a multiple of 64"
            )
        return problems


@dataclass(frozen=True)
class BackwardTile:
    """Tile of a backward kernel with mma.sync: ``block_n`` keys meet ``block_m`` queries at a time.

    Half of the ``warps`` hold dV and half dK: a pair of one each shares ``block_n / (warps / 2)`` keys, and
    takes as many queries at once as its scores have registers. Q and dO have two stages, P and dS
    ``score_stages``; ``min_blocks`` is as in ForwardTile.
    """

    TEMPLATE: ClassVar[str] = "mma::Backward"
    block_m: int
    block_n: int
    warps: int
    min_blocks: int
    score_stages: int

    @property
    def keys_per_warp(self) -> int:
        return self.block_n // (self.warps // 2)

    @property
    def queries_at_once(self) -> int:
        return min(self.block_m, 2048 // self.keys_per_warp)

    @property
    def barriers(self) -> int:
        """One of all warps, and one of each pair for each of the parts that it splits ``block_m`` into."""
        return 1 + self.warps // 2 * (self.block_m // self.queries_at_once)

    def smem_bytes(self, head_dim: int) -> int:
        """K, V, the stages of Q, dO and scores, two bytes an element; those of LSE and D, four bytes."""
        elements = 2 * self.block_n * head_dim + 4 * self.block_m * head_dim
        return 2 * (elements + self.score_stages * self.block_m * self.block_n) + 2 * 2 * self.block_m * 4

    def register_floor(self, head_dim: int) -> int:
        """Registers per thread below which an fp32 gradient and fp32 scores must spill."""
        return self.keys_per_warp * (head_dim + self.queries_at_once) // 32 + REGISTER_OVERHEAD

    def problems(self, family: axes.Family, head_dim: int, resident: bool) -> list[str]:
        if problems := self._shape_problems():
            return problems
        shared = (
            "2 * (2 * block_n * d + 4 * block_m * d + score_stages * block_m * block_n) + 16 * block_m"
            f" = 2 * (2 * {self.block_n} * {head_dim} + 4 * {self.block_m} * {head_dim}"
            f" + {self.score_stages} * {self.block_m} * {self.block_n}) + 16 * {self.block_m}"
            f" = {self.smem_bytes(head_dim)}"
        )
        registers = (
            "keys_per_warp * (d + queries_at_once) / 32 + overhead"
            f" = {self.keys_per_warp} * ({head_dim} + {self.queries_at_once}) / 32"
            f" + {REGISTER_OVERHEAD} = {self.register_floor(head_dim)}"
        )
        return [
            *_copy_problems(self, head_dim),
            *_smem_problems(self, family, head_dim, shared, resident),
            *_register_problems(self, family, head_dim, registers),
        ]

    def _shape_problems(self) -> list[str]:
        if self.warps % 2 or self.warps < 2:
            return [f"warps = {self.warps}, not pairs"]
        problems = []
        if self.block_m not in (16, 32, 64, 128):
            problems.append(
                f"block_m = {self.block_m}, not 16, 32, 64 or 128: a divisor of the workspace's rows"
            )
        keys = self.block_n / (self.warps // 2)
        if keys not in (16, 32, 64):
            problems.append(
                f"keys per warp: block_n / (warps / 2) = {self.block_n} / {self.warps // 2} = {keys:g},"
                " not 16, 32 or 64"
            )
        if self.score_stages not in (1, 2):
            problems.append(f"score_stages = {self.score_stages}, not 1 or 2")
        if not problems and self.barriers > 16:
            problems.append(
                f"barriers: 1 + pairs * block_m / queries_at_once = {self.barriers}, more than 16"
            )
        return problems


@dataclass(frozen=True)
class SplitTile:
    """Tile of a forward kernel with mma.sync for few queries and split keys, read from a KV cache.

    ``warps_m`` warps share the rows among them and ``warps_n`` the keys of a block; K and V have ``stages``
    buffers each. ``min_blocks`` is as in ForwardTile.
    """

    TEMPLATE: ClassVar[str] = "mma::Split"
    block_m: int
    block_n: int
    warps_m: int
    warps_n: int
    stages: int
    min_blocks: int

    @property
    def warps(self) -> int:
        return self.warps_m * self.warps_n

    def smem_bytes(self, head_dim: int) -> int:
        """Q and the stages of K and V, two bytes an element; in the end O, maximum and sum of each warp."""
        ring = 2 * head_dim * (self.block_m + 2 * self.stages * self.block_n)
        return max(ring, self.warps_n * self.block_m * (head_dim + 8 + 2) * 4)

    def register_floor(self, head_dim: int) -> int:
        """Registers per thread below which the fp32 O and S fragments must spill."""
        columns = head_dim + self.block_n // self.warps_n
        return self.block_m // self.warps_m * columns // 32 + REGISTER_OVERHEAD

    def problems(self, family: axes.Family, head_dim: int, resident: bool) -> list[str]:
        problems = [
            f"{name} = {whole / parts:g}, not a multiple of 16"
            for name, whole, parts in (
                ("block_m / warps_m", self.block_m, self.warps_m),
                ("block_n / warps_n", self.block_n, self.warps_n),
            )
            if whole % (16 * parts)
        ]
        shared = (
            "max(2 * d * (block_m + 2 * stages * block_n), warps_n * block_m * (d + 10) * 4)"
            f" = {self.smem_bytes(head_dim)}"
        )
        registers = (
            "block_m / warps_m * (d + block_n / warps_n) / 32 + overhead"
            f" = {self.block_m} / {self.warps_m} * ({head_dim} + {self.block_n} / {self.warps_n}) / 32"
            f" + {REGISTER_OVERHEAD} = {self.register_floor(head_dim)}"
        )
        return [
            *problems,
            *_smem_problems(self, family, head_dim, shared, resident),
            *_register_problems(self, family, head_dim, registers),
        ]


@dataclass(frozen=True)
class HopperTile:
    """Tile of a forward kernel with wgmma.

    ``stages`` is the number of buffers for K, and for V; ``query_stages`` that for Q. A tile with
    ``head_dim_v`` serves heads of V up to that, one with ``max_keys`` calls whose queries see no more keys
    on average; 0 stands for the head dim of Q and K, and for any number of keys.
    """

    TEMPLATE: ClassVar[str] = "wgmma::Forward"
    block_m: int
    block_n: int
    stages: int
    query_stages: int
    head_dim_v: int = 0
    max_keys: int = 0

    BARRIER_BYTES: ClassVar[int] = 256
    CONSUMER_REGISTERS: ClassVar[dict[int, int]] = {2: 232, 3: 160}

    def smem_bytes(self, head_dim: int) -> int:
        """Q, K and V in slabs of 64 columns, and barriers."""
        d, dv = (-(-n // 64) * 64 for n in (head_dim, self.head_dim_v or head_dim))
        return (
            2 * (self.query_stages * self.block_m * d + self.stages * self.block_n * (d + dv))
            + self.BARRIER_BYTES
        )

    def register_floor(self, head_dim: int) -> int:
        """Registers per consumer thread below which fp32 O and S and 16-bit P must spill."""
        return (
            ((self.head_dim_v or head_dim) + self.block_n) // 2 + self.block_n // 4 + HOPPER_REGISTER_OVERHEAD
        )

    def problems(self, family: axes.Family, head_dim: int, resident: bool) -> list[str]:
        problems = []
        registers = self.CONSUMER_REGISTERS.get(self.block_m // 64)
        if registers is None or self.block_m % 64:
            problems.append(f"block_m = {self.block_m}, not 128 or 192: two or three warpgroups of 64 rows")
        elif self.register_floor(head_dim) > registers:
            problems.append(
                f"registers per consumer: (dv + block_n) / 2 + block_n / 4 + overhead"
                f" = {self.register_floor(head_dim)} > {registers}"
            )
        if self.block_n % 16 or not 16 <= self.block_n <= 256:
            problems.append(f"block_n = {self.block_n}, not a multiple of 16 up to 256")
        if self.stages < 2:
            problems.append(f"stages = {self.stages}: the next V is waited for before this one is released")
        if self.smem_bytes(head_dim) > family.smem_per_block:
            problems.append(
                f"shared memory per block: Q, K and V stages and barriers = {self.smem_bytes(head_dim)}"
                f" > {family.smem_per_block} bytes"
            )
        return problems


def _copy_problems(tile: ForwardTile | BackwardTile, head_dim: int) -> list[str]:
    copied = tile.warps * 32 // (8 if head_dim % 64 == 0 else 4)
    return [
        f"{name} = {rows}, not a multiple of the {copied} rows that {tile.warps} warps copy at once"
        for name, rows in (("block_m", tile.block_m), ("block_n", tile.block_n))
        if rows % copied
    ]


def _smem_problems(
    tile: ForwardTile | BackwardTile | SplitTile,
    family: axes.Family,
    head_dim: int,
    formula: str,
    resident: bool,
) -> list[str]:
    smem = tile.smem_bytes(head_dim)
    problems = []
    if smem > family.smem_per_block:
        problems.append(f"shared memory per block: {formula} > {family.smem_per_block} bytes")
    needed = tile.min_blocks * (smem + family.smem_reserved_per_block)
    if resident and needed > family.smem_per_sm:
        problems.append(
            f"shared memory per SM: min_blocks * (smem + reserved) = {tile.min_blocks} *"
            f" ({smem} + {family.smem_reserved_per_block}) = {needed} > {family.smem_per_sm} bytes,"
            f" with smem = {formula}"
        )
    return problems


def _register_problems(
    tile: ForwardTile | BackwardTile | SplitTile, family: axes.Family, head_dim: int, formula: str
) -> list[str]:
    threads = tile.min_blocks * tile.warps * 32
    limit = min(family.regs_per_thread, family.regs_per_sm // threads)
    if tile.register_floor(head_dim) <= limit:
        return []
    return [
        f"registers per thread: {formula}"
        f" > min({family.regs_per_thread}, {family.regs_per_sm} / ({tile.min_blocks} * {tile.warps} * 32))"
        f" = {limit}"
    ]
