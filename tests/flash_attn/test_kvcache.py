"""`flash_attn_with_kvcache` against the fp64 oracle on the cache's contents."""

from __future__ import annotations

import pytest
import torch
from oracle import Options, rotated
from plans import forced
from problems import (
    BF16,
    FEW_MASKS,
    HEAD_DIM_PAIRS,
    MASKS,
    check,
    check_sequences,
    in_pages,
    int32,
    qkv,
    rotary_tables,
    run_cache,
    zeros,
)

from flash_attn import _device, flash_attn_with_kvcache
from flash_attn._abi import HEAD_DIMS, Design
from flash_attn.flash_attn_interface import kvcache_num_splits

BATCH, CAPACITY, HEADS, HEADS_K, HEAD_DIM = 3, 96, 4, 2, 32
FEW, SEVERAL, MANY = 7, 20, 80
"""Numbers of queries for each tile; MANY run in the forward kernel on Hopper."""

ODD_HEAD_DIMS = (1, 3, 59, 75, 111, 170, 255)
"""Head dims of caches whose rows are not aligned to 16 bytes: for each kernel at least one."""

CACHE_MASKS = (*FEW_MASKS, "causal window")


@pytest.fixture(autouse=True)
def kernels(default_device, require_split):
    require_split(default_device, BF16, HEAD_DIM)


def make(seqlen_q, entries=BATCH, seqlen_new=0, head_dims=HEAD_DIM, capacity=CAPACITY):
    """Return q, the caches, and new keys and values."""
    q, k, v = qkv(BATCH, seqlen_q, seqlen_new, (HEADS, HEADS_K), head_dims)
    return q, *qkv(entries, 0, capacity, (HEADS, HEADS_K), head_dims)[1:], k, v


def check_lengths(out, lse, q, caches, lengths, options):
    """Compare with the oracle, given how many rows of the caches are used."""
    check_sequences(out, lse, q, [tuple(x[b, :n] for x in caches) for b, n in enumerate(lengths)], options)


@pytest.mark.parametrize("seqlen_q", [1, 7])
@pytest.mark.parametrize("mask", CACHE_MASKS)
@pytest.mark.parametrize(
    "seqlens, lengths", [(None, [CAPACITY] * 3), (40, [40] * 3), ((0, 33, 96), [0, 33, 96])], ids=str
)
def test_without_appending(seqlen_q, mask, seqlens, lengths):
    q, k_cache, v_cache, *_ = make(seqlen_q)
    seqlens = int32(*seqlens) if isinstance(seqlens, tuple) else seqlens
    out, lse = run_cache(q, k_cache, v_cache, MASKS[mask], cache_seqlens=seqlens)
    check_lengths(out, lse, q, (k_cache, v_cache), lengths, MASKS[mask])


def check_appending(seqlen_q, seqlen_new, mask, head_dims):
    q, k_cache, v_cache, k, v = make(seqlen_q, seqlen_new=seqlen_new, head_dims=head_dims)
    expected = k_cache.clone(), v_cache.clone()
    lengths = [0, 33, CAPACITY - seqlen_new]
    for b, n in enumerate(lengths):
        expected[0][b, n : n + seqlen_new], expected[1][b, n : n + seqlen_new] = k[b], v[b]
    out, lse = run_cache(q, k_cache, v_cache, MASKS[mask], k=k, v=v, cache_seqlens=int32(*lengths))
    assert torch.equal(k_cache, expected[0]) and torch.equal(v_cache, expected[1])
    check_lengths(out, lse, q, expected, [n + seqlen_new for n in lengths], MASKS[mask])


@pytest.mark.parametrize("seqlen_q, seqlen_new", [(1, 1), (7, 7), (3, 9), (9, 3), (MANY, 9)])
@pytest.mark.parametrize("mask", CACHE_MASKS)
def test_appending(seqlen_q, seqlen_new, mask):
    check_appending(seqlen_q, seqlen_new, mask, HEAD_DIM)


@pytest.mark.parametrize("head_dims", HEAD_DIM_PAIRS, ids=str)
@pytest.mark.parametrize("mask", ["causal", "window"])
def test_head_dim_of_v_differs(head_dims, mask, device, require_split):
    require_split(device, BF16, *head_dims)
    check_appending(3, 9, mask, head_dims)


