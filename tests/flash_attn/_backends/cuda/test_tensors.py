"""What the CUDA backend makes of any tensor, so that kernels can read it."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, place

from flash_attn._backends.cuda import tensors

SIZE = st.integers(0, 9)
SETTINGS = settings(max_examples=300, deadline=None, derandomize=True)


@st.composite
def placed(draw):
    shape = *draw(st.lists(SIZE, min_size=2, max_size=3)), draw(st.integers(1, 40))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16]))
    return place(shape, draw(st.sampled_from(sorted(LAYOUTS))), dtype).view


@st.composite
def strided(draw):
    """Any strides at all, those of dimensions of size 1 among them."""
    shape = [draw(SIZE), draw(SIZE), draw(st.integers(1, 20))]
    strides = [draw(st.integers(0, 40)) for _ in shape]
    x = torch.randn(64 + sum(n * step for n, step in zip(shape, strides, strict=True))).to(torch.bfloat16)
    return x.as_strided(shape, strides, draw(SIZE))


@SETTINGS
@given(x=st.one_of(placed(), strided()))
def test_aligned(x):
    head_dim = x.shape[-1]
    found = tensors.aligned(x, "x")
    assert tensors.readable(found)
    assert torch.equal(found[..., :head_dim], x) and not found[..., head_dim:].any()
    assert found.shape[:-1] == x.shape[:-1] and found.shape[-1] == -(-head_dim // 8) * 8
    assert tensors.readable(tensors.writable(x)) and tensors.writable(x).shape == found.shape


@SETTINGS
@given(x=st.one_of(placed(), strided()), alignment=st.sampled_from([4, 16]))
def test_contiguous(x, alignment):
    found = tensors.contiguous(x, "x", alignment)
    assert found.is_contiguous() and not found.is_neg() and torch.equal(found, x)
    assert found.data_ptr() % alignment == 0
