"""Gradients of fixed-length attention against the fp64 oracle. On the CPU only: CUDA has no backward yet."""

from __future__ import annotations

import pytest
import torch
from oracle import HEAD_DIM_PAIRS, Options, assert_within, attention, gradients

from flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
)
from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_forward

MASKS = {
    "full": Options(),
    "causal": Options(causal=True),
    "window": Options(window_size=(17, 29)),
    "left": Options(window_size=(33, -1)),
    "causal window": Options(causal=True, window_size=(40, 7)),
}
LENGTHS = ((1, 1), (1, 147), (113, 203), (128, 217), (108, 256), (203, 113), (257, 1), (1, 5))


def make(batch, seqlen_q, seqlen_k, heads, heads_k, head_dim, dtype, head_dim_v=None):
    q = torch.randn(batch, seqlen_q, heads, head_dim).to(dtype).requires_grad_()
    dims = head_dim, head_dim if head_dim_v is None else head_dim_v
    k, v = (torch.randn(batch, seqlen_k, heads_k, dim).to(dtype).requires_grad_() for dim in dims)
    return q, k, v


def check(q, k, v, options):
    out = flash_attn_func(q, k, v, **options.arguments())
    dout = torch.randn_like(out)
    actual = torch.autograd.grad(out, (q, k, v), dout)

    def run(dtype):
        return gradients(lambda *x: attention(*x, options, dtype)[0], (q, k, v), dout, dtype)

    for a, truth, yardstick in zip(actual, run(torch.float64), run(q.dtype), strict=True):
        assert a.dtype == q.dtype
        assert_within(a, truth, yardstick, factor=3.0)