@pytest.mark.parametrize("head_dims", [*((d, d) for d in ODD_HEAD_DIMS), (59, 64), (128, 111)], ids=str)
@pytest.mark.parametrize("seqlen_q, seqlen_new", [(1, 1), (SEVERAL, 9)])
def test_head_dims_that_are_no_multiple_of_8(seqlen_q, seqlen_new, head_dims, device, require_split):
    require_split(device, BF16, *head_dims)
    check_appending(seqlen_q, seqlen_new, "causal", head_dims)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [16, 32])
@pytest.mark.parametrize("mask", CACHE_MASKS)
@pytest.mark.parametrize("seqlen_q", [5, MANY])
@pytest.mark.parametrize("head_dim", [HEAD_DIM, 59])
def test_rotary(interleaved, rotary_dim, mask, seqlen_q, head_dim, device, require_split):
    require_split(device, BF16, head_dim)
    q, k_cache, v_cache, k, v = make(seqlen_q, seqlen_new=5, head_dims=head_dim)
    cos, sin = rotary_tables(CAPACITY + seqlen_q, rotary_dim)
    lengths = [0, 20, 91]
    before = k_cache.clone()
    arguments = {"k": k, "v": v, "cache_seqlens": int32(*lengths), "rotary_cos": cos, "rotary_sin": sin}
    out, lse = run_cache(q, k_cache, v_cache, MASKS[mask], rotary_interleaved=interleaved, **arguments)
    moving = mask != "full"
    q_rotated = torch.empty_like(q)
    for b, n in enumerate(lengths):
        positions = n + torch.arange(seqlen_q)
        expected = rotated(k[b], cos, sin, positions[:5], interleaved)
        error = (k_cache[b, n : n + 5].double() - expected).abs()
        assert (error <= 1e-3 + 2**-8 * expected.abs()).all()
        assert torch.equal(k_cache[b, :n], before[b, :n]) and torch.equal(v_cache[b, n : n + 5], v[b])
        q_rotated[b] = rotated(q[b], cos, sin, positions if moving else positions * 0 + n, interleaved).to(
            q.dtype
        )
    check_lengths(out, lse, q_rotated, (k_cache, v_cache), [n + 5 for n in lengths], MASKS[mask])


def test_rotary_without_a_single_new_key_still_rotates_q():
    q, k_cache, v_cache, k, v = make(2)
    cos, sin = rotary_tables(CAPACITY, HEAD_DIM)
    arguments = {"k": k, "v": v, "rotary_cos": cos, "rotary_sin": sin, "cache_seqlens": int32(8, 17, 40)}
    out, lse = run_cache(q, k_cache, v_cache, Options(), **arguments)
    turned = [rotated(x, cos, sin, torch.tensor([n, n]), True) for x, n in zip(q, (8, 17, 40), strict=True)]
    check_lengths(out, lse, torch.stack(turned).to(q.dtype), (k_cache, v_cache), (8, 17, 40), Options())


@pytest.mark.parametrize("appends", [False, True])
@pytest.mark.parametrize("seqlen_q", [4, MANY])
def test_batch_idx_and_leftpad(appends, seqlen_q):
    q, k_cache, v_cache, k, v = make(seqlen_q, entries=5, seqlen_new=4)
    rows, lengths, pads = [4, 0, 2], [10, 50, 33], [3, 50, 0]
    arguments = {"k": k, "v": v} if appends else {}
    out, lse = run_cache(
        q, k_cache, v_cache, Options(causal=True), cache_seqlens=int32(*lengths),
        cache_batch_idx=int32(*rows), cache_leftpad=int32(*pads), **arguments,
    )  # fmt: skip
    used = [slice(p, n + 4 * appends) for p, n in zip(pads, lengths, strict=True)]
    for b, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        assert torch.equal(v_cache[row, n : n + 4], v[b]) == appends
    sequences = [(k_cache[row, u], v_cache[row, u]) for row, u in zip(rows, used, strict=True)]
    check_sequences(out, lse, q, sequences, Options(causal=True))


