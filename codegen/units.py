"""The translation units of a selection: one kernel instantiation each."""

from dataclasses import dataclass

from codegen import CodegenError, axes, tiles
from codegen.kernel_key import KernelKey
from codegen.targets import Selection
from codegen.tile_shapes import Tile


@dataclass(frozen=True)
class Unit:
    """One kernel: its place on the axes, and the tiles for which its launcher asks, or None."""

    direction: str
    family: str
    dtype: str
    head_dim: int
    mask: str
    tiles: dict[str, Tile | None]

    @property
    def key(self) -> str:
        """The kernel's name everywhere, see KernelKey."""
        return str(KernelKey(self.direction, self.family, self.dtype, self.head_dim, self.mask))

    @property
    def path(self) -> str:
        """Path of the source, relative to the folder of generated files."""
        return f"{self.family}/{self.direction}_{self.dtype}_d{self.head_dim}_{self.mask}.cu"

    @property
    def config(self) -> str:
        """C++ type whose members describe the kernel's tiles: ``ForwardSm80Bf16D128Causal``."""
        return "".join(word.capitalize() for word in self.key.split("_"))

    @property
    def design(self) -> str:
        """Kernel design that serves the unit: folder under ``templates/`` and C++ namespace."""
        return axes.FAMILIES[self.family].directions[self.direction]

    @property
    def designs(self) -> list[str]:
        """Designs whose launchers the unit needs: that of a call over a KV cache chooses between two."""
        of_tiles = {tile.TEMPLATE.partition("::")[0] for tile in self.tiles.values() if tile}
        return sorted({self.design, *of_tiles})

    @property
    def kernel_pass(self) -> str:
        """Folder of the kernel in its design's; also in the names of its launcher and parameter struct."""
        return axes.PASSES[self.direction]

    @property
    def cost_rank(self) -> tuple[int, int, int]:
        """Sorts units by what their compile time follows."""
        return axes.DIRECTIONS.index(self.direction), self.head_dim, axes.MASKS.index(self.mask)

    @property
    def tile(self) -> Tile:
        """The tile of calls for which no other one is better; raises TileError if there is none."""
        for name in ("default", "rows128", "rows64"):
            if tile := self.tiles.get(name):
                return tile
        raise tiles.TileError(f"{self.key} has no tile default, rows128 or rows64")

    @property
    def planned_tiles(self) -> list[list[int]] | list[int]:
        """What a plan reads of the tiles, in the order of the C++ members."""
        return tiles.planned(self.direction, self.tiles, self.head_dim)

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory that a block of ``tile`` needs, in bytes."""
        return self.tile.smem_bytes(self.head_dim)


def list_units(selection: Selection) -> list[Unit]:
    """Every unit of the selection, by family, direction, head dim, dtype, mask; raises TileError."""
    return [
        Unit(
            direction,
            family,
            dtype,
            head_dim,
            mask,
            tiles.find_tiles(direction, family, head_dim, mask),
        )
        for family in selection.families
        for direction in selection.directions
        for head_dim in selection.head_dims
        for dtype in selection.dtypes
        for mask in axes.MASKS
        if axes.is_legal(family, direction, dtype, mask)
    ]


def shard(units: list[Unit], text: str) -> list[Unit]:
    """Part ``i`` of ``n`` (text ``"i/n"``, from 1): disjoint, together complete, of nearly equal cost.

    Units are sorted by cost, then dealt out back and forth.
    """
    try:
        index, count = (int(number) for number in text.split("/"))
    except ValueError:
        raise CodegenError(f"--shard takes i/n such as 1/4, not {text!r}") from None
    if not 1 <= index <= count:
        raise CodegenError(f"--shard {text}: i must be from 1 to n")
    costliest_first = sorted(units, key=lambda u: (u.cost_rank, u.key), reverse=True)
    turns = (min(i % (2 * count), 2 * count - 1 - i % (2 * count)) for i in range(len(units)))
    return [unit for unit, turn in zip(costliest_first, turns, strict=True) if turn == index - 1]
