"""The tiles of kernels with mma.sync."""

from dataclasses import dataclass
from typing import ClassVar

from codegen import axes
from codegen.abi.limits import WORKSPACE_ROWS
from codegen.tile_shapes.formula import Sum, Term
from codegen.tile_shapes.tile import Tile

REGISTER_OVERHEAD = 40
"""Registers per thread besides the fp32 accumulators: addresses, softmax state, fragments of the operands."""


@dataclass(frozen=True)
class MmaForwardTile(Tile):
    """Tile of a forward kernel with mma.sync.

    ``min_blocks`` is the number of thread blocks per multiprocessor that ``__launch_bounds__`` asks for.
    With ``warps_per_row`` = 2, a pair of warps shares rows: each computes half of the columns of S and of O.
    """

    TEMPLATE: ClassVar[str] = "mma::Forward"
    warps: int
    min_blocks: int
    warps_per_row: int = 1

    def smem(self, head_dim: int) -> Sum:
        terms = (
            Term("Q", {"bytes": 2, "block_m": self.block_m, "head_dim": head_dim}),
            Term("K, V", {"bytes": 2, "tensors": 2, "block_n": self.block_n, "head_dim": head_dim}),
        )
        exchanged = (
            Term("P of pairs", {"bytes": 2, "block_m": self.block_m, "block_n": self.block_n}),
            Term("rows of pairs", {"bytes": 4, "block_m": self.block_m, "warps_per_row": self.warps_per_row}),
        )
        return Sum(terms + exchanged if self.warps_per_row == 2 else terms)

    def registers(self, head_dim: int) -> Sum:
        threads = {"threads": 32 * self.warps}
        return Sum(
            (
                Term("O", {"block_m": self.block_m, "head_dim": head_dim}, threads),
                Term("S", {"block_m": self.block_m, "block_n": self.block_n}, threads),
                Term("overhead", {"registers": REGISTER_OVERHEAD}),
            )
        )

    def problems(self, family: axes.Family, head_dim: int, resident: bool) -> list[str]:
        return [
            *self._shape_problems(head_dim),
            *_copy_problems(self, head_dim),
            *_cost_problems(self, family, head_dim, resident),
        ]

    def _shape_problems(self, head_dim: int) -> list[str]:
        problems = []
        if self.warps_per_row not in (1, 2):
            problems.append(f"warps_per_row = {self.warps_per_row}, not 1 or 2")
        sharing = {"warps_per_row": self.warps_per_row}
        problems += [
            *_not_multiple(
                Term("rows per warp", {"block_m": self.block_m, **sharing}, {"warps": self.warps}), 16
            ),
            *_not_multiple(Term("keys per warp", {"block_n": self.block_n}, sharing), 16),
        ]
        if self.warps_per_row == 2:
            problems += _not_multiple(Term("columns of O per warp", {"head_dim": head_dim}, sharing), 64)
        return problems


