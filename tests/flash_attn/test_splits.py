"""Into how many parts keys are split: bounds, monotony, and what is expected at sizes that were measured."""

from __future__ import annotations

import pytest

from flash_attn._abi import CACHE_KEYS, CACHE_ROWS, MAX_SPLITS, Design
from flash_attn._splits import (
    Plan,
    WgmmaTile,
    choose_key_parts,
    plan,
    tile_rows,
    wgmma_tile,
)

H200 = 132
ROWS16, ROWS64, ROWS128 = CACHE_ROWS


def splits_of(tiles, rows, key_blocks, multiprocessors=H200):
    """Into how many parts the keys of so many tiles are split, one of each sequence."""
    return plan(tiles, 1, rows, key_blocks * CACHE_KEYS, multiprocessors).num_splits


@pytest.mark.parametrize("multiprocessors", [1, 20, 108, 132])
@pytest.mark.parametrize("tiles", [0, 1, 7, 132, 5000])
@pytest.mark.parametrize("key_blocks", [0, 1, 2, 63, 4096])
@pytest.mark.parametrize("wgmma", [None, WgmmaTile(3, 192, 80)])
@pytest.mark.parametrize("rows", CACHE_ROWS)
def test_is_between_one_and_what_there_is_to_split(tiles, rows, wgmma, key_blocks, multiprocessors):
    splits, _ = plan(tiles, 1, rows, key_blocks * CACHE_KEYS, multiprocessors, wgmma)
    assert 1 <= splits <= max(1, min(MAX_SPLITS, key_blocks))


def test_many_tiles_are_not_split_and_few_fill_the_gpu():
    assert all(splits_of(10 * H200, rows, 1000) == 1 for rows in CACHE_ROWS)
    assert splits_of(H200, ROWS16, 1000) == 1
    for tiles in (1, 2, 8, 32):
        assert 0.9 * H200 <= tiles * splits_of(tiles, ROWS16, 1000) <= H200


@pytest.mark.parametrize("rows", [ROWS64, ROWS128])
def test_tiles_that_tensor_cores_bound_share_a_multiprocessor(rows):
    assert splits_of(H200, rows, 1000) == 2
    for tiles in (2, 8, 32):
        assert 1.8 * H200 <= tiles * splits_of(tiles, rows, 1000) <= 2 * H200


def test_more_rows_make_splitting_dearer():
    assert splits_of(8, ROWS128, 40) < splits_of(8, ROWS64, 40)


def test_few_keys_are_not_split():
    assert all(splits_of(1, rows, 2) == 1 for rows in CACHE_ROWS)


@pytest.mark.parametrize(
    "batch, num_heads_k, rows, keys, best",
    [
        (1, 8, 4, 4096, {16, 32}), (1, 8, 4, 65536, {16, 32}), (8, 8, 4, 8192, {2, 4}),
        (64, 8, 4, 4096, {1}), (128, 8, 4, 1024, {1}), (1, 32, 1, 4096, {4, 8}), (8, 32, 1, 8192, {1, 2}),
        (1, 1, 16, 4096, {64}), (1, 1, 16, 65536, {128}), (8, 1, 16, 8192, {16, 32}),
        (64, 1, 16, 4096, {2, 4}), (128, 1, 16, 1024, {1}),
    ],
)  # fmt: skip
def test_is_near_the_best_that_was_measured_on_an_h200(batch, num_heads_k, rows, keys, best):
    num_splits, design = plan(batch, num_heads_k, rows, keys, H200)
    assert design == Design.MMA and num_splits in best


