"""Layouts of tensors down the CUDA path, to the library's stand-in: what is handed on, and the results."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, WRITABLE, place
from oracle import Options, assert_gradients, assert_within, attention
from standin import StandIn

from flash_attn import _cuda, flash_attn_func, flash_attn_with_kvcache
from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_forward

BF16 = torch.bfloat16
SIZE = st.integers(0, 9)
SETTINGS = settings(max_examples=300, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def library(install):
    install(StandIn(), hopper=True)


@st.composite
def tensors(draw):
    shape = *draw(st.lists(SIZE, min_size=2, max_size=3)), draw(st.integers(1, 40))
    dtype = draw(st.sampled_from([torch.float16, BF16]))
    return place(shape, draw(st.sampled_from(sorted(LAYOUTS))), dtype).view


@st.composite
def strided(draw):
    """Any strides at all, those of dimensions of size 1 among them."""
    shape = [draw(SIZE), draw(SIZE), draw(st.integers(1, 20))]
    strides = [draw(st.integers(0, 40)) for _ in shape]
    x = torch.randn(64 + sum(n * step for n, step in zip(shape, strides, strict=True))).to(BF16)
    return x.as_strided(shape, strides, draw(SIZE))


@SETTINGS
@given(x=st.one_of(tensors(), strided()))
def test_what_is_aligned_is_readable(x):
    head_dim = x.shape[-1]
    found = _cuda.aligned(x, "x")
    assert _cuda.readable(found)
    assert torch.equal(found[..., :head_dim], x) and not found[..., head_dim:].any()
    assert found.shape[:-1] == x.shape[:-1] and found.shape[-1] == -(-head_dim // 8) * 8
    assert _cuda.readable(_cuda.writable(x)) and _cuda.writable(x).shape == found.shape


@SETTINGS
@given(x=st.one_of(tensors(), strided()), alignment=st.sampled_from([4, 16]))
def test_what_is_contiguous(x, alignment):
    found = _cuda.contiguous(x, "x", alignment)
    assert found.is_contiguous() and not found.is_neg() and torch.equal(found, x)
    assert found.data_ptr() % alignment == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_dims", [(64, 64), (36, 20)], ids=str)
def test_forward_and_backward(layout, head_dims):
    shapes = (2, 19, 4, head_dims[0]), (2, 23, 2, head_dims[0]), (2, 23, 2, head_dims[1])
    q, k, v = (place(shape, layout).view for shape in shapes)
    dout = place((2, 19, 4, head_dims[1]), layout).view
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = flash_attn_func(*leaves, causal=True)
    truth, _ = attention(q, k, v, Options(causal=True))
    assert_within(out, truth, attention(q, k, v, Options(causal=True), BF16)[0])
    found = torch.autograd.grad(out, leaves, dout)
    assert_gradients(
        found, lambda q, k, v, d: attention(q, k, v, Options(causal=True), d)[0], (q, k, v), dout
    )  # fmt: skip


@pytest.mark.parametrize("layout", WRITABLE)
@pytest.mark.parametrize("head_dims", [(64, 64), (36, 20)], ids=str)
def test_outputs(layout, head_dims):
    """Written in full, and nothing beside them."""
    shapes = (1, 19, 4, head_dims[0]), (1, 23, 2, head_dims[0]), (1, 23, 2, head_dims[1])
    q, k, v = (place(shape).view for shape in shapes)
    out_shape = 1, 19, 4, head_dims[1]
    written = [place(shape, layout, fill=7.0) for shape in (out_shape, *shapes)]
    scoring = 0.0, None, True, -1, -1, 0.0, None
    out = flash_attn_func(q, k, v, causal=True, out=written[0].view)
    lse, dout = _flash_attn_forward(q, k, v, *scoring, False)[1], torch.randn(out_shape).to(BF16)
    _flash_attn_backward(dout, q, k, v, out, lse, *(x.view for x in written[1:]), *scoring, False)
    truth, _ = attention(q, k, v, Options(causal=True))
    assert_within(out, truth, attention(q, k, v, Options(causal=True), BF16)[0])
    assert_gradients(
        [x.view for x in written[1:]], lambda q, k, v, d: attention(q, k, v, Options(causal=True), d)[0],
        (q, k, v), dout,
    )  # fmt: skip
    assert all(torch.equal(x.buffer.isnan(), ~x.touched) for x in written)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_beside_a_cache(layout):
    q, k, v = (place((2, n, h, 64), layout).view for n, h in ((5, 4), (3, 2), (3, 2)))
    caches = [torch.randn(2, 32, 2, 64).to(BF16) for _ in range(2)]
    out = flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=20, causal=True, num_splits=2)
    assert torch.equal(caches[0][:, 20:23], k) and torch.equal(caches[1][:, 20:23], v)
    used = [x[:, :23] for x in caches]
    truth, _ = attention(q, *used, Options(causal=True))
    assert_within(out, truth, attention(q, *used, Options(causal=True), BF16)[0])
