"""The shapes of tiles: what each costs in shared memory and registers, and why it may not fit a family."""

from codegen.tile_shapes.mma import BackwardTile, ForwardTile, SplitTile
from codegen.tile_shapes.tile import Tile
from codegen.tile_shapes.wgmma import HopperTile

__all__ = ["BackwardTile", "ForwardTile", "HopperTile", "SplitTile", "Tile"]
