"""Where a formula loses digits that the inputs' dtype keeps, or leaves the range of fp32 on its way."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracle import Options, assert_gradients, assert_lse, assert_within, attention, gradients
from problems import BF16, qkv, run

from flash_attn import flash_attn_func

FP16, FP32 = torch.float16, torch.float32
FP32_TINY, FP32_MAX = 2.0**-126, torch.finfo(FP32).max


def draw(*shape, dtype=BF16, device="cpu"):
    return torch.randn(shape, device=device).to(dtype)


@pytest.mark.parametrize("dtype, worst", [(FP32, 1e-4), (BF16, 0.1)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_where_softcap_saturates(device, require_backward, dtype, worst, causal):
    """Rounding P, dS and O to bf16 is worth 0.07 here; 1 - tanh^2 in fp32 is off by 0.3 and more."""
    require_backward(device, dtype, 64)
    q, k = (1.0 + 0.3 * torch.randn(2, 4, 2, 64, device=device) for _ in range(2))
    inputs = (0.1 * q).to(dtype), k.to(dtype), draw(2, 4, 2, 64, dtype=dtype, device=device)
    options = Options(softcap=0.1, causal=causal)  # tanh is taken at 8 or so: it is 1 - 2e-7
    leaves = [x.requires_grad_() for x in inputs]
    out = flash_attn_func(*leaves, **options.arguments())
    dout = draw(*out.shape, dtype=dtype, device=device)
    actual = torch.autograd.grad(out, leaves[:2], dout)
    exact = gradients(lambda *x: attention(*x, options)[0], inputs, dout, torch.float64)
    for a, truth in zip(actual, exact[:2], strict=True):
        seen = slice(1, None) if causal else slice(None)  # a row that sees one key has no gradient
        error = (a - truth).abs().amax(-1) / truth.abs().amax(-1)
        assert error[:, seen].max() < worst


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("heads_k, head_dims", [(4, (64, 64)), (1, (192, 128))], ids=str)
@pytest.mark.parametrize("arguments", [{}, {"softcap": 50.0}, {"deterministic": True}], ids=str)
def test_gradients_of_keys_that_are_seen_weakly(
    device, require_backward, dtype, head_dims, heads_k, arguments
):
    """P is 1e-7 or so for half of the keys, which fp16 by itself rounds to a multiple of 6e-8."""
    require_backward(device, dtype, *head_dims)
    head_dim, head_dim_v = head_dims
    q, k = torch.randn(1, 300, 4, head_dim), torch.randn(1, 160, heads_k, head_dim)
    v, dout = torch.randn(1, 160, heads_k, head_dim_v), 16.0 * torch.randn(1, 300, 4, head_dim_v)
    q[..., 0], k[..., 0], weak = head_dim**0.5, 0.0, slice(80, None)
    k[:, weak, :, 0] = -11.0
    inputs = tuple(x.to(device, dtype).requires_grad_() for x in (q, k, v))
    dout = dout.to(device, dtype)
    actual = torch.autograd.grad(flash_attn_func(*inputs, **arguments), inputs, dout)
    options = Options(softcap=arguments.get("softcap", 0.0))
    exact = gradients(lambda *x: attention(*x, options)[0], inputs, dout, torch.float64)
    for a, truth in zip(actual[1:], exact[1:], strict=True):
        error = (a - truth)[:, weak].norm() / truth[:, weak].norm()
        assert error < 4.0 * torch.finfo(dtype).eps, error


@pytest.mark.parametrize("softcap", [FP32_TINY, 1e-4, 1e20, 2.4e38, FP32_MAX])
@pytest.mark.parametrize("softmax_scale", [None, -0.2, 1e-44, 2.0**100])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_softcap_over_its_whole_range(device, require_backward, dtype, softmax_scale, softcap):
    require_backward(device, dtype, 64)
    # Numbers that bf16 holds: their products are exact in fp32.
    inputs = [x.to(dtype).requires_grad_() for x in qkv(1, 20, 35, (2, 1), device=device)]
    options = Options(softcap=softcap, softmax_scale=softmax_scale, causal=True)
    out, lse = run(*inputs, options)
    truth, exact_lse = attention(*inputs, options)
    # As good as without a softcap, where that changes nothing: in 16 bits the formula itself loses digits.
    yardstick = replace(options, softcap=0.0) if softcap > 1e10 else options
    assert_within(out, truth, attention(*inputs, yardstick, dtype)[0])
    assert_lse(lse, exact_lse)
    if abs(softmax_scale or 1.0) > 100.0 and softcap > 1e10:
        return  # the LSE of such scores has no digit behind the point, from which gradients could be computed
    dout = draw(*out.shape, dtype=dtype, device=device)
    assert_gradients(
        torch.autograd.grad(out, inputs, dout),
        lambda q, k, v, d: attention(q, k, v, options if d is torch.float64 else yardstick, d)[0],
        inputs,
        dout,
    )


@pytest.mark.parametrize("softmax_scale", [1e-44, 1e-30, 0.0, -1e-3, 300.0, -300.0, 1e10, 1e30, -(2.0**100)])
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_scales_over_their_whole_range(device, require_kernel, dtype, softmax_scale):
    require_kernel(device, dtype, 64)
    q, k, v = qkv(1, 130, 200, (2, 2), dtype=dtype, device=device)
    options = Options(softmax_scale=softmax_scale)
    out, lse = run(q, k, v, options)
    truth, exact_lse = attention(q, k, v, options)
    rounded = attention(q, k, v, options, FP32)[0].to(dtype)  # scores in `dtype` would name another winner
    assert_within(out, truth, rounded)
    assert_lse(lse, exact_lse)
