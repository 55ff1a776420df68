"""What only the CPU backend could get wrong: torch's defaults, fp64, and values that a row does not see."""

from __future__ import annotations

import pytest
import torch

from flash_attn import flash_attn_func

FP32, FP64 = torch.float32, torch.float64


def draw(*shape, dtype=FP32):
    return torch.randn(shape, dtype=dtype)


def gradients_of(leaves, **arguments):
    torch.manual_seed(1)
    out = flash_attn_func(*leaves, **arguments)
    return torch.autograd.grad(out, leaves, torch.ones_like(out))


@pytest.mark.parametrize("default", [FP64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "arguments",
    [
        {"dropout_p": 0.3},
        {"softcap": 2.0, "window_size": (9, 2), "alibi_slopes": torch.tensor([0.1, 0.2])},
    ],
    ids=["dropout", "modifiers"],
)
def test_results_do_not_depend_on_the_default_dtype(default, arguments):
    leaves = [draw(2, 33, 2, 24).requires_grad_() for _ in range(3)]
    expected = gradients_of(leaves, **arguments)
    torch.set_default_dtype(default)
    try:
        actual = gradients_of(leaves, **arguments)
    finally:
        torch.set_default_dtype(FP32)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


BAD = float("nan"), float("inf")
MASKS = {
    "causal": {"causal": True},
    "window": {"window_size": (5, 2)},
    "causal, more queries": {"causal": True},
}


def visible(seqlen_q, seqlen_k, causal=False, window_size=(-1, -1)):
    left, right = (-1, 0) if causal else window_size
    i = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
    j = torch.arange(seqlen_k)
    return (j <= i + right) & ((j >= i - left) | (left < 0))


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
def test_what_a_row_does_not_see_does_not_reach_it(dtype, mask, bad, name):
    """A row or a key is changed to NaN or inf: exactly what sees it may change."""
    seqlen_q, seqlen_k = (40, 29) if "more" in mask else (29, 40)
    seen = visible(seqlen_q, seqlen_k, **MASKS[mask])
    of_q, of_k = (2, seqlen_q, 4, 16), (2, seqlen_k, 2, 16)
    x = {"q": draw(*of_q), "k": draw(*of_k), "v": draw(*of_k), "dout": draw(*of_q)}
    x = {key: value.to(dtype) for key, value in x.items()}

    def results():
        leaves = [x[key].clone().requires_grad_() for key in "qkv"]
        out = flash_attn_func(*leaves, **MASKS[mask])
        return (out.detach(), *torch.autograd.grad(out, leaves, x["dout"]))

    expected = results()
    at = 17
    x[name][0, at, 1, 3] = bad
    if name in ("k", "v"):
        rows = seen[:, at]
        keys = seen[rows].any(0)
    else:
        rows = torch.arange(seqlen_q) == at
        keys = seen[at]
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for a, e, reached in zip(results(), expected, (rows, rows, keys, keys), strict=True):
        torch.testing.assert_close(a[0, ~reached], e[0, ~reached], **tolerance)
        torch.testing.assert_close(a[1], e[1], **tolerance)
