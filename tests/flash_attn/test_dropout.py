"""Dropout: the generator, the mask, its statistics, and attention and gradients under it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracle import (
    Options,
    dropout_keeps,
    philox_4x32,
    probabilities,
)
from problems import (
    BF16,
    FEW_MASKS,
    MASKS,
    bounds,
    check,
    check_gradients,
    check_varlen,
    check_varlen_gradients,
    packed_qkv,
    qkv,
)

from flash_attn import _philox, flash_attn_func, flash_attn_varlen_func
from flash_attn.flash_attn_interface import _flash_attn_forward, _flash_attn_varlen_forward


def test_oracle_philox_is_the_published_one():
    """Known answers of Random123 for Philox4x32 with 10 rounds."""
    assert philox_4x32((0,) * 4, (0, 0), 10) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    ones = 0xFFFFFFFF
    assert philox_4x32((ones,) * 4, (ones,) * 2, 10) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)


def test_philox_equals_the_oracle():
    counters = torch.randint(0, 2**32, (4, 200))
    counters[:, 0] = 2**32 - 1
    words = torch.stack(_philox.philox(tuple(counters), (0xDEADBEEF, 0xFFFFFFFF)))
    for column in range(counters.shape[1]):
        expected = philox_4x32(tuple(counters[:, column].tolist()), (0xDEADBEEF, 0xFFFFFFFF), 7)
        assert tuple(words[:, column].tolist()) == expected


@pytest.mark.parametrize(
    "rows, cols", [((0, 40), (0, 50)), ((16, 33), (32, 50)), ((5, 6), (31, 33)), ((7, 23), (3, 4))]
)
def test_mask_equals_the_oracle(rows, cols):
    state = torch.tensor([2**61 + 12345, 2**40 + 99])
    whole = dropout_keeps(state, 0.3, (2, 3, 40, 50)).flatten(0, 1)
    part = _philox.keep_mask(state, 0.3, range(1, 5), range(*rows), range(*cols))
    assert torch.equal(part, whole[1:5, slice(*rows), slice(*cols)])


@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.17, 0.5, 0.999999])
def test_threshold(dropout_p):
    assert _philox.keep_threshold(dropout_p) == int((1 - dropout_p) * 65536 + 0.5)


def assert_s_dmask(s_dmask, probs, keep):
    """Assert rounded probabilities, the sign of every dropped entry, masked ones too, and zeros beyond."""
    rows, cols = probs.shape[-2:]
    actual = s_dmask[..., :rows, :cols]
    assert s_dmask.dtype == BF16
    assert ((actual.abs().double() - probs).abs() <= 2**-8 * probs + 1e-5).all()
    assert torch.equal(torch.signbit(actual), ~keep)
    for beyond in (s_dmask[..., rows:, :], s_dmask[..., cols:]):
        assert not beyond.any() and not torch.signbit(beyond).any()


@pytest.mark.parametrize("mask", FEW_MASKS)
@pytest.mark.parametrize("lengths", [(37, 61), (61, 37), (1, 20)], ids=str)
def test_forward_under_the_mask(device, require_kernel, mask, lengths):
    require_kernel(device, BF16, 64)
    (q, k, v), options = qkv(2, *lengths, device=device), MASKS[mask]
    scoring = 0.2, 0.125, options.causal, *options.window_size, 0.0, None
    out, _, s_dmask, rng_state = _flash_attn_forward(q, k, v, *scoring, True)
    keep = dropout_keeps(rng_state, 0.2, (2, 4, *lengths)).to(device)
    check(out, None, q, k, v, replace(options, keep=keep, dropout_p=0.2))
    probs, _ = probabilities(q, k, options, torch.float64)
    assert s_dmask.shape == (2, 4, 128, 128)
    assert_s_dmask(s_dmask, probs, keep)


def test_varlen_forward_under_the_mask(device, require_kernel):
    require_kernel(device, BF16, 64)
    lengths = [30, 0, 17], [40, 10, 33]
    q, k, v = packed_qkv(lengths, device=device)
    out, _, s_dmask, rng_state = _flash_attn_varlen_forward(
        q, k, v, *bounds(lengths, device), 0.3, 0.125, True, return_softmax=True
    )
    keep = dropout_keeps(rng_state, 0.3, (3, 4, 30, 40)).to(device)
    check_varlen(out, None, q, k, v, lengths, Options(causal=True, dropout_p=0.3, keep=keep))
    assert s_dmask.shape == (3, 4, 128, 128)
    sequences = zip(q.split(lengths[0]), k.split(lengths[1]), strict=True)
    for b, (q_rows, k_rows) in enumerate(sequences):
        probs, _ = probabilities(q_rows[None], k_rows[None], Options(causal=True), torch.float64)
        assert_s_dmask(s_dmask[b : b + 1], probs, keep[b : b + 1, :, : len(q_rows), : len(k_rows)])


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_kept_fraction(device, require_kernel, dropout_p):
    require_kernel(device, BF16, 64)
    q, k, v = qkv(2, 256, 256, device=device)
    _, _, s_dmask = flash_attn_func(q * 0.1, k, v, dropout_p=dropout_p, return_attn_probs=True)
    kept = 1 - torch.signbit(s_dmask).float().mean().item()
    assert abs(kept - (1 - dropout_p)) < 0.01


def test_same_seed_same_mask(device, require_kernel):
    require_kernel(device, BF16, 64)
    q, k, v = qkv(1, 64, 64, device=device)

    def run(seed):
        torch.manual_seed(seed)
        return flash_attn_func(q, k, v, dropout_p=0.5)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_each_call_draws_a_new_mask(device, require_kernel):
    require_kernel(device, BF16, 64)
    q, k, v = qkv(1, 64, 64, device=device)
    assert not torch.equal(flash_attn_func(q, k, v, dropout_p=0.5), flash_attn_func(q, k, v, dropout_p=0.5))


@pytest.mark.parametrize("mask", FEW_MASKS)
@pytest.mark.parametrize("lengths", [(37, 61), (61, 37)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 40])
def test_gradients_under_the_mask(device, require_backward, mask, lengths, head_dim):
    require_backward(device, BF16, head_dim)
    q, k, v = qkv(2, *lengths, head_dims=head_dim, device=device, grad=True)
    dout, options = torch.randn_like(q), replace(MASKS[mask], dropout_p=0.17)
    torch.manual_seed(7)
    out, _, s_dmask = flash_attn_func(q, k, v, **options.arguments(), return_attn_probs=True)
    torch.manual_seed(7)
    keep = dropout_keeps(_philox.new_rng_state(q.device), 0.17, (2, 4, *lengths)).to(device)
    found = torch.autograd.grad(out, (q, k, v), dout)
    check_gradients(found, (q, k, v), dout, replace(options, keep=keep))
    assert torch.equal(torch.signbit(s_dmask[..., : lengths[0], : lengths[1]]), ~keep)


def test_varlen_gradients_under_the_mask(device, require_backward):
    require_backward(device, BF16, 32)
    lengths = [25, 0, 15], [20, 4, 26]
    q, k, v = packed_qkv(lengths, head_dims=32, device=device, grad=True)
    torch.manual_seed(3)
    out = flash_attn_varlen_func(q, k, v, *bounds(lengths, device), dropout_p=0.4, causal=True)
    torch.manual_seed(3)
    keep = dropout_keeps(_philox.new_rng_state(q.device), 0.4, (3, 4, 25, 26)).to(device)
    options = Options(causal=True, dropout_p=0.4, keep=keep)
    dout = torch.randn_like(q)
    check_varlen_gradients(
        torch.autograd.grad(out, (q, k, v), dout), (q, k, v), dout, lengths, options
    )  # fmt: skip


def test_a_mask_of_more_scores_than_exist_at_once(device, require_backward):
    """The CPU takes them in parts, the kernels in blocks: the mask is that of the whole."""
    require_backward(device, BF16, 32)
    q, k, v = qkv(1, 1500, 1600, (1, 1), 32, device=device, grad=True)
    torch.manual_seed(1)
    out, _, s_dmask = flash_attn_func(q, k, v, dropout_p=0.3, causal=True, return_attn_probs=True)
    torch.manual_seed(1)
    state = _philox.new_rng_state(q.device).cpu()
    keep = _philox.keep_mask(state, 0.3, range(1), range(1500), range(1600)).view(1, 1, 1500, 1600).to(device)
    options, dout = Options(causal=True, dropout_p=0.3, keep=keep), torch.randn_like(out)
    assert torch.equal(torch.signbit(s_dmask[..., :1500, :1600]), ~keep)
    check(out, None, q, k, v, options)
    check_gradients(torch.autograd.grad(out, (q, k, v), dout), (q, k, v), dout, options)
