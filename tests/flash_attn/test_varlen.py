"""Packed sequences and their gradients against the fp64 oracle; paged keys on the CPU alone."""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
import torch
from oracle import (
    HEAD_DIM_PAIRS,
    Options,
    assert_gradients,
    assert_lse,
    assert_within,
    varlen_attention,
)

from flash_attn import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from flash_attn.flash_attn_interface import _flash_attn_varlen_backward, _flash_attn_varlen_forward

MASKS = {
    "full": Options(),
    "causal": Options(causal=True),
    "window": Options(window_size=(17, 29)),
    "right": Options(window_size=(-1, 5)),
    "causal window": Options(causal=True, window_size=(40, 7)),
}
SEQUENCES = {
    "mixed": ([113, 1, 64, 130], [203, 77, 64, 50]),
    "empty first, middle, last": ([0, 40, 0, 0, 65, 0], [0, 30, 12, 0, 70, 0]),
    "no keys": ([5, 40, 7], [0, 30, 0]),
    "no queries": ([0, 40, 0], [9, 30, 7]),
    "one": ([300], [300]),
    "nothing": ([0, 0], [0, 0]),
}


def cumulative(lengths, device="cpu"):
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def make(lengths_q, lengths_k, heads, heads_k, head_dim, dtype, device, trailing=0, head_dim_v=None):
    total_q, total_k = sum(lengths_q) + trailing, sum(lengths_k) + trailing
    q = torch.randn(total_q, heads, head_dim, device=device).to(dtype)
    dims = head_dim, head_dim if head_dim_v is None else head_dim_v
    k, v = (torch.randn(total_k, heads_k, dim, device=device).to(dtype) for dim in dims)
    return q, k, v


def bounds(lengths_q, lengths_k, device):
    sizes = max(lengths_q, default=0), max(lengths_k, default=0)
    return cumulative(lengths_q, device), cumulative(lengths_k, device), *sizes


def check(q, k, v, lengths_q, lengths_k, options):
    arguments = bounds(lengths_q, lengths_k, q.device)
    out, lse, _ = flash_attn_varlen_func(q, k, v, *arguments, **options.arguments(), return_attn_probs=True)
    truth, truth_lse = varlen_attention(q, k, v, lengths_q, lengths_k, options)
    yardstick, _ = varlen_attention(q, k, v, lengths_q, lengths_k, options, q.dtype)
    assert_within(out, truth, yardstick)
    assert_lse(lse, truth_lse)


