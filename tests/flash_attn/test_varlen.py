"""Packed sequences and their gradients against the fp64 oracle."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from oracle import Options
from problems import (
    BF16,
    FEW_MASKS,
    HEAD_DIM_PAIRS,
    MASKS,
    bounds,
    check_varlen,
    check_varlen_gradients,
    cu_seqlens,
    int32,
    packed_qkv,
    qkv,
    run_varlen,
)

from flash_attn import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from flash_attn.flash_attn_interface import _flash_attn_varlen_backward, _flash_attn_varlen_forward

VARLEN_MASKS = (*FEW_MASKS, "right", "causal window")
SEQUENCES = {
    "mixed": ([113, 1, 64, 130], [203, 77, 64, 50]),
    "empty first, middle, last": ([0, 40, 0, 0, 65, 0], [0, 30, 12, 0, 70, 0]),
    "no keys": ([5, 40, 7], [0, 30, 0]),
    "no queries": ([0, 40, 0], [9, 30, 7]),
    "one": ([300], [300]),
    "nothing": ([0, 0], [0, 0]),
}


def check(tensors, lengths, options):
    check_varlen(*run_varlen(*tensors, lengths, options), *tensors, lengths, options)


@pytest.mark.parametrize("sequences", SEQUENCES)
@pytest.mark.parametrize("mask", VARLEN_MASKS)
@pytest.mark.parametrize("head_dim", [64, 111])
def test_sequences_and_masks(device, require_kernel, sequences, mask, head_dim):
    require_kernel(device, BF16, head_dim)
    lengths = SEQUENCES[sequences]
    check(packed_qkv(lengths, head_dims=head_dim, device=device), lengths, MASKS[mask])


@pytest.mark.parametrize("head_dim", [32, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.float16, BF16])
def test_head_dims(device, require_kernel, head_dim, dtype):
    require_kernel(device, dtype, head_dim)
    tensors = packed_qkv(SEQUENCES["mixed"], (4, 1), head_dim, dtype, device)
    check(tensors, SEQUENCES["mixed"], Options(causal=True))


@pytest.mark.parametrize("head_dims", HEAD_DIM_PAIRS, ids=str)
@pytest.mark.parametrize("mask", FEW_MASKS)
@pytest.mark.parametrize("sequences", ["mixed", "empty first, middle, last"])
def test_head_dim_of_v_differs(device, require_kernel, head_dims, mask, sequences):
    require_kernel(device, BF16, *head_dims)
    lengths = SEQUENCES[sequences]
    check(packed_qkv(lengths, head_dims=head_dims, device=device, trailing=11), lengths, MASKS[mask])


@pytest.mark.parametrize("extra", [{"softcap": 5.0}, {"softmax_scale": -0.3}], ids=str)
@pytest.mark.parametrize("mask", VARLEN_MASKS)
def test_softcap_and_scale(device, require_kernel, mask, extra):
    require_kernel(device, BF16, 64)
    check(packed_qkv(SEQUENCES["mixed"], device=device), SEQUENCES["mixed"], replace(MASKS[mask], **extra))


@pytest.mark.parametrize("shape", [(4,), (4, 4)], ids=str)
@pytest.mark.parametrize("mask", VARLEN_MASKS)
def test_alibi(device, require_kernel, mask, shape):
    require_kernel(device, BF16, 64)
    options = replace(MASKS[mask], alibi_slopes=torch.rand(shape, device=device))
    check(packed_qkv(SEQUENCES["mixed"], device=device), SEQUENCES["mixed"], options)


@pytest.mark.parametrize("lengths", [([30, 0, 41], [50, 20, 0]), ([0, 0], [0, 0]), ([], [])], ids=str)
def test_trailing_tokens_are_zero(device, require_kernel, lengths):
    require_kernel(device, BF16, 64)
    tensors, used = packed_qkv(lengths, device=device, trailing=150), sum(lengths[0])
    out, lse = run_varlen(*tensors, lengths, Options())
    assert not out[used:].any() and (lse[:, used:] == math.inf).all()
    check_varlen(out, lse, *tensors, lengths, Options())


def test_equals_fixed_length(device, require_kernel):
    require_kernel(device, BF16, 64)
    q, k, v = qkv(3, 50, 50, device=device)
    flat, lengths = [x.flatten(0, 1) for x in (q, k, v)], ([50] * 3, [50] * 3)
    out = flash_attn_varlen_func(*flat, *bounds(lengths, device), causal=True)
    torch.testing.assert_close(out.view_as(q), flash_attn_func(q, k, v, causal=True), atol=1e-6, rtol=1e-6)


def test_packed(device, require_kernel):
    require_kernel(device, BF16, 64)
    qkv = torch.randn(90, 3, 4, 64, device=device).bfloat16()
    cu = cu_seqlens([30, 60], device)
    expected = flash_attn_varlen_func(*(x.contiguous() for x in qkv.unbind(1)), cu, cu, 60, 60, causal=True)
    assert torch.equal(flash_attn_varlen_qkvpacked_func(qkv, cu, 60, causal=True), expected)
    packed = flash_attn_varlen_kvpacked_func(qkv[:, 0], qkv[:, 1:], cu, cu, 60, 60, causal=True)
    assert torch.equal(packed, expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "leftpad, used", [(None, [60, 0, 12]), ([3, 0, 20], None), ([3, 5, 40], [60, 9, 40])], ids=str
)
def test_seqused_and_leftpad(device, require_kernel, leftpad, used, causal):
    require_kernel(device, BF16, 64)
    lengths = [20, 30, 40], [70, 33, 50]
    tensors, options = packed_qkv(lengths, device=device), Options(causal=causal)
    index = [None if x is None else int32(*x, device=device) for x in (leftpad, used)]
    out, lse, _, _ = _flash_attn_varlen_forward(
        *tensors, *bounds(lengths, device), 0.0, 0.125, causal, leftpad_k=index[0], seqused_k=index[1]
    )
    check_varlen(out, lse, *tensors, lengths, options, leftpad, used)
    if leftpad is None:
        assert torch.equal(run_varlen(*tensors, lengths, options, seqused_k=index[1])[0], out)


def test_max_seqlen_may_be_larger_or_a_tensor(device, require_kernel):
    require_kernel(device, BF16, 64)
    q, k, v = packed_qkv(([30, 20], [30, 20]), device=device)
    cu = cu_seqlens([30, 20], device)
    expected = flash_attn_varlen_func(q, k, v, cu, cu, 30, 30)
    assert torch.equal(flash_attn_varlen_func(q, k, v, cu, cu, 500, 400), expected)
    assert torch.equal(flash_attn_varlen_func(q, k, v, cu, cu, torch.tensor(30), torch.tensor(30)), expected)


def check_gradients(device, lengths, options, heads=(4, 2), head_dims=64):
    """Compare gradients with the oracle's; the last 11 tokens belong to no sequence."""
    inputs = packed_qkv(lengths, heads, head_dims, device=device, grad=True, trailing=11)
    out = flash_attn_varlen_func(*inputs, *bounds(lengths, device), **options.arguments())
    dout = torch.randn_like(out)
    found = torch.autograd.grad(out, inputs, dout)
    check_varlen_gradients(found, inputs, dout, lengths, options)
    assert not any(x[-11:].any() for x in found)


