"""Checks of the memory of what a call writes to, and of tensors that are not dense."""

from __future__ import annotations

import pytest
import torch
from problems import zeros
from refusals import raises

import flash_attn
from flash_attn.flash_attn_interface import _flash_attn_backward, kvcache_num_splits

Q, K = zeros(2, 10, 4, 32), zeros(2, 12, 2, 32)


class TestOut:
    """What a result is to be written to."""

    def test_expanded(self):
        out = zeros(1, *Q.shape[1:]).expand(Q.shape)
        raises(ValueError, "out", flash_attn.flash_attn_func, Q, K, K, out=out)

    def test_overlapping_itself(self):
        out = zeros(4 * Q.numel()).as_strided(Q.shape, (1, 1, 1, 1))
        raises(ValueError, "out", flash_attn.flash_attn_func, Q, K, K, out=out)

    @pytest.mark.parametrize("name", ["q", "k", "v"])
    def test_an_input(self, name):
        given = {n: zeros(2, 12, 2, 32) for n in "qkv"}
        raises(ValueError, "out", flash_attn.flash_attn_func, **given, out=given[name])

    def test_parts_of_one_tensor_are_apart(self):
        whole = torch.randn(2, 12, 4, 2, 32)
        q, k, v, out = whole.unbind(2)
        expected = flash_attn.flash_attn_func(*(x.clone() for x in (q, k, v)))
        assert flash_attn.flash_attn_func(q, k, v, out=out) is out and torch.equal(out, expected)

    def test_a_cache(self):
        q, k, v = (zeros(1, 16, 2, 32) for _ in range(3))
        raises(ValueError, "out", flash_attn.flash_attn_with_kvcache, q, k, v, out=k)

    def test_made_in_inference_mode(self):
        with torch.inference_mode():
            out = torch.empty(Q.shape, dtype=Q.dtype)
        assert torch.equal(flash_attn.flash_attn_func(Q, K, K, out=out), flash_attn.flash_attn_func(Q, K, K))


def test_a_cache_that_is_appended_to_has_every_element_once():
    q, new, cache = zeros(2, 1, 2, 32), zeros(2, 1, 2, 32), zeros(2, 16, 2, 32)
    call = flash_attn.flash_attn_with_kvcache
    expanded = cache[:1].expand(2, -1, -1, -1)
    raises(ValueError, "k_cache", call, q, expanded, cache, new, new, cache_seqlens=3)
    raises(ValueError, "v_cache", call, q, cache, cache, new, new, cache_seqlens=3)
    call(q, expanded, expanded, cache_seqlens=3)


@pytest.mark.parametrize("gradient, read", [("dk", "k"), ("dq", "dout"), ("dv", "out")])
def test_a_gradient_is_apart_from_what_is_read(gradient, read):
    x = {name: zeros(2, 10, 4, 32) for name in ("dout", "q", "k", "v", "out", "dq", "dk", "dv")}
    x[gradient] = x[read]
    tensors = (*(x[n] for n in ("dout", "q", "k", "v", "out")), zeros(2, 4, 10, dtype=torch.float32))
    gradients = x["dq"], x["dk"], x["dv"]
    scoring = (0.0, 1.0, False, -1, -1, 0.0, None, False)
    raises(ValueError, gradient, _flash_attn_backward, *tensors, *gradients, *scoring)


def test_the_number_of_splits_is_told_for_right_arguments_only():
    assert kvcache_num_splits(Q, K) == 1
    raises(TypeError, "q", kvcache_num_splits, 3, K)
    raises(ValueError, "k_cache", kvcache_num_splits, Q, zeros(2, 12, 3, 32))
    raises(TypeError, "block_table", kvcache_num_splits, Q, zeros(2, 16, 2, 32), 3)


@pytest.mark.parametrize("make", [torch.Tensor.to_sparse, lambda x: torch.nested.nested_tensor(list(x))])
def test_tensors_that_are_not_dense(make):
    raises(TypeError, "k", flash_attn.flash_attn_func, Q.float(), make(K.float()), K.float())
