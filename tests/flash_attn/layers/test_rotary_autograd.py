"""Gradients of rotary embedding: compiled, of leaves written in place, of second order, and of the tables."""

from __future__ import annotations

import pytest
import torch
from problems import int32
from torch.autograd import forward_ad

from flash_attn.layers.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
)
from flash_attn.ops.triton.rotary import apply_rotary

ANGLES = torch.arange(20.0)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.01])
COS, SIN = ANGLES.cos(), ANGLES.sin()
LENGTHS = int32(0, 3, 5)


def formula(x, offset=0):
    """Rotate x (b, s, h, d) out of place."""
    rows = slice(offset, offset + x.shape[1])
    return apply_rotary_emb_torch(x, COS[rows].to(x.dtype), SIN[rows].to(x.dtype))


def whole(x, function=lambda y: y):
    expected = formula(function(x))
    return apply_rotary_emb(function(x), COS, SIN, inplace=True), expected


def of_view(x, function=lambda y: y):
    """What holds the view shows the gradient too."""
    y = function(x)
    apply_rotary_emb(y[:, :, 1:], COS, SIN, inplace=True)
    expected = function(x)
    return y, torch.cat([expected[:, :, :1], formula(expected[:, :, 1:])], dim=2)


def packed(x, function=lambda y: y):
    y = function(x)
    expected = torch.stack([formula(y[:, :, 0], 2), formula(y[:, :, 1], 2), y[:, :, 2]], dim=2)
    return apply_rotary_emb_qkv_(y, COS, SIN, seqlen_offsets=2), expected


def packed_kv(x, function=lambda y: y):
    y = function(x[:, :, :2])
    expected = torch.stack([formula(y[:, :, 0]), y[:, :, 1]], dim=2)
    return apply_rotary_emb_kv_(y, COS, SIN), expected


SHAPES = {whole: (2, 7, 3, 10), of_view: (2, 7, 3, 10), packed: (2, 7, 3, 2, 10), packed_kv: (2, 7, 3, 2, 10)}


def twice(x):
    return x * 2


def check_gradient(function, x, tolerance=1e-5):
    """The gradient of the first result of `function(x)` is that of the second."""
    leaf = x.clone().requires_grad_()
    _, expected = function(leaf.clone())
    dout = torch.randn_like(expected)
    (truth,) = torch.autograd.grad(expected, leaf, dout)
    out, _ = function(leaf)
    torch.testing.assert_close(out, expected)
    (gradient,) = torch.autograd.grad(out, leaf, dout)
    torch.testing.assert_close(gradient, truth, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_in_place_under_a_compiler(case, backend):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: case(x, twice)[0], backend=backend, fullgraph=True)
    check_gradient(lambda x: (compiled(x), case(x.clone(), twice)[1]), torch.randn(SHAPES[case]))


@pytest.mark.parametrize("scale_base, backend", [(None, "aot_eager"), (512.0, "inductor")])
def test_module_under_a_compiler(scale_base, backend):
    torch._dynamo.reset()
    module = RotaryEmbedding(8, scale_base=scale_base)

    def rotate(x, run):
        q, kv = run(x[:, :, 0] * 1, x[:, :, 1:] * 1)
        return torch.cat([q[:, :, None], kv], dim=2)

    compiled = torch.compile(module, backend=backend, fullgraph=True)
    check_gradient(lambda x: (rotate(x, compiled), rotate(x, module)), torch.randn(2, 7, 3, 2, 10))


