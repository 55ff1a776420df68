"""The tile tables, and what fits in them."""

from codegen import CodegenError, axes
from codegen.tile_shapes import MmaBackwardTile, MmaCacheTile, MmaForwardTile, Tile, WgmmaForwardTile


class TileError(CodegenError):
    """A tile that does not fit its family, or a missing one."""


# family -> head dim -> mask class or name of MEMBERS -> tile.
Table = dict[str, dict[int, dict[str, Tile]]]

FORWARD_TILES: Table = {
    "sm80": {
        32: {"default": MmaForwardTile(128, 64, 4, 3)},
        64: {"default": MmaForwardTile(128, 128, 4, 2)},
        96: {"default": MmaForwardTile(128, 64, 4, 2)},
        128: {"default": MmaForwardTile(128, 64, 4, 2)},
        192: {"default": MmaForwardTile(128, 128, 8, 1)},
        256: {"default": MmaForwardTile(128, 64, 8, 1, 2), "roomy": MmaForwardTile(64, 64, 4, 2, 2)},
    },
    "sm86": {
        32: {"default": MmaForwardTile(128, 64, 4, 3)},
        64: {"default": MmaForwardTile(128, 128, 4, 2)},
        96: {"default": MmaForwardTile(128, 64, 4, 2), "causal": MmaForwardTile(64, 64, 4, 2)},
        128: {"default": MmaForwardTile(64, 64, 4, 2), "full": MmaForwardTile(128, 32, 4, 2)},
        192: {"default": MmaForwardTile(128, 64, 8, 1)},
        256: {"default": MmaForwardTile(64, 64, 4, 1)},
    },
    "sm90": {
        32: {"default": WgmmaForwardTile(192, 128, 3, 2)},
        64: {"default": WgmmaForwardTile(192, 128, 3, 2)},
        96: {"default": WgmmaForwardTile(192, 96, 3, 1)},
        128: {
            "default": WgmmaForwardTile(192, 80, 3, 2),
            "short": WgmmaForwardTile(192, 64, 4, 2, max_keys=512),
        },
        192: {
            "default": WgmmaForwardTile(128, 96, 2, 1),
            "narrow": WgmmaForwardTile(192, 80, 3, 1, head_dim_v=128),
        },
        256: {"default": WgmmaForwardTile(128, 80, 2, 1)},
    },
}

BACKWARD_TILES: Table = {
    "sm80": {
        32: {"default": MmaBackwardTile(64, 128, 4, 2, 2)},
        64: {"default": MmaBackwardTile(32, 128, 4, 2, 2), "roomy": MmaBackwardTile(64, 128, 4, 2, 2)},
        96: {"default": MmaBackwardTile(64, 128, 8, 1, 2)},
        128: {"default": MmaBackwardTile(64, 128, 8, 1, 2)},
        192: {"default": MmaBackwardTile(64, 64, 8, 1, 2)},
        256: {"default": MmaBackwardTile(32, 64, 8, 1, 2)},
    },
    "sm86": {
        32: {"default": MmaBackwardTile(64, 128, 4, 1, 2)},
        64: {"default": MmaBackwardTile(32, 128, 4, 1, 2)},
        96: {"default": MmaBackwardTile(64, 64, 4, 1, 2)},
        128: {"default": MmaBackwardTile(32, 64, 8, 1, 2)},
        192: {"default": MmaBackwardTile(32, 32, 4, 1, 2)},
        256: {"default": MmaBackwardTile(32, 32, 4, 1, 1)},
    },
    "sm90": {
        32: {"default": MmaBackwardTile(64, 128, 4, 2, 2)},
        64: {"default": MmaBackwardTile(64, 128, 4, 2, 2)},
        96: {"default": MmaBackwardTile(64, 128, 8, 1, 2)},
        128: {"default": MmaBackwardTile(64, 128, 8, 1, 2)},
        192: {"default": MmaBackwardTile(64, 64, 8, 1, 2)},
        256: {"default": MmaBackwardTile(64, 64, 8, 1, 2)},
    },
}