@pytest.mark.parametrize("page_size", [16, 32, 48])
@pytest.mark.parametrize("mask", CACHE_MASKS)
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("head_dim_v", [HEAD_DIM, 24])
@pytest.mark.parametrize("seqlen_q", [5, MANY])
def test_paged_equals_unpaged(page_size, mask, rotary, head_dim_v, seqlen_q):
    q, k_cache, v_cache, k, v = make(seqlen_q, seqlen_new=5, head_dims=(HEAD_DIM, head_dim_v))
    pages, table = in_pages(page_size, k_cache, v_cache)
    arguments = {"k": k, "v": v, "cache_seqlens": int32(0, 14, 91)}
    if rotary:
        cos, sin = rotary_tables(CAPACITY + seqlen_q, 16)
        arguments |= {"rotary_cos": cos, "rotary_sin": sin}
    expected = run_cache(q, k_cache, v_cache, MASKS[mask], **arguments)
    actual = run_cache(q, *pages, MASKS[mask], block_table=table, **arguments)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    for cache, paged in zip((k_cache, v_cache), pages, strict=True):
        assert torch.equal(paged[table.flatten().long()].view_as(cache), cache)


@pytest.mark.parametrize("page_size", [16, 48])
@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, *ODD_HEAD_DIMS])
def test_pages_of_every_head_dim(page_size, head_dim, device, require_split):
    require_split(device, BF16, head_dim)
    q, k_cache, v_cache, *_ = make(MANY, head_dims=head_dim)
    pages, table = in_pages(page_size, k_cache, v_cache)
    lengths, options = [5, 70, CAPACITY], Options(causal=True)
    out, lse = run_cache(q, *pages, options, cache_seqlens=int32(*lengths), block_table=table)
    check_lengths(out, lse, q, (k_cache, v_cache), lengths, options)


@pytest.mark.parametrize("extra", [{"softcap": 5.0}, {"softmax_scale": 0.3}], ids=str)
def test_softcap_and_scale(extra):
    q, k_cache, v_cache, *_ = make(4)
    options = Options(causal=True, **extra)
    out, lse = run_cache(q, k_cache, v_cache, options, cache_seqlens=50)
    check_lengths(out, lse, q, (k_cache, v_cache), [50] * BATCH, options)


@pytest.mark.parametrize("shape", [(HEADS,), (BATCH, HEADS)], ids=str)
def test_alibi(shape):
    q, k_cache, v_cache, *_ = make(4)
    options = Options(causal=True, alibi_slopes=torch.rand(shape))
    lengths = [4, 50, 96]
    out, lse = run_cache(q, k_cache, v_cache, options, cache_seqlens=int32(*lengths))
    check_lengths(out, lse, q, (k_cache, v_cache), lengths, options)


@pytest.mark.parametrize("num_splits", [0, 1, 7, 128])
@pytest.mark.parametrize("seqlen_q", [2, MANY])
def test_num_splits_does_not_matter(num_splits, seqlen_q):
    q, k_cache, v_cache, *_ = make(seqlen_q)
    out, lse = run_cache(q, k_cache, v_cache, Options(), num_splits=num_splits)
    check(out, lse, q, k_cache, v_cache, Options())
    again = flash_attn_with_kvcache(q, k_cache, v_cache, num_splits=num_splits)
    assert torch.equal(again, out)


