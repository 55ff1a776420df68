"""The CUDA path of calls over a KV cache without a GPU: a library that records what it is given."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from refusals import raises
from standin import STREAM, StandIn, make, strides

from flash_attn import _abi, flash_attn_varlen_func, flash_attn_with_kvcache

LENGTHS = torch.tensor([5, 9], dtype=torch.int32)


@pytest.fixture
def library(install):
    recorder = StandIn()
    install(recorder)
    return recorder


def run(q, k_cache, v_cache, new=(None, None), rotary=(None, None), seqlens=LENGTHS, **named):
    return flash_attn_with_kvcache(
        q, k_cache, v_cache, *new, *rotary, seqlens, return_softmax_lse=True, **named
    )


def test_packed_fields(library):
    q, k_cache, v_cache = make(seqlen_q=3, seqlen_k=40)
    new = k_cache[:, :3].clone(), v_cache[:, :3].clone()
    cos, sin = torch.rand(2, 50, 8).bfloat16()
    index = torch.tensor([1, 0], dtype=torch.int32)
    out, lse = run(q, k_cache, v_cache, new, (cos, sin), num_splits=1, cache_batch_idx=index)
    ((params, stream),) = library.cache_calls
    forward = params.forward
    assert stream == STREAM
    for name, x in (("q", q), ("k", k_cache), ("v", v_cache), ("out", out)):
        assert getattr(forward, name) == x.data_ptr() and strides(forward, name) == x.stride()[:3]
    for name, x in zip(("k_new", "v_new"), new, strict=True):
        assert getattr(params, name) == x.data_ptr() and strides(params, name) == x.stride()[:3]
    assert forward.softmax_lse == lse.data_ptr() and (forward.batch, forward.seqlen_q) == (2, 3)
    assert (forward.seqlen_k, forward.num_heads, forward.num_heads_k) == (40, 4, 2)
    assert (params.cache_seqlens, params.cache_batch_idx) == (LENGTHS.data_ptr(), index.data_ptr())
    assert (params.rotary_cos, params.rotary_sin) == (cos.data_ptr(), sin.data_ptr()) and params.q_rotated
    assert (params.rotary_rows, params.rotary_dim, params.rotary_interleaved) == (50, 16, 1)
    assert (params.cache_entries, params.page_size, params.seqlen_new, params.num_splits) == (2, 0, 3, 1)
    assert params.out_partial == params.lse_partial == params.block_table == 0
    assert (params.cache_head_dim, params.cache_head_dim_v) == (64, 64)


def test_pages_and_splits(library):
    q, k_cache, v_cache = make(batch=6, seqlen_q=1, seqlen_k=16)
    table = torch.arange(6, dtype=torch.int32).view(2, 3)
    run(q[:2], k_cache, v_cache, num_splits=3, block_table=table)
    ((params, _),) = library.cache_calls
    assert (params.block_table, params.block_table_stride, params.page_size) == (table.data_ptr(), 3, 16)
    assert (params.cache_entries, params.forward.seqlen_k, params.num_splits) == (6, 48, 3)
    rows, head_dim_v = 2 * 4 * 3, 64
    assert params.lse_partial - params.out_partial == 4 * rows * head_dim_v


def test_the_library_plans_what_nobody_gives(library):
    q, k_cache, v_cache = make(seqlen_q=1, seqlen_k=4096)
    run(q, k_cache, v_cache)
    ((params, _),) = library.cache_calls
    assert params.num_splits == 3 and params.out_partial


@pytest.mark.parametrize(
    "seqlen_q, num_splits, hopper, counts",
    [(100, 1, True, True), (100, 0, True, True), (100, 2, True, True), (32, 1, True, False),
     (100, 1, False, False)],
)  # fmt: skip
def test_the_wgmma_design_has_a_tile_counter(install, seqlen_q, num_splits, hopper, counts):
    recorder = StandIn(hopper=hopper)
    install(recorder)
    run(*make(batch=1, seqlen_q=seqlen_q, seqlen_k=640), num_splits=num_splits, seqlens=None)
    ((params, _),) = recorder.cache_calls
    assert params.design == counts
    assert (params.forward.tile_counter > 0) == counts


def moved(x, elements=1):
    """Return x at an address that is so many elements further than one that kernels are given."""
    return torch.empty(x.numel() + 8, dtype=x.dtype)[elements : x.numel() + elements].view(x.shape).copy_(x)


def test_what_cannot_be_read_is_copied(library):
    q, k_cache, v_cache = make(seqlen_q=2, seqlen_k=40)
    new = moved(k_cache[:, :2]), moved(v_cache[:, :2])
    shifted = moved(q)
    run(shifted, k_cache, v_cache, new)
    ((params, _),) = library.cache_calls
    assert params.forward.q != shifted.data_ptr() and params.forward.q % 16 == 0
    for at, x in zip((params.k_new, params.v_new), new, strict=True):
        assert at != x.data_ptr() and at % 16 == 0


UNALIGNED = {
    "address of k": lambda k, v: (moved(k), v),
    "address of v": lambda k, v: (k, moved(v, 4)),
    "strides of rows": lambda k, v: (k.new_empty(2, 640, 131)[..., :128].unflatten(2, (2, 64)), v),
    "strides of entries": lambda k, v: (k, v.new_empty(2, 640 * 128 + 1)[:, 1:].view(v.shape)),
    "head dim of k": lambda k, v: (k[..., :59], v),
    "head dim of v": lambda k, v: (k, v[..., :27].contiguous()),
    "head dims": lambda k, v: (k[..., :63].contiguous(), v[..., :1]),
}  # fmt: skip


@pytest.mark.parametrize("case", UNALIGNED)
def test_an_unaligned_cache_is_used_where_it_lies(install, case):
    """With everything else copied, head dims padded, and without Hopper's tiles, which TMA copies."""
    recorder = StandIn(hopper=True)
    install(recorder)
    q, *caches = make(seqlen_q=100, seqlen_k=640)
    k_cache, v_cache = UNALIGNED[case](*caches)
    dims = k_cache.shape[3], v_cache.shape[3]
    new = [cache[:, :3].clone() for cache in (k_cache, v_cache)]
    cos, sin = torch.rand(2, 800, 8).bfloat16()
    out, _ = run(q[..., : dims[0]], k_cache, v_cache, new, (cos, sin), num_splits=3)
    ((params, _),) = recorder.cache_calls
    forward, padded = params.forward, [-(-dim // 8) * 8 for dim in dims]
    assert out.shape == (2, 100, 4, dims[1])
    assert (forward.k, forward.v) == (k_cache.data_ptr(), v_cache.data_ptr())
    assert (strides(forward, "k"), strides(forward, "v")) == (k_cache.stride()[:3], v_cache.stride()[:3])
    assert (params.cache_head_dim, params.cache_head_dim_v) == dims
    assert [forward.head_dim, forward.head_dim_v] == padded
    assert not params.design and not forward.tile_counter
    for at in (forward.q, forward.out, params.k_new, params.v_new, params.q_rotated):
        assert at % 16 == 0
    for name in ("q", "out"):
        assert not any(stride % 8 for stride in strides(forward, name))
    for name in ("k_new", "v_new"):
        assert not any(stride % 8 for stride in strides(params, name))
    assert params.lse_partial - params.out_partial == 4 * 2 * 100 * 4 * 3 * padded[1]


def test_a_head_of_one_element_has_any_last_stride(library):
    q, k_cache, v_cache = (x.as_strided(x.shape, (*x.stride()[:3], 7)) for x in make(head_dim=1))
    run(q, k_cache, v_cache)
    ((params, _),) = library.cache_calls
    assert (params.forward.k, params.forward.v) == (k_cache.data_ptr(), v_cache.data_ptr())


def test_a_last_dimension_that_is_not_contiguous_is_refused(library):
    q, k_cache, v_cache = make(seqlen_k=16)
    for name in ("k_cache", "v_cache"):
        caches = {"k_cache": k_cache, "v_cache": v_cache}
        caches[name] = torch.empty(2, 16, 2, 128).bfloat16()[..., ::2]
        raises(ValueError, f"{name} must be contiguous in its last dimension", run, q, **caches)
    table, starts = torch.arange(2, dtype=torch.int32).view(2, 1), torch.tensor([0, 10, 20]).int()
    pages = [k_cache, torch.empty(2, 16, 2, 128).bfloat16()[..., ::2]]
    for name in ("v", "k"):
        raises(
            ValueError, f"{name} must be contiguous in its last dimension", flash_attn_varlen_func,
            q.flatten(0, 1), *pages, starts, starts, 10, 10, block_table=table,
        )  # fmt: skip
        pages.reverse()
    assert not library.cache_calls


@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_keys_are_not_appended_to_an_expanded_cache(library, name, dim):
    """Rows that are one in memory would be written over one another; reading them is right."""
    q, *caches = make(seqlen_q=3, seqlen_k=40)
    new = [cache[:, :3].clone() for cache in caches]
    named = dict(zip(("k_cache", "v_cache"), caches, strict=True))
    named[name] = named[name].narrow(dim, 0, 1).expand_as(named[name])
    append = partial(flash_attn_with_kvcache, q, k=new[0], v=new[1], cache_seqlens=LENGTHS)
    raises(ValueError, f"{name} must be a tensor that is not expanded", append, **named)
    assert not library.cache_calls
    run(q, **named)
    assert len(library.cache_calls) == 1


def test_one_entry_may_have_stride_0(library):
    q, k_cache, v_cache = make(batch=1, seqlen_q=3, seqlen_k=40)
    new = k_cache[:, :3].clone(), v_cache[:, :3].clone()
    caches = (x.as_strided(x.shape, (0, *x.stride()[1:])) for x in (k_cache, v_cache))
    run(q, *caches, new, seqlens=5)
    assert len(library.cache_calls) == 1


@pytest.mark.parametrize(
    "status, ends",
    [(_abi.Status.NOT_BUILT, "FLASH_ATTN_DIRECTIONS=forward,split pip install .`"), (3, "is not built")],
)
def test_a_launch_that_fails(install, status, ends):
    install(StandIn(status))
    with pytest.raises(RuntimeError, match=f"{ends}$"):
        run(*make(seqlen_k=16))


def test_dropout_over_pages_is_for_the_cpu(library):
    q, k, v = make(batch=1, seqlen_q=16, seqlen_k=16)
    starts, table = torch.tensor([0, 16]).int(), torch.zeros(1, 1).int()
    with pytest.raises(NotImplementedError, match="dropout with a block_table is not implemented on CUDA"):
        flash_attn_varlen_func(q[0], k, v, starts, starts, 16, 16, dropout_p=0.5, block_table=table)
    assert not library.cache_calls and not library.calls
