"""The tile table and the check that a tile fits its family's shared memory and registers."""

from dataclasses import dataclass
from typing import ClassVar

from codegen import CodegenError, axes

REGISTER_OVERHEAD = 40
"""Registers per thread besides the fp32 O and S fragments: addresses, softmax state, Q, K and V fragments."""


HOPPER_REGISTER_OVERHEAD = 24
"""The same for kernels with wgmma, whose Q and K fragments stay in shared memory."""


class TileError(CodegenError):
    """A tile that does not fit its family, or a missing one."""


@dataclass(frozen=True)
class ForwardTile:
    """Tile of a forward kernel; its fields are the arguments of the C++ ``ForwardTile``, in order.

    ``min_blocks`` is the number of thread blocks per multiprocessor that ``__launch_bounds__`` asks for.
    With ``warps_per_row`` = 2, a pair of warps shares rows: each computes half of the columns of S and of O.
    """

    block_m: int
    block_n: int
    warps: int
    min_blocks: int
    warps_per_row: int = 1

    @property
    def rows_per_warp(self) -> int:
        return self.block_m * self.warps_per_row // self.warps

    def smem_bytes(self, head_dim: int) -> int:
        """Dynamic shared memory of a block: Q, K and V, two bytes an element, and what pairs exchange."""
        return 2 * (self.block_m * head_dim + 2 * self.block_n * head_dim) + self.pair_bytes

    @property
    def pair_bytes(self) -> int:
        """Shared memory in which pairs exchange P, two bytes an element, and an fp32 per row and warp."""
        return self.block_m * self.block_n * 2 + self.block_m * 2 * 4 if self.warps_per_row == 2 else 0

    def register_floor(self, head_dim: int) -> int:
        """Registers per thread below which the fp32 O and S fragments must spill."""
        columns = (head_dim + self.block_n) // self.warps_per_row
        return self.rows_per_warp * columns // 32 + REGISTER_OVERHEAD


@dataclass(frozen=True)
class HopperTile:
    """Tile of a forward kernel with wgmma; its fields are the arguments of the C++ ``ForwardTile``, in order.

    ``stages`` is the number of buffers for K, and for V; ``query_stages`` that for Q. A tile with
    ``head_dim_v`` serves heads of V up to that, one with ``max_keys`` calls whose queries see no more keys
    on average; 0 stands for the head dim of Q and K, and for any number of keys.
    """

    block_m: int
    block_n: int
    stages: int
    query_stages: int
    head_dim_v: int = 0
    max_keys: int = 0

    BARRIER_BYTES: ClassVar[int] = 256
    CONSUMER_REGISTERS: ClassVar[dict[int, int]] = {2: 232, 3: 160}

    def smem_bytes(self, head_dim: int) -> int:
        """Dynamic shared memory of a block: Q, K and V in slabs of 64 columns, and barriers."""
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


Tile = ForwardTile | HopperTile

# family -> head dim -> mask class, "default", or one of VARIANTS -> tile.
FORWARD_TILES: dict[str, dict[int, dict[str, Tile]]] = {
    "sm80": {
        32: {"default": ForwardTile(128, 64, 4, 3)},
        64: {"default": ForwardTile(128, 128, 4, 2)},
        96: {"default": ForwardTile(128, 64, 4, 2)},
        128: {"default": ForwardTile(128, 64, 4, 2)},
        192: {"default": ForwardTile(128, 128, 8, 1)},
        256: {"default": ForwardTile(128, 64, 8, 1, 2), "roomy": ForwardTile(64, 64, 4, 2, 2)},
    },
    "sm86": {
        32: {"default": ForwardTile(128, 64, 4, 3)},
        64: {"default": ForwardTile(128, 128, 4, 2)},
        96: {"default": ForwardTile(128, 64, 4, 2), "causal": ForwardTile(64, 64, 4, 2)},
        128: {"default": ForwardTile(64, 64, 4, 2), "full": ForwardTile(128, 32, 4, 2)},
        192: {"default": ForwardTile(128, 64, 8, 1)},
        256: {"default": ForwardTile(64, 64, 4, 1)},
    },
    "sm90": {
        32: {"default": HopperTile(192, 128, 3, 2)},
        64: {"default": HopperTile(192, 128, 3, 2)},
        96: {"default": HopperTile(192, 96, 3, 1)},
        128: {"default": HopperTile(192, 80, 3, 2), "short": HopperTile(192, 64, 4, 2, max_keys=512)},
        192: {"default": HopperTile(128, 96, 2, 1), "narrow": HopperTile(192, 80, 3, 1, head_dim_v=128)},
        256: {"default": HopperTile(128, 80, 2, 1)},
    },
}

VARIANTS = ("roomy", "short", "narrow")
"""Keys of the tile table for tiles that the launcher takes instead of the default where they suit."""


def forward_tile(family: str, head_dim: int, mask: str) -> Tile:
    """The checked tile of one kernel; raises TileError if there is none or if it does not fit."""
    row = FORWARD_TILES.get(family, {}).get(head_dim, {})
    tile = row.get(mask) or row.get("default")
    if tile is None:
        raise TileError(
            f"no forward tile for family {family}, head_dim {head_dim}, mask {mask}: add it to FORWARD_TILES"
        )
    check_tile(tile, axes.FAMILIES[family], head_dim, mask)
    return tile


