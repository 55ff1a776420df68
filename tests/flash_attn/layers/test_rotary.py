"""Rotary embedding against complex multiplication, its gradients, and its in-place and packed variants."""

from __future__ import annotations

import pytest
import torch
from conftest import uses_kernels
from oracle import assert_within
from problems import int32
from standin import StandIn

from flash_attn._backends.cuda.library import load
from flash_attn.layers import rotary
from flash_attn.layers.rotary import (
    apply_rotary_emb,
    apply_rotary_emb_func,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
)


def reference(x, angles, interleaved):
    """Rotate x (..., s, h, d) by angles (..., s, n) as complex numbers."""
    n = angles.shape[-1]
    part = x[..., : 2 * n].double()
    pairs = part.unflatten(-1, (n, 2)) if interleaved else part.unflatten(-1, (2, n)).mT
    turned = torch.view_as_complex(pairs.contiguous()) * torch.exp(1j * angles.double()).unsqueeze(-2)
    real = torch.view_as_real(turned)
    flat = real.flatten(-2) if interleaved else real.mT.flatten(-2)
    return torch.cat([flat, x[..., 2 * n :].double()], dim=-1)


def tables(rows, n):
    angles = torch.rand(rows, n) * 6
    return angles, angles.cos(), angles.sin()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [8, 16])