# By the rows that a tile holds: the queries of all heads that share keys.
CACHE_TILES: Table = {
    "sm80": {
        32: {
            "rows16": MmaCacheTile(16, 64, 1, 4, 4, 2),
            "rows64": MmaCacheTile(64, 64, 4, 1, 2, 2),
            "rows128": MmaCacheTile(128, 64, 4, 1, 2, 2),
        },
        64: {
            "rows16": MmaCacheTile(16, 64, 1, 4, 3, 2),
            "rows64": MmaCacheTile(64, 64, 4, 1, 2, 2),
            "rows128": MmaCacheTile(128, 64, 4, 1, 2, 2),
        },
        96: {
            "rows16": MmaCacheTile(16, 64, 1, 4, 3, 2),
            "rows64": MmaCacheTile(64, 64, 4, 1, 2, 2),
            "rows128": MmaCacheTile(128, 64, 4, 1, 1, 2),
        },
        128: {
            "rows16": MmaCacheTile(16, 64, 1, 4, 2, 2),
            "rows64": MmaCacheTile(64, 64, 4, 1, 2, 2),
            "rows128": MmaCacheTile(128, 64, 4, 1, 1, 2),
        },
        192: {
            "rows16": MmaCacheTile(16, 64, 1, 4, 3, 1),
            "rows64": MmaCacheTile(64, 64, 4, 1, 2, 1),
            "rows128": MmaCacheTile(128, 64, 8, 1, 2, 1),
        },
        256: {
            "rows16": MmaCacheTile(16, 64, 1, 4, 2, 1),
            "rows64": MmaCacheTile(64, 64, 4, 1, 2, 1),
            "rows128": MmaCacheTile(128, 64, 8, 1, 1, 1),
        },
    },
    "sm86": {
        32: {"rows16": MmaCacheTile(16, 64, 1, 4, 4, 2), "rows64": MmaCacheTile(64, 64, 4, 1, 2, 2)},
        64: {"rows16": MmaCacheTile(16, 64, 1, 4, 2, 2), "rows64": MmaCacheTile(64, 64, 4, 1, 2, 2)},
        96: {"rows16": MmaCacheTile(16, 64, 1, 4, 3, 1), "rows64": MmaCacheTile(64, 64, 4, 1, 1, 2)},
        128: {"rows16": MmaCacheTile(16, 64, 1, 4, 2, 1), "rows64": MmaCacheTile(64, 64, 4, 1, 1, 2)},
        192: {"rows16": MmaCacheTile(16, 64, 1, 4, 1, 1), "rows64": MmaCacheTile(64, 64, 4, 1, 1, 1)},
        256: {"rows16": MmaCacheTile(16, 64, 1, 4, 1, 1), "rows64": MmaCacheTile(64, 64, 4, 1, 1, 1)},
    },
    "sm90": {
        32: {
            "rows16": MmaCacheTile(16, 64, 1, 4, 6, 2),
            "rows64": MmaCacheTile(64, 64, 4, 1, 3, 2),
            "rows128": MmaCacheTile(128, 64, 4, 1, 3, 2),
        },
        64: {
            "rows16": MmaCacheTile(16, 64, 1, 4, 5, 2),
            "rows64": MmaCacheTile(64, 64, 4, 1, 3, 2),
            "rows128": MmaCacheTile(128, 64, 4, 1, 3, 2),
        },
        96: {
            "rows16": MmaCacheTile(16, 64, 1, 4, 4, 2),
            "rows64": MmaCacheTile(64, 64, 4, 1, 3, 2),
            "rows128": MmaCacheTile(128, 64, 4, 1, 2, 2),
        },
        128: {
            "rows16": MmaCacheTile(16, 64, 1, 4, 3, 2),
            "rows64": MmaCacheTile(64, 64, 4, 1, 2, 2),
            "rows128": MmaCacheTile(128, 64, 4, 1, 2, 2),
        },
        192: {
            "rows16": MmaCacheTile(16, 64, 1, 4, 2, 2),
            "rows64": MmaCacheTile(64, 64, 4, 1, 2, 1),
            "rows128": MmaCacheTile(128, 64, 8, 1, 2, 1),
        },
        256: {
            "rows16": MmaCacheTile(16, 64, 1, 4, 3, 1),
            "rows64": MmaCacheTile(64, 64, 4, 1, 2, 1),
            "rows128": MmaCacheTile(128, 64, 8, 1, 2, 1),
        },
    },
}

