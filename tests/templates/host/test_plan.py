"""Plans: bounds, monotony, and what is expected at sizes that were measured, with the tiles of the tables."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import byref
from typing import NamedTuple

import pytest

from codegen import axes, tiles
from flash_attn._abi import (
    MAX_SPLITS,
    BackwardParams,
    BackwardPlan,
    CacheParams,
    CachePlan,
    Design,
    ForwardParams,
)

H200 = 132
KEYS = 64  # of a block of the mma design's tiles
SOME = 4096  # an address, which nobody looks at
MHA, GQA, MQA = (32, 32), (32, 8), (16, 1)
MMA, WGMMA = Design.MMA, Design.WGMMA


class Call(NamedTuple):
    """A call over a cache or a backward, whose heads are (of q, of k)."""

    batch: int = 1
    heads: tuple[int, int] = GQA
    seqlen_q: int = 1
    keys: int = 4096
    head_dim: int = 128

    def forward(self, **changes: float) -> ForwardParams:
        of_cache = {"k": SOME, "v": SOME} | {f"{x}_row_stride": self.head_dim for x in "kv"}
        fields = of_cache | {
            "batch": self.batch, "num_heads": self.heads[0], "num_heads_k": self.heads[1],
            "seqlen_q": self.seqlen_q, "seqlen_k": self.keys, "head_dim": self.head_dim,
            "head_dim_v": self.head_dim, "window_left": -1, "window_right": -1, "softmax_scale": 0.125,
        }  # fmt: skip
        return ForwardParams(**(fields | changes))

    def cache(self, num_splits: int = 0, head_dim: int = 0, **changes: float) -> CacheParams:
        """Return the parameters; the cache's own head dim may be another one, changes are of `forward`."""
        own = {"cache_head_dim": head_dim or self.head_dim, "cache_head_dim_v": self.head_dim}
        return CacheParams(self.forward(**changes), num_splits=num_splits, **own)


def numbers(direction: str, family: str, head_dim: int) -> ctypes.Array[ctypes.c_int32]:
    """Return what a plan reads of the tiles of a table, as C++ has it."""
    found = tiles.planned(direction, tiles.find_tiles(direction, family, head_dim, "windowed"), head_dim)
    flat = [n for shape in found for n in (shape if isinstance(shape, list) else [shape])]
    return (ctypes.c_int32 * len(flat))(*flat)


Planner = Callable[..., tuple[int, int]]


@pytest.fixture(scope="session")
def plan(plans: ctypes.CDLL) -> Planner:
    """`plan(call)` returns (num_splits, design) for the tiles of a family."""

    def run(call: Call, family: str = "sm90", gpu: int = H200, **changes: float) -> tuple[int, int]:
        params, found = call.cache(**changes), CachePlan()
        plans.make_cache_plan(byref(params), numbers("split", family, call.head_dim), gpu, byref(found))
        return found.num_splits, found.design

    return run


def mma_rows(plans: ctypes.CDLL, call: Call, family: str = "sm90", **changes: float) -> int:
    """Return the rows of the mma design's tile that computes a call."""
    return plans.mma_rows(byref(call.cache(**changes)), numbers("split", family, call.head_dim))


def packed_heads(plans: ctypes.CDLL, call: Call, **changes: float) -> int:
    """Return the heads that are packed into a tile of the wgmma design."""
    rows = tiles.CACHE_TILES["sm90"][call.head_dim]["wgmma"].block_m
    return plans.packed_heads(byref(call.forward(**changes)), rows)


@pytest.mark.parametrize("multiprocessors", [1, 20, 108, 132])
@pytest.mark.parametrize("batch", [0, 1, 7, 132, 5000])
@pytest.mark.parametrize("key_blocks", [0, 1, 2, 63, 4096])
@pytest.mark.parametrize("family", ["sm80", "sm86", "sm90"])
@pytest.mark.parametrize("rows", [0, 16, 64, 128])
def test_is_between_one_and_what_there_is_to_split(plan, rows, family, key_blocks, batch, multiprocessors):
    call = Call(batch, (1, 1), rows, key_blocks * KEYS)
    splits, design = plan(call, family, multiprocessors)
    assert 1 <= splits <= max(1, min(MAX_SPLITS, key_blocks))
    assert design == MMA or family == "sm90"


