"""What only the CPU backend could get wrong: torch's defaults, fp64, and values that a row does not see."""

from __future__ import annotations

import pytest
import torch
from oracle import visible
from problems import BF16, MASKS, qkv

from flash_attn import flash_attn_func

FP32, FP64 = torch.float32, torch.float64


def gradients_of(leaves, **arguments):
    torch.manual_seed(1)
    out = flash_attn_func(*leaves, **arguments)
    return torch.autograd.grad(out, leaves, torch.ones_like(out))


@pytest.mark.parametrize("default", [FP64, BF16], ids=str)
@pytest.mark.parametrize(
    "arguments",
    [
        {"dropout_p": 0.3},
        {"softcap": 2.0, "window_size": (9, 2), "alibi_slopes": torch.tensor([0.1, 0.2])},
    ],
    ids=["dropout", "modifiers"],
)
def test_results_do_not_depend_on_the_default_dtype(default, arguments):
    leaves = qkv(2, 33, 33, (2, 2), 24, FP32, grad=True)
    expected = gradients_of(leaves, **arguments)
    torch.set_default_dtype(default)
    try:
        actual = gradients_of(leaves, **arguments)
    finally:
        torch.set_default_dtype(FP32)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


BAD = float("nan"), float("inf")


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("mask, lengths", [("causal", (29, 40)), ("window", (29, 40)), ("causal", (40, 29))])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
def test_what_a_row_does_not_see_does_not_reach_it(dtype, mask, lengths, bad, name):
    """A row or a key is changed to NaN or inf: exactly what sees it may change."""
    seen, scoring = visible(*lengths, MASKS[mask], torch.device("cpu")), MASKS[mask].arguments()
    x = dict(zip("qkv", qkv(2, *lengths, head_dims=16, dtype=dtype), strict=True))
    x["dout"] = torch.randn_like(x["q"])

    def results():
        leaves = [x[key].clone().requires_grad_() for key in "qkv"]
        out = flash_attn_func(*leaves, **scoring)
        return (out.detach(), *torch.autograd.grad(out, leaves, x["dout"]))

    expected = results()
    at = 17
    x[name][0, at, 1, 3] = bad
    if name in ("k", "v"):
        rows = seen[:, at]
        keys = seen[rows].any(0)
    else:
        rows = torch.arange(lengths[0]) == at
        keys = seen[at]
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype is BF16 else {"rtol": 1e-5, "atol": 1e-5}
    for a, e, reached in zip(results(), expected, (rows, rows, keys, keys), strict=True):
        torch.testing.assert_close(a[0, ~reached], e[0, ~reached], **tolerance)
        torch.testing.assert_close(a[1], e[1], **tolerance)