@pytest.mark.parametrize(
    "queries, heads, keys, best",
    [
        (128, (32, 8), 4096, {5}), (512, (32, 8), 4096, {1}), (512, (32, 8), 32768, {4, 8}),
        (2048, (32, 8), 32768, {1, 3}), (128, (32, 32), 4096, {3, 4}), (128, (16, 1), 4096, {8}),
        (512, (16, 1), 4096, {3}), (512, (16, 1), 32768, {3}), (2048, (16, 1), 32768, {3}),
    ],
)  # fmt: skip
def test_hoppers_forward_kernel_takes_many_queries_as_was_measured_on_an_h200(queries, heads, keys, best):
    num_heads, num_heads_k = heads
    tiles = wgmma_tile(queries, num_heads, num_heads_k, 128, packs=True)
    num_splits, design = plan(1, num_heads_k, queries * num_heads // num_heads_k, keys, H200, tiles)
    assert design == Design.WGMMA and num_splits in best


def test_a_prompt_that_fills_the_gpu_is_not_split_however_large_the_block_table_is():
    for batch, queries, num_heads in ((1, 4096, 32), (4, 1024, 64), (8, 200, 128)):
        tiles, rows = wgmma_tile(queries, num_heads, 8, 128, packs=True), queries * num_heads // 8
        assert plan(batch, 8, rows, 1 << 20, H200, tiles) == Plan(1, Design.WGMMA)


def test_a_number_of_splits_that_is_given_stays():
    tiles = wgmma_tile(512, 32, 8, 128, packs=True)
    for num_splits in (1, 7, 128):
        assert plan(1, 8, 2048, 4096, H200, tiles, num_splits).num_splits == num_splits
        assert plan(1, 8, 4, 4096, H200, None, num_splits) == Plan(num_splits, Design.MMA)


def test_tiles_that_stay_empty_are_left_to_the_other_kernel():
    """20 queries of 28 heads that do not fill a tile, beside 3 tiles of 64 rows for each head of keys."""
    tiles = wgmma_tile(20, 28, 4, 128, packs=True)
    assert tiles == WgmmaTile(28, 192, 80) and plan(50, 4, 140, 4096, H200, tiles).design == Design.MMA


@pytest.mark.parametrize(
    "seqlen_q, heads, head_dim, packs, expected",
    [
        (100, (32, 8), 128, True, WgmmaTile(8 * 3, 192, 80)),  # 400 rows of a KV head, packed
        (1920, (32, 8), 128, True, WgmmaTile(32 * 10, 192, 80)),  # packing would fill tiles no better
        (512, (32, 8), 128, False, WgmmaTile(32 * 3, 192, 80)),
        (512, (32, 8), 256, True, WgmmaTile(32 * 4, 128, 80)),
        (20, (28, 4), 128, True, WgmmaTile(28, 192, 80)),  # 7 heads do not divide a tile
        (48, (32, 8), 128, False, WgmmaTile(32, 192, 80)),
        (17, (32, 8), 128, True, WgmmaTile(8, 192, 80)),
        (16, (32, 8), 128, True, None),  # 64 rows: memory is the bound
    ],
)  # fmt: skip
def test_tiles_of_the_forward_kernel(seqlen_q, heads, head_dim, packs, expected):
    assert wgmma_tile(seqlen_q, *heads, head_dim, packs) == expected


def test_rows_of_a_tile():
    for rows, tile in ((0, ROWS16), (1, ROWS16), (ROWS16, ROWS16), (ROWS16 + 1, ROWS64), (ROWS64, ROWS64)):
        assert tile_rows(rows) == tile
    for rows in (ROWS64 + 1, ROWS128, 10 * ROWS128):
        assert tile_rows(rows) == ROWS128
    assert CACHE_KEYS % 16 == 0


@pytest.mark.parametrize(
    "sequences, heads, seqlen_k, full, causal",
    [
        (1, (32, 8), 512, 4, 4), (1, (32, 8), 1024, 2, 4), (1, (32, 8), 2048, 1, 4),
        (1, (32, 8), 16384, 1, 2), (1, (32, 8), 131072, 1, 1), (1, (32, 32), 128, 1, 1),
        (1, (32, 1), 4096, 4, 32), (64, (32, 1), 4096, 1, 1), (1, (6, 2), 128, 3, 3), (0, (4, 2), 128, 2, 2),
    ],
)  # fmt: skip
def test_a_backward_with_few_keys_is_split_by_heads(sequences, heads, seqlen_k, full, causal):
    for masked, parts in ((False, full), (True, causal)):
        assert choose_key_parts(sequences, *heads, seqlen_k, masked, H200) == parts
