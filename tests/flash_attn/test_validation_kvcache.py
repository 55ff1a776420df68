"""Bad input of `flash_attn_with_kvcache`."""

from __future__ import annotations

import pytest
import torch
from problems import int32, zeros
from refusals import raises

import flash_attn

Q = zeros(2, 10, 4, 32)
CACHE, NEW = zeros(2, 32, 2, 32), zeros(2, 3, 2, 32)
PAGES, TABLE = zeros(6, 16, 2, 32), torch.arange(4, dtype=torch.int32).view(2, 2)
COS = zeros(64, 8)

KVCACHE = {
    "k without v": (ValueError, "v", {"k": NEW, "cache_seqlens": 3}),
    "v without k": (ValueError, "k", {"v": NEW, "cache_seqlens": 3}),
    "appending without lengths": (ValueError, "cache_seqlens", {"k": NEW, "v": NEW}),
    "cache_seqlens int64": (TypeError, "cache_seqlens", {"cache_seqlens": torch.tensor([1, 2])}),
    "cache_seqlens a string": (TypeError, "cache_seqlens", {"cache_seqlens": "3"}),
    "cache_seqlens of another batch": (ValueError, "cache_seqlens", {"cache_seqlens": int32(1)}),
    "cache_seqlens past the cache": (ValueError, "cache_seqlens", {"cache_seqlens": 33}),
    "no room to append": (ValueError, "cache_seqlens", {"cache_seqlens": 30, "k": NEW, "v": NEW}),
    "cache_seqlens negative": (ValueError, "cache_seqlens", {"cache_seqlens": int32(-1, 2)}),
    "strided k_cache": (ValueError, "k_cache", {"k_cache": zeros(2, 32, 2, 64)[..., ::2]}),
    "strided v_cache": (ValueError, "v_cache", {"v_cache": zeros(2, 32, 2, 64)[..., ::2]}),
    "caches differ": (ValueError, "v_cache", {"v_cache": CACHE[:, :16]}),
    "heads of caches differ": (ValueError, "v_cache", {"v_cache": zeros(2, 32, 1, 32)}),
    "head dim of v_cache": (ValueError, "v_cache", {"v_cache": zeros(2, 32, 2, 264)}),
    "new head dim of v": (ValueError, "v", {"k": NEW, "v": NEW[..., :24], "cache_seqlens": 3}),
    "new head dim of v as k's": (ValueError, "v", {
        "v_cache": zeros(2, 32, 2, 24), "k": NEW, "v": NEW, "cache_seqlens": 3}),
    "cache dtype": (TypeError, "k_cache", {"k_cache": CACHE.float()}),
    "cache too small": (ValueError, "k_cache", {"k_cache": CACHE[:1], "v_cache": CACHE[:1]}),
    "new keys a list": (TypeError, "k", {"k": [1], "v": [2], "cache_seqlens": 3}),
    "new dtype": (TypeError, "k", {"k": NEW.float(), "v": NEW, "cache_seqlens": 3}),
    "new heads": (ValueError, "k", {"k": zeros(2, 3, 4, 32), "v": zeros(2, 3, 4, 32), "cache_seqlens": 3}),
    "new batch": (ValueError, "k", {"k": NEW[:1], "v": NEW[:1], "cache_seqlens": 3}),
    "batch_idx past the cache": (ValueError, "cache_batch_idx", {"cache_batch_idx": int32(0, 2)}),
    "batch_idx dtype": (TypeError, "cache_batch_idx", {"cache_batch_idx": torch.tensor([0, 1])}),
    "leftpad past the length": (ValueError, "cache_leftpad", {
        "cache_leftpad": int32(0, 5), "cache_seqlens": 4}),
    "leftpad shape": (ValueError, "cache_leftpad", {"cache_leftpad": int32(0)}),
    "batch_idx with pages": (ValueError, "cache_batch_idx", {
        "k_cache": PAGES, "v_cache": PAGES, "block_table": TABLE, "cache_batch_idx": int32(0, 1)}),
    "leftpad with pages": (ValueError, "cache_leftpad", {
        "k_cache": PAGES, "v_cache": PAGES, "block_table": TABLE, "cache_leftpad": int32(0, 1)}),
    "page size": (ValueError, "k_cache", {
        "k_cache": PAGES[:, :8], "v_cache": PAGES[:, :8], "block_table": TABLE}),
    "block_table dtype": (TypeError, "block_table", {
        "k_cache": PAGES, "v_cache": PAGES, "block_table": TABLE.long()}),
    "block_table past the pages": (ValueError, "block_table", {
        "k_cache": PAGES, "v_cache": PAGES, "block_table": TABLE + 4}),
    "num_splits": (ValueError, "num_splits", {"num_splits": 129}),
    "num_splits a float": (TypeError, "num_splits", {"num_splits": 1.5}),
    "cos without sin": (ValueError, "rotary_cos", {
        "rotary_cos": COS, "k": NEW, "v": NEW, "cache_seqlens": 3}),
    "rotary tables not tensors": (TypeError, "rotary_cos", {
        "rotary_cos": 1, "rotary_sin": 2, "k": NEW, "v": NEW, "cache_seqlens": 3}),
    "rotary without k": (ValueError, "rotary_cos", {"rotary_cos": COS, "rotary_sin": COS}),
    "rotary dtype": (TypeError, "rotary_cos", {
        "rotary_cos": COS.float(), "rotary_sin": COS.float(), "k": NEW, "v": NEW, "cache_seqlens": 3}),
    "rotary_dim 8": (ValueError, "rotary_cos", {
        "rotary_cos": COS[:, :4], "rotary_sin": COS[:, :4], "k": NEW, "v": NEW, "cache_seqlens": 3}),
    "rotary_dim above d": (ValueError, "rotary_cos", {
        "rotary_cos": zeros(64, 24), "rotary_sin": zeros(64, 24), "k": NEW, "v": NEW, "cache_seqlens": 3}),
    "rotary tables differ": (ValueError, "rotary_sin", {
        "rotary_cos": COS, "rotary_sin": COS[:9], "k": NEW, "v": NEW, "cache_seqlens": 3}),
    "rotary too short": (ValueError, "rotary_cos", {
        "rotary_cos": COS[:9], "rotary_sin": COS[:9], "k": NEW, "v": NEW, "cache_seqlens": 9}),
}  # fmt: skip


@pytest.mark.parametrize("case", KVCACHE)
def test_kvcache(case):
    kind, name, changes = KVCACHE[case]
    base = {"q": zeros(2, 3, 4, 32), "k_cache": CACHE, "v_cache": CACHE}
    raises(kind, name, flash_attn.flash_attn_with_kvcache, **(base | changes))


def test_meta_tensors_are_refused():
    q, cache = Q.to("meta"), CACHE.to("meta")
    with pytest.raises(NotImplementedError, match="meta"):
        flash_attn.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=3)
