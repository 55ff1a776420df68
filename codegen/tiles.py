"""The tile table and the check that a tile fits its family's shared memory and registers."""

from dataclasses import dataclass

from codegen import CodegenError, axes

REGISTER_OVERHEAD = 40
"""Registers per thread besides the fp32 O and S fragments: addresses, softmax state, Q, K and V fragments."""


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


# family -> head dim -> mask class, or "default" -> tile. A "roomy" tile is taken instead on devices whose
# multiprocessors have the shared memory for min_blocks of it, which the family's smallest ones have not.
FORWARD_TILES: dict[str, dict[int, dict[str, ForwardTile]]] = {
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
}


def forward_tile(family: str, head_dim: int, mask: str) -> ForwardTile:
    """The checked tile of one kernel; raises TileError if there is none or if it does not fit."""
    row = FORWARD_TILES.get(family, {}).get(head_dim, {})
    tile = row.get(mask) or row.get("default")
    if tile is None:
        raise TileError(
            f"no forward tile for family {family}, head_dim {head_dim}, mask {mask}: add it to FORWARD_TILES"
        )
    check_forward_tile(tile, axes.FAMILIES[family], head_dim, mask)
    return tile


def roomy_tile(family: str, head_dim: int) -> ForwardTile | None:
    """The checked tile for devices with more shared memory per SM than the family counts on, if any."""
    tile = FORWARD_TILES[family][head_dim].get("roomy")
    if tile is not None:
        check_forward_tile(tile, axes.FAMILIES[family], head_dim, "roomy", resident=False)
    return tile


def check_forward_tile(
    tile: ForwardTile, family: axes.Family, head_dim: int, mask: str, resident: bool = True
) -> None:
    """Raise TileError, with the arithmetic, if the tile cannot run on the family.

    With ``resident``, ``min_blocks`` of it must fit on a multiprocessor of every device of the family.
    """
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
