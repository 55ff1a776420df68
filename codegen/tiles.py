"""The tile tables, and what fits in them."""

from codegen import CodegenError, axes
from codegen.tile_shapes import BackwardTile, ForwardTile, HopperTile, SplitTile, Tile


class TileError(CodegenError):
    """A tile that does not fit its family, or a missing one."""


# family -> head dim -> mask class, "default", or one of VARIANTS -> tile.
Table = dict[str, dict[int, dict[str, Tile]]]

FORWARD_TILES: Table = {
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

BACKWARD_TILES: Table = {
    "sm80": {
        32: {"default": BackwardTile(64, 128, 4, 2, 2)},
        64: {"default": BackwardTile(32, 128, 4, 2, 2), "roomy": BackwardTile(64, 128, 4, 2, 2)},
        96: {"default": BackwardTile(64, 128, 8, 1, 2)},
        128: {"default": BackwardTile(64, 128, 8, 1, 2)},
        192: {"default": BackwardTile(64, 64, 8, 1, 2)},
        256: {"default": BackwardTile(32, 64, 8, 1, 2)},
    },
    "sm86": {
        32: {"default": BackwardTile(64, 128, 4, 1, 2)},
        64: {"default": BackwardTile(32, 128, 4, 1, 2)},
        96: {"default": BackwardTile(64, 64, 4, 1, 2)},
        128: {"default": BackwardTile(32, 64, 8, 1, 2)},
        192: {"default": BackwardTile(32, 32, 4, 1, 2)},
        256: {"default": BackwardTile(32, 32, 4, 1, 1)},
    },
    "sm90": {
        32: {"default": BackwardTile(64, 128, 4, 2, 2)},
        64: {"default": BackwardTile(64, 128, 4, 2, 2)},
        96: {"default": BackwardTile(64, 128, 8, 1, 2)},
        128: {"default": BackwardTile(64, 128, 8, 1, 2)},
        192: {"default": BackwardTile(64, 64, 8, 1, 2)},
        256: {"default": BackwardTile(64, 64, 8, 1, 2)},
    },
}

# "few" holds up to 16 rows: the queries of the heads that share keys; "several" up to 64.
SPLIT_TILES: Table = {
    "sm80": {
        32: {
            "few": SplitTile(16, 64, 1, 4, 4, 2),
            "several": SplitTile(64, 64, 4, 1, 2, 2),
            "default": SplitTile(128, 64, 4, 1, 2, 2),
        },
        64: {
            "few": SplitTile(16, 64, 1, 4, 3, 2),
            "several": SplitTile(64, 64, 4, 1, 2, 2),
            "default": SplitTile(128, 64, 4, 1, 2, 2),
        },
        96: {
            "few": SplitTile(16, 64, 1, 4, 3, 2),
            "several": SplitTile(64, 64, 4, 1, 2, 2),
            "default": SplitTile(128, 64, 4, 1, 1, 2),
        },
        128: {
            "few": SplitTile(16, 64, 1, 4, 2, 2),
            "several": SplitTile(64, 64, 4, 1, 2, 2),
            "default": SplitTile(128, 64, 4, 1, 1, 2),
        },
        192: {
            "few": SplitTile(16, 64, 1, 4, 3, 1),
            "several": SplitTile(64, 64, 4, 1, 2, 1),
            "default": SplitTile(128, 64, 8, 1, 2, 1),
        },
        256: {
            "few": SplitTile(16, 64, 1, 4, 2, 1),
            "several": SplitTile(64, 64, 4, 1, 2, 1),
            "default": SplitTile(128, 64, 8, 1, 1, 1),
        },
    },
    "sm86": {
        32: {"few": SplitTile(16, 64, 1, 4, 4, 2), "default": SplitTile(64, 64, 4, 1, 2, 2)},
        64: {"few": SplitTile(16, 64, 1, 4, 2, 2), "default": SplitTile(64, 64, 4, 1, 2, 2)},
        96: {"few": SplitTile(16, 64, 1, 4, 3, 1), "default": SplitTile(64, 64, 4, 1, 1, 2)},
        128: {"few": SplitTile(16, 64, 1, 4, 2, 1), "default": SplitTile(64, 64, 4, 1, 1, 2)},
        192: {"few": SplitTile(16, 64, 1, 4, 1, 1), "default": SplitTile(64, 64, 4, 1, 1, 1)},
        256: {"few": SplitTile(16, 64, 1, 4, 1, 1), "default": SplitTile(64, 64, 4, 1, 1, 1)},
    },
    "sm90": {
        32: {
            "few": SplitTile(16, 64, 1, 4, 6, 2),
            "several": SplitTile(64, 64, 4, 1, 3, 2),
            "default": SplitTile(128, 64, 4, 1, 3, 2),
        },
        64: {
            "few": SplitTile(16, 64, 1, 4, 5, 2),
            "several": SplitTile(64, 64, 4, 1, 3, 2),
            "default": SplitTile(128, 64, 4, 1, 3, 2),
        },
        96: {
            "few": SplitTile(16, 64, 1, 4, 4, 2),
            "several": SplitTile(64, 64, 4, 1, 3, 2),
            "default": SplitTile(128, 64, 4, 1, 2, 2),
        },
        128: {
            "few": SplitTile(16, 64, 1, 4, 3, 2),
            "several": SplitTile(64, 64, 4, 1, 2, 2),
            "default": SplitTile(128, 64, 4, 1, 2, 2),
        },
        192: {
            "few": SplitTile(16, 64, 1, 4, 2, 2),
            "several": SplitTile(64, 64, 4, 1, 2, 1),
            "default": SplitTile(128, 64, 8, 1, 2, 1),
        },
        256: {
            "few": SplitTile(16, 64, 1, 4, 3, 1),
            "several": SplitTile(64, 64, 4, 1, 2, 1),
            "default": SplitTile(128, 64, 8, 1, 2, 1),
        },
    },
}

# Hopper's forward kernel takes many rows: flash_attn/_splits.py decides.
for _head_dim, _row in SPLIT_TILES["sm90"].items():
    _row["long"] = FORWARD_TILES["sm90"][_head_dim]["default"]

LONG_COST = 0.5
"""Time of a row in that kernel over that in the largest tile for split keys, measured on an H200."""

TABLES = {"forward": FORWARD_TILES, "backward": BACKWARD_TILES, "split": SPLIT_TILES}

VARIANTS = ("roomy", "short", "narrow", "few", "several", "long")
"""Keys of the tile tables for tiles that the launcher takes instead of the default where they suit."""


def find_tile(direction: str, family: str, head_dim: int, mask: str) -> Tile:
    """The checked tile of one kernel; raises TileError if there is none or if it does not fit."""
    row = TABLES[direction].get(family, {}).get(head_dim, {})
    tile = row.get(mask) or row.get("default")
    if tile is None:
        raise TileError(
            f"no {direction} tile for family {family}, head_dim {head_dim}, mask {mask}:"
            f" add it to {direction.upper()}_TILES"
        )
    check_tile(tile, axes.FAMILIES[family], head_dim, mask)
    return tile


def tile_variants(direction: str, family: str, head_dim: int) -> dict[str, Tile]:
    """The checked tiles that are tried before the default one, by name.

    A roomy tile is for devices with more shared memory per SM than the family counts on.
    """
    row = TABLES[direction][family][head_dim]
    variants = {name: row[name] for name in VARIANTS if name in row}
    for name, tile in variants.items():
        check_tile(tile, axes.FAMILIES[family], head_dim, name, resident=name != "roomy")
    return variants


def check_tile(tile: Tile, family: axes.Family, head_dim: int, mask: str, resident: bool = True) -> None:
    """Raise TileError, with the arithmetic, if the tile cannot run on the family.

    With ``resident``, ``min_blocks`` of it must fit on a multiprocessor of every device of the family.
    """
    if problems := tile.problems(family, head_dim, resident):
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise TileError(
            f"{tile} refused for family {family.name}, head_dim {head_dim}, mask {mask}:\n{listed}"
        )


def split_shape() -> tuple[tuple[int, ...], int]:
    """The numbers of rows that tiles with split keys have, in ascending order, and of keys in a block."""
    tiles = [tile for family in SPLIT_TILES.values() for row in family.values() for tile in row.values()]
    split = [tile for tile in tiles if isinstance(tile, SplitTile)]
    keys = {tile.block_n for tile in split}
    if len(keys) != 1:
        raise TileError(f"block_n differs between the tiles of SPLIT_TILES: {sorted(keys)}")
    return tuple(sorted({tile.block_m for tile in split})), keys.pop()


def long_tiles() -> dict[int, tuple[int, int]]:
    """The rows and keys of Hopper's tiles for many queries over a KV cache, by head dim."""
    tiles = {d: row["long"] for d, row in SPLIT_TILES["sm90"].items()}
    return {d: (tile.block_m, tile.block_n) for d, tile in tiles.items() if isinstance(tile, HopperTile)}


def wgmma_columns() -> list[int]:
    """The widths N of wgmma that kernels use: keys of a block for Q K^T, the head dim of V for P V."""
    tables = FORWARD_TILES["sm90"], SPLIT_TILES["sm90"]
    tiles = [(d, tile) for table in tables for d, row in table.items() for tile in row.values()]
    hopper = [(d, tile) for d, tile in tiles if isinstance(tile, HopperTile)]
    return sorted({n for d, tile in hopper for n in (tile.head_dim_v or d, tile.block_n)})