@pytest.mark.parametrize("sequences", SEQUENCES)
@pytest.mark.parametrize("mask", VARLEN_MASKS)
def test_gradients(device, require_backward, sequences, mask):
    require_backward(device, BF16, 32)
    check_gradients(device, SEQUENCES[sequences], MASKS[mask], head_dims=32)


@pytest.mark.parametrize("head_dim", [40, 59, 64, 96, 111, 128, 192, 256])
@pytest.mark.parametrize("heads_k", [4, 1])
def test_gradients_of_head_dims_and_groups(device, require_backward, head_dim, heads_k):
    require_backward(device, BF16, head_dim)
    lengths = SEQUENCES["empty first, middle, last"]
    check_gradients(device, lengths, MASKS["causal"], (4, heads_k), head_dim)


@pytest.mark.parametrize("head_dims", HEAD_DIM_PAIRS, ids=str)
def test_gradients_where_the_head_dim_of_v_differs(device, require_backward, head_dims):
    require_backward(device, BF16, *head_dims)
    check_gradients(device, SEQUENCES["mixed"], MASKS["causal window"], head_dims=head_dims)


@pytest.mark.parametrize("slopes", [(4,), (4, 4)], ids=str)
def test_gradients_with_softcap_and_alibi(device, require_backward, slopes):
    require_backward(device, BF16, 64)
    options = Options(causal=True, softcap=5.0, alibi_slopes=torch.rand(slopes, device=device))
    check_gradients(device, SEQUENCES["mixed"], options)


def test_packed_gradients(device, require_backward):
    require_backward(device, BF16, 16)
    qkv = torch.randn(97, 3, 4, 16, device=device).bfloat16().requires_grad_()
    cu = cu_seqlens([30, 60], device)
    dout = torch.randn(97, 4, 16, device=device).bfloat16()
    named = {"causal": True, "deterministic": True}
    (actual,) = torch.autograd.grad(flash_attn_varlen_qkvpacked_func(qkv, cu, 60, **named), qkv, dout)
    q, k, v = (x.detach().requires_grad_() for x in qkv.unbind(1))
    expected = torch.autograd.grad(
        flash_attn_varlen_func(q, k, v, cu, cu, 60, 60, **named), (q, k, v), dout
    )  # fmt: skip
    assert torch.equal(actual, torch.stack(expected, dim=1))
    kv = torch.stack((k, v), dim=1).detach().requires_grad_()
    dq, dkv = torch.autograd.grad(
        flash_attn_varlen_kvpacked_func(q, kv, cu, cu, 60, 60, **named), (q, kv), dout
    )
    assert torch.equal(dq, expected[0]) and torch.equal(dkv, torch.stack(expected[1:], dim=1))


@pytest.mark.parametrize("deterministic", [False, True])
def test_given_gradients_are_written_in_full(device, require_backward, deterministic):
    """They start as NaN; there are sequences without keys and without queries, and tokens of none."""
    require_backward(device, BF16, 64)
    lengths = [170, 0, 40, 130], [0, 7, 90, 200]
    q, k, v = packed_qkv(lengths, device=device, trailing=150)
    scoring = (0.0, 0.125, True, -1, -1, 0.0, None)
    arguments = bounds(lengths, device)
    out, lse, _, _ = _flash_attn_varlen_forward(q, k, v, *arguments, *scoring)
    dout = torch.randn_like(out)
    given = [torch.full_like(x, math.nan) for x in (q, k, v)]
    softmax_d = _flash_attn_varlen_backward(
        dout, q, k, v, out, lse, *given, *arguments, *scoring, deterministic
    )  # fmt: skip
    check_varlen_gradients(given, (q, k, v), dout, lengths, Options(causal=True))
    assert not any(x[-150:].any() for x in given)
    assert softmax_d.shape == (4, len(q) + 4 * 128) and softmax_d.isfinite().all()
    expected = (dout.double() * out.double()).sum(-1).mT[:, : sum(lengths[0])]
    torch.testing.assert_close(
        softmax_d.double().sum(-1), expected.sum(-1), atol=1e-3, rtol=1e-4
    )  # zero between the sequences
