"""KV caches of any strides and address, read and appended to where they lie: nothing else is touched."""

from __future__ import annotations

import pytest
import torch
from oracle import Options
from problems import BF16, check_sequences, cu_seqlens, int32, rotary_tables, run_cache

from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

pytestmark = pytest.mark.usefixtures("default_device")
BATCH, CAPACITY, HEADS, HEADS_K = 2, 80, 4, 2
LENGTHS, NEW = (10, 61), 7
GUARD = 64  # elements before and behind

# How many elements lie between the heads of a row, the rows, and the entries, and before the first one; and
# whether the rows of a head lie beside one another.
LAYOUTS = {
    "moved by an element": (0, 0, 0, 1, False),
    "moved by two": (0, 0, 0, 2, False),
    "odd strides": (3, 1, 1, 1, False),
    "an odd stride of rows": (0, 1, 0, 0, False),
    "an odd stride of entries": (0, 0, 1, 0, False),
    "heads first": (1, 3, 0, 5, True),
}
HEAD_DIMS = [(64, 64), (59, 59), (111, 64), (8, 3), (1, 1), (256, 255)]


def random(*shape):
    return torch.randn(shape).to(BF16)


class Placed:
    """A cache in memory that is NaN everywhere else."""

    def __init__(self, content, layout):
        between_heads, between_rows, between_entries, shift, heads_first = LAYOUTS[layout]
        entries, rows, heads, dim = content.shape
        if heads_first:
            row, head = dim + between_rows, rows * (dim + between_rows) + between_heads
            entry = heads * head + between_entries
        else:
            head = dim + between_heads
            row = heads * head + between_rows
            entry = rows * row + between_entries
        where = content.shape, (entry, row, head, 1), GUARD + shift
        self.memory = torch.full((2 * GUARD + shift + entries * entry,), torch.nan, dtype=BF16)
        self.cache = self.memory.as_strided(*where)
        self.cache.copy_(content)
        self.expected_memory = self.memory.clone()
        self.expected = self.expected_memory.as_strided(*where)

    def assert_as_expected(self):
        """Compare every bit, those around the cache included."""
        assert torch.equal(self.memory.view(torch.int16), self.expected_memory.view(torch.int16))


def place(head_dims, layout, entries=BATCH, rows=CAPACITY):
    """Return the placed K and V; unlike the memory around them, they are random."""
    return [Placed(random(entries, rows, HEADS_K, dim), layout) for dim in head_dims]


@pytest.mark.parametrize("seqlen_q", [1, 40])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=str)
def test_appending_in_place(seqlen_q, layout, head_dims, device, require_split):
    require_split(device, BF16, *head_dims)
    keys, values = place(head_dims, layout, entries=4)
    rows = [3, 0]
    new = [random(BATCH, NEW, HEADS_K, dim) for dim in head_dims]
    for placed, x in zip((keys, values), new, strict=True):
        for b, n in enumerate(LENGTHS):
            placed.expected[rows[b], n : n + NEW] = x[b]
    q, options = random(BATCH, seqlen_q, HEADS, head_dims[0]), Options(causal=True)
    out, lse = run_cache(
        q, keys.cache, values.cache, options, k=new[0], v=new[1], cache_seqlens=int32(*LENGTHS),
        cache_batch_idx=int32(*rows), cache_leftpad=int32(4, 0),
    )  # fmt: skip
    keys.assert_as_expected()
    values.assert_as_expected()
    used = [(rows[b], slice(pad, n + NEW)) for b, (n, pad) in enumerate(zip(LENGTHS, (4, 0), strict=True))]
    check_sequences(out, lse, q, [(keys.expected[u], values.expected[u]) for u in used], options)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("layout", ["moved by an element", "odd strides"])
@pytest.mark.parametrize("head_dim", [32, 59])
def test_rotating_in_place(interleaved, layout, head_dim, device, require_split):
    """As into an aligned cache of rows that are longer, bit by bit."""
    require_split(device, BF16, head_dim)
    dims = head_dim, head_dim
    keys, values = place(dims, layout)
    padding = 0, 64 - head_dim
    aligned = [torch.nn.functional.pad(placed.cache, padding).contiguous() for placed in (keys, values)]
    q, *new = random(BATCH, 5, HEADS, head_dim), *(random(BATCH, NEW, HEADS_K, dim) for dim in dims)
    cos, sin = rotary_tables(CAPACITY + 5, 32)
    arguments = {"cache_seqlens": int32(*LENGTHS), "rotary_cos": cos, "rotary_sin": sin, "causal": True}
    arguments["rotary_interleaved"] = interleaved
    out = flash_attn_with_kvcache(q, keys.cache, values.cache, *new, **arguments)
    padded = [torch.nn.functional.pad(x, padding) for x in (q, *new)]
    expected = flash_attn_with_kvcache(
        padded[0], *aligned, *padded[1:], softmax_scale=head_dim**-0.5, **arguments
    )  # fmt: skip
    for placed, x in zip((keys, values), aligned, strict=True):
        placed.expected.copy_(x[..., :head_dim])
        placed.assert_as_expected()
    torch.testing.assert_close(out, expected[..., :head_dim], rtol=2**-7, atol=2**-8)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("layout", ["moved by an element", "heads first"])
