"""Where rows lie in fixed-length and varlen layouts, and what is stored where a query sees no key."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_int64

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from problem_calls import GUARD, SETTINGS, THREADS, Call, Rows, calls, tiles

from flash_attn._abi import ForwardParams


def lengths_of(problem: ctypes.CDLL, params: ForwardParams, batch: int) -> list[int]:
    """Return the numbers of queries and keys of a batch entry."""
    found = np.zeros(2, np.int32)
    problem.lengths(byref(params), batch, found.ctypes)
    return found.tolist()


@given(calls())
@SETTINGS
def test_rows_of_every_entry(problem: ctypes.CDLL, call: Call) -> None:
    params, addresses = byref(call.params), np.zeros(3, np.uint64)
    for batch in call.entries:
        q, out, lse = call.queries(call.q, batch), call.queries(call.out, batch), call.lse_rows(batch)
        k, v = (call.keys(x, batch) for x in (call.k, call.v))
        assert lengths_of(problem, call.params, batch) == [len(q), len(k)]
        for row, head in np.ndindex(q.shape[:2]):
            problem.query_addresses(params, batch, head, row, addresses.ctypes)
            assert addresses.tolist() == [x[row:, head:].ctypes.data for x in (q, out, lse)]
        for head in range(call.params.num_heads_k if len(k) else 0):
            problem.key_addresses(params, batch, head, addresses.ctypes)
            assert addresses[:2].tolist() == [x[:, head:].ctypes.data for x in (k, v)]


DEVICE_LENGTH = st.one_of(st.sampled_from([-3, 0, 40]), st.integers(1, 12))
NUMBERS = st.one_of(st.none(), st.lists(DEVICE_LENGTH, min_size=3, max_size=3))


@given(calls(), NUMBERS, NUMBERS)
@SETTINGS
def test_lengths_on_the_device_are_cut_down(
    problem: ctypes.CDLL, call: Call, used: list[int] | None, skipped: list[int] | None
) -> None:
    """Keys [skipped, used) of those that there are, whatever the two numbers."""
    arrays = [x and np.array(x, np.int32) for x in (used, skipped)]
    call.params.seqused_k, call.params.leftpad_k = (None if x is None else x.ctypes.data for x in arrays)
    address = np.zeros(2, np.uint64)
    for batch in range(call.params.batch):
        k = call.keys(call.k, batch)
        kept = [
            row
            for row in range(len(k))
            if (used is None or row < used[batch]) and (skipped is None or row >= skipped[batch])
        ]
        assert lengths_of(problem, call.params, batch)[1] == len(kept)
        if kept:
            problem.key_addresses(byref(call.params), batch, 0, address.ctypes)
            assert address[0] == k[kept[0] :].ctypes.data
    if call.starts_q is not None:
        tail = len(call.q) - call.starts_q[-1]
        assert lengths_of(problem, call.params, call.params.batch) == [tail, 0]


@given(tiles())
@SETTINGS
def test_rows_of_a_tile(problem: ctypes.CDLL, tile: tuple[Call, Rows, list[tuple[int, int]]]) -> None:
    call, rows, expected = tile
    numbers, addresses = np.zeros((rows.max_rows, 3), np.int64), np.zeros((rows.max_rows, 3), np.uint64)
    count = problem.query_block(byref(call.params), byref(rows), numbers.ctypes, addresses.ctypes)
    assert max(count, 0) == len(expected)
    indices = np.arange(call.q[..., 0].size).reshape(call.q.shape[:-1])
    found = [call.queries(x, rows.batch) for x in (indices, call.q, call.out)]
    for i, (query, head) in enumerate(expected):
        assert numbers[i].tolist() == [query, head, found[0][query, head]]
        places = [x[query:, head:] for x in (*found[1:], call.lse_rows(rows.batch))]
        assert addresses[i].tolist() == [x.ctypes.data for x in places]


@given(tiles(), THREADS, st.booleans())
@SETTINGS
def test_empty_rows_and_no_others_are_stored(
    problem: ctypes.CDLL, tile: tuple[Call, Rows, list[tuple[int, int]]], threads: int,
    with_lse: bool,
) -> None:  # fmt: skip
    """O = 0, LSE = +inf."""
    call, rows, expected = tile
    if not with_lse:
        call.params.softmax_lse = None
    memory = [x.base for x in (call.out, call.lse)]
    before = [x.copy() for x in memory]
    problem.fill_empty_rows(byref(call.params), byref(rows), threads)
    stored = [x.copy() for x in memory]
    for x, old in zip(memory, before, strict=True):
        x[:] = old
    for query, head in expected:
        call.queries(call.out, rows.batch)[query, head] = 0
        if with_lse:
            call.lse_rows(rows.batch)[query, head] = np.inf
    for found, wanted in zip(stored, memory, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("rows, chunks, threads", [(0, 2, 4), (1, 1, 32), (5, 3, 1), (5, 3, 4), (9, 2, 100)])
def test_zero_rows(problem: ctypes.CDLL, rows: int, chunks: int, threads: int) -> None:
    memory = np.full((rows + 2, 8 * chunks + 16), GUARD, np.uint16)
    expected = memory.copy()
    expected[1 : rows + 1, 8 : 8 + 8 * chunks] = 0
    stride = c_int64(memory.shape[1])
    problem.fill_zero_rows(memory[1:, 8:].ctypes, stride, c_int64(rows), chunks, c_int64(threads))
    np.testing.assert_array_equal(memory, expected)


@given(st.integers(0, 2000), st.sampled_from([16, 64, 128]), st.integers(1, 5))
@SETTINGS
def test_tiles_of_a_schedule_share_all_tail_rows(
    problem: ctypes.CDLL, rows: int, block_m: int, tiles_m: int
) -> None:
    """Each of `tiles_m` tiles takes every `tiles_m`-th: together they come to each row once."""
    covered, found = np.zeros(rows, int), np.zeros(200, np.int32)
    for tile in range(tiles_m):
        count = problem.tail_tiles(
            c_int64(tile * block_m), c_int64(tiles_m * block_m), c_int64(rows), found.ctypes, len(found)
        )
        for first in found[:count]:
            covered[first : first + block_m] += 1
    assert (covered == 1).all()
