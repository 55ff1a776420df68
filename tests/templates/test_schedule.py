"""The order of tiles: each comes once, and heads that share L2 run together."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import byref, c_int64
from itertools import groupby, product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from problem_calls import SETTINGS

from flash_attn._abi import ForwardParams, Mask

SOME = 4096  # an address, which nobody looks at
LENGTH = st.sampled_from([0, 1, 64, 150, 300])
SECTION_BYTES = st.one_of(st.sampled_from([0, 2**40]), st.integers(1, 9).map(lambda n: n * 40_000))
Tiles = list[tuple[int, int, int]]


@st.composite
def calls(draw: st.DrawFn) -> ForwardParams:
    """A call of any layout: nothing but its sizes matters."""
    num_heads_k = draw(st.integers(1, 3))
    starts = draw(st.sampled_from([None, SOME]))
    return ForwardParams(
        batch=draw(st.sampled_from([0, 1, 2, 3])),
        num_heads_k=num_heads_k,
        num_heads=num_heads_k * draw(st.sampled_from([1, 2, 4, 6])),
        seqlen_q=draw(LENGTH),
        seqlen_k=draw(LENGTH),
        head_dim=draw(st.sampled_from([8, 64, 128])),
        head_dim_v=draw(st.sampled_from([8, 64])),
        cu_seqlens_q=starts,
        cu_seqlens_k=starts,
    )


def enumerated(store: Callable[..., int], *arguments: object) -> Tiles:
    """Return all tiles that a schedule gives, as (m_block, batch, head)."""
    found = np.zeros((10_000, 3), np.int32)
    count = store(*arguments, found.ctypes, c_int64(len(found)))
    assert count <= len(found)
    return [tuple(tile) for tile in found[:count].tolist()]


def check_each_comes_once(tiles: Tiles, call: ForwardParams, tiles_m: int, num_heads: int) -> None:
    """Every tile of every head, those past the last varlen sequence included."""
    batches = call.batch + bool(call.cu_seqlens_q)
    assert sorted(tiles) == sorted(product(range(tiles_m), range(batches), range(num_heads)))


def sections_of(tiles: Tiles) -> list[list[tuple[int, int]]]:
    """Cut tiles where a later block follows an earlier one; return the heads (batch, head) of each section.

    Inside a section all heads' last blocks come first, then the ones before them.
    """
    cuts = [i for i in range(1, len(tiles)) if tiles[i][0] > tiles[i - 1][0]]
    sections = []
    for begin, end in zip([0, *cuts], [*cuts, len(tiles)], strict=True):
        by_block = [
            [heads for _, *heads in same] for _, same in groupby(tiles[begin:end], lambda tile: tile[0])
        ]
        assert all(heads == by_block[0] for heads in by_block)
        sections.append([tuple(heads) for heads in by_block[0]])
    return sections


def check_sections(tiles: Tiles, unit: int, unit_bytes: int, room: int) -> None:
    """Sections hold as many units of `unit` heads side by side as there is room for, at least one.

    A unit counts as a byte at least: where a call has no queries or keys.
    """
    unit_bytes = max(unit_bytes, 1)
    sections = sections_of(tiles)
    heads = [head for section in sections for head in section]
    assert heads == sorted(set(heads))
    *whole, last = map(len, sections)
    for size in whole:
        units = size // unit
        assert size == units * unit
        assert units == 1 or units * unit_bytes <= room
        assert (units + 1) * unit_bytes > room
    assert last <= unit or -(-last // unit) * unit_bytes <= room


@given(
    calls(),
    st.sampled_from([16, 64, 128]),
    st.sampled_from([*Mask, Mask.CAUSAL]),
    SECTION_BYTES,
    st.booleans(),
)
@SETTINGS
def test_tiles_of_queries(
    problem: ctypes.CDLL, call: ForwardParams, block_m: int, mask: Mask, section_bytes: int, packed: bool
) -> None:
    group = call.num_heads // call.num_heads_k
    packed_heads = group if packed else 1
    tiles = enumerated(
        problem.query_tiles, byref(call), block_m, mask, c_int64(section_bytes), packed_heads
    )  # fmt: skip
    tiles_m = -(-call.seqlen_q * packed_heads // block_m)
    check_each_comes_once(tiles, call, tiles_m, call.num_heads // packed_heads)
    if mask != Mask.CAUSAL:
        heads = [(batch, head) for _, batch, head in tiles]
        assert heads == sorted(heads)
    elif tiles_m > 1 and tiles:
        key_bytes = 2 * call.seqlen_k * (call.head_dim + call.head_dim_v)
        check_sections(tiles, group // packed_heads, key_bytes, section_bytes)


@given(calls(), st.sampled_from([64, 128]), st.booleans(), SECTION_BYTES, st.data())
@SETTINGS
def test_tiles_of_keys(
    problem: ctypes.CDLL, call: ForwardParams, block_n: int, sections: bool, section_bytes: int,
    data: st.DataObject,
) -> None:  # fmt: skip
    group = call.num_heads // call.num_heads_k
    parts = data.draw(st.sampled_from([n for n in range(1, group + 1) if group % n == 0]))
    tiles = enumerated(
        problem.key_tiles, byref(call), block_n, parts, ctypes.c_bool(sections), c_int64(section_bytes)
    )  # fmt: skip
    tiles_n = -(-call.seqlen_k // block_n)
    check_each_comes_once(tiles, call, tiles_n, call.num_heads_k * parts)
    if not sections:
        heads = [(batch, head) for _, batch, head in tiles]
        assert heads == sorted(heads)
    elif tiles_n > 1 and tiles:
        queries = call.seqlen_q * (group // parts)
        query_bytes = queries * (2 * call.head_dim + 2 * call.head_dim_v + 4 * call.head_dim)
        check_sections(tiles, 1, query_bytes, section_bytes)
