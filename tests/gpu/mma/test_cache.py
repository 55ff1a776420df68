"""What lies on the GPU cannot be checked before a launch: nothing outside the cache is read or written."""

from __future__ import annotations

import pytest
import torch
from oracle import Options
from problems import BF16, check, int32

from flash_attn import flash_attn_with_kvcache

BATCH, CAPACITY, PAGE, HEADS = 2, 64, 16, 2
LONG = 150  # queries that Hopper's forward kernel takes
pytestmark = pytest.mark.gpu


@pytest.fixture(params=[64, 59], autouse=True)
def head_dim(request, require_split):
    """With rows of 64 elements the cache is aligned to 16 bytes, with rows of 59 it is not."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    require_split("cuda", BF16, request.param)
    with torch.device("cuda"):
        yield request.param


def random(head_dim, *shape):
    return torch.randn(*shape, HEADS, head_dim).bfloat16()


def guarded(head_dim, entries, rows):
    """Return a cache (entries, rows, h, d) of zeros between guard entries of ones, and all of it."""
    whole = torch.ones(entries + 2, rows, HEADS, head_dim).bfloat16()
    whole[1:-1] = 0
    return whole[1:-1], whole


@pytest.mark.parametrize("length", [CAPACITY - 1, CAPACITY, CAPACITY + 5, -7, 2**31 - 1])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("seqlen_q", [1, LONG])
def test_appended_keys_past_the_end_are_dropped(length, paged, seqlen_q, head_dim):
    entries, rows = (BATCH * CAPACITY // PAGE, PAGE) if paged else (BATCH, CAPACITY)
    (k_cache, whole_k), (v_cache, whole_v) = (guarded(head_dim, entries, rows) for _ in range(2))
    table = torch.arange(entries).int().view(BATCH, -1) if paged else None
    k, v = random(head_dim, BATCH, 3), random(head_dim, BATCH, 3)
    q, lengths = random(head_dim, BATCH, seqlen_q), int32(length, 10)
    out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, block_table=table)
    assert out.isfinite().all()
    kept = max(0, min(3, CAPACITY - max(length, 0)))
    first = min(max(length, 0), CAPACITY)
    for cache, whole, new in ((k_cache, whole_k, k), (v_cache, whole_v, v)):
        expected = torch.zeros(BATCH, CAPACITY, HEADS, head_dim).bfloat16()
        expected[0, first : first + kept] = new[0, :kept]
        expected[1, 10:13] = new[1]
        assert torch.equal(cache.reshape(expected.shape), expected)
        assert (whole[0] == 1).all() and (whole[-1] == 1).all()


@pytest.mark.parametrize("wrong", [-1, 8, 2**31 - 1])
@pytest.mark.parametrize("seqlen_q", [1, LONG])
def test_pages_outside_the_cache_are_zeros_and_stay_unwritten(wrong, seqlen_q, head_dim):
    (k_cache, whole_k), (v_cache, whole_v) = guarded(head_dim, 8, PAGE), guarded(head_dim, 8, PAGE)
    k_cache.copy_(random(head_dim, 8, PAGE))
    v_cache.copy_(random(head_dim, 8, PAGE))
    before = whole_k.clone(), whole_v.clone()
    table = torch.arange(8).int().view(BATCH, -1)
    table[0, 1] = wrong
    q = random(head_dim, BATCH, seqlen_q)
    out = flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        random(head_dim, BATCH, 1),
        random(head_dim, BATCH, 1),
        cache_seqlens=int32(20, 63),
        block_table=table,
    )
    before[0][1 + 7, 15], before[1][1 + 7, 15] = k_cache[7, 15], v_cache[7, 15]
    assert torch.equal(whole_k, before[0]) and torch.equal(whole_v, before[1])
    keys, values = (torch.cat([x[0], torch.zeros_like(x[0, :5])])[None] for x in (k_cache, v_cache))
    check(out[:1], None, q[:1], keys, values, Options())


@pytest.mark.parametrize("wrong", [-1, BATCH, 2**31 - 1])
@pytest.mark.parametrize("seqlen_q", [1, LONG])
def test_rows_outside_the_cache_stay_unwritten(wrong, seqlen_q, head_dim):
    (k_cache, whole_k), (v_cache, whole_v) = (guarded(head_dim, BATCH, CAPACITY) for _ in range(2))
    q, k, v = (random(head_dim, BATCH, n) for n in (seqlen_q, 1, 1))
    out = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=int32(5, 6), cache_batch_idx=int32(wrong, 1)
    )
    assert (out[0] == 0).all() and out.isfinite().all()
    assert (k_cache[0] == 0).all() and (v_cache[0] == 0).all()
    for whole in (whole_k, whole_v):
        assert (whole[0] == 1).all() and (whole[-1] == 1).all()


def test_rotation_past_the_tables_is_left_out(head_dim):
    cos, sin = torch.rand(8, 16).bfloat16(), torch.rand(8, 16).bfloat16()
    k_cache, v_cache = random(head_dim, 1, CAPACITY), random(head_dim, 1, CAPACITY)
    k, v = random(head_dim, 1, 2), random(head_dim, 1, 2)
    flash_attn_with_kvcache(
        random(head_dim, 1, 2),
        k_cache,
        v_cache,
        k,
        v,
        rotary_cos=cos,
        rotary_sin=sin,
        cache_seqlens=int32(7),
        causal=True,
    )
    assert not torch.equal(k_cache[0, 7], k[0, 0]) and torch.equal(k_cache[0, 8], k[0, 1])
