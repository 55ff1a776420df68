"""Which keys a query sees, and which blocks of keys a tile of queries visits, against the definition."""

from __future__ import annotations

import ctypes
from ctypes import byref

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from problem_calls import SETTINGS, visible, windows

from flash_attn._abi import ForwardParams, Mask


def spread(ranges: np.ndarray, length: int) -> np.ndarray:
    """Return for each [first, end) which of the numbers from 0 on it holds; none may be out of bounds."""
    numbers = np.arange(-1, length + 1)
    inside = (numbers >= ranges[:, :1]) & (numbers < ranges[:, 1:])
    assert not inside[:, [0, -1]].any()
    return inside[:, 1:-1]


@given(windows(), st.integers(0, 60), st.integers(0, 60))
@SETTINGS
def test_bounds_are_what_is_visible(
    problem: ctypes.CDLL, window: tuple[Mask, int, int], seqlen_q: int, seqlen_k: int
) -> None:
    mask, left, right = window
    params = ForwardParams(window_left=left, window_right=right)
    keys, queries = (np.zeros((n, 2), np.int32) for n in (seqlen_q, seqlen_k))
    problem.mask_bounds(byref(params), mask, seqlen_q, seqlen_k, keys.ctypes, queries.ctypes)
    expected = visible(seqlen_q, seqlen_k, left, right)
    assert (spread(keys, seqlen_k) == expected).all()
    assert (spread(queries, seqlen_q) == expected.T).all()


@given(windows(), st.data(), st.integers(1, 500), st.integers(0, 700), st.sampled_from([64, 80, 128]))
@SETTINGS
def test_blocks_are_those_with_a_visible_key(
    problem: ctypes.CDLL, window: tuple[Mask, int, int], data: st.DataObject, seqlen_q: int, seqlen_k: int,
    block_n: int,
) -> None:  # fmt: skip
    mask, left, right = window
    first = data.draw(st.integers(0, seqlen_q - 1))
    last = data.draw(st.integers(first, min(first + 200, seqlen_q - 1)))
    params = ForwardParams(window_left=left, window_right=right)
    count = -(-seqlen_k // block_n)
    found, needs_mask = np.zeros((1, 2), np.int32), np.ones(count, bool)
    problem.key_blocks(
        byref(params), mask, block_n, seqlen_q, seqlen_k, first, last, found.ctypes, needs_mask.ctypes, count
    )
    seen = np.zeros((last - first + 1, count * block_n), bool)
    seen[:, :seqlen_k] = visible(seqlen_q, seqlen_k, left, right)[first : last + 1]
    blocks = seen.reshape(len(seen), count, block_n)
    visited = spread(found, count)[0]
    assert (visited == blocks.any((0, 2))).all()
    assert (needs_mask == ~blocks.all((0, 2)))[visited].all()
