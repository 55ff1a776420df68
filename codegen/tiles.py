"""The tile table and the check that a tile fits its family's shared memory and registers."""

from dataclasses import dataclass

from codegen import CodegenError, axes

ACCUMULATOR_OVERHEAD = 40
"""Registers per thread besides the fp32 O and S fragments: addresses, softmax state, K and V fragments."""


class TileError(CodegenError):
    """A tile that does not fit its family, or a missing one."""


@dataclass(frozen=True)
class ForwardTile:
    """Tile of a forward kernel.

    ``stages`` counts the buffers of K and of V, ``min_blocks`` is the minimum of CTAs per SM given to
    ``__launch_bounds__``, and ``q_in_regs`` keeps the Q fragments in registers for the whole loop.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    min_blocks: int
    q_in_regs: bool

    @property
    def rows_per_warp(self) -> int:
        return self.block_m // self.warps

    def smem_bytes(self, head_dim: int) -> int:
        """Dynamic shared memory: Q once, K and V ``stages`` times each, two bytes an element."""
        return 2 * (self.block_m * head_dim + self.stages * 2 * self.block_n * head_dim)

    def register_floor(self, head_dim: int) -> int:
        """Registers per thread below which the fp32 O and S fragments (and Q, if kept) must spill."""
        accumulators = self.rows_per_warp * (head_dim + self.block_n) // 32
        query = self.rows_per_warp * head_dim // 64 if self.q_in_regs else 0
        return accumulators + query + ACCUMULATOR_OVERHEAD


# family -> head dim -> mask class (or "default") -> tile
FORWARD_TILES: dict[str, dict[int, dict[str, ForwardTile]]] = {
    "sm80": {
        32: {"default": ForwardTile(128, 128, 4, 1, 2, False)},
        64: {"default": ForwardTile(128, 128, 4, 1, 2, False)},
        96: {"default": ForwardTile(128, 64, 4, 1, 2, False)},
        128: {"default": ForwardTile(128, 64, 4, 1, 2, False)},
        192: {"default": ForwardTile(128, 64, 8, 1, 1, False)},
        256: {"default": ForwardTile(64, 64, 4, 1, 1, False)},
    },
    "sm86": {
        32: {"default": ForwardTile(128, 128, 4, 1, 2, False)},
        64: {"default": ForwardTile(128, 128, 4, 1, 2, False)},
        96: {
            "default": ForwardTile(128, 64, 4, 1, 1, False),
            "causal": ForwardTile(64, 64, 4, 1, 2, False),
        },
        128: {
            "default": ForwardTile(64, 64, 4, 1, 2, False),
            "full": ForwardTile(128, 32, 4, 1, 2, False),
        },
        192: {"default": ForwardTile(64, 64, 4, 1, 1, False)},
        256: {"default": ForwardTile(64, 32, 4, 1, 1, False)},
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


def check_forward_tile(tile: ForwardTile, family: axes.Family, head_dim: int, mask: str) -> None:
    """Raise TileError, with the arithmetic, if the tile cannot run on the family."""
    problems = [
        *_shape_problems(tile),
        *_smem_problems(tile, family, head_dim),
        *_register_problems(tile, family, head_dim),
    ]
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise TileError(
            f"{tile} refused for family {family.name}, head_dim {head_dim}, mask {mask}:\n{listed}"
        )


def _shape_problems(tile: ForwardTile) -> list[str]:
    problems = []
    if tile.block_m % (16 * tile.warps):
        problems.append(
            f"rows per warp: block_m / warps = {tile.block_m} / {tile.warps} = {tile.block_m / tile.warps:g},"
            " not a multiple of 16"
        )
    if tile.block_n % 16:
        problems.append(f"block_n = {tile.block_n}, not a multiple of 16")
    if tile.stages not in (1, 2):
        problems.append(f"stages = {tile.stages}, not 1 or 2")
    return problems


def _smem_problems(tile: ForwardTile, family: axes.Family, head_dim: int) -> list[str]:
    smem = tile.smem_bytes(head_dim)
    formula = (
        f"2 * (block_m * d + stages * 2 * block_n * d)"
        f" = 2 * ({tile.block_m} * {head_dim} + {tile.stages} * 2 * {tile.block_n} * {head_dim}) = {smem}"
    )
    problems = []
    if smem > family.smem_per_block:
        problems.append(f"shared memory per block: {formula} > {family.smem_per_block} bytes")
    resident = tile.min_blocks * (smem + family.smem_reserved_per_block)
    if resident > family.smem_per_sm:
        problems.append(
            f"shared memory per SM: min_blocks * (smem + reserved) = {tile.min_blocks} *"
            f" ({smem} + {family.smem_reserved_per_block}) = {resident} > {family.smem_per_sm} bytes,"
            f" with smem = {formula}"
        )
    return problems


def _register_problems(tile: ForwardTile, family: axes.Family, head_dim: int) -> list[str]:
    threads = tile.min_blocks * tile.warps * 32
    limit = min(family.regs_per_thread, family.regs_per_sm // threads)
    floor = tile.register_floor(head_dim)
    if floor <= limit:
        return []
    rows = tile.rows_per_warp
    query = f" + {rows} * {head_dim} / 64" if tile.q_in_regs else ""
    return [
        f"registers per thread: (rows_per_warp * d + rows_per_warp * block_n) / 32 + overhead"
        f" = ({rows} * {head_dim} + {rows} * {tile.block_n}) / 32{query} + {ACCUMULATOR_OVERHEAD} = {floor}"
        f" > min({family.regs_per_thread}, {family.regs_per_sm} / (min_blocks * warps * 32 = {threads})) = {limit}"
    ]