@pytest.mark.parametrize("modified", [False, True])
def test_many_queries_and_split_keys(num_splits, layout, modified, device, require_split):
    require_split(device, BF16, 111)
    keys, values = place((111, 96), layout)
    q, slopes = random(BATCH, 300, HEADS, 111), torch.rand(HEADS) if modified else None
    options = Options(window_size=(60, 5), softcap=3.0 if modified else 0.0, alibi_slopes=slopes)
    named = {"cache_seqlens": int32(*LENGTHS), "num_splits": num_splits}
    out, lse = run_cache(q, keys.cache, values.cache, options, **named)
    keys.assert_as_expected()
    values.assert_as_expected()
    sequences = [(keys.cache[b, :n], values.cache[b, :n]) for b, n in enumerate(LENGTHS)]
    check_sequences(out, lse, q, sequences, options)


@pytest.mark.parametrize("page_size", [16, 80, 256])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_dims", [(64, 64), (59, 111)], ids=str)
def test_pages(page_size, layout, head_dims, device, require_split):
    """Appended to, read as a cache, then as packed sequences; what is past the lengths is NaN."""
    require_split(device, BF16, *head_dims)
    blocks = -(-CAPACITY // page_size)
    table = (torch.randperm(BATCH * blocks) + 1).view(BATCH, blocks).int()
    keys, values = place(head_dims, layout, BATCH * blocks + 1, page_size)
    new = [random(BATCH, NEW, HEADS_K, dim) for dim in head_dims]
    for placed, x in zip((keys, values), new, strict=True):
        placed.expected.fill_(torch.nan)
        for b, n in enumerate(LENGTHS):
            for i in range(n):
                place_of = int(table[b, i // page_size]), i % page_size
                placed.expected[place_of] = placed.cache[place_of]
        placed.memory.copy_(placed.expected_memory)
        for b, n in enumerate(LENGTHS):
            for i in range(NEW):
                placed.expected[int(table[b, (n + i) // page_size]), (n + i) % page_size] = x[b, i]
    q, options = random(BATCH, 3, HEADS, head_dims[0]), Options(causal=True)
    named = {"k": new[0], "v": new[1], "cache_seqlens": int32(*LENGTHS), "block_table": table}
    out, lse = run_cache(q, keys.cache, values.cache, options, **named)
    keys.assert_as_expected()
    values.assert_as_expected()
    lengths = [n + NEW for n in LENGTHS]
    sequences = [
        tuple(placed.expected[table[b].long()].flatten(0, 1)[:n] for placed in (keys, values))
        for b, n in enumerate(lengths)
    ]
    check_sequences(out, lse, q, sequences, options)
    starts = cu_seqlens([3, 3]), cu_seqlens(lengths)
    packed = flash_attn_varlen_func(
        q.flatten(0, 1), keys.cache, values.cache, *starts, 3, max(lengths), block_table=table, causal=True
    )
    check_sequences(packed.view_as(out), lse, q, sequences, options)


def test_no_queries_and_the_next_kernel_sees_what_was_appended(device, require_split):
    """Nothing waits for the keys to be written but the stream's order."""
    require_split(device, BF16, 64)
    tokens = 16384 if device == "cuda" else 16
    new = [random(16, tokens, HEADS_K, 64) for _ in range(2)]
    for _ in range(20):
        caches = [torch.zeros_like(x) for x in new]
        out = flash_attn_with_kvcache(random(16, 0, HEADS, 64), *caches, *new, cache_seqlens=0)
        last = caches[1][-1, -16:].clone()  # what is written last
        assert out.shape == (16, 0, HEADS, 64) and torch.equal(last, new[1][-1, -16:])
        assert all(torch.equal(cache, x) for cache, x in zip(caches, new, strict=True))
