"""The CUDA path of rotary embedding on CPU tensors: a stand-in for the library rotates their memory."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch

from flash_attn import _abi, _cuda_rotary, _gpu
from flash_attn.layers.rotary import apply_rotary_emb, apply_rotary_emb_qkv_
from flash_attn.ops.triton.rotary import apply_rotary

FIELDS = [name for name, _ in _abi.RotaryParams._fields_]
BF16 = torch.bfloat16


def memory(address, dtype, shape, strides):
    """A tensor over memory that is known by its address."""
    count = sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + 1
    buffer = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(buffer, dtype=dtype).as_strided(shape, strides)


class Rotor:
    """Stands in for the loaded library: rotates batches, halves as pairs, by one offset."""

    def __init__(self):
        self.calls = []

    def rotary(self, packed, stream):
        p = SimpleNamespace(**dict(zip(FIELDS, _abi.ROTARY_PARAMS.unpack(packed), strict=True)))
        self.calls.append(p)
        assert not p.offsets and not p.cu_seqlens and not p.interleaved
        shape, half = (p.batch, p.seqlen, p.num_heads, p.head_dim), p.rotary_dim // 2
        x = memory(p.x, BF16, shape, (p.x_batch_stride, p.x_row_stride, p.x_head_stride, 1))
        out = memory(p.out, BF16, shape, (p.out_batch_stride, p.out_row_stride, p.out_head_stride, 1))
        rows, size = slice(p.offset, p.offset + p.seqlen), (p.table_rows, half)
        cos, sin = (memory(at, torch.float32, size, (half, 1))[rows, None] for at in (p.cos, p.sin))
        sin = -sin if p.conjugate else sin
        x1, x2, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :].clone()
        out.copy_(torch.cat([(x1 * cos - x2 * sin).to(BF16), (x2 * cos + x1 * sin).to(BF16), rest], dim=-1))
        return 0


@pytest.fixture
def rotor():
    """Send tensors down the CUDA path to a Rotor, bf16 ones that it can read."""
    library = Rotor()
    with _gpu.stand_in(library):
        yield library


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
def test_gradients_of_first_and_second_order(rotor, function):
    x, other = (make(2, 7, 4, 24).requires_grad_() for _ in range(2))
    other.data.copy_(x)
    results = []
    for leaf, run in ((x, function), (other, lambda x, *unused: by_operations(function, x))):
        out = run(leaf, *TABLES)
        (gradient,) = torch.autograd.grad(out.float().pow(3).sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(gradient.float().pow(2).sum(), leaf)
        results.append((out, gradient, second))
        calls = len(rotor.calls)
    assert calls == len(rotor.calls) >= 3, "the kernel rotates forward, back, and forward again"
    assert {bool(call.conjugate) for call in rotor.calls} == {False, True}
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=0.05, rtol=0.05)


def test_a_kernel_counts_as_a_change(rotor):
    """A backward that saved what the kernel overwrote must not run, whoever called it."""
    for x in (make(2, 7, 4, 24).requires_grad_(), make(2, 7, 4, 24).requires_grad_() * 1):
        saved = x.square()
        with torch.no_grad():
            apply_rotary(x, *TABLES, inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            saved.sum().backward()
    assert len(rotor.calls) == 2


def test_tracing_does_not_bake_addresses(rotor):
    with torch.no_grad():
        rotate = torch.jit.trace(lambda x: apply_rotary_emb(x, *TABLES), make(1, 4, 2, 24))
        x = make(3, 12, 2, 24)
        expected = apply_rotary_emb(x, *TABLES)
        rotor.calls.clear()
        assert torch.equal(rotate(x), expected) and not rotor.calls


def test_subclasses_never_reach_the_kernel(rotor):
    class Wrapped(torch.Tensor):
        pass

    x, tensors = make(2, 7, 4, 24), [make(2, 7, 4, 24), *TABLES]
    for i in range(3):
        given = list(tensors)
        given[i] = given[i].as_subclass(Wrapped)
        apply_rotary_emb(*given)
    apply_rotary_emb(x, *TABLES, seqlen_offsets=torch.tensor([1, 2]).as_subclass(Wrapped))
    apply_rotary_emb(x.to("meta"), *[t.to("meta") for t in TABLES])
    assert not rotor.calls


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_positions_of_any_type(dtype):
    index = torch.tensor([5, 0, torch.iinfo(dtype).max, torch.iinfo(dtype).min], dtype=dtype)
    found = _cuda_rotary._as_int32(index, "seqlen_offsets")
    assert found.dtype == torch.int32
    assert found.tolist() == [max(-(2**31 - 1), min(2**31 - 1, n)) for n in index.tolist()]
    negative = _cuda_rotary._as_int32(
        torch._neg_view(torch.tensor([5, -3], dtype=torch.int32)), "seqlen_offsets"
    )
    assert not negative.is_neg() and negative.tolist() == [-5, 3]
