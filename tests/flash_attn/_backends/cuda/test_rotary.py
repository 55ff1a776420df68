"""The CUDA path of rotary embedding on CPU tensors: the stand-in of the library rotates their memory."""

from __future__ import annotations

import pytest
import torch
from standin import StandIn

from flash_attn._backends.cuda import rotary
from flash_attn.layers.rotary import apply_rotary_emb, apply_rotary_emb_qkv_
from flash_attn.ops.triton.rotary import apply_rotary

BF16 = torch.bfloat16


@pytest.fixture
def library(install):
    recorder = StandIn()
    install(recorder)
    return recorder


ANGLES = torch.arange(20.0)[:, None] * torch.tensor([1.0, 0.6, 0.4, 0.3, 0.2, 0.1, 0.05, 0.01])
TABLES = ANGLES.cos(), ANGLES.sin()


def make(*shape):
    return torch.randn(shape).to(BF16)


def by_operations(function, *inputs):
    """The result and gradients of the same call by torch operations: a table that requires grad."""
    tables = TABLES[0].clone().requires_grad_(), TABLES[1]
    return function(*inputs, *tables)


FUNCTIONS = {
    "fresh": lambda x, cos, sin: apply_rotary_emb(x, cos, sin, seqlen_offsets=3),
    "in place": lambda x, cos, sin: apply_rotary_emb(x * 1, cos, sin, inplace=True),
    "leaf": lambda x, cos, sin: apply_rotary_emb(x, cos, sin, inplace=True),
    "view of a leaf": lambda x, cos, sin: apply_rotary_emb(x[:, 1:], cos, sin, inplace=True),
    "triton": lambda x, cos, sin: apply_rotary(x * 1, cos, sin, 2, inplace=True, conjugate=True),
    "packed": lambda x, cos, sin: apply_rotary_emb_qkv_(x * 1, cos, sin, num_heads_q=2),
    "packed leaf": lambda x, cos, sin: apply_rotary_emb_qkv_(x, cos, sin, num_heads_q=2),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_gradients_of_first_and_second_order(library, function):
    x, other = (make(2, 7, 4, 24).requires_grad_() for _ in range(2))
    other.data.copy_(x)
    results = []
    for leaf, run in ((x, function), (other, lambda x, *unused: by_operations(function, x))):
        out = run(leaf, *TABLES)
        (gradient,) = torch.autograd.grad(out.float().pow(3).sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(gradient.float().pow(2).sum(), leaf)
        results.append((out, gradient, second))
        calls = len(library.rotary_calls)
    assert calls == len(library.rotary_calls) >= 3, "the kernel rotates forward, back, and forward again"
    assert {bool(params.conjugate) for params, _ in library.rotary_calls} == {False, True}
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=0.05, rtol=0.05)


def test_a_kernel_counts_as_a_change(library):
    """A backward that saved what the kernel overwrote must not run, whoever called it."""
    for x in (make(2, 7, 4, 24).requires_grad_(), make(2, 7, 4, 24).requires_grad_() * 1):
        saved = x.square()
        with torch.no_grad():
            apply_rotary(x, *TABLES, inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            saved.sum().backward()
    assert len(library.rotary_calls) == 2


def test_tracing_does_not_bake_addresses(library):
    with torch.no_grad():
        rotate = torch.jit.trace(lambda x: apply_rotary_emb(x, *TABLES), make(1, 4, 2, 24))
        x = make(3, 12, 2, 24)
        expected = apply_rotary_emb(x, *TABLES)
        library.rotary_calls.clear()
        assert torch.equal(rotate(x), expected) and not library.rotary_calls


def test_subclasses_never_reach_the_kernel(library):
    class Wrapped(torch.Tensor):
        pass

    x, tensors = make(2, 7, 4, 24), [make(2, 7, 4, 24), *TABLES]
    for i in range(3):
        given = list(tensors)
        given[i] = given[i].as_subclass(Wrapped)
        apply_rotary_emb(*given)
    apply_rotary_emb(x, *TABLES, seqlen_offsets=torch.tensor([1, 2]).as_subclass(Wrapped))
    apply_rotary_emb(x.to("meta"), *[t.to("meta") for t in TABLES])
    assert not library.rotary_calls


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_positions_of_any_type(dtype):
    index = torch.tensor([5, 0, torch.iinfo(dtype).max, torch.iinfo(dtype).min], dtype=dtype)
    found = rotary._as_int32(index, "seqlen_offsets")
    assert found.dtype == torch.int32
    assert found.tolist() == [max(-(2**31 - 1), min(2**31 - 1, n)) for n in index.tolist()]
    negative = rotary._as_int32(torch._neg_view(torch.tensor([5, -3], dtype=torch.int32)), "seqlen_offsets")
    assert not negative.is_neg() and negative.tolist() == [-5, 3]


def test_a_launch_that_fails(install):
    install(StandIn(status=3))
    with pytest.raises(RuntimeError, match=r"^flash_attn: kernel .* is not built$"):
        apply_rotary_emb(make(2, 7, 4, 24), *TABLES)