# Hopper's forward kernel takes many rows: templates/host/plan.cu decides.
for _head_dim, _row in CACHE_TILES["sm90"].items():
    _row["wgmma"] = FORWARD_TILES["sm90"][_head_dim]["default"]

TABLES = {"forward": FORWARD_TILES, "backward": BACKWARD_TILES, "split": CACHE_TILES}

MEMBERS = {
    ("mma", "forward"): ("default", "roomy"),
    ("mma", "backward"): ("default", "roomy"),
    ("mma", "split"): ("rows16", "rows64", "rows128"),
    ("wgmma", "forward"): ("default", "short", "narrow"),
    ("wgmma", "split"): ("rows16", "rows64", "rows128", "wgmma"),
}
"""The tiles for which the launcher of a design and direction asks by name: members of a unit's C++ struct.

A mask class in the table stands in for "default". A roomy tile is for devices with more shared memory per SM
than the family counts on.
"""

OPTIONAL = ("roomy", "short", "narrow", "rows128")
"""Members that a table may lack: ``void`` in C++."""


def find_tiles(direction: str, family: str, head_dim: int, mask: str) -> dict[str, Tile | None]:
    """The checked tiles of one kernel by member; raises TileError if one is missing or does not fit."""
    row = TABLES[direction].get(family, {}).get(head_dim, {})
    design = axes.FAMILIES[family].directions[direction]
    if (design, direction) not in MEMBERS:
        raise TileError(f"design {design} has no members for {direction} kernels: add them to MEMBERS")
    found: dict[str, Tile | None] = {}
    for member in MEMBERS[design, direction]:
        tile = row.get(mask if member == "default" and mask in row else member)
        if tile is not None:
            check_tile(tile, axes.FAMILIES[family], head_dim, mask, resident=member != "roomy")
        elif member not in OPTIONAL:
            raise TileError(
                f"no {direction} tile {member!r} for family {family}, head_dim {head_dim}, mask {mask}:"
                f" add it to {axes.PASSES[direction].upper()}_TILES"
            )
        found[member] = tile
    return found


def check_tile(tile: Tile, family: axes.Family, head_dim: int, mask: str, resident: bool = True) -> None:
    """Raise TileError, with the arithmetic, if the tile cannot run on the family.

    With ``resident``, ``min_blocks`` of it must fit on a multiprocessor of every device of the family.
    """
    if problems := tile.problems(family, head_dim, resident):
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise TileError(
            f"{tile} refused for family {family.name}, head_dim {head_dim}, mask {mask}:\n{listed}"
        )


def planned(direction: str, tiles: dict[str, Tile | None], head_dim: int) -> list[list[int]] | list[int]:
    """What a plan reads of a kernel's tiles: the members of CacheTiles and BackwardTiles in C++.

    Raises TileError for a backward whose tiles differ in them, as a plan does not know which one will run.
    """
    if direction == "split":
        chosen = [tiles.get(name) for name in MEMBERS["wgmma", "split"]]
        return [[tile.block_m, tile.block_n] if tile else [0, 0] for tile in chosen]
    if direction == "forward":
        return []
    shapes = {(tile.block_n, tile.warps) for tile in tiles.values() if isinstance(tile, MmaBackwardTile)}
    if len(shapes) != 1:
        raise TileError(
            f"block_n or warps differ between backward tiles of one kernel, head_dim {head_dim}:"
            f" {sorted(shapes)}"
        )
    block_n, warps = shapes.pop()
    return [block_n, head_dim, warps]


def wgmma_columns() -> list[int]:
    """The widths N of wgmma that kernels use: keys of a block for Q K^T, the head dim of V for P V."""
    tables = FORWARD_TILES["sm90"], CACHE_TILES["sm90"]
    tiles = [(d, tile) for table in tables for d, row in table.items() for tile in row.values()]
    wgmma = [(d, tile) for d, tile in tiles if isinstance(tile, WgmmaForwardTile)]
    return sorted({n for d, tile in wgmma for n in (tile.head_dim_v or d, tile.block_n)})
