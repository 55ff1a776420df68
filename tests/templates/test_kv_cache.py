"""Where keys lie in a cache, with pages and without, against a cache in Python."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_int64
from dataclasses import dataclass

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from problem_calls import SETTINGS

from flash_attn._abi import CacheParams, ForwardParams

PAGE = 16
"""Page sizes are multiples of it in every build."""


@dataclass
class Cache:
    """What a call says of its cache; None for what it does not give."""

    batch: int
    capacity: int
    entries: int
    appended: int
    length: int
    lengths: np.ndarray | None
    leftpad: np.ndarray | None
    indices: np.ndarray | None
    starts: np.ndarray | None
    page_size: int
    table: np.ndarray | None

    @property
    def params(self) -> CacheParams:
        """The parameters of the call; they point into this object."""
        lengths, leftpad, indices, starts, table = (
            None if x is None else x.ctypes.data
            for x in (self.lengths, self.leftpad, self.indices, self.starts, self.table)
        )
        forward = ForwardParams(
            batch=self.batch, seqlen_q=1, seqlen_k=self.capacity, leftpad_k=leftpad, cu_seqlens_q=starts,
            cu_seqlens_k=starts,
        )  # fmt: skip
        return CacheParams(
            forward, cache_seqlens=lengths, cache_batch_idx=indices, block_table=table,
            block_table_stride=0 if self.table is None else self.table.strides[0] // 4,
            cache_entries=self.entries, page_size=self.page_size, cache_seqlen=self.length,
            seqlen_new=self.appended,
        )  # fmt: skip

    def held(self, batch: int) -> int:
        """Return how many keys the sequence has before the call's own, no more than there is room for."""
        length = self.length
        if self.lengths is not None:
            length = self.lengths[batch]
        elif self.starts is not None:
            length = self.starts[batch + 1] - self.starts[batch]
        return len(range(self.capacity)[: max(length, 0)])

    def positions(self, batch: int) -> range:
        """Return the positions that hold a key after the call, skipped ones left out."""
        skipped = 0 if self.leftpad is None else max(self.leftpad[batch], 0)
        return range(self.capacity)[skipped : self.held(batch) + self.appended]

    def place(self, batch: int, position: int) -> tuple[int, int]:
        """Return (row of the cache or page, row in it) as the call names it; -1 past the last one."""
        if position >= self.capacity:
            return -1, 0
        if self.table is not None:
            return self.table[batch, position // self.page_size], position % self.page_size
        return (batch if self.indices is None else self.indices[batch]), position

    def exists(self, entry: int) -> bool:
        """Return whether the cache has this row or page."""
        return entry in range(self.entries)


@st.composite
def caches(draw: st.DrawFn) -> Cache:
    """A cache with pages or rows, and numbers on the device that may be anything."""
    batch, entries = draw(st.integers(1, 3)), draw(st.integers(0, 6))
    paged = draw(st.booleans())
    page_size = PAGE * draw(st.integers(1, 3)) if paged else 0
    pages = draw(st.integers(1, 3))
    capacity = page_size * pages if paged else draw(st.integers(1, 80))

    def numbers(first: int, last: int, *shape: int) -> np.ndarray:
        count = int(np.prod(shape))
        values = draw(st.lists(st.integers(first, last), min_size=count, max_size=count))
        return np.array(values, np.int32).reshape(shape)

    def perhaps(first: int, last: int) -> np.ndarray | None:
        return numbers(first, last, batch) if draw(st.booleans()) else None

    packed = paged and draw(st.booleans())
    steps = numbers(0, capacity, batch) if packed else None
    return Cache(
        batch, capacity, entries, 0 if packed else draw(st.integers(0, 20)), draw(st.integers(0, 120)),
        lengths=perhaps(-3, capacity + 20), leftpad=None if paged else perhaps(-3, capacity + 20),
        indices=None if paged else perhaps(-2, entries + 2),
        starts=None if steps is None else np.cumsum([0, *steps]).astype(np.int32),
        page_size=page_size,
        table=numbers(-2, entries + 2, batch, pages + draw(st.integers(0, 2))) if paged else None,
    )  # fmt: skip


@given(caches())
@SETTINGS
def test_lengths(problem: ctypes.CDLL, cache: Cache) -> None:
    """Keys of the call follow those of the cache; past the last packed sequence there are none."""
    found, params = np.zeros(3, np.int32), cache.params
    for batch in range(cache.batch):
        problem.cached_lengths(byref(params), batch, found.ctypes)
        length, keys, skipped = found.tolist()
        assert length == cache.held(batch)
        assert range(skipped, skipped + keys) == cache.positions(batch)
    if cache.starts is not None:
        problem.cached_lengths(byref(params), cache.batch, found.ctypes)
        assert found.tolist() == [0, 0, 0]


@given(caches())
@SETTINGS
def test_every_key_and_those_past_the_last_one(problem: ctypes.CDLL, cache: Cache) -> None:
    """A row or page that the cache lacks is -1 where a key is located."""
    params, lengths = cache.params, np.zeros(3, np.int32)
    for batch in range(cache.batch):
        problem.cached_lengths(byref(params), batch, lengths.ctypes)
        skipped = int(lengths[2])
        count = cache.capacity - skipped + 20
        looked_up, located = np.zeros((2, count, 2), np.int32)
        problem.key_locations(byref(params), batch, count, looked_up.ctypes, located.ctypes)
        for key in range(count):
            entry, row = cache.place(batch, skipped + key)
            if cache.exists(entry):
                assert looked_up[key].tolist() == located[key].tolist() == [entry, row]
            else:
                assert not cache.exists(looked_up[key][0]) if cache.page_size else looked_up[key][0] == -1
                assert located[key][0] == -1


SIZES = st.one_of(
    st.tuples(st.sampled_from([4096, 4112]), *[st.integers(0, 40).map(lambda n: n * 8)] * 3),
    st.tuples(st.sampled_from([4096, 4098, 4104]), *[st.sampled_from([0, 8, 12, 64, 65])] * 3),
)
HEAD_DIM = st.one_of(st.sampled_from([16, 24, 128]), st.integers(9, 40))


def starts_and_ends_of_rows(tensor: tuple[int, int, int, int], head_dim: int) -> list[int]:
    """Return the addresses where rows of 16-bit elements start and end."""
    address, *strides = tensor
    at = np.array(list(np.ndindex(2, 2, 2, 2)))
    return (address + 2 * at @ [*strides, head_dim]).tolist()


@given(SIZES, HEAD_DIM)
@SETTINGS
def test_rows_are_aligned(problem: ctypes.CDLL, tensor: tuple[int, int, int, int], head_dim: int) -> None:
    address, *strides = tensor
    found = problem.are_rows_aligned(ctypes.c_void_p(address), *map(c_int64, strides), head_dim)
    assert found == all(place % 16 == 0 for place in starts_and_ends_of_rows(tensor, head_dim))


@given(SIZES, SIZES, HEAD_DIM, HEAD_DIM)
@SETTINGS
def test_a_cache_is_aligned_if_its_own_rows_are(
    problem: ctypes.CDLL, k: tuple[int, int, int, int], v: tuple[int, int, int, int], dim: int, dim_v: int
) -> None:
    """The call's head dims are those of the cache, rounded up to a multiple of 8."""
    names = ("", "_batch_stride", "_row_stride", "_head_stride")
    fields = {
        tensor + name: value
        for tensor, values in (("k", k), ("v", v))
        for name, value in zip(names, values, strict=True)
    }
    forward = ForwardParams(head_dim=-(-dim // 8) * 8, head_dim_v=-(-dim_v // 8) * 8, **fields)
    params = CacheParams(forward, cache_head_dim=dim, cache_head_dim_v=dim_v)
    places = starts_and_ends_of_rows(k, dim) + starts_and_ends_of_rows(v, dim_v)
    assert problem.is_cache_aligned(byref(params)) == all(place % 16 == 0 for place in places)
