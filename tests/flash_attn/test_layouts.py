"""Layouts of tensors do not change results."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from layouts import LAYOUTS, WRITABLE, place
from oracle import Options
from problems import BF16, check, check_gradients, qkv

from flash_attn import flash_attn_func, flash_attn_with_kvcache
from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_forward

SIZE = st.integers(0, 9)
CAUSAL = Options(causal=True)
SETTINGS = settings(max_examples=300, deadline=None, derandomize=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_dims", [(64, 64), (36, 20), (59, 24)], ids=str)
def test_forward_and_backward(device, require_backward, layout, head_dims):
    """As of contiguous tensors, bit for bit, but for the order in which gradients are added up."""
    require_backward(device, BF16, *head_dims)
    of_q, of_k, of_v = (2, 19, 4, head_dims[0]), (2, 23, 2, head_dims[0]), (2, 23, 2, head_dims[1])
    q, k, v = (place(shape, layout, device=device).view.requires_grad_() for shape in (of_q, of_k, of_v))
    dout = place((2, 19, 4, head_dims[1]), layout, device=device).view
    out = flash_attn_func(q, k, v, causal=True)
    check(out, None, q, k, v, CAUSAL)
    plain = (x.detach().resolve_neg().contiguous() for x in (q, k, v))
    assert out.stride(-1) == 1 and torch.equal(out, flash_attn_func(*plain, causal=True))
    check_gradients(torch.autograd.grad(out, (q, k, v), dout), (q, k, v), dout, CAUSAL)


@pytest.mark.parametrize("layout", WRITABLE)
@pytest.mark.parametrize("head_dims", [(64, 64), (36, 20)], ids=str)
def test_outputs(device, require_backward, layout, head_dims):
    """Written in full, and nothing beside them."""
    require_backward(device, BF16, *head_dims)
    q, k, v = qkv(1, 19, 23, head_dims=head_dims, device=device)
    shapes = (1, 19, 4, head_dims[1]), q.shape, k.shape, v.shape
    written = [place(shape, layout, device=device, fill=7.0) for shape in shapes]
    scoring = 0.0, None, True, -1, -1, 0.0, None
    out = flash_attn_func(q, k, v, causal=True, out=written[0].view)
    lse, dout = _flash_attn_forward(q, k, v, *scoring, False)[1], torch.randn_like(out)
    gradients = [x.view for x in written[1:]]
    _flash_attn_backward(dout, q, k, v, out, lse, *gradients, *scoring, False)
    check(out, lse, q, k, v, CAUSAL)
    check_gradients(gradients, (q, k, v), dout, CAUSAL)
    assert all(torch.equal(x.buffer.isnan(), ~x.touched) for x in written)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_beside_a_cache(device, require_split, layout):
    require_split(device, BF16, 64)
    q, k, v = (place((2, n, h, 64), layout, device=device).view for n, h in ((5, 4), (3, 2), (3, 2)))
    caches = qkv(2, 0, 32, device=device)[1:]
    out = flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=20, causal=True, num_splits=2)
    assert torch.equal(caches[0][:, 20:23], k) and torch.equal(caches[1][:, 20:23], v)
    check(out, None, q, *(x[:, :23] for x in caches), CAUSAL)