@pytest.mark.parametrize("sequences", SEQUENCES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("head_dim", [64, 111])
def test_sequences_and_masks(device, require_kernel, sequences, mask, head_dim):
    require_kernel(device, torch.bfloat16, head_dim)
    tensors = make(*SEQUENCES[sequences], 4, 2, head_dim, torch.bfloat16, device)
    check(*tensors, *SEQUENCES[sequences], MASKS[mask])


@pytest.mark.parametrize("head_dim", [32, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_head_dims(device, require_kernel, head_dim, dtype):
    require_kernel(device, dtype, head_dim)
    check(
        *make(*SEQUENCES["mixed"], 4, 1, head_dim, dtype, device), *SEQUENCES["mixed"], Options(causal=True)
    )


@pytest.mark.parametrize("head_dims", HEAD_DIM_PAIRS, ids=str)
@pytest.mark.parametrize("mask", ["full", "causal", "window"])
@pytest.mark.parametrize("sequences", ["mixed", "empty first, middle, last"])
def test_head_dim_of_v_differs(device, require_kernel, head_dims, mask, sequences):
    require_kernel(device, torch.bfloat16, *head_dims)
    lengths = SEQUENCES[sequences]
    tensors = make(*lengths, 4, 2, head_dims[0], torch.bfloat16, device, 11, head_dims[1])
    check(*tensors, *lengths, MASKS[mask])


@pytest.mark.parametrize("extra", [{"softcap": 5.0}, {"softmax_scale": -0.3}], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_softcap_and_scale(device, require_kernel, mask, extra):
    require_kernel(device, torch.bfloat16, 64)
    options = Options(**{**MASKS[mask].arguments(), **extra})
    check(*make(*SEQUENCES["mixed"], 4, 2, 64, torch.bfloat16, device), *SEQUENCES["mixed"], options)


@pytest.mark.parametrize("shape", [(4,), (4, 4)], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_alibi(device, require_kernel, mask, shape):
    require_kernel(device, torch.bfloat16, 64)
    options = Options(**{**MASKS[mask].arguments(), "alibi_slopes": torch.rand(shape, device=device)})
    check(*make(*SEQUENCES["mixed"], 4, 2, 64, torch.bfloat16, device), *SEQUENCES["mixed"], options)


@pytest.mark.parametrize("lengths", [([30, 0, 41], [50, 20, 0]), ([0, 0], [0, 0]), ([], [])], ids=str)
def test_trailing_tokens_are_zero(device, require_kernel, lengths):
    require_kernel(device, torch.bfloat16, 64)
    q, k, v = make(*lengths, 4, 2, 64, torch.bfloat16, device, trailing=150)
    used = sum(lengths[0])
    out, lse, _ = flash_attn_varlen_func(q, k, v, *bounds(*lengths, device), return_attn_probs=True)
    truth, _ = varlen_attention(q, k, v, *lengths, Options())
    yardstick, _ = varlen_attention(q, k, v, *lengths, Options(), q.dtype)
    assert not out[used:].any() and (lse[:, used:] == math.inf).all()
    assert_within(out, truth, yardstick)


def test_equals_fixed_length(device, require_kernel):
    require_kernel(device, torch.bfloat16, 64)
    q, k, v = (torch.randn(3, 50, 4, 64, device=device).bfloat16() for _ in range(3))
    out = flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in (q, k, v)), *bounds([50] * 3, [50] * 3, device), causal=True
    )
    torch.testing.assert_close(out.view_as(q), flash_attn_func(q, k, v, causal=True), atol=1e-6, rtol=1e-6)


def test_packed(device, require_kernel):
    require_kernel(device, torch.bfloat16, 64)
    qkv = torch.randn(90, 3, 4, 64, device=device).bfloat16()
    cu = cumulative([30, 60], device)
    expected = flash_attn_varlen_func(*(x.contiguous() for x in qkv.unbind(1)), cu, cu, 60, 60, causal=True)
    assert torch.equal(flash_attn_varlen_qkvpacked_func(qkv, cu, 60, causal=True), expected)
    packed = flash_attn_varlen_kvpacked_func(qkv[:, 0], qkv[:, 1:], cu, cu, 60, 60, causal=True)
    assert torch.equal(packed, expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "leftpad, used", [(None, [60, 0, 12]), ([3, 0, 20], None), ([3, 5, 40], [60, 9, 40])], ids=str
)
def test_seqused_and_leftpad(device, require_kernel, leftpad, used, causal):
    require_kernel(device, torch.bfloat16, 64)
    lengths = [20, 30, 40], [70, 33, 50]
    q, k, v = make(*lengths, 4, 2, 64, torch.bfloat16, device)
    index = [
        None if x is None else torch.tensor(x, dtype=torch.int32, device=device) for x in (leftpad, used)
    ]
    out, lse, _, _ = _flash_attn_varlen_forward(
        q, k, v, *bounds(*lengths, device), 0.0, 0.125, causal, leftpad_k=index[0], seqused_k=index[1]
    )
    options = Options(causal=causal)
    truth, truth_lse = varlen_attention(q, k, v, *lengths, options, leftpad=leftpad, used=used)
    yardstick, _ = varlen_attention(q, k, v, *lengths, options, q.dtype, leftpad, used)
    assert_within(out, truth, yardstick)
    assert_lse(lse, truth_lse)


def test_max_seqlen_may_be_larger_or_a_tensor(device, require_kernel):
    require_kernel(device, torch.bfloat16, 64)
    q, k, v = make([30, 20], [30, 20], 2, 2, 64, torch.bfloat16, device)
    cu = cumulative([30, 20], device)
    expected = flash_attn_varlen_func(q, k, v, cu, cu, 30, 30)
    assert torch.equal(flash_attn_varlen_func(q, k, v, cu, cu, 500, 400), expected)
    assert torch.equal(flash_attn_varlen_func(q, k, v, cu, cu, torch.tensor(30), torch.tensor(30)), expected)


def check_gradients(tensors, lengths, options):
    """Compare gradients with the oracle's; the last 11 tokens belong to no sequence."""
    leaves = [x.requires_grad_() for x in tensors]
    out = flash_attn_varlen_func(*leaves, *bounds(*lengths, leaves[0].device), **options.arguments())
    dout = torch.randn_like(out)
    actual = torch.autograd.grad(out, leaves, dout)
    assert_gradients(
        actual, lambda q, k, v, d: varlen_attention(q, k, v, *lengths, options, d)[0], tensors, dout
    )  # fmt: skip
    assert not any(a[-11:].any() for a in actual)


@pytest.mark.parametrize("sequences", SEQUENCES)
@pytest.mark.parametrize("mask", MASKS)
def test_gradients(device, require_backward, sequences, mask):
    require_backward(device, torch.bfloat16, 32)
    lengths = SEQUENCES[sequences]
    check_gradients(make(*lengths, 4, 2, 32, torch.bfloat16, device, 11), lengths, MASKS[mask])


@pytest.mark.parametrize("head_dim", [40, 59, 64, 96, 111, 128, 192, 256])
@pytest.mark.parametrize("heads_k", [4, 1])
def test_gradients_of_head_dims_and_groups(device, require_backward, head_dim, heads_k):
    require_backward(device, torch.bfloat16, head_dim)
    lengths = SEQUENCES["empty first, middle, last"]
    tensors = make(*lengths, 4, heads_k, head_dim, torch.bfloat16, device, 11)
    check_gradients(tensors, lengths, MASKS["causal"])


@pytest.mark.parametrize("head_dims", HEAD_DIM_PAIRS, ids=str)
def test_gradients_where_the_head_dim_of_v_differs(device, require_backward, head_dims):
    require_backward(device, torch.bfloat16, *head_dims)
    lengths = SEQUENCES["mixed"]
    tensors = make(*lengths, 4, 2, head_dims[0], torch.bfloat16, device, 11, head_dims[1])
    check_gradients(tensors, lengths, MASKS["causal window"])


@pytest.mark.parametrize("slopes", [(4,), (4, 4)], ids=str)
def test_gradients_with_softcap_and_alibi(device, require_backward, slopes):
    require_backward(device, torch.bfloat16, 64)
    lengths = SEQUENCES["mixed"]
    options = Options(causal=True, softcap=5.0, alibi_slopes=torch.rand(slopes, device=device))
    check_gradients(make(*lengths, 4, 2, 64, torch.bfloat16, device, 11), lengths, options)


def test_packed_gradients(device, require_backward):
    require_backward(device, torch.bfloat16, 16)
    qkv = torch.randn(97, 3, 4, 16, device=device).bfloat16().requires_grad_()
    cu = cumulative([30, 60], device)
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
    require_backward(device, torch.bfloat16, 64)
    lengths = [170, 0, 40, 130], [0, 7, 90, 200]
    q, k, v = make(*lengths, 4, 2, 64, torch.bfloat16, device, trailing=150)
    scoring = (0.0, 0.125, True, -1, -1, 0.0, None)
    arguments = bounds(*lengths, device)
    out, lse, _, _ = _flash_attn_varlen_forward(q, k, v, *arguments, *scoring)
    dout = torch.randn_like(out)
    given = [torch.full_like(x, math.nan) for x in (q, k, v)]
    softmax_d = _flash_attn_varlen_backward(
        dout, q, k, v, out, lse, *given, *arguments, *scoring, deterministic
    )  # fmt: skip
    options = Options(causal=True)
    assert_gradients(
        tuple(given), lambda q, k, v, d: varlen_attention(q, k, v, *lengths, options, d)[0], (q, k, v), dout
    )
    assert not any(x[-150:].any() for x in given)
    assert softmax_d.shape == (4, len(q) + 4 * 128) and softmax_d.isfinite().all()
    expected = (dout.double() * out.double()).sum(-1).mT[:, : sum(lengths[0])]
    torch.testing.assert_close(
        softmax_d.double().sum(-1), expected.sum(-1), atol=1e-3, rtol=1e-4
    )  # zero between the sequences


@pytest.mark.parametrize("page_size", [16, 48, 256])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim_v", [32, 24])
def test_paged_keys(page_size, causal, head_dim_v):
    lengths = [20, 3, 40], [300, 0, 257]
    q, k, v = make(*lengths, 4, 2, 32, torch.bfloat16, "cpu", head_dim_v=head_dim_v)
    blocks = -(-300 // page_size)
    table = torch.randperm(3 * blocks + 2)[: 3 * blocks].view(3, blocks).int()
    shape = 3 * blocks + 2, page_size, 2
    pages = [torch.full((*shape, dim), math.nan, dtype=torch.bfloat16) for dim in (32, head_dim_v)]
    for x, paged in zip((k, v), pages, strict=True):
        for b, sequence in enumerate(x.split(lengths[1])):
            for p, rows in enumerate(sequence.split(page_size)):
                paged[table[b, p], : len(rows)] = rows
    arguments = bounds(*lengths, "cpu")
    out = flash_attn_varlen_func(q, *pages, *arguments, causal=causal, block_table=table)
    assert torch.equal(out, flash_attn_varlen_func(q, k, v, *arguments, causal=causal))