@pytest.mark.parametrize("head_dim", [32, 40, 59, 64, 96, 111, 128, 160, 192, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_head_dims(head_dim, causal):
    check(*make(1, 70, 90, 4, 2, head_dim, torch.bfloat16), Options(causal=causal))


@pytest.mark.parametrize("head_dims", [*HEAD_DIM_PAIRS, (59, 17)], ids=str)
@pytest.mark.parametrize("mask", ["full", "causal", "window"])
def test_head_dim_of_v_differs(head_dims, mask):
    check(*make(1, 70, 90, 4, 2, head_dims[0], torch.bfloat16, head_dims[1]), MASKS[mask])


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_lengths_and_masks(lengths, mask):
    check(*make(2, *lengths, 4, 2, 32, torch.bfloat16), MASKS[mask])


@pytest.mark.parametrize("heads", [(3, 3), (6, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_groups_and_dtypes(heads, dtype):
    check(*make(2, 65, 80, *heads, 64, dtype), Options(causal=True))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "extra", [{"softcap": 4.0}, {"softmax_scale": -0.2}, {"softmax_scale": 0.0}], ids=str
)
def test_softcap_and_scale(mask, extra):
    options = Options(**{**MASKS[mask].arguments(), **extra})
    check(*make(1, 90, 110, 4, 2, 32, torch.float32), options)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", [(4,), (2, 4)], ids=str)
def test_alibi(mask, shape):
    options = Options(**{**MASKS[mask].arguments(), "alibi_slopes": torch.rand(shape)})
    check(*make(2, 90, 110, 4, 2, 32, torch.bfloat16), options)


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_empty(lengths):
    q, k, v = make(2, *lengths, 4, 2, 32, torch.bfloat16)
    dq, dk, dv = torch.autograd.grad(flash_attn_func(q, k, v), (q, k, v), torch.randn_like(q))
    assert dq.shape == q.shape and dk.shape == k.shape and dv.shape == v.shape
    assert not dq.any() and not dk.any() and not dv.any()


def test_rows_that_see_no_key_get_no_gradient():
    q, k, v = make(1, 100, 30, 2, 2, 32, torch.float32)
    (dq,) = torch.autograd.grad(flash_attn_func(q, k, v, causal=True), q, torch.randn_like(q))
    assert not dq[:, :70].any() and dq[:, 71:].any()


@pytest.mark.parametrize(
    "options", [Options(causal=True), Options(softcap=3.0), Options(window_size=(3, 2))], ids=str
)
@pytest.mark.parametrize("head_dim_v", [3, 5])
def test_gradcheck(options, head_dim_v):
    q, k, v = make(2, 7, 9, 4, 2, 3, torch.float64, head_dim_v)
    torch.autograd.gradcheck(lambda *x: flash_attn_func(*x, **options.arguments()), (q, k, v))


def test_packed():
    qkv = torch.randn(2, 40, 3, 4, 32, requires_grad=True)
    q, k, v = (x.detach().requires_grad_() for x in qkv.unbind(2))
    dout = torch.randn_like(q)
    expected = torch.stack(torch.autograd.grad(flash_attn_func(q, k, v, causal=True), (q, k, v), dout), dim=2)
    (actual,) = torch.autograd.grad(flash_attn_qkvpacked_func(qkv, causal=True), qkv, dout)
    assert torch.equal(actual, expected)
    kv = qkv.detach()[:, :, 1:].requires_grad_()
    dq, dkv = torch.autograd.grad(flash_attn_kvpacked_func(q, kv, causal=True), (q, kv), dout)
    assert torch.equal(dq, expected[:, :, 0]) and torch.equal(dkv, expected[:, :, 1:])


def test_deterministic_gradients_are_bitwise_equal():
    q, k, v = make(2, 130, 130, 4, 2, 32, torch.float32)
    dout = torch.randn_like(q)
    runs = [
        torch.autograd.grad(flash_attn_func(q, k, v, causal=True, deterministic=True), (q, k, v), dout)
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_expanded_and_strided_inputs_and_gradient():
    q, k, v = make(1, 33, 44, 4, 2, 16, torch.float32)
    wide = flash_attn_func(q.expand(3, -1, -1, -1), k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1))
    dout = torch.randn(16, 4, 33, 3).permute(3, 2, 1, 0)
    actual = torch.autograd.grad(wide, (q, k, v), dout)
    expected = torch.autograd.grad(flash_attn_func(q, k, v), (q, k, v), dout.sum(0, keepdim=True))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-5, rtol=1e-5)


def test_lse_and_probabilities_carry_no_gradient():
    out, lse, probs = flash_attn_func(*make(1, 5, 5, 1, 1, 8, torch.float32), return_attn_probs=True)
    assert out.requires_grad and not lse.requires_grad and not probs.requires_grad


def test_backward_takes_the_lse_of_a_merged_result():
    """As ring attention does: each part's gradients come from the output and the LSE of all parts."""
    q, k, v = (x.detach() for x in make(1, 40, 60, 2, 2, 16, torch.float64))
    dout = torch.randn_like(q)
    whole = gradients(lambda *x: attention(*x, Options())[0], (q, k, v), dout, torch.float64)
    options = (0.0, 0.25, False, -1, -1, 0.0, None)
    out, lse, _, _ = _flash_attn_forward(q, k, v, *options, False)
    dq_sum = torch.zeros_like(q)
    for part in (slice(0, 25), slice(25, 60)):
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k[:, part]), torch.empty_like(v[:, part])
        _flash_attn_backward(dout, q, k[:, part], v[:, part], out, lse, dq, dk, dv, *options, False)
        dq_sum += dq
        torch.testing.assert_close(dk, whole[1][:, part])
        torch.testing.assert_close(dv, whole[2][:, part])
    torch.testing.assert_close(dq_sum, whole[0])


@pytest.mark.parametrize("varlen", [False, True])
def test_a_second_derivative_is_an_error(varlen):
    q, k, v = make(1, 9, 12, 2, 2, 16, torch.float64)
    if varlen:
        bounds = [torch.tensor([0, n], dtype=torch.int32) for n in (9, 12)]
        out = flash_attn_varlen_func(q[0], k[0], v[0], *bounds, 9, 12)
    else:
        out = flash_attn_func(q, k, v)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dq.square().sum().backward()