@pytest.mark.parametrize("offsets", [0, 5, torch.tensor([3, 0])], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_fixed_length(interleaved, rotary_dim, offsets, inplace):
    x = torch.randn(2, 7, 3, 16)
    angles, cos, sin = tables(20, rotary_dim // 2)
    before = x.clone()
    out = apply_rotary_emb(x, cos, sin, interleaved, inplace, offsets)
    positions = torch.as_tensor(offsets).reshape(-1, 1) + torch.arange(7)
    torch.testing.assert_close(
        out.double(), reference(before, angles[positions], interleaved), atol=1e-5, rtol=1e-5
    )
    assert (out.data_ptr() == x.data_ptr()) == inplace and torch.equal(x, out if inplace else before)


@pytest.mark.parametrize("offsets", [0, 2, int32(3, 0, 1, 5)], ids=str)
def test_varlen(offsets):
    lengths = [4, 0, 7, 1]
    x = torch.randn(15, 2, 16)
    angles, cos, sin = tables(20, 8)
    cu_seqlens = int32(0, 4, 4, 11, 12)
    out = apply_rotary_emb(x, cos, sin, seqlen_offsets=offsets, cu_seqlens=cu_seqlens, max_seqlen=7)
    starts = torch.as_tensor(offsets).expand(4).tolist()
    positions = torch.cat([torch.arange(n) + s for n, s in zip(lengths, starts, strict=True)])
    torch.testing.assert_close(
        out[:12].double(), reference(x[:12], angles[positions], False), atol=1e-5, rtol=1e-5
    )
    assert torch.equal(out[12:], x[12:])


@pytest.mark.parametrize("offsets", [torch.tensor([3, -1]), torch.tensor([0, 2**40])], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_unknown_positions_past_the_tables_do_not_rotate(install, offsets, packed):
    """On CUDA positions are not read; the tables must not be read past their end either."""
    install(StandIn())
    x, (angles, cos, sin) = torch.randn(2, 7, 3, 16), tables(6, 8)
    sequences = {"cu_seqlens": int32(0, 7, 14)} if packed else {}
    out = apply_rotary_emb(x.flatten(0, 1) if packed else x, cos, sin, seqlen_offsets=offsets, **sequences)
    positions = offsets[:, None] + torch.arange(7)
    inside = (positions >= 0) & (positions < 6)
    expected = reference(x, torch.where(inside[..., None], angles[positions.clamp(0, 5)], 0.0), False)
    torch.testing.assert_close(out.view_as(x).double(), expected, atol=1e-5, rtol=1e-5)


def test_aliases_agree():
    x, (_, cos, sin) = torch.randn(2, 7, 3, 16), tables(7, 4)
    assert apply_rotary_emb_func is apply_rotary_emb
    for interleaved in (False, True):
        torch.testing.assert_close(
            apply_rotary_emb(x, cos, sin, interleaved), apply_rotary_emb_torch(x, cos, sin, interleaved)
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_rotated_in_fp32(dtype):
    x, (_, cos, sin) = torch.randn(2, 7, 3, 16).to(dtype), tables(7, 8)
    cos, sin = cos.to(dtype), sin.to(dtype)
    exact = apply_rotary_emb(x.double(), cos.double(), sin.double())
    assert torch.equal(apply_rotary_emb(x, cos, sin), exact.float().to(dtype))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_gradients(interleaved, inplace):
    x = torch.randn(2, 5, 3, 12, dtype=torch.float64, requires_grad=True)
    cos, sin = (t.double() for t in tables(9, 4)[1:])
    torch.autograd.gradcheck(lambda y: apply_rotary_emb(y * 1.0, cos, sin, interleaved, inplace, 2), x)
    cu_seqlens = int32(0, 2, 9)
    packed = x.detach().flatten(0, 1).requires_grad_()
    torch.autograd.gradcheck(lambda y: apply_rotary_emb(y * 1.0, cos, sin, cu_seqlens=cu_seqlens), packed)


def require_library(device):
    if device == "cuda":
        load()  # tests of the kernel must not pass by torch operations


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head_dim, rotary_dim", [(64, 64), (128, 32), (40, 16), (48, 24)])
@pytest.mark.parametrize("table_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("offsets", [0, 5, (3, 0), (0, 2**40)], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_half_types(device, interleaved, head_dim, rotary_dim, table_dtype, offsets, inplace):
    """Five bf16 heads, so that a thread's last ones are missing; positions past the tables."""
    require_library(device)
    if offsets == (0, 2**40) and not uses_kernels(device):
        pytest.skip("the CPU backend refuses positions past the tables")
    with torch.device(device):
        x = torch.randn(2, 7, 9, head_dim).bfloat16()[:, :, 2:7]
        _, cos, sin = tables(12, rotary_dim // 2)
        cos, sin = cos.to(table_dtype), sin.to(table_dtype)
        offsets = torch.tensor(offsets) if isinstance(offsets, tuple) else offsets
        positions = torch.as_tensor(offsets).reshape(-1, 1) + torch.arange(7)
    inside = ((positions >= 0) & (positions < 12))[..., None]
    at = positions.clamp(0, 11)
    c, s = torch.where(inside, cos[at], 1), torch.where(inside, sin[at], 0)
    truth = apply_rotary_emb_torch(x.double(), c.double(), s.double(), interleaved)
    yardstick = apply_rotary_emb_torch(x, c.to(x.dtype), s.to(x.dtype), interleaved)
    before = x.clone()
    out = apply_rotary_emb(x, cos, sin, interleaved, inplace, offsets)
    assert_within(out, truth, yardstick)
    assert torch.equal(out[..., rotary_dim:], before[..., rotary_dim:])
    assert (out.data_ptr() == x.data_ptr()) == inplace and torch.equal(x, out if inplace else before)


@pytest.mark.parametrize("offsets", [0, 2, (3, 0, 1, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_varlen_half_types(device, offsets, dtype):
    require_library(device)
    lengths = [4, 0, 7, 1]
    with torch.device(device):
        x = torch.randn(15, 3, 32).to(dtype)
        _, cos, sin = tables(20, 16)
        cu_seqlens = int32(0, 4, 4, 11, 12)
        starts = torch.as_tensor(offsets).expand(4).tolist()
        positions = torch.cat([torch.arange(n) + s for n, s in zip(lengths, starts, strict=True)])
        offsets = torch.tensor(offsets, dtype=torch.int32) if isinstance(offsets, tuple) else offsets
    out = apply_rotary_emb(x, cos, sin, seqlen_offsets=offsets, cu_seqlens=cu_seqlens, max_seqlen=7)
    c, s = cos[positions], sin[positions]
    truth = apply_rotary_emb_torch(x[:12].double(), c.double(), s.double())
    assert_within(out[:12], truth, apply_rotary_emb_torch(x[:12], c.to(dtype), s.to(dtype)))
    assert torch.equal(out[12:], x[12:])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_gradient_of_half_types_rotates_back(device, interleaved, inplace):
    require_library(device)
    with torch.device(device):
        x = torch.randn(2, 7, 3, 48).bfloat16().requires_grad_()
        dout = torch.randn(2, 7, 3, 48).bfloat16()
        _, cos, sin = tables(9, 16)
    out = apply_rotary_emb(x * 1, cos, sin, interleaved, inplace, 2)
    (dx,) = torch.autograd.grad(out, x, dout)
    back = cos[2:], -sin[2:]
    truth = apply_rotary_emb_torch(dout.double(), *(t.double() for t in back), interleaved)
    assert_within(dx, truth, apply_rotary_emb_torch(dout, *(t.to(x.dtype) for t in back), interleaved))


@pytest.mark.parametrize("num_heads_q", [None, 4])
def test_packed_half_types(device, num_heads_q):
    require_library(device)
    with torch.device(device):
        qkv = (
            torch.randn(2, 5, 3, 4, 32).bfloat16()
            if num_heads_q is None
            else torch.randn(2, 5, 8, 32).bfloat16()
        )
        (_, cos, sin), (_, cos_k, sin_k) = tables(9, 16), tables(9, 16)
    before = qkv.clone()
    apply_rotary_emb_qkv_(qkv, cos, sin, cos_k, sin_k, seqlen_offsets=3, num_heads_q=num_heads_q)
    parts, expected = (rotary._select_qk(x, num_heads_q) for x in (qkv, before))
    for part, x, table in zip(parts, expected, ((cos, sin), (cos_k, sin_k)), strict=True):
        assert torch.equal(part, apply_rotary_emb(x, *table, seqlen_offsets=3))
    v = (qkv[:, :, 2], before[:, :, 2]) if num_heads_q is None else (qkv[:, :, 6:], before[:, :, 6:])
    assert torch.equal(*v)


def test_packed_qkv():
    x, (_, cos, sin) = torch.randn(2, 5, 3, 4, 16), tables(9, 8)
    before = x.clone()
    out = apply_rotary_emb_qkv_(x, cos, sin, seqlen_offsets=3)
    assert out.data_ptr() == x.data_ptr()
    for i in range(2):
        assert torch.equal(out[:, :, i], apply_rotary_emb(before[:, :, i], cos, sin, seqlen_offsets=3))
    assert torch.equal(out[:, :, 2], before[:, :, 2])


def test_packed_groups():
    x, (_, cos, sin), (_, cos_k, sin_k) = torch.randn(2, 5, 8, 16), tables(9, 8), tables(9, 8)
    before = x.clone()
    out = apply_rotary_emb_qkv_(x, cos, sin, cos_k, sin_k, interleaved=True, num_heads_q=4)
    assert torch.equal(out[:, :, :4], apply_rotary_emb(before[:, :, :4], cos, sin, True))
    assert torch.equal(out[:, :, 4:6], apply_rotary_emb(before[:, :, 4:6], cos_k, sin_k, True))
    assert torch.equal(out[:, :, 6:], before[:, :, 6:])


def test_packed_gradients():
    cos, sin = (t.double() for t in tables(9, 4)[1:])
    qkv = torch.randn(1, 5, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda y: apply_rotary_emb_qkv_(y * 1.0, cos, sin, seqlen_offsets=1), qkv)
    torch.autograd.gradcheck(lambda y: apply_rotary_emb_kv_(y[:, :, 1:] * 1.0, cos, sin), qkv)