def test_no_heads_and_sizes_beyond_memory_have_a_plan(plan):
    assert plan(Call(heads=(0, 8))) == (1, MMA)
    most = 2**31 - 128
    for heads in ((most, most), (most, 1)):
        assert plan(Call(most, heads, most, most)) == (1, WGMMA)


def splits_of(plan, tiles, rows, key_blocks, family="sm80"):
    """Return into how many parts the keys of so many tiles are split, one of each sequence."""
    splits, design = plan(Call(tiles, (1, 1), rows, key_blocks * KEYS), family)
    assert design == MMA
    return splits


def test_many_tiles_are_not_split_and_few_fill_the_gpu(plan):
    assert all(splits_of(plan, 10 * H200, rows, 1000) == 1 for rows in (16, 64, 128))
    assert splits_of(plan, H200, 16, 1000) == 1
    for count in (1, 2, 8, 32):
        assert 0.9 * H200 <= count * splits_of(plan, count, 16, 1000) <= H200


@pytest.mark.parametrize("rows", [64, 128])
def test_tiles_that_tensor_cores_bound_share_a_multiprocessor(plan, rows):
    assert splits_of(plan, H200, rows, 1000) == 2
    for count in (2, 8, 32):
        assert 1.8 * H200 <= count * splits_of(plan, count, rows, 1000) <= 2 * H200


def test_more_rows_make_splitting_dearer(plan):
    assert splits_of(plan, 8, 128, 40) < splits_of(plan, 8, 64, 40)


def test_few_keys_are_not_split(plan):
    assert all(splits_of(plan, 1, rows, 2) == 1 for rows in (16, 64, 128))


def test_a_family_without_the_tile_of_128_rows_counts_tiles_of_64(plan):
    for count in (2, 8, 32):
        of_two_halves = splits_of(plan, count, 128, 1000, "sm86")
        assert of_two_halves == splits_of(plan, 2 * count, 64, 1000) < splits_of(plan, count, 128, 1000)


@pytest.mark.parametrize(
    "batch, num_heads_k, rows, keys, best",
    [
        (1, 8, 4, 4096, {16, 32}), (1, 8, 4, 65536, {16, 32}), (8, 8, 4, 8192, {2, 4}),
        (64, 8, 4, 4096, {1}), (128, 8, 4, 1024, {1}), (1, 32, 1, 4096, {4, 8}), (8, 32, 1, 8192, {1, 2}),
        (1, 1, 16, 4096, {64}), (1, 1, 16, 65536, {128}), (8, 1, 16, 8192, {16, 32}),
        (64, 1, 16, 4096, {2, 4}), (128, 1, 16, 1024, {1}),
    ],
)  # fmt: skip
def test_is_near_the_best_that_was_measured_on_an_h200(plan, batch, num_heads_k, rows, keys, best):
    num_splits, design = plan(Call(batch, (num_heads_k * rows, num_heads_k), 1, keys))
    assert design == MMA and num_splits in best


@pytest.mark.parametrize(
    "queries, heads, keys, best",
    [
        (128, GQA, 4096, {5}), (512, GQA, 4096, {1}), (512, GQA, 32768, {4, 8}), (2048, GQA, 32768, {1, 3}),
        (128, MHA, 4096, {3, 4}), (128, MQA, 4096, {8}), (512, MQA, 4096, {3}), (512, MQA, 32768, {3}),
        (2048, MQA, 32768, {3}),
    ],
)  # fmt: skip
def test_hoppers_forward_kernel_takes_many_queries_as_was_measured_on_an_h200(
    plan, queries, heads, keys, best
):
    num_splits, design = plan(Call(1, heads, queries, keys))
    assert design == WGMMA and num_splits in best


def test_a_prompt_that_fills_the_gpu_is_not_split_however_large_the_block_table_is(plan):
    for batch, queries, num_heads in ((1, 4096, 32), (4, 1024, 64), (8, 200, 128)):
        assert plan(Call(batch, (num_heads, 8), queries, 1 << 20)) == (1, WGMMA)