def test_leaf_under_a_compiler():
    x = torch.randn(2, 7, 3, 10, requires_grad=True)
    before = x.detach().clone()
    out = torch.compile(lambda x: whole(x)[0], backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(x.detach(), formula(before))
    dout = torch.randn_like(before)
    probe = before.clone().requires_grad_()
    (truth,) = torch.autograd.grad(formula(probe), probe, dout)
    torch.testing.assert_close(torch.autograd.grad(out, x, dout)[0], truth)


@pytest.mark.parametrize("function", [whole, packed, packed_kv])
def test_leaf_is_rotated_in_place(function):
    """Upstream takes leaves and views of leaves; a version counts for those who saved what is lost."""
    leaf = torch.randn(SHAPES[function], requires_grad=True)
    before, saved = leaf.detach().clone(), leaf.square()
    out, _ = function(leaf)
    expected = function(before.clone())[1]
    torch.testing.assert_close(out, expected)
    assert leaf.is_leaf and out.data_ptr() == leaf.data_ptr()
    assert torch.equal(out.detach(), leaf.detach()[:, :, : out.shape[2]])
    dout = torch.randn_like(out)
    out.backward(dout)
    probe = before.clone().requires_grad_()
    torch.testing.assert_close(leaf.grad, torch.autograd.grad(function(probe.clone())[1], probe, dout)[0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


def test_leaf_twice_and_without_gradients():
    leaf = torch.randn(2, 7, 3, 10, requires_grad=True)
    probe = leaf.detach().clone().requires_grad_()
    out = apply_rotary_emb(apply_rotary_emb(leaf, COS, SIN, inplace=True), COS, SIN, inplace=True)
    expected = formula(formula(probe))
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(leaf.grad, probe.grad)
    with torch.no_grad():
        assert apply_rotary_emb(leaf, COS, SIN, inplace=True) is leaf
    torch.testing.assert_close(leaf, formula(expected))


def test_what_autograd_saved_is_known_to_be_lost():
    x = torch.randn(2, 7, 3, 10, requires_grad=True) * 1
    saved = x.square()
    with torch.no_grad():
        apply_rotary(x, COS, SIN, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_second_derivatives(inplace, interleaved):
    cos, sin = COS.double(), SIN.double()
    x = torch.randn(1, 3, 2, 10, dtype=torch.float64, requires_grad=True)
    qkv = torch.randn(1, 3, 3, 1, 8, dtype=torch.float64, requires_grad=True)
    check = torch.autograd.gradgradcheck
    check(lambda x: apply_rotary_emb(x * 1, cos, sin, interleaved, inplace, 2).pow(3), x)
    check(lambda x: apply_rotary(x * 1, cos, sin, 2, inplace=inplace, conjugate=True).pow(3), x)
    check(lambda x: apply_rotary_emb_qkv_(x * 1, cos, sin, interleaved=interleaved).pow(3), qkv)
    bounds = int32(0, 1, 2)
    check(lambda x: apply_rotary_emb(x[0] * 1, cos, sin, cu_seqlens=bounds).pow(3), x)


def test_second_derivative_flows_through_the_gradient():
    x = torch.randn(2, 7, 3, 10, requires_grad=True)
    (gradient,) = torch.autograd.grad(apply_rotary_emb(x, COS, SIN).pow(3).sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(formula(x).pow(3).sum(), x, create_graph=True)
    actual, truth = (torch.autograd.grad(g.pow(2).sum(), x)[0] for g in (gradient, expected))
    torch.testing.assert_close(actual, truth, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("inplace", [False, True])
def test_gradients_of_the_tables(inplace):
    x = torch.randn(1, 3, 2, 10, dtype=torch.float64, requires_grad=True)
    cos, sin = (table[:5].double().requires_grad_() for table in (COS, SIN))
    check = torch.autograd.gradcheck
    check(lambda x, c, s: apply_rotary_emb(x * 1, c, s, inplace=inplace, seqlen_offsets=1), (x, cos, sin))
    qkv = torch.randn(1, 3, 3, 1, 8, dtype=torch.float64)
    check(lambda c, s: apply_rotary_emb_qkv_(qkv.clone(), c, s), (cos, sin))


def test_gradient_of_trained_frequencies():
    """Tables with a graph serve one step."""
    module = RotaryEmbedding(8)
    x = torch.randn(1, 5, 3, 1, 8)
    with torch.no_grad():
        module(x.clone())
    module.inv_freq = torch.nn.Parameter(module.inv_freq)
    for _ in range(2):
        (gradient,) = torch.autograd.grad(module(x.clone()).square()[..., :4].sum(), module.inv_freq)
        assert gradient.abs().min() > 0


def test_forward_mode_and_transforms():
    x, tangent = torch.randn(2, 7, 3, 10), torch.randn(2, 7, 3, 10)
    with forward_ad.dual_level():
        dual = apply_rotary_emb(forward_ad.make_dual(x, tangent), COS, SIN)
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, formula(tangent))
    gradient = torch.func.grad(lambda x: apply_rotary_emb(x, COS, SIN).pow(3).sum())(x)
    torch.testing.assert_close(gradient, torch.func.grad(lambda x: formula(x).pow(3).sum())(x))
    mapped = torch.func.vmap(lambda x: apply_rotary_emb(x, COS, SIN))(x[:, None])
    torch.testing.assert_close(mapped[:, 0], formula(x))


def test_traced_for_another_length():
    rotate = torch.jit.trace(
        lambda x: apply_rotary_emb(x, COS, SIN, seqlen_offsets=1), torch.randn(1, 4, 2, 10)
    )
    packed = torch.jit.trace(
        lambda x, bounds: apply_rotary_emb(x, COS, SIN, cu_seqlens=bounds), (torch.randn(5, 2, 10), LENGTHS)
    )
    x = torch.randn(3, 12, 2, 10)
    torch.testing.assert_close(rotate(x), formula(x, 1))
    bounds = int32(0, 12, 24, 36)
    torch.testing.assert_close(packed(x.flatten(0, 1), bounds), formula(x).flatten(0, 1))
