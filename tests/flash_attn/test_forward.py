"""Forward of fixed-length attention against the fp64 oracle, on every device."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from oracle import Options, attention
from problems import BF16, FEW_MASKS, HEAD_DIM_PAIRS, MASKS, check, qkv

from flash_attn import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func

HALF = (torch.float16, BF16)
HEAD_DIMS = (32, 40, 59, 64, 96, 111, 128, 160, 192, 256)
LENGTHS = (
    (1, 1), (1, 147), (113, 203), (128, 217), (113, 211), (108, 256), (256, 512), (512, 256), (203, 113),
    (1023, 1024), (1024, 1023), (64, 1), (17, 16),
)  # fmt: skip
HEADS = ((3, 3), (6, 2), (4, 1))


def run_and_check(q, k, v, options, **arguments):
    """Compare with the oracle; a second call, without the LSE, gives the same bits."""
    out, lse, probs = flash_attn_func(q, k, v, **options.arguments(), return_attn_probs=True, **arguments)
    assert out.dtype == q.dtype and probs.shape == (0,)
    assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    check(out, lse, q, k, v, options)
    assert torch.equal(flash_attn_func(q, k, v, **options.arguments(), **arguments), out)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("causal", [False, True])
def test_head_dims(device, require_kernel, head_dim, dtype, causal):
    require_kernel(device, dtype, head_dim)
    run_and_check(*qkv(2, 113, 203, (4, 2), head_dim, dtype, device), Options(causal=causal))


@pytest.mark.parametrize("head_dims", [*HEAD_DIM_PAIRS, (59, 17), (1, 256)], ids=str)
@pytest.mark.parametrize("mask", FEW_MASKS)
@pytest.mark.parametrize("heads", [(4, 4), (4, 1)], ids=str)
def test_head_dim_of_v_differs(device, require_kernel, head_dims, mask, heads):
    require_kernel(device, BF16, *head_dims)
    run_and_check(*qkv(2, 113, 203, heads, head_dims, device=device), MASKS[mask])


@pytest.mark.parametrize("head_dims", [(192, 128), (40, 24)], ids=str)
@pytest.mark.parametrize("extra", ["softcap", "alibi_slopes", "softmax_scale"])
def test_head_dim_of_v_differs_beside_modifiers(device, require_kernel, head_dims, extra):
    require_kernel(device, torch.float16, *head_dims)
    value = {"softcap": 5.0, "alibi_slopes": torch.rand(4, device=device), "softmax_scale": 0.3}[extra]
    tensors = qkv(2, 70, 90, (4, 2), head_dims, torch.float16, device)
    run_and_check(*tensors, Options(causal=True, **{extra: value}))


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_lengths_and_masks(device, require_kernel, lengths, mask):
    require_kernel(device, BF16, 64)
    run_and_check(*qkv(1, *lengths, device=device), MASKS[mask])


@pytest.mark.parametrize("head_dim", [32, 96, 128, 192, 256])
@pytest.mark.parametrize("mask", MASKS)
def test_masks_of_every_kernel(device, require_kernel, head_dim, mask):
    require_kernel(device, torch.float16, head_dim)
    run_and_check(*qkv(1, 203, 331, (2, 1), head_dim, torch.float16, device), MASKS[mask])


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
def test_groups_and_dtypes(device, require_kernel, heads, dtype):
    require_kernel(device, dtype, 128)
    run_and_check(*qkv(2, 65, 130, heads, 128, dtype, device), Options(causal=True))


def test_fp64_stays_fp64():
    q, k, v = qkv(2, 33, 47, (4, 2), 24, torch.float64)
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    truth, truth_lse = attention(q, k, v, Options(causal=True))
    assert (out - truth).abs().max() < 1e-13 and (lse - truth_lse)[:, :, 1:].abs().max() < 1e-12


@pytest.mark.parametrize("softmax_scale", [0.0, -0.3, 0.5, 3.0])
@pytest.mark.parametrize("causal", [False, True])
def test_softmax_scale(device, require_kernel, softmax_scale, causal):
    require_kernel(device, BF16, 64)
    options = Options(softmax_scale=softmax_scale, causal=causal)
    run_and_check(*qkv(2, 100, 90, device=device), options)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("softcap", [5.0, 30.0])
def test_softcap(device, require_kernel, mask, softcap):
    require_kernel(device, BF16, 128)
    q, k, v = qkv(1, 129, 150, (2, 2), 128, device=device)
    run_and_check(q * 3, k, v, replace(MASKS[mask], softcap=softcap))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("per_batch", [False, True])
@pytest.mark.parametrize("lengths", [(113, 203), (203, 113), (1, 50)], ids=str)
def test_alibi(device, require_kernel, mask, per_batch, lengths):
    require_kernel(device, BF16, 64)
    slopes = torch.rand((2, 4) if per_batch else (4,), device=device)
    run_and_check(*qkv(2, *lengths, device=device), replace(MASKS[mask], alibi_slopes=slopes))


def test_alibi_not_contiguous(device, require_kernel):
    require_kernel(device, BF16, 64)
    slopes = torch.rand(4, 2, device=device).T
    run_and_check(*qkv(2, 20, 30, device=device), Options(alibi_slopes=slopes))


def test_window_entries_as_tensors(device, require_kernel):
    require_kernel(device, BF16, 64)
    q, k, v = qkv(1, 50, 60, device=device)
    window = torch.tensor(5), torch.tensor(7)
    assert torch.equal(
        flash_attn_func(q, k, v, window_size=window), flash_attn_func(q, k, v, window_size=(5, 7))
    )


@pytest.mark.parametrize("window", [(60, -1), (-1, 60), (99, 99), (-7, -3)])
def test_windows_that_are_unlimited(device, require_kernel, window):
    require_kernel(device, BF16, 64)
    q, k, v = qkv(1, 50, 60, device=device)
    assert torch.equal(flash_attn_func(q, k, v, window_size=window), flash_attn_func(q, k, v))


@pytest.mark.parametrize("batch, seqlen_q, seqlen_k", [(2, 0, 5), (2, 5, 0), (0, 5, 7), (2, 0, 0)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim_v", [64, 24])
def test_empty(device, require_kernel, batch, seqlen_q, seqlen_k, causal, head_dim_v):
    require_kernel(device, BF16, 64)
    q, k, v = qkv(batch, seqlen_q, seqlen_k, (4, 2), (64, head_dim_v), device=device)
    out, lse, _ = flash_attn_func(q, k, v, causal=causal, return_attn_probs=True)
    assert out.shape == (batch, seqlen_q, 4, head_dim_v) and lse.shape == (batch, 4, seqlen_q)
    assert (out == 0).all() and (lse == math.inf).all()


def test_rows_that_see_no_key(device, require_kernel):
    require_kernel(device, BF16, 64)
    q, k, v = qkv(2, 300, 70, device=device)
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert (
        (out[:, :230] == 0).all() and (lse[:, :, :230] == math.inf).all() and lse[:, :, 230:].isfinite().all()
    )


def test_packed(device, require_kernel):
    require_kernel(device, BF16, 64)
    qkv = torch.randn(2, 70, 3, 4, 64, device=device).bfloat16()
    expected = flash_attn_func(*(x.contiguous() for x in qkv.unbind(2)), causal=True)
    assert torch.equal(flash_attn_qkvpacked_func(qkv, causal=True), expected)
    assert torch.equal(flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], causal=True), expected)


def test_expanded_batch(device, require_kernel):
    require_kernel(device, BF16, 64)
    q, k, v = qkv(1, 40, 50, device=device)
    expanded = (x.expand(3, -1, -1, -1) for x in (q, k, v))
    assert torch.equal(flash_attn_func(*expanded), flash_attn_func(q, k, v).expand(3, -1, -1, -1))


@pytest.mark.not_simulated
@pytest.mark.parametrize("batch, heads", [(65_600, 1), (1, 65_600), (33_000, 2)])
def test_more_than_65535_batches_and_heads(device, require_kernel, batch, heads):
    require_kernel(device, torch.float16, 32)
    q, k, v = qkv(batch, 3, 5, (heads, heads), 32, torch.float16, device)
    run_and_check(q, k, v, Options(causal=True))


def test_large_values(device, require_kernel):
    require_kernel(device, BF16, 64)
    q, k, v = qkv(1, 64, 64, device=device)
    run_and_check(q * 30, k * 30, v, Options())