def test_a_number_of_splits_that_is_given_stays(plan):
    for num_splits in (1, 7, 128):
        assert plan(Call(seqlen_q=512), num_splits=num_splits)[0] == num_splits
        assert plan(Call(seqlen_q=1), num_splits=num_splits) == (num_splits, MMA)
        assert plan(Call(seqlen_q=512), "sm80", num_splits=num_splits) == (num_splits, MMA)
    assert plan(Call(seqlen_q=512), num_splits=1)[1] == WGMMA


def test_tiles_that_stay_empty_are_left_to_the_other_kernel(plan):
    """20 queries of 28 heads that do not fill a tile, beside 3 tiles of 64 rows for each head of keys."""
    assert plan(Call(50, (28, 4), 20))[1] == MMA


def test_only_a_kernel_that_has_the_design_is_asked_for_it(plan):
    assert [plan(Call(seqlen_q=2048), family)[1] for family in ("sm80", "sm86", "sm90")] == [MMA, MMA, WGMMA]


@pytest.mark.parametrize("head_dim", axes.HEAD_DIMS)
def test_rows_from_which_on_hoppers_forward_kernel_takes_a_call(plan, head_dim):
    """Up to 64 rows memory is the bound."""
    for heads, queries in (GQA, 17), ((8, 8), 65):
        assert plan(Call(8, heads, queries - 1, 65536, head_dim))[1] == MMA
        assert plan(Call(8, heads, 16 * queries, 65536, head_dim))[1] == WGMMA


UNALIGNED = ({"k": SOME + 2}, {"v_row_stride": 129}, {"k_head_stride": 4}, {"head_dim": 127})


@pytest.mark.parametrize("changes", UNALIGNED, ids=str)
@pytest.mark.parametrize("family", ["sm80", "sm86", "sm90"])
def test_a_cache_that_is_not_aligned_is_read_by_the_tile_of_64_rows(plan, plans, family, changes):
    for queries in (1, 16, 500):
        call = Call(3, GQA, queries, 8192)
        assert mma_rows(plans, call, family, **changes) == 64
        assert plan(call, family, **changes)[1] == MMA
    few, as_many = (Call(H200, (4, 1), queries, 64000) for queries in (1, 16))
    assert plan(few, family, **changes) == plan(as_many, family) != plan(few, family)


@pytest.mark.parametrize("family, largest", [("sm80", 128), ("sm86", 64), ("sm90", 128)])
def test_rows_of_a_tile(plans, family, largest):
    for rows, tile in ((0, 16), (1, 16), (16, 16), (17, 64), (64, 64), (65, largest), (1280, largest)):
        assert mma_rows(plans, Call(1, (1, 1), rows), family) == tile


@pytest.mark.parametrize(
    "seqlen_q, heads, head_dim, packed",
    [
        (100, GQA, 128, 4),  # 3 tiles of 400 rows, not 4 of 100 each
        (1920, GQA, 128, 1),  # packing would fill tiles no better
        (512, GQA, 256, 1),
        (20, (28, 4), 128, 1),  # 7 heads do not divide a tile
        (17, GQA, 128, 4),
        (513, (2, 1), 128, 1),  # 6 tiles, packed or not
        (48, (8, 8), 128, 1),
    ],
)
def test_heads_that_are_packed_into_a_tile(plans, seqlen_q, heads, head_dim, packed):
    assert packed_heads(plans, Call(1, heads, seqlen_q, head_dim=head_dim)) == packed


MODIFIERS = (
    {"softcap": 5.0}, {"alibi_slopes": SOME}, {"softmax_scale": 0.0}, {"softmax_scale": -0.125},
    {"softmax_scale": 257.0}, {"softmax_scale": float("nan")},
)  # fmt: skip


