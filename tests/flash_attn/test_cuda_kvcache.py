"""The CUDA path of calls over a KV cache without a GPU: a library that records what it is given."""

from __future__ import annotations

import pytest
import torch
from standin import MULTIPROCESSORS, STREAM, StandIn, make, strides

from flash_attn import _cuda_kvcache
from flash_attn._cpu_kvcache import Cache, Rotary
from flash_attn._splits import plan
from flash_attn._validation import Scoring

SCORING = Scoring(0.125, 0.0, -1, -1, 0.0, None)
LENGTHS = torch.tensor([5, 9], dtype=torch.int32)


@pytest.fixture
def library(install):
    recorder = StandIn()
    install(recorder)
    return recorder


def run(q, k_cache, v_cache, new=(None, None), rotary=None, scoring=SCORING, num_splits=0, **where):
    fields = {"seqlens": LENGTHS, "batch_idx": None, "leftpad": None, "block_table": None} | where
    shapes = q.shape, k_cache.shape, v_cache.shape
    return _cuda_kvcache.forward_kvcache(
        q, Cache(k_cache, v_cache, **fields), *new, shapes, rotary, scoring, None, num_splits, True
    )


def test_packed_fields(library):
    q, k_cache, v_cache = make(seqlen_q=3, seqlen_k=40)
    new = k_cache[:, :3].clone(), v_cache[:, :3].clone()
    cos, sin = torch.rand(2, 50, 8).bfloat16()
    index = torch.tensor([1, 0], dtype=torch.int32)
    out, lse = run(q, k_cache, v_cache, new, Rotary(cos, sin, True), num_splits=1, batch_idx=index)
    ((params, stream),) = library.split_calls
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


def test_pages_and_splits(library):
    q, k_cache, v_cache = make(batch=6, seqlen_q=1, seqlen_k=16)
    table = torch.arange(6, dtype=torch.int32).view(2, 3)
    run(q[:2], k_cache, v_cache, num_splits=3, block_table=table)
    ((params, _),) = library.split_calls
    assert (params.block_table, params.block_table_stride, params.page_size) == (table.data_ptr(), 3, 16)
    assert (params.cache_entries, params.forward.seqlen_k, params.num_splits) == (6, 48, 3)
    rows, head_dim_v = 2 * 4 * 3, 64
    assert params.lse_partial - params.out_partial == 4 * rows * head_dim_v


def test_the_heuristic_chooses_where_nobody_else_does(library):
    q, k_cache, v_cache = make(seqlen_q=1, seqlen_k=4096)
    run(q, k_cache, v_cache)
    ((params, _),) = library.split_calls
    assert params.num_splits == plan(2, 2, 2, 4096, MULTIPROCESSORS).num_splits > 1


@pytest.mark.parametrize(
    "seqlen_q, num_splits, hopper, counts",
    [(100, 1, True, True), (100, 0, True, True), (100, 2, True, True), (32, 1, True, False),
     (100, 1, False, False)],
)  # fmt: skip
def test_hoppers_forward_kernel_has_a_tile_counter(install, seqlen_q, num_splits, hopper, counts):
    recorder = StandIn()
    install(recorder, hopper=hopper)
    run(*make(batch=1, seqlen_q=seqlen_q, seqlen_k=640), num_splits=num_splits, seqlens=None)
    ((params, _),) = recorder.split_calls
    assert params.long_tiles == counts
    assert (params.forward.tile_counter > 0) == counts


def test_score_modifiers_keep_hopper_from_packing_heads(install):
    """48 queries of 4 heads fill a tile, 48 of one do not: another kernel computes them faster."""
    recorder = StandIn()
    install(recorder, hopper=True)
    problem = make(batch=8, seqlen_q=48, seqlen_k=64, heads=8, heads_k=2)
    run(*problem, num_splits=1, seqlens=None)
    run(*problem, num_splits=1, seqlens=None, scoring=SCORING._replace(softcap=5.0))
    plain, modified = (params.long_tiles for params, _ in recorder.split_calls)
    assert plain and not modified


def test_q_is_copied_where_it_cannot_be_read_and_a_cache_is_refused(library):
    q, k_cache, v_cache = make(seqlen_q=2, seqlen_k=40)
    shifted = torch.empty(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape)
    run(shifted, k_cache, v_cache)
    ((params, _),) = library.split_calls
    assert params.forward.q != shifted.data_ptr() and params.forward.q % 16 == 0
    moved = torch.empty(k_cache.numel() + 1, dtype=q.dtype)[1:].view(k_cache.shape)
    with pytest.raises(ValueError, match=r"^k_cache must be .*not copied.*address % 16 = 2"):
        run(q, moved, v_cache)
