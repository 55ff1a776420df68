"""Attention sinks on every path, against a dense softmax with one more column; out=, LSE of varlen."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from oracle import Options, assert_lse, assert_within, attention, gradients

from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

HEADS, HEADS_K, HEAD_DIM = 4, 2, 64
MASKS = {"full": Options(), "causal": Options(causal=True), "window": Options(window_size=(9, 3))}


@pytest.fixture(autouse=True)
def default_device(device, require_kernel):
    """Make every tensor of a test on its device."""
    require_kernel(device, torch.bfloat16, HEAD_DIM)
    with torch.device(device):
        yield


def make(batch, seqlen_q, seqlen_k):
    """Return q, k, v and sinks: small, large, and so large that their exponential overflows."""
    q = torch.randn(batch, seqlen_q, HEADS, HEAD_DIM).bfloat16()
    k, v = (torch.randn(batch, seqlen_k, HEADS_K, HEAD_DIM).bfloat16() for _ in range(2))
    return q, k, v, torch.tensor([-3.0, 0.5, 4.0, 150.0]).bfloat16()


def reference(q, k, v, sinks, options, dtype):
    """Return out (b, sq, h, d) and lse (b, h, sq)."""
    return attention(q, k, v, replace(options, sinks=sinks), dtype)


def check(out, lse, q, k, v, sinks, options):
    truth, truth_lse = reference(q, k, v, sinks, options, torch.float64)
    assert_within(out, truth, reference(q, k, v, sinks, options, q.dtype)[0])
    assert_lse(lse, truth_lse)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(1, 70), (33, 70), (70, 33)])
@pytest.mark.parametrize("softcap", [0.0, 1e4])
def test_fixed_length(mask, seqlen_q, seqlen_k, softcap):
    """A softcap of 1e4 changes nothing but the kernel that runs."""
    q, k, v, sinks = make(2, seqlen_q, seqlen_k)
    options = MASKS[mask]
    out, lse, _ = flash_attn_func(
        q, k, v, causal=options.causal, window_size=options.window_size, softcap=softcap, s_aux=sinks,
        return_attn_probs=True,
    )  # fmt: skip
    check(out, lse, q, k, v, sinks, options)


def test_varlen_with_lse_and_out():
    lengths_q, lengths_k = [3, 0, 40], [50, 9, 40]
    q, k, v, sinks = make(1, sum(lengths_q), sum(lengths_k))
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in (lengths_q, lengths_k))
    given = torch.empty_like(q[0])
    out, lse = flash_attn_varlen_func(
        q[0], k[0], v[0], cu_q, cu_k, 40, 50, causal=True, out=given, return_softmax_lse=True, s_aux=sinks
    )
    assert out is given and lse.shape == (HEADS, sum(lengths_q))
    for i in range(3):
        rows, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        part = q[:, rows], k[:, keys], v[:, keys]
        check(out[None, rows], lse[None, :, rows], *part, sinks, Options(causal=True))


@pytest.mark.parametrize("seqlen_q", [1, 40])
@pytest.mark.parametrize("num_splits", [1, 5])
@pytest.mark.parametrize("page_size", [None, 16])
def test_cache(seqlen_q, num_splits, page_size, device, require_split):
    require_split(device, torch.bfloat16, HEAD_DIM)
    q, k, v, sinks = make(2, seqlen_q, 320)
    cache, table = (k, v), None
    if page_size:
        table = torch.arange(2 * 320 // page_size).int().view(2, -1)
        cache = tuple(x.view(-1, page_size, *x.shape[2:]) for x in cache)
    given = torch.empty_like(q)
    out, lse = flash_attn_with_kvcache(
        q, *cache, cache_seqlens=300, causal=True, num_splits=num_splits, block_table=table,
        return_softmax_lse=True, out=given, s_aux=sinks,
    )  # fmt: skip
    assert out is given
    check(out, lse, q, k[:, :300], v[:, :300], sinks, Options(causal=True))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("packed", [False, True])
def test_gradients(mask, packed, device, require_backward):
    require_backward(device, torch.bfloat16, HEAD_DIM)
    options = MASKS[mask]
    q, k, v, sinks = make(2, 40, 70)
    sinks = sinks.float().clamp(max=5.0)
    dout = torch.randn_like(q)
    arguments = {"causal": options.causal, "window_size": options.window_size}

    def ours(q, k, v, sinks):
        if not packed:
            return flash_attn_func(q, k, v, **arguments, s_aux=sinks)
        cu_q, cu_k = torch.tensor([0, 40, 80]).int(), torch.tensor([0, 70, 140]).int()
        flat = (x.flatten(0, 1) for x in (q, k, v))
        return flash_attn_varlen_func(*flat, cu_q, cu_k, 40, 70, **arguments, s_aux=sinks).view_as(q)

    leaves = [x.detach().requires_grad_() for x in (q, k, v, sinks)]
    actual = torch.autograd.grad(ours(*leaves), leaves, dout)

    def dense(dtype):
        return gradients(lambda *x: reference(*x, options, dtype)[0], (q, k, v, sinks), dout, dtype)

    for got, truth, yardstick in zip(actual, dense(torch.float64), dense(q.dtype), strict=True):
        assert_within(got, truth, yardstick, 3.0)


def test_no_sink_is_a_sink_of_minus_infinity():
    q, k, v, _ = make(2, 33, 70)
    sinks = torch.full((HEADS,), -math.inf)
    expected = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    actual = flash_attn_func(q, k, v, causal=True, return_attn_probs=True, s_aux=sinks)
    truth, _ = attention(q, k, v, Options(causal=True))
    assert_within(actual[0], truth, expected[0])
    assert_lse(actual[1], expected[1])


def test_seqused_k_limits_the_keys():
    q, k, v, _ = make(1, 40, 100)
    cu_q, cu_k = torch.tensor([0, 10, 40]).int(), torch.tensor([0, 50, 100]).int()
    out = flash_attn_varlen_func(
        q[0], k[0], v[0], cu_q, cu_k, 30, 50, causal=True, seqused_k=torch.tensor([33, 50]).int()
    )
    for rows, keys in ((slice(0, 10), slice(0, 33)), (slice(10, 40), slice(50, 100))):
        truth, _ = attention(q[:, rows], k[:, keys], v[:, keys], Options(causal=True))
        yardstick, _ = attention(q[:, rows], k[:, keys], v[:, keys], Options(causal=True), q.dtype)
        assert_within(out[None, rows], truth, yardstick)


@pytest.mark.parametrize(
    "sinks, error",
    [
        (torch.zeros(3), ValueError), (torch.zeros(4, 1), ValueError), ([0.0] * 4, TypeError),
        (torch.zeros(4, dtype=torch.int32), TypeError),
    ],
)  # fmt: skip
def test_wrong_sinks(sinks, error, device):
    q, k, v, _ = make(1, 2, 3)
    sinks = sinks.to(device) if isinstance(sinks, torch.Tensor) else sinks
    with pytest.raises(error, match=r"^s_aux "):
        flash_attn_func(q, k, v, s_aux=sinks)


def test_out_is_refused_where_a_gradient_is_needed():
    q, k, v, _ = make(1, 2, 2)
    cu = torch.tensor([0, 2]).int()
    with pytest.raises(NotImplementedError, match=r"^out "):
        flash_attn_varlen_func(
            q[0].requires_grad_(), k[0], v[0], cu, cu, 2, 2, out=torch.empty_like(q[0].detach())
        )


def test_rows_of_no_sequence_do_not_reach_the_gradient(device, require_backward):
    require_backward(device, torch.bfloat16, HEAD_DIM)
    q, k, v, sinks = (x.squeeze(0).requires_grad_() for x in make(1, 6, 6))
    bounds = torch.tensor([0, 4], dtype=torch.int32)
    out = flash_attn_varlen_func(q, k, v, bounds, bounds, 4, 4, s_aux=sinks)
    dout = torch.randn_like(out)
    expected = torch.autograd.grad(out, sinks, dout, retain_graph=True)[0]
    dout[4:] = math.nan
    assert torch.equal(torch.autograd.grad(out, sinks, dout)[0], expected) and expected.isfinite().all()