@dataclass(frozen=True)
class MmaBackwardTile(Tile):
    """Tile of a backward kernel with mma.sync.

    Half of the ``warps`` hold dV and half dK: a pair of one each shares ``block_n / (warps / 2)`` keys, and
    takes as many queries at once as its scores have registers. Q and dO have two stages, P and dS
    ``score_stages``; ``min_blocks`` is as in MmaForwardTile.
    """

    TEMPLATE: ClassVar[str] = "mma::Backward"
    warps: int
    min_blocks: int
    score_stages: int

    SCORES_AT_ONCE: ClassVar[int] = 2048  # of a pair
    BARRIERS: ClassVar[int] = 16  # that a block has

    @property
    def pairs(self) -> int:
        return self.warps // 2

    @property
    def keys_per_warp(self) -> Term:
        return Term("keys per warp", {"block_n": self.block_n}, {"pairs": self.pairs})

    @property
    def queries_at_once(self) -> int:
        return min(self.block_m, self.SCORES_AT_ONCE // self.keys_per_warp.value)

    @property
    def modified_queries_at_once(self) -> int:
        """The same of the kernel with score modifiers, whose scores need twice the registers."""
        return min(self.block_m, self.SCORES_AT_ONCE // 2 // self.keys_per_warp.value)

    def constants(self, head_dim: int) -> dict[str, int]:
        return {
            **super().constants(head_dim),
            "kPlainChunk": self.queries_at_once,
            "kModifiedChunk": self.modified_queries_at_once,
        }

    @property
    def barriers(self) -> Sum:
        """Barriers of a block of the kernel with score modifiers, which needs most."""
        at_once = {"modified_queries_at_once": self.modified_queries_at_once}
        parts = {"pairs": self.pairs, "block_m": self.block_m}, at_once
        return Sum((Term("all warps", {"barriers": 1}), Term("each pair's parts of block_m", *parts)))

    def smem(self, head_dim: int) -> Sum:
        pair = {"tensors": 2}
        query_rows = {"stages": 2, "block_m": self.block_m}
        scores = {"score_stages": self.score_stages, "block_m": self.block_m, "block_n": self.block_n}
        return Sum(
            (
                Term("K, V", {"bytes": 2, **pair, "block_n": self.block_n, "head_dim": head_dim}),
                Term("Q, dO", {"bytes": 2, **pair, **query_rows, "head_dim": head_dim}),
                Term("P, then dS", {"bytes": 2, **scores}),
                Term("LSE, D", {"bytes": 4, **pair, **query_rows}),
            )
        )

    def registers(self, head_dim: int) -> Sum:
        keys, lanes = {"keys_per_warp": self.keys_per_warp.value}, {"lanes": 32}
        return Sum(
            (
                Term("dK or dV", {**keys, "head_dim": head_dim}, lanes),
                Term("scores", {**keys, "queries_at_once": self.queries_at_once}, lanes),
                Term("overhead", {"registers": REGISTER_OVERHEAD}),
            )
        )

    def problems(self, family: axes.Family, head_dim: int, resident: bool) -> list[str]:
        if problems := self._shape_problems():
            return problems
        return [*_copy_problems(self, head_dim), *_cost_problems(self, family, head_dim, resident)]

    def _shape_problems(self) -> list[str]:
        if self.warps % 2 or self.warps < 2:
            return [f"warps = {self.warps}, not pairs"]
        problems = []
        for name, rows in (("block_m", self.block_m), ("block_n", self.block_n)):
            if rows % 16 or WORKSPACE_ROWS.value % rows:
                problems.append(f"{name} = {rows}, not a multiple of 16 that divides {WORKSPACE_ROWS}")
        if self.keys_per_warp.quotient not in (16, 32, 64):
            problems.append(f"{self.keys_per_warp} = {self.keys_per_warp.quotient:g}, not 16, 32 or 64")
        if self.score_stages not in (1, 2):
            problems.append(f"score_stages = {self.score_stages}, not 1 or 2")
        if not problems and self.barriers.value > self.BARRIERS:
            problems.append(f"barriers: {self.barriers}, more than {self.BARRIERS}")
        return problems


@dataclass(frozen=True)
class MmaCacheTile(Tile):
    """Tile of a forward kernel with mma.sync for few queries and split keys, read from a KV cache.

    ``warps_m`` warps share the rows among them and ``warps_n`` the keys of a block; K and V have ``stages``
    buffers each. ``min_blocks`` is as in MmaForwardTile.
    """

    TEMPLATE: ClassVar[str] = "mma::Cache"
    warps_m: int
    warps_n: int
    stages: int
    min_blocks: int

    @property
    def warps(self) -> int:
        return self.warps_m * self.warps_n

    def smem(self, head_dim: int) -> Sum:
        """The larger of what the loop needs and, in the end, the results of the warps."""
        keys = {"tensors": 2, "stages": self.stages, "block_n": self.block_n}
        loop = Sum(
            (
                Term("Q", {"bytes": 2, "block_m": self.block_m, "head_dim": head_dim}),
                Term("K, V", {"bytes": 2, **keys, "head_dim": head_dim}),
            )
        )
        rows = {"warps_n": self.warps_n, "block_m": self.block_m}
        results = Sum(
            (
                Term("O of each warp", {"bytes": 4, **rows, "padded_head_dim": head_dim + 8}),
                Term("maximum, sum of each warp", {"bytes": 4, **rows, "tensors": 2}),
            )
        )
        return max(loop, results, key=lambda need: need.value)

    def registers(self, head_dim: int) -> Sum:
        threads = {"threads": 32 * self.warps}
        return Sum(
            (
                Term("O", {"warps_n": self.warps_n, "block_m": self.block_m, "head_dim": head_dim}, threads),
                Term("S", {"block_m": self.block_m, "block_n": self.block_n}, threads),
                Term("overhead", {"registers": REGISTER_OVERHEAD}),
            )
        )

    def problems(self, family: axes.Family, head_dim: int, resident: bool) -> list[str]:
        return [
            *_not_multiple(Term("rows per warp", {"block_m": self.block_m}, {"warps_m": self.warps_m}), 16),
            *_not_multiple(Term("keys per warp", {"block_n": self.block_n}, {"warps_n": self.warps_n}), 16),
            *_cost_problems(self, family, head_dim, resident),
        ]


def _not_multiple(term: Term, unit: int) -> list[str]:
    return [f"{term} = {term.quotient:g}, not a multiple of {unit}"] if term.quotient % unit else []


def _copy_problems(tile: MmaForwardTile | MmaBackwardTile, head_dim: int) -> list[str]:
    copied = tile.warps * 32 // (8 if head_dim % 64 == 0 else 4)
    return [
        f"{name} = {rows}, not a multiple of the {copied} rows that {tile.warps} warps copy at once"
        for name, rows in (("block_m", tile.block_m), ("block_n", tile.block_n))
        if rows % copied
    ]


def _cost_problems(
    tile: MmaForwardTile | MmaBackwardTile | MmaCacheTile, family: axes.Family, head_dim: int, resident: bool
) -> list[str]:
    problems = tile.smem_problems(family, head_dim)
    smem, blocks = tile.smem(head_dim), {"min_blocks": tile.min_blocks}
    together = Sum(
        (
            Term("the blocks", {**blocks, "smem": smem.value}),
            Term("the system", {**blocks, "reserved": family.smem_reserved_per_block}),
        )
    )
    if resident and together.value > family.smem_per_sm:
        problems.append(f"shared memory per SM: {together} > {family.smem_per_sm} bytes, with smem = {smem}")
    threads = {"threads": 32 * tile.warps}
    share = Term("a thread's share", {"registers": family.regs_per_sm}, {**blocks, **threads})
    limit = min(family.regs_per_thread, share.value)
    registers = tile.registers(head_dim)
    if registers.value > limit:
        problems.append(
            f"registers per thread: {registers} > min({family.regs_per_thread}, {share}) = {limit}"
        )
    return problems
