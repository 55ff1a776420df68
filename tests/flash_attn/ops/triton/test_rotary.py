"""The rotary function that models import from `flash_attn.ops.triton.rotary`."""

from __future__ import annotations

import pytest
import torch
from problems import int32

from flash_attn.layers.rotary import apply_rotary_emb
from flash_attn.ops.triton.rotary import apply_rotary

PACKED = {"cu_seqlens": int32(0, 3, 9), "max_seqlen": 6}


@pytest.mark.parametrize(
    "shape, sequences", [((2, 7, 3, 16), {}), ((10, 3, 16), PACKED)], ids=["batch", "packed"]
)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_rotates_and_rotates_back(shape, sequences, interleaved, inplace):
    x, angles = torch.randn(shape), torch.rand(20, 4) * 6
    tables = angles.cos(), angles.sin()
    before = x.clone()
    named = {"seqlen_offsets": 5, **sequences, "interleaved": interleaved}
    out = apply_rotary(x, *tables, **named, inplace=inplace)
    assert torch.equal(out, apply_rotary_emb(before, *tables, **named))
    assert (out.data_ptr() == x.data_ptr()) == inplace and torch.equal(x, out if inplace else before)
    torch.testing.assert_close(apply_rotary(out, *tables, **named, conjugate=True), before)


def test_position_of_the_arguments():
    x, angles = torch.randn(9, 3, 16), torch.rand(20, 4)
    tables = angles.cos(), angles.sin()
    expected = apply_rotary(x, *tables, interleaved=True, conjugate=True, **PACKED)
    assert torch.equal(apply_rotary(x, *tables, 0, *PACKED.values(), True, False, True), expected)


def test_writes_through_a_view():
    """As ModernBERT calls it: q and k of a packed tensor, in place."""
    qkv, angles = torch.randn(9, 3, 2, 16), torch.rand(9, 8)
    expected = apply_rotary(qkv[:, :2].reshape(9, 4, 16), angles.cos(), angles.sin(), **PACKED)
    apply_rotary(qkv[:, :2].view(9, -1, 16), angles.cos(), angles.sin(), **PACKED, inplace=True)
    assert torch.equal(qkv[:, :2].flatten(1, 2), expected)


@pytest.mark.parametrize("packed", [False, True])
def test_another_number_of_dimensions_is_refused(packed):
    x, table = torch.randn(*((1,) if packed else ()), 5, 3, 8), torch.rand(9, 4)
    bounds = int32(0, 5) if packed else None
    with pytest.raises(ValueError, match=r"^x must be a tensor of"):
        apply_rotary(x, table, table, cu_seqlens=bounds)
