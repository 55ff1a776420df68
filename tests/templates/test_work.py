"""The blocks of keys of a tile of queries, their parts, and where the results of these go."""

from __future__ import annotations

import ctypes
from ctypes import byref

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from problem_calls import GUARD, SETTINGS, THREADS, Call, Rows, calls, tiles, visible, windows

from flash_attn._abi import CacheParams, ForwardParams, Mask

PARTS = st.one_of(st.integers(1, 6), st.sampled_from([17, 128]))


@given(
    windows(), st.integers(1, 200), st.integers(0, 1500), st.integers(1, 4), st.integers(0, 300), PARTS,
    st.sampled_from([64, 80, 128]),
)  # fmt: skip
@SETTINGS
def test_parts_take_each_block_once(
    problem: ctypes.CDLL, window: tuple[Mask, int, int], seqlen_q: int, seqlen_k: int, group: int,
    first_row: int, parts: int, block_n: int,
) -> None:  # fmt: skip
    """In order, all of one size but the last ones; more parts than blocks leave some without any."""
    mask, left, right = window
    params = ForwardParams(
        batch=1, num_heads=group, num_heads_k=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k, window_left=left,
        window_right=right,
    )  # fmt: skip
    rows = Rows(0, 0, group, first_row, 64)
    found = np.zeros((parts + 1, 3), np.int32)
    problem.key_parts(byref(params), mask, block_n, byref(rows), parts, found.ctypes)
    queries = sorted({row // group for row in range(first_row, min(first_row + 64, seqlen_q * group))})
    keys = visible(seqlen_q, seqlen_k, left, right)[queries].any(0).nonzero()[0]
    expected = sorted(set((keys // block_n).tolist()))
    every, *of_parts = (list(range(begin, end)) for begin, end, _ in found.tolist())
    assert every == expected
    assert found[:, 2].tolist() == [bool(blocks) for blocks in (every, *of_parts)]
    each = -(-len(expected) // parts)
    assert of_parts == [expected[i * each : (i + 1) * each] for i in range(parts)]


def partial_results(call: Call, parts: int) -> tuple[CacheParams, np.ndarray, np.ndarray]:
    """Return parameters of a call whose keys are in parts, O (.., row, head, part, element) and the LSE."""
    shape = *call.q.shape[:-1], parts
    out, lse = (np.full(of, GUARD, np.float32) for of in ((*shape, call.params.head_dim_v), shape))
    pointers = {"out_partial": out.ctypes.data, "lse_partial": lse.ctypes.data}
    return CacheParams(call.params, num_splits=parts, **pointers), out, lse


@given(tiles(), st.integers(2, 5), st.data(), THREADS)
@SETTINGS
def test_a_part_without_keys(
    problem: ctypes.CDLL, tile: tuple[Call, Rows, list[tuple[int, int]]], parts: int, data: st.DataObject,
    threads: int,
) -> None:  # fmt: skip
    """O = 0 and LSE = -inf in the rows of this part, and nothing else."""
    call, rows, expected = tile
    part = data.draw(st.integers(0, parts - 1))
    params, out, lse = partial_results(call, parts)
    wanted = out.copy(), lse.copy()
    for query, head in expected:
        for x, value in zip(wanted, (0, -np.inf), strict=True):
            call.queries(x, rows.batch)[query, head, part] = value
    problem.fill_no_keys(byref(params), byref(rows), part, parts, threads)
    for found, right in zip((out, lse), wanted, strict=True):
        np.testing.assert_array_equal(found, right)
    assert (call.out.base == GUARD).all() and (call.lse.base == GUARD).all()


@given(tiles(), THREADS)
@SETTINGS
def test_the_only_part_stores_the_result(
    problem: ctypes.CDLL, tile: tuple[Call, Rows, list[tuple[int, int]]], threads: int
) -> None:
    """What fill_empty_rows stores."""
    call, rows, expected = tile
    params, *partial = partial_results(call, 1)
    problem.fill_no_keys(byref(params), byref(rows), 0, 1, threads)
    stored = np.zeros(call.q.shape[:-1], bool)
    for query, head in expected:
        call.queries(stored, rows.batch)[query, head] = True
    assert ((call.out == 0).all(-1) == stored).all()
    assert ((call.lse.swapaxes(-1, -2) == np.inf) == stored).all()
    assert all((x == GUARD).all() for x in partial)


@given(calls(), st.integers(1, 4), st.booleans(), st.sampled_from([1, 3, 16]))
@SETTINGS
def test_every_row_of_every_part_has_a_place_of_its_own(
    problem: ctypes.CDLL, call: Call, parts: int, packed: bool, block_m: int
) -> None:
    num_heads = call.params.num_heads
    group = num_heads // call.params.num_heads_k if packed else 1
    places: list[int] = []
    found = np.zeros(block_m, np.int64)
    for batch in call.entries:
        count = len(call.queries(call.q, batch)) * group
        for part, head, first in np.ndindex(parts, num_heads // group, count):
            if first % block_m == 0:
                rows = Rows(batch, head, group, first, block_m)
                stored = problem.partial_rows(byref(call.params), byref(rows), part, parts, found.ctypes)
                places += found[:stored].tolist()
    assert sorted(places) == list(range(call.q[..., 0].size * parts))
