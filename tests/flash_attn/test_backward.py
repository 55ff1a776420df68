"""Gradients of fixed-length attention against the fp64 oracle."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from layouts import place
from oracle import Options, assert_gradients, attention
from problems import BF16, FEW_MASKS, HEAD_DIM_PAIRS, MASKS, bounds, check_gradients, packed_qkv, qkv
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
)
from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_forward

BACKWARD_MASKS = (*FEW_MASKS, "left", "causal window")
LENGTHS = ((1, 1), (1, 147), (113, 203), (128, 217), (108, 256), (203, 113), (257, 1), (1, 5))


def check(q, k, v, options):
    out = flash_attn_func(q, k, v, **options.arguments())
    dout = torch.randn_like(out)
    check_gradients(torch.autograd.grad(out, (q, k, v), dout), (q, k, v), dout, options)


@pytest.mark.parametrize("head_dim", [32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_head_dims(device, require_backward, head_dim, causal):
    require_backward(device, BF16, head_dim)
    check(*qkv(1, 70, 90, (4, 2), head_dim, device=device, grad=True), Options(causal=causal))


@pytest.mark.parametrize("head_dims", [*HEAD_DIM_PAIRS, (59, 17)], ids=str)
@pytest.mark.parametrize("mask", FEW_MASKS)
def test_head_dim_of_v_differs(device, require_backward, head_dims, mask):
    require_backward(device, BF16, *head_dims)
    check(*qkv(1, 70, 90, (4, 2), head_dims, device=device, grad=True), MASKS[mask])


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("mask", BACKWARD_MASKS)
def test_lengths_and_masks(device, require_backward, lengths, mask):
    require_backward(device, BF16, 32)
    check(*qkv(2, *lengths, (4, 2), 32, device=device, grad=True), MASKS[mask])


@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_keys_that_no_query_sees_get_no_gradient(device, require_backward, head_dim):
    require_backward(device, BF16, head_dim)
    q, k, v = qkv(2, 1, 1500, (4, 2), head_dim, device=device, grad=True)
    out = flash_attn_func(q, k, v, window_size=(17, -1))
    for gradient in torch.autograd.grad(out, (k, v), torch.randn_like(out)):
        assert not gradient[:, :-18].any() and gradient[:, -18:].any()


@pytest.mark.parametrize("heads", [(3, 3), (6, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, BF16, torch.float32, torch.float64])
def test_groups_and_dtypes(device, require_backward, heads, dtype):
    require_backward(device, dtype, 64)
    check(*qkv(2, 65, 80, heads, 64, dtype, device, grad=True), Options(causal=True))


@pytest.mark.parametrize("mask", BACKWARD_MASKS)
@pytest.mark.parametrize(
    "extra", [{"softcap": 4.0}, {"softmax_scale": -0.2}, {"softmax_scale": 0.0}], ids=str
)
def test_softcap_and_scale(device, require_backward, mask, extra):
    require_backward(device, BF16, 32)
    check(*qkv(1, 90, 110, (4, 2), 32, device=device, grad=True), replace(MASKS[mask], **extra))


@pytest.mark.parametrize("mask", BACKWARD_MASKS)
@pytest.mark.parametrize("shape", [(4,), (2, 4)], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_alibi(device, require_backward, mask, shape, softcap):
    require_backward(device, BF16, 32)
    slopes = torch.rand(shape, device=device)
    options = replace(MASKS[mask], alibi_slopes=slopes, softcap=softcap)
    check(*qkv(2, 90, 110, (4, 2), 32, device=device, grad=True), options)


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_empty(device, lengths):
    q, k, v = qkv(2, *lengths, (4, 2), 32, device=device, grad=True)
    dq, dk, dv = torch.autograd.grad(flash_attn_func(q, k, v), (q, k, v), torch.randn_like(q))
    assert dq.shape == q.shape and dk.shape == k.shape and dv.shape == v.shape
    assert not dq.any() and not dk.any() and not dv.any()


def test_rows_that_see_no_key_get_no_gradient(device, require_backward):
    require_backward(device, BF16, 32)
    q, k, v = qkv(1, 100, 30, (2, 2), 32, device=device, grad=True)
    (dq,) = torch.autograd.grad(flash_attn_func(q, k, v, causal=True), q, torch.randn_like(q))
    assert not dq[:, :70].any() and dq[:, 71:].any()


NEEDS = [needs for n in (1, 2, 3) for needs in itertools.combinations(range(3), n)]


@pytest.mark.parametrize("needs", NEEDS, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.17])
def test_only_what_needs_a_gradient_gets_one(device, require_backward, needs, dropout_p):
    require_backward(device, BF16, 64)
    q, k, v = qkv(2, 113, 203, device=device)
    dout = torch.randn_like(q)

    def run(needed):
        torch.manual_seed(5)
        leaves = [x.detach().requires_grad_(i in needed) for i, x in enumerate((q, k, v))]
        out = flash_attn_func(*leaves, dropout_p=dropout_p, causal=True, deterministic=True)
        out.backward(dout)
        return [x.grad for x in leaves]

    for i, (part, whole) in enumerate(zip(run(needs), run((0, 1, 2)), strict=True)):
        assert torch.equal(part, whole) if i in needs else part is None


@pytest.mark.parametrize(
    "arguments", [{"causal": True}, {"softcap": 3.0}, {"window_size": (3, 2)}, {"dropout_p": 0.4}], ids=str
)
@pytest.mark.parametrize("head_dim_v", [3, 5])
def test_gradcheck(arguments, head_dim_v):
    """In fp64, of the CPU alone."""

    def function(*x):
        torch.manual_seed(3)
        return flash_attn_func(*x, **arguments)

    inputs = qkv(1, 7, 9, (4, 2), (3, head_dim_v), torch.float64, grad=True)
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("head_dim", [32, 59])
def test_packed(device, require_backward, head_dim):
    """The same gradients as without packing, written where they belong."""
    require_backward(device, BF16, head_dim)
    qkv = torch.randn(2, 140, 3, 4, head_dim, device=device).to(BF16).requires_grad_()
    q, k, v = (x.detach().requires_grad_() for x in qkv.unbind(2))
    dout = torch.randn_like(q)
    named = {"causal": True, "deterministic": True}
    expected = torch.stack(torch.autograd.grad(flash_attn_func(q, k, v, **named), (q, k, v), dout), dim=2)
    (actual,) = torch.autograd.grad(flash_attn_qkvpacked_func(qkv, **named), qkv, dout)
    assert torch.equal(actual, expected)
    kv = qkv.detach()[:, :, 1:].requires_grad_()
    dq, dkv = torch.autograd.grad(flash_attn_kvpacked_func(q, kv, **named), (q, kv), dout)
    assert torch.equal(dq, expected[:, :, 0]) and torch.equal(dkv, expected[:, :, 1:])
    (dkv,) = torch.autograd.grad(flash_attn_kvpacked_func(q.detach(), kv, **named), kv, dout)
    assert torch.equal(dkv, expected[:, :, 1:])


def test_deterministic_gradients_are_bitwise_equal(device, require_backward):
    require_backward(device, BF16, 32)
    q, k, v = qkv(2, 130, 330, (4, 2), 32, device=device, grad=True)
    dout = torch.randn_like(q)
    first, *others = (
        torch.autograd.grad(flash_attn_func(q, k, v, causal=True, deterministic=True), (q, k, v), dout)
        for _ in range(5)
    )
    assert all(torch.equal(a, b) for other in others for a, b in zip(other, first, strict=True))


def test_expanded_and_strided_inputs_and_gradient(device, require_backward):
    require_backward(device, BF16, 16)
    q, k, v = qkv(1, 33, 44, (4, 2), 16, device=device, grad=True)
    k = k.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    v = v.detach().mT.contiguous().mT.requires_grad_()
    dout = torch.randn(16, 4, 33, 3, device=device).to(BF16).permute(3, 2, 1, 0)

    def wide(*tensors):
        return [x.expand(3, -1, -1, -1) for x in tensors]

    actual = torch.autograd.grad(flash_attn_func(*wide(q, k, v)), (q, k, v), dout)
    assert_gradients(
        actual, lambda q, k, v, d: attention(*wide(q, k, v), Options(), d)[0], (q, k, v), dout
    )  # fmt: skip
    (of_sum,) = torch.autograd.grad(flash_attn_func(q, k, v).sum(), v)
    ones = torch.ones(q.shape, dtype=BF16, device=device)
    (of_ones,) = torch.autograd.grad(flash_attn_func(q, k, v), v, ones)
    assert torch.equal(of_sum, of_ones)


@pytest.mark.parametrize("layout", ["contiguous", "heads first", "last strided", "odd rows"])
@pytest.mark.parametrize("head_dims", [(64, 64), (59, 24)], ids=str)
def test_given_gradients_are_written_in_full(device, require_backward, layout, head_dims):
    """They start as NaN; some queries see no key, some keys are seen by no query."""
    require_backward(device, BF16, *head_dims)
    q, k, v = qkv(2, 203, 113, (4, 2), head_dims, device=device)
    mask = Options(window_size=(20, 5))
    scoring = (0.0, None, False, *mask.window_size, 0.0, None)
    out, lse, _, _ = _flash_attn_forward(q, k, v, *scoring, False)
    dout = place(out.shape, layout, device=device).view
    given = [place(x.shape, layout, device=device, fill=math.nan).view for x in (q, k, v)]
    softmax_d = _flash_attn_backward(dout, q, k, v, out, lse, *given, *scoring, False)
    check_gradients(given, (q, k, v), dout.contiguous(), mask)
    expected = (dout.double() * out.double()).sum(-1).transpose(1, 2)
    torch.testing.assert_close(softmax_d[..., :203].double(), expected, atol=1e-4, rtol=1e-4)
    assert softmax_d.shape == (2, 4, 256) and not softmax_d[..., 203:].any()


def test_lse_and_probabilities_carry_no_gradient(device, require_backward):
    require_backward(device, BF16, 8)
    inputs = qkv(1, 5, 5, (1, 1), 8, device=device, grad=True)
    out, lse, probs = flash_attn_func(*inputs, return_attn_probs=True)
    assert out.requires_grad and not lse.requires_grad and not probs.requires_grad


def test_backward_takes_the_lse_of_a_merged_result(device, require_backward):
    """As ring attention does: each part's gradients come from the output and the LSE of all parts."""
    require_backward(device, BF16, 32)
    q, k, v = qkv(1, 140, 260, (2, 2), 32, device=device)
    dout = torch.randn_like(q)
    options = (0.0, 0.25, False, -1, -1, 0.0, None)
    out, lse, _, _ = _flash_attn_forward(q, k, v, *options, False)
    dq_sum, dk, dv = torch.zeros_like(q, dtype=torch.float32), torch.empty_like(k), torch.empty_like(v)
    for part in (slice(0, 125), slice(125, 260)):
        dq = torch.empty_like(q)
        parts = dk[:, part], dv[:, part]
        _flash_attn_backward(dout, q, k[:, part], v[:, part], out, lse, dq, *parts, *options, False)
        dq_sum += dq
    whole = Options(softmax_scale=0.25)
    check_gradients((dq_sum.to(BF16), dk, dv), (q, k, v), dout, whole)


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("weights", [False, True])
def test_a_second_derivative_is_an_error(device, require_backward, varlen, weights):
    """Where the gradient of the output requires grad, and where only the saved tensors do."""
    require_backward(device, BF16, 16)
    lengths = [9], [12]
    if varlen:
        inputs = packed_qkv(lengths, (2, 2), 16, device=device, grad=True)
        out = flash_attn_varlen_func(*inputs, *bounds(lengths, device))
    else:
        inputs = qkv(1, 9, 12, (2, 2), 16, device=device, grad=True)
        out = flash_attn_func(*inputs)
    dout = torch.randn_like(out, requires_grad=weights)
    gradients = torch.autograd.grad(out, inputs, dout, create_graph=True)
    assert all(x.requires_grad for x in gradients)
    with pytest.raises(NotImplementedError, match="differentiate twice"):
        (out.sum() + gradients[0].square().sum()).backward()


