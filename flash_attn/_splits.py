"""Into how many parts to split a call that makes few thread blocks: pure functions of its shape and the GPU.

Few queries over a KV cache make few thread blocks, and a few thread blocks cannot read memory at full speed.
Splitting the keys makes more of them. A backward has a thread block for each block of keys of each KV head;
splitting the query heads that share them makes more. The price is a second kernel that merges the parts.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from flash_attn._abi import MAX_SPLITS, Design
from flash_attn._library import kernel_head_dim

CACHE_ROWS = (16, 64, 128)
"""Rows of the mma design's tiles; a family may lack the last."""

CACHE_KEYS = 64
"""Keys of their blocks."""

WGMMA_SHAPES = {32: (192, 128), 64: (192, 128), 96: (192, 96), 128: (192, 80), 192: (128, 96), 256: (128, 80)}
"""Rows and keys of the wgmma design's tiles, by the kernel's head dim."""

WGMMA_COST = 0.5
"""Time of a row in that design over that in the largest of the other's tiles."""

MERGED_AT_ONCE = 8
"""Parts of a row of the result that a warp reads at once."""

MERGING_WARPS = 8
"""Warps that share a row of a call with few rows to merge."""

START_COST = 0.5
"""What a thread block costs besides its blocks of keys, in blocks of keys."""

PART_COST = 1 / 32
"""What a row of a part of the result costs to write and merge, in blocks of keys; the first FEW_ROWS of a
thread block are free, except in Hopper's forward kernel.
"""

MERGE_COST = 2.0
"""What merging costs besides, in blocks of keys of one multiprocessor, each time that parts are read."""

ALONE = 0.6
"""How fast one thread block runs alone on a multiprocessor, relative to two that share it (tiles of more than
FEW_ROWS rows).

Tensor cores bound it, and it does not keep them busy; with few rows memory does.
"""

TOLERANCE = 1.02
"""Fewer splits are taken where they cost at most this much more than the best number."""

FEW_ROWS, LARGEST_TILE = CACHE_ROWS[0], CACHE_ROWS[-1]

ENOUGH_TILES = 2
"""Tiles of Hopper's forward kernel for each multiprocessor from which on their keys are not split."""

WGMMA_FROM = CACHE_ROWS[-2] + 1
"""Rows of a head of keys from which on Hopper's forward kernel may take a call; memory bounds fewer."""