@pytest.mark.parametrize("changes", MODIFIERS, ids=str)
def test_score_modifiers_keep_heads_from_being_packed(plan, plans, changes):
    call = Call(16, GQA, 48)
    assert packed_heads(plans, call) == 4 and packed_heads(plans, call, softmax_scale=256.0) == 4
    assert packed_heads(plans, call, **changes) == 1
    assert plan(call)[1] == WGMMA != plan(call, **changes)[1]


@pytest.fixture(scope="session")
def backward_plan(plans: ctypes.CDLL) -> Planner:
    """`backward_plan(call)` returns (key_parts, head_dim)."""

    def run(
        call: Call, family: str = "sm90", dk: int | None = SOME, at_once: int = H200, **changes: float
    ) -> tuple[int, int]:
        params, found = BackwardParams(call.forward(**changes), dk=dk), BackwardPlan()
        tile = numbers("backward", family, call.head_dim)
        plans.make_backward_plan(byref(params), tile, at_once, byref(found))
        return found.key_parts, found.head_dim

    return run


@pytest.mark.parametrize(
    "batch, heads, seqlen_k, full, causal",
    [
        (1, GQA, 512, 4, 4), (1, GQA, 1024, 2, 4), (1, GQA, 2048, 1, 4), (1, GQA, 16384, 1, 2),
        (1, GQA, 131072, 1, 1), (1, MHA, 128, 1, 1), (1, (32, 1), 4096, 4, 32), (64, (32, 1), 4096, 1, 1),
        (1, (6, 2), 128, 3, 3), (0, (4, 2), 128, 1, 1),
    ],
)  # fmt: skip
def test_a_backward_with_few_keys_is_split_by_heads(backward_plan, batch, heads, seqlen_k, full, causal):
    call = Call(batch, heads, seqlen_k, seqlen_k)
    assert backward_plan(call) == (full, 128)
    for window in ({"window_right": 0}, {"window_left": 5}, {"window_left": 0, "window_right": 0}):
        assert backward_plan(call, **window) == (causal, 128)


@pytest.mark.parametrize(
    "family, head_dim, parts", [("sm80", 128, 2), ("sm80", 256, 1), ("sm86", 64, 2), ("sm86", 192, 1)]
)
def test_a_backward_with_fewer_keys_in_a_tile_has_more_thread_blocks(backward_plan, family, head_dim, parts):
    assert backward_plan(Call(1, GQA, 1024, 1024, head_dim), family) == (parts, head_dim)


@pytest.mark.parametrize(
    "heads, seqlen_k, head_dim, parts",
    [
        (GQA, 1024, 64, 4), (GQA, 2048, 64, 2), ((32, 4), 2048, 64, 4), (MQA, 2048, 64, 16),
        (MQA, 8192, 64, 4), (GQA, 2048, 32, 2), ((32, 4), 2048, 32, 4),
    ],
)  # fmt: skip
def test_a_backward_of_two_thread_blocks_at_a_time_as_was_measured_on_an_h200(
    backward_plan, heads, seqlen_k, head_dim, parts
):  # fmt: skip
    """Twice as many of them fill the GPU: 1.02 to 1.43 as fast as with half as many parts."""
    call = Call(1, heads, seqlen_k, seqlen_k, head_dim)
    assert backward_plan(call, at_once=2 * H200) == (parts, head_dim)
    assert backward_plan(call, at_once=H200) == (max(parts // 2, 1), head_dim)


@pytest.mark.parametrize(
    "per_multiprocessor, warps, shared_bytes, blocks",
    [
        (233472, 8, 160000, 1), (233472, 8, 10000, 1), (233472, 4, 110000, 2), (233472, 4, 116000, 1),
        (102400, 4, 99 * 1024, 1), (102400, 4, 50000, 2), (102400, 2, 20000, 4), (0, 4, 1, 1),
    ],
)  # fmt: skip
def test_thread_blocks_that_run_at_a_time(plans, per_multiprocessor, warps, shared_bytes, blocks):
    """Registers are bound by warps, 8 of which fill a multiprocessor."""
    assert plans.resident(per_multiprocessor, warps, shared_bytes) == blocks


def test_a_backward_without_gradients_of_keys_is_not_split(backward_plan):
    assert backward_plan(Call(keys=128), dk=None) == (1, 128)