@pytest.mark.parametrize("varlen", [False, True])
def test_forward_mode_is_an_error(device, varlen):
    x = torch.randn(1, 9, 3, 2, 16, device=device).to(BF16)
    bounds = torch.tensor([0, 9], dtype=torch.int32, device=device)

    def run(x):
        return flash_attn_varlen_qkvpacked_func(x[0], bounds, 9) if varlen else flash_attn_qkvpacked_func(x)

    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(run, (x,), (x,))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            run(dual)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_repeats_the_mask(device, require_backward, reentrant):
    require_backward(device, BF16, 64)
    q, k, v = qkv(2, 60, 70, device=device, grad=True)

    def run(wrap):
        torch.manual_seed(3)
        out = wrap(lambda *x: flash_attn_func(*x, dropout_p=0.5, deterministic=True))
        for x in (q, k, v):
            x.grad = None
        out.float().square().sum().backward()
        return [x.grad for x in (q, k, v)]

    plain = run(lambda f: f(q, k, v))
    again = run(lambda f: checkpoint(f, q, k, v, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_autocast(device, require_backward):
    """Weights in fp32, attention in bf16: as with the casts written out."""
    require_backward(device, BF16, 64)
    x, weight = torch.randn(2, 50, 128, device=device), torch.randn(3 * 128, 128, device=device)
    leaves = [(weight / 11).requires_grad_() for _ in range(2)]

    def attend(qkv):
        return flash_attn_qkvpacked_func(qkv.unflatten(-1, (3, 2, 64)), causal=True, deterministic=True)

    with torch.autocast(device, BF16):
        out = attend(torch.nn.functional.linear(x, leaves[0]))
    expected = attend(torch.nn.functional.linear(x.to(BF16), leaves[1].to(BF16)))
    assert out.dtype == BF16 and torch.equal(out, expected)
    for y in (out, expected):
        y.float().square().mean().backward()
    assert leaves[0].grad.dtype == torch.float32 and torch.equal(leaves[0].grad, leaves[1].grad)
