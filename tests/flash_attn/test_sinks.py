"""Attention sinks on every path, against a dense softmax with one more column; out=."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from oracle import Options, assert_lse, assert_within, attention, gradients
from problems import (
    BF16,
    FEW_MASKS,
    MASKS,
    bounds,
    check,
    check_varlen,
    in_pages,
    int32,
    packed_qkv,
    qkv,
    run,
    run_cache,
    run_varlen,
)

from flash_attn import flash_attn_func, flash_attn_varlen_func

HEAD_DIM = 64


@pytest.fixture(autouse=True)
def kernels(default_device, require_kernel):
    require_kernel(default_device, BF16, HEAD_DIM)


def make_sinks():
    """Return small ones, large ones, and one so large that its exponential overflows."""
    return torch.tensor([-3.0, 0.5, 4.0, 150.0], dtype=BF16)


@pytest.mark.parametrize("mask", FEW_MASKS)
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(1, 70), (33, 70), (70, 33)])
@pytest.mark.parametrize("softcap", [0.0, 1e4])
def test_fixed_length(mask, seqlen_q, seqlen_k, softcap):
    """A softcap of 1e4 changes nothing but the kernel that runs."""
    inputs = qkv(2, seqlen_q, seqlen_k)
    options = replace(MASKS[mask], softcap=softcap, sinks=make_sinks())
    check(*run(*inputs, options), *inputs, replace(options, softcap=0.0))


def test_varlen_with_lse_and_out():
    lengths = [3, 0, 40], [50, 9, 40]
    inputs, options = packed_qkv(lengths), Options(causal=True, sinks=make_sinks())
    given = torch.empty_like(inputs[0])
    out, lse = run_varlen(*inputs, lengths, options, out=given)
    assert out is given
    check_varlen(out, lse, *inputs, lengths, options)


@pytest.mark.parametrize("seqlen_q", [1, 40])
@pytest.mark.parametrize("num_splits", [1, 5])
@pytest.mark.parametrize("page_size", [None, 16])
def test_cache(seqlen_q, num_splits, page_size, device, require_split):
    require_split(device, BF16, HEAD_DIM)
    q, k, v = qkv(2, seqlen_q, 320)
    caches, table = ([k, v], None) if page_size is None else in_pages(page_size, k, v)
    given, options = torch.empty_like(q), Options(causal=True, sinks=make_sinks())
    named = {"cache_seqlens": 300, "num_splits": num_splits, "block_table": table, "out": given}
    out, lse = run_cache(q, *caches, options, **named)
    assert out is given
    check(out, lse, q, k[:, :300], v[:, :300], options)


@pytest.mark.parametrize("mask", FEW_MASKS)
@pytest.mark.parametrize("packed", [False, True])
def test_gradients(mask, packed, device, require_backward):
    require_backward(device, BF16, HEAD_DIM)
    q, k, v = qkv(2, 40, 70)
    sinks = make_sinks().float().clamp(max=5.0)
    dout = torch.randn_like(q)
    arguments = MASKS[mask].arguments()

    def ours(q, k, v, sinks):
        if not packed:
            return flash_attn_func(q, k, v, **arguments, s_aux=sinks)
        flat, lengths = (x.flatten(0, 1) for x in (q, k, v)), bounds(([40] * 2, [70] * 2))
        return flash_attn_varlen_func(*flat, *lengths, **arguments, s_aux=sinks).view_as(q)

    leaves = [x.detach().requires_grad_() for x in (q, k, v, sinks)]
    actual = torch.autograd.grad(ours(*leaves), leaves, dout)

    def dense(dtype):
        def compute(q, k, v, sinks):
            return attention(q, k, v, replace(MASKS[mask], sinks=sinks), dtype)[0]

        return gradients(compute, (q, k, v, sinks), dout, dtype)

    for got, truth, yardstick in zip(actual, dense(torch.float64), dense(q.dtype), strict=True):
        assert_within(got, truth, yardstick, 3.0)


def test_no_sink_is_a_sink_of_minus_infinity():
    q, k, v = qkv(2, 33, 70)
    sinks = torch.full((4,), -math.inf)
    expected = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    actual = flash_attn_func(q, k, v, causal=True, return_attn_probs=True, s_aux=sinks)
    truth, _ = attention(q, k, v, Options(causal=True))
    assert_within(actual[0], truth, expected[0])
    assert_lse(actual[1], expected[1])


@pytest.mark.parametrize(
    "sinks, error",
    [
        (torch.zeros(3), ValueError), (torch.zeros(4, 1), ValueError), ([0.0] * 4, TypeError),
        (torch.zeros(4, dtype=torch.int32), TypeError),
    ],
)  # fmt: skip
def test_wrong_sinks(sinks, error, device):
    q, k, v = qkv(1, 2, 3)
    sinks = sinks.to(device) if isinstance(sinks, torch.Tensor) else sinks
    with pytest.raises(error, match=r"^s_aux "):
        flash_attn_func(q, k, v, s_aux=sinks)


def test_out_is_refused_where_a_gradient_is_needed():
    inputs, bounds = packed_qkv(([2], [2]), grad=True), int32(0, 2)
    with pytest.raises(NotImplementedError, match=r"^out "):
        flash_attn_varlen_func(*inputs, bounds, bounds, 2, 2, out=torch.empty_like(inputs[0].detach()))


def test_rows_of_no_sequence_do_not_reach_the_gradient(device, require_backward):
    require_backward(device, BF16, HEAD_DIM)
    inputs, sinks = packed_qkv(([4], [4]), trailing=2, grad=True), make_sinks().requires_grad_()
    out = flash_attn_varlen_func(*inputs, int32(0, 4), int32(0, 4), 4, 4, s_aux=sinks)
    dout = torch.randn_like(out)
    expected = torch.autograd.grad(out, sinks, dout, retain_graph=True)[0]
    dout[4:] = math.nan
    assert torch.equal(torch.autograd.grad(out, sinks, dout)[0], expected) and expected.isfinite().all()