@pytest.mark.parametrize(
    "seqlen_q, design",
    [(FEW, Design.MMA), (SEVERAL, Design.MMA), (MANY, Design.MMA), (MANY, Design.WGMMA)],
    ids=["rows16", "rows64", "rows128", "wgmma"],
)
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("scoring", ["causal", "window", "modified"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_tile(seqlen_q, design, num_splits, scoring, head_dim, device, require_split):
    """Long tiles are for Hopper; other families take their largest instead."""
    require_split(device, BF16, head_dim)
    check_tile(seqlen_q, design, num_splits, scoring, head_dim)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("scoring", ["window", "modified"])
@pytest.mark.parametrize("head_dim", ODD_HEAD_DIMS)
def test_the_tile_of_unaligned_rows(num_splits, scoring, head_dim, device, require_split):
    """It is taken for any number of queries, also where the wgmma design is asked for."""
    require_split(device, BF16, head_dim)
    check_tile(MANY, Design.WGMMA, num_splits, scoring, head_dim)


def check_tile(seqlen_q, design, num_splits, scoring, head_dim):
    q, k_cache, v_cache, *_ = make(seqlen_q, head_dims=head_dim)
    modified = Options(causal=True, softcap=5.0, alibi_slopes=torch.rand(BATCH, HEADS))
    options = modified if scoring == "modified" else MASKS[scoring]
    lengths = [5, 70, CAPACITY]
    with forced(num_splits, design):
        out, lse = run_cache(q, k_cache, v_cache, options, cache_seqlens=int32(*lengths))
    check_lengths(out, lse, q, (k_cache, v_cache), lengths, options)


@pytest.mark.parametrize("num_splits", [1, 3, 40])
@pytest.mark.parametrize(
    "mask", [Options(causal=True), Options(window_size=(700, 100))], ids=["causal", "window"]
)
@pytest.mark.parametrize("page_size", [None, 16, 96])
@pytest.mark.parametrize("head_dims", [(128, 128), (64, 40), (256, 256)], ids=str)
def test_wgmma_tiles_over_many_blocks(num_splits, mask, page_size, head_dims, device, require_split):
    """Parts of several blocks of keys, and more of them than there are multiprocessors."""
    require_split(device, BF16, max(head_dims))
    capacity, lengths = 1440, [5, 700, 1440]
    q, *caches = make(MANY, head_dims=head_dims, capacity=capacity)[:3]
    where, table = (caches, None) if page_size is None else in_pages(page_size, *caches)
    with forced(num_splits, Design.WGMMA):
        out, lse = run_cache(q, *where, mask, cache_seqlens=int32(*lengths), block_table=table)
    check_lengths(out, lse, q, caches, lengths, mask)


def test_the_number_of_splits_can_be_asked_for(device):
    q, k_cache, *_ = make(2)
    table = torch.zeros(BATCH, 5000, dtype=torch.int32)
    assert kvcache_num_splits(q, k_cache) == 1  # two blocks of keys
    assert (kvcache_num_splits(q, k_cache, table) > 1) == _device.on_cuda(q)


def test_strided_cache_is_written_in_place():
    q, _, _, k, v = make(2, seqlen_new=2)
    store = torch.zeros(2, BATCH, HEADS_K, CAPACITY, HEAD_DIM, dtype=q.dtype)
    k_cache, v_cache = (x.transpose(1, 2) for x in store)
    flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=10)
    assert torch.equal(store[0, :, :, 10:12].transpose(1, 2), k)
    assert torch.equal(store[1, :, :, 10:12].transpose(1, 2), v)


def test_decoding_step_by_step_equals_causal_attention():
    steps = 20
    q, k, v = qkv(2, steps, steps, (HEADS, HEADS_K), HEAD_DIM)
    k_cache, v_cache = (zeros(2, CAPACITY, HEADS_K, HEAD_DIM) for _ in range(2))
    outs = [
        flash_attn_with_kvcache(
            q[:, i : i + 1], k_cache, v_cache, k[:, i : i + 1], v[:, i : i + 1], cache_seqlens=i, causal=True
        )
        for i in range(steps)
    ]
    check(torch.cat(outs, dim=1), None, q, k, v, Options(causal=True))


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "k", "v", "s_aux"])
def test_no_gradients_flow(name):
    tensors = dict(zip(("q", "k_cache", "v_cache", "k", "v"), make(2, seqlen_new=3), strict=True))
    tensors["s_aux"] = torch.randn(HEADS)
    expected = flash_attn_with_kvcache(**{n: x.clone() for n, x in tensors.items()}, cache_seqlens=5)
    if name.endswith("cache"):
        del tensors["k"], tensors["v"]
    tensors[name].requires_grad_()
    out = flash_attn_with_kvcache(**tensors, cache_seqlens=5)
    assert name.endswith("cache") or torch.equal(out, expected)
    with pytest.raises(NotImplementedError, match="flash_attn_with_kvcache"):
        out.sum().backward()
    with torch.no_grad():
        assert not flash_attn_with_kvcache(**tensors, cache_seqlens=5).requires_grad


def test_a_cache_that_requires_grad_is_not_appended_to():
    q, k_cache, v_cache, k, v = make(2, seqlen_new=3)
    with pytest.raises(NotImplementedError, match=r"^v_cache "):
        flash_attn_with_kvcache(q, k_cache, v_cache.requires_grad_(), k, v, cache_seqlens=5)
