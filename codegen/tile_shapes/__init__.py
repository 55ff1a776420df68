"""The shapes of tiles: what each costs in shared memory and registers, and why it may not fit a family."""

from codegen.tile_shapes.mma import MmaBackwardTile, MmaCacheTile, MmaForwardTile
from codegen.tile_shapes.tile import Tile
from codegen.tile_shapes.wgmma import WgmmaForwardTile

__all__ = ["MmaBackwardTile", "MmaCacheTile", "MmaForwardTile", "Tile", "WgmmaForwardTile"]