def _cost(splits: int, tiles: int, rows: int, key_blocks: int, multiprocessors: int) -> float:
    """Model the time of a call, in blocks of keys that one multiprocessor works through.

    Multiprocessors share the memory's speed evenly; one with more thread blocks than others ends last.
    """
    thread_blocks: float = -(-tiles * splits // multiprocessors)
    if rows > FEW_ROWS and thread_blocks % 2:
        thread_blocks += 1 / ALONE - 1
    cost = thread_blocks * (-(-key_blocks // splits) + START_COST)
    return cost + thread_blocks * (rows - FEW_ROWS) * PART_COST + MERGE_COST if splits > 1 else cost


def _wgmma_cost(
    splits: int, tiles: int, wgmma: WgmmaTile, rows: int, capacity: int, multiprocessors: int
) -> float:
    """The same for the tiles of Hopper's forward kernel, of which a multiprocessor works on one at a time.

    The memory that parts of all `rows` are written to and merged from is shared evenly.
    """
    tiles *= splits
    blocks = -(-_blocks(capacity, wgmma.keys) // splits) * wgmma.keys / CACHE_KEYS
    cost = -(-tiles // multiprocessors) * (blocks + START_COST) * WGMMA_COST * wgmma.rows / LARGEST_TILE
    if splits == 1:
        return cost
    warps = MERGING_WARPS if rows <= MERGING_WARPS * multiprocessors else 1
    merges = -(-splits // (MERGED_AT_ONCE * warps))
    return cost + rows * splits / multiprocessors * PART_COST + merges * MERGE_COST


def _blocks(keys: int, block_n: int) -> int:
    return max(-(-keys // block_n), 1)


def _choices(blocks: int) -> list[int]:
    """Return the numbers of splits worth a look: the least of those with equally many blocks in each."""
    return list({-(-blocks // n): n for n in range(min(MAX_SPLITS, blocks), 0, -1)}.values())[::-1]


def _cheapest(costs: dict[int, float]) -> int:
    """Return the fewest splits that cost hardly more than the best number."""
    enough = TOLERANCE * min(costs.values())
    return next(splits for splits, cost in costs.items() if cost <= enough)


def tile_rows(rows: int) -> int:
    """Return how many rows a tile has where a sequence and KV head has `rows` (queries x heads of q)."""
    return next((block_m for block_m in CACHE_ROWS if rows <= block_m), LARGEST_TILE)


class WgmmaTile(NamedTuple):
    """How many tiles of how many rows and keys a sequence has in Hopper's forward kernel."""

    tiles: int
    rows: int
    keys: int


@lru_cache(maxsize=4096)
def wgmma_tile(
    seqlen_q: int, num_heads: int, num_heads_k: int, head_dim: int, packs: bool
) -> WgmmaTile | None:
    """Return the tiles of Hopper's forward kernel, None where there are too few rows for it.

    `head_dim` is the larger one; `packs` says that no score modifiers keep it from packing heads into a tile.
    """
    group, (block_m, block_n) = num_heads // num_heads_k, WGMMA_SHAPES[kernel_head_dim(head_dim)]
    rows = seqlen_q * group
    if rows < WGMMA_FROM:
        return None
    packed, unpacked = num_heads_k * -(-rows // block_m), num_heads * -(-seqlen_q // block_m)
    tiles = packed if packs and block_m % group == 0 and 10 * packed < 9 * unpacked else unpacked
    return WgmmaTile(tiles, block_m, block_n)


class Plan(NamedTuple):
    """Into how many parts keys are split, and the design whose kernel computes them."""

    num_splits: int
    design: Design


@lru_cache(maxsize=4096)
def plan(
    sequences: int, num_heads_k: int, rows: int, capacity: int, multiprocessors: int,
    wgmma: WgmmaTile | None = None, num_splits: int = 0,
) -> Plan:  # fmt: skip
    """Return how to compute a call with `rows` rows (queries x heads that share keys) for each head of keys,
    and room for `capacity` keys, in each sequence.

    `wgmma` are the tiles of Hopper's forward kernel, if it may take the call; `num_splits` is 0 to choose.
    """
    block_m, key_blocks = tile_rows(rows), _blocks(capacity, CACHE_KEYS)
    tiles = sequences * num_heads_k * -(-rows // block_m)
    choices = [num_splits] if num_splits else _choices(key_blocks) if tiles else [1]
    costs = {n: _cost(n, tiles, block_m, key_blocks, multiprocessors) for n in choices}
    best = _cheapest(costs)
    if wgmma is None:
        return Plan(best, Design.MMA)
    tiles, total_rows = sequences * wgmma.tiles, sequences * num_heads_k * rows
    if not num_splits:
        # Many tiles share out evenly enough, also where capacity says little about lengths.
        many = tiles >= ENOUGH_TILES * multiprocessors
        choices = [1] if many else _choices(_blocks(capacity, wgmma.keys))
    wgmma_costs = {n: _wgmma_cost(n, tiles, wgmma, total_rows, capacity, multiprocessors) for n in choices}
    wgmma_best = _cheapest(wgmma_costs)
    if wgmma_costs[wgmma_best] <= costs[best]:
        return Plan(wgmma_best, Design.WGMMA)
    return Plan(best, Design.MMA)


KEY_BLOCK = 128
"""Keys of a backward's thread block, of the widest tile; others have half or a quarter as many."""

ENOUGH_THREAD_BLOCKS = {False: 0.9, True: 15.0}
"""Thread blocks of a backward for each multiprocessor from which on splitting costs more than it brings.

Under a mask (True) thread blocks differ in length, and many short ones share out better. Measured on an H200.
"""


@lru_cache(maxsize=4096)
def choose_key_parts(
    sequences: int, num_heads: int, num_heads_k: int, seqlen_k: int, masked: bool, multiprocessors: int
) -> int:
    """Return into how many parts to split the heads of q that share keys, a divisor of their number."""
    group = num_heads // num_heads_k
    thread_blocks = sequences * num_heads_k * -(-seqlen_k // KEY_BLOCK)
    divisors = (parts for parts in range(1, group + 1) if group % parts == 0)
    enough = ENOUGH_THREAD_BLOCKS[masked] * multiprocessors
    return next((parts for parts in divisors if parts * thread_blocks >= enough), group)
