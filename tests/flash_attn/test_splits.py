"""Into how many parts keys are split: bounds, monotony, and what is expected at sizes that were measured."""

from __future__ import annotations

import pytest

from flash_attn._abi import SPLIT_KEYS, SPLIT_ROWS
from flash_attn._splits import (
    MAX_SPLITS,
    LongTiles,
    choose_key_parts,
    choose_num_splits,
    heuristic,
    long_tiles,
    tile_rows,
)

H200 = 132
FEW, SEVERAL, MANY = SPLIT_ROWS


@pytest.mark.parametrize("multiprocessors", [1, 20, 108, 132])
@pytest.mark.parametrize("tiles", [0, 1, 7, 132, 5000])
@pytest.mark.parametrize("key_blocks", [0, 1, 2, 63, 4096])
@pytest.mark.parametrize("rows", SPLIT_ROWS)
def test_is_between_one_and_what_there_is_to_split(tiles, rows, key_blocks, multiprocessors):
    splits = choose_num_splits(tiles, rows, key_blocks, multiprocessors)
    assert 1 <= splits <= max(1, min(MAX_SPLITS, key_blocks))


def test_many_tiles_are_not_split_and_few_fill_the_gpu():
    assert all(choose_num_splits(10 * H200, rows, 1000, H200) == 1 for rows in SPLIT_ROWS)
    assert choose_num_splits(H200, FEW, 1000, H200) == 1
    for tiles in (1, 2, 8, 32):
        assert 0.9 * H200 <= tiles * choose_num_splits(tiles, FEW, 1000, H200) <= H200


@pytest.mark.parametrize("rows", [SEVERAL, MANY])
def test_tiles_that_tensor_cores_bound_share_a_multiprocessor(rows):
    assert choose_num_splits(H200, rows, 1000, H200) == 2
    for tiles in (2, 8, 32):
        assert 1.8 * H200 <= tiles * choose_num_splits(tiles, rows, 1000, H200) <= 2 * H200


def test_more_rows_make_splitting_dearer():
    assert choose_num_splits(8, MANY, 40, H200) < choose_num_splits(8, SEVERAL, 40, H200)


def test_few_keys_are_not_split():
    assert all(choose_num_splits(1, rows, 2, H200) == 1 for rows in SPLIT_ROWS)


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
    assert heuristic(batch, num_heads_k, rows, keys, H200) in best


def test_hopper_does_not_split_what_fills_it():
    for queries, fills in ((512, True), (128, False)):
        tiles, plain = long_tiles(queries, 32, 8, 128, packs=True), (1, 8, 4 * queries, 4096, H200)
        assert (heuristic(*plain, tiles) == 1) == fills and heuristic(*plain) > 1
    assert heuristic(1, 8, 4 * 128, 4096, H200, long_tiles(128, 32, 8, 128, True)) == heuristic(
        1, 8, 4 * 128, 4096, H200
    )


@pytest.mark.parametrize(
    "seqlen_q, heads, head_dim, packs, expected",
    [
        (100, (32, 8), 128, True, LongTiles(8 * 3, 192)),  # 400 rows of a KV head, packed
        (1920, (32, 8), 128, True, LongTiles(32 * 10, 192)),  # packing would fill tiles no better
        (512, (32, 8), 128, False, LongTiles(32 * 3, 192)),
        (512, (32, 8), 256, True, LongTiles(32 * 4, 128)),
        (32, (32, 8), 128, True, None),  # 128 rows: one tile for split keys
        (20, (28, 4), 128, True, None),  # 7 heads do not divide a tile, and 20 queries do not fill it
        (48, (32, 8), 128, False, None),
    ],
)  # fmt: skip
def test_tiles_of_the_forward_kernel(seqlen_q, heads, head_dim, packs, expected):
    assert long_tiles(seqlen_q, *heads, head_dim, packs) == expected


def test_rows_of_a_tile():
    assert [tile_rows(rows) for rows in (0, 1, FEW, FEW + 1, SEVERAL, SEVERAL + 1, MANY, 10 * MANY)] == [
        FEW, FEW, FEW, SEVERAL, SEVERAL, MANY, MANY, MANY,
    ]  # fmt: skip
    assert SPLIT_KEYS % 16 == 0


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