def tile_variants(family: str, head_dim: int) -> dict[str, Tile]:
    """The checked tiles that are tried before the default one, by name.

    A roomy tile is for devices with more shared memory per SM than the family counts on.
    """
    row = FORWARD_TILES[family][head_dim]
    variants = {name: row[name] for name in VARIANTS if name in row}
    for name, tile in variants.items():
        check_tile(tile, axes.FAMILIES[family], head_dim, name, resident=name != "roomy")
    return variants


def check_tile(tile: Tile, family: axes.Family, head_dim: int, mask: str, resident: bool = True) -> None:
    """Raise TileError, with the arithmetic, if the tile cannot run on the family.

    With ``resident``, ``min_blocks`` of it must fit on a multiprocessor of every device of the family.
    """
    if isinstance(tile, HopperTile):
        problems = _hopper_problems(tile, family, head_dim)
    else:
        problems = [
            *_shape_problems(tile, head_dim),
            *_smem_problems(tile, family, head_dim, resident),
            *_register_problems(tile, family, head_dim),
        ]
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise TileError(
            f"{tile} refused for family {family.name}, head_dim {head_dim}, mask {mask}:\n{listed}"
        )


def _hopper_problems(tile: HopperTile, family: axes.Family, head_dim: int) -> list[str]:
    problems = []
    registers = tile.CONSUMER_REGISTERS.get(tile.block_m // 64)
    if registers is None or tile.block_m % 64:
        problems.append(f"block_m = {tile.block_m}, not 128 or 192: two or three warpgroups of 64 rows")
    elif tile.register_floor(head_dim) > registers:
        problems.append(
            f"registers per consumer: (dv + block_n) / 2 + block_n / 4 + overhead"
            f" = {tile.register_floor(head_dim)} > {registers}"
        )
    if tile.block_n % 16 or not 16 <= tile.block_n <= 256:
        problems.append(f"block_n = {tile.block_n}, not a multiple of 16 up to 256")
    if tile.stages < 2:
        problems.append(f"stages = {tile.stages}: the next V is waited for before this one is released")
    if tile.smem_bytes(head_dim) > family.smem_per_block:
        problems.append(
            f"shared memory per block: Q, K and V stages and barriers = {tile.smem_bytes(head_dim)}"
            f" > {family.smem_per_block} bytes"
        )
    return problems


def _shape_problems(tile: ForwardTile, head_dim: int) -> list[str]:
    problems = []
    if tile.warps_per_row not in (1, 2):
        problems.append(f"warps_per_row = {tile.warps_per_row}, not 1 or 2")
    if tile.block_m * tile.warps_per_row % (16 * tile.warps):
        problems.append(
            "rows per warp: block_m * warps_per_row / warps"
            f" = {tile.block_m} * {tile.warps_per_row} / {tile.warps}"
            f" = {tile.block_m * tile.warps_per_row / tile.warps:g}, not a multiple of 16"
        )
    if tile.block_n % (16 * tile.warps_per_row):
        problems.append(
            f"keys per warp: block_n / warps_per_row = {tile.block_n} / {tile.warps_per_row}"
            f" = {tile.block_n / tile.warps_per_row:g}, not a multiple of 16"
        )
    copied = tile.warps * 32 // (8 if head_dim % 64 == 0 else 4)
    for name, rows in (("block_m", tile.block_m), ("block_n", tile.block_n)):
        if rows % copied:
            problems.append(
                f"{name} = {rows}, not a multiple of the {copied} rows that {tile.warps} warps copy at once"
            )
    if tile.warps_per_row == 2 and head_dim % 128:
        problems.append(
            f"columns of O per warp: head_dim / 2 = {head_dim} / 2 = {head_dim / 2:g}, not a multiple of 64"
        )
    return problems


def _smem_problems(tile: ForwardTile, family: axes.Family, head_dim: int, resident: bool) -> list[str]:
    smem = tile.smem_bytes(head_dim)
    pairs = f" + {tile.pair_bytes} for pairs" if tile.pair_bytes else ""
    formula = (
        f"2 * (block_m * d + 2 * block_n * d){pairs}"
        f" = 2 * ({tile.block_m} * {head_dim} + 2 * {tile.block_n} * {head_dim}){pairs} = {smem}"
    )
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


def _register_problems(tile: ForwardTile, family: axes.Family, head_dim: int) -> list[str]:
    threads = tile.min_blocks * tile.warps * 32
    limit = min(family.regs_per_thread, family.regs_per_sm // threads)
    floor = tile.register_floor(head_dim)
    if floor <= limit:
        return []
    return [
        f"registers per thread: rows_per_warp * (d + block_n) / warps_per_row / 32 + overhead"
        f" = {tile.rows_per_warp} * ({head_dim} + {tile.block_n}) / {tile.warps_per_row} / 32"
        f" + {REGISTER_OVERHEAD} = {floor}"
        f" > min({family.regs_per_thread}, {family.regs_per_sm} / ({tile.min_blocks} * {tile.warps} * 32))"
        f" = {limit}"
    ]


def wgmma_columns() -> list[int]:
    """The widths N of wgmma that kernels use: keys of a block for Q K^T, the head dim of V for P V."""
    tiles = [(d, tile) for d, row in FORWARD_TILES["sm90"].items() for tile in row.values()]
    hopper = [(d, tile) for d, tile in tiles if isinstance(tile, HopperTile)]
    return sorted({n for d, tile in hopper for n in (tile.head_dim_v or d, tile.block_n)})
