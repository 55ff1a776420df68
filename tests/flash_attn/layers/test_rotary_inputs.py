"""What rotary embedding takes as offsets, flags, tables and tensors; what it refuses, before it writes."""

from __future__ import annotations

import operator

import pytest
import torch
from problems import int32
from refusals import raises
from standin import StandIn
from torch._subclasses.fake_tensor import FakeTensorMode

from flash_attn.layers.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
)
from flash_attn.ops.triton.rotary import apply_rotary

NO_INTEGERS = [5.0, "5", None, [5], torch.tensor(5.0)]
X, TABLE = torch.zeros(2, 5, 3, 8), torch.rand(9, 4)
BOUNDS = int32(0, 2, 5)


class Index:
    """An integer as those of numpy are."""

    def __index__(self):
        return 3


def tables(rows):
    angles = torch.rand(rows, 8) * 6
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("offset", [Index(), torch.tensor(3), True], ids=repr)
@pytest.mark.parametrize("packed", [False, True])
def test_kinds_of_offsets(offset, packed):
    x = torch.randn(2, 5, 3, 8)
    expected = apply_rotary_emb(x, TABLE, TABLE, seqlen_offsets=operator.index(offset))
    if packed:
        x, expected, bounds = x.flatten(0, 1), expected.flatten(0, 1), int32(0, 5, 10)
        assert torch.equal(apply_rotary_emb(x, TABLE, TABLE, False, False, offset, bounds), expected)
    else:
        assert torch.equal(apply_rotary_emb(x, TABLE, TABLE, seqlen_offsets=offset), expected)
        assert torch.equal(apply_rotary(x, TABLE, TABLE, offset), expected)


@pytest.mark.parametrize("offset", NO_INTEGERS, ids=repr)
def test_offsets_that_are_no_integers(offset):
    name = "seqlen_offset"
    raises(TypeError, name, apply_rotary_emb, X, TABLE, TABLE, seqlen_offsets=offset)
    raises(TypeError, name, apply_rotary_emb, X[0], TABLE, TABLE, False, False, offset, BOUNDS)
    raises(TypeError, name, apply_rotary, X, TABLE, TABLE, offset)
    raises(TypeError, name, RotaryEmbedding(8), torch.zeros(2, 5, 3, 1, 8), seqlen_offset=offset)
    raises(TypeError, name, apply_rotary_emb_kv_, torch.zeros(2, 5, 2, 1, 8), TABLE, TABLE, False, offset)


@pytest.mark.parametrize("yes, no", [(1.0, 0.0), (1, None), (torch.tensor(1), torch.tensor(False))], ids=repr)
def test_kinds_of_flags(yes, no):
    x = torch.randn(2, 5, 3, 8)
    for flag in (yes, no):
        expected = apply_rotary(x, TABLE, TABLE, interleaved=bool(flag), conjugate=bool(flag))
        actual = apply_rotary(x.clone(), TABLE, TABLE, interleaved=flag, conjugate=flag, inplace=flag)
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", ["interleaved", "conjugate", "inplace"])
@pytest.mark.parametrize("value", ["False", [], torch.ones(2), {}], ids=repr)
def test_values_that_are_no_flags(name, value):
    raises(TypeError, name, apply_rotary, X, TABLE, TABLE, **{name: value})


def test_a_table_of_k_alone():
    """As upstream, cos_k and sin_k each default to those of q."""
    qkv, (cos, sin) = torch.randn(2, 5, 3, 4, 16), tables(9)
    for named in ({"cos_k": cos * 0.5}, {"sin_k": sin * 0.5}):
        out = apply_rotary_emb_qkv_(qkv.clone(), cos, sin, **named)
        of_k = {"cos_k": cos, "sin_k": sin} | named
        assert torch.equal(out[:, :, 0], apply_rotary_emb(qkv[:, :, 0], cos, sin))
        assert torch.equal(out[:, :, 1], apply_rotary_emb(qkv[:, :, 1], *of_k.values()))


def test_no_sequences():
    for x in (torch.randn(5, 3, 8), torch.randn(0, 3, 8)):
        assert torch.equal(apply_rotary_emb(x, TABLE, TABLE, cu_seqlens=int32(0)), x)


def test_tokens_before_the_first_sequence_stay(install):
    install(StandIn())
    x, offsets = torch.randn(5, 3, 8), torch.tensor([4])
    out = apply_rotary_emb(x, TABLE, TABLE, False, False, offsets, int32(2, 5))
    assert torch.equal(out[:2], x[:2])
    assert torch.equal(out[2:], apply_rotary_emb(x[None, 2:], TABLE, TABLE, seqlen_offsets=4)[0])


def test_negative_views_and_defaults_of_the_process():
    """The sign of a negative view counts; the default dtype and device do not."""
    x = torch.randn(2, 5, 3, 8)
    expected = apply_rotary_emb(-x, TABLE, -TABLE)
    assert torch.equal(apply_rotary_emb(torch._neg_view(x), TABLE, torch._neg_view(TABLE)), expected)
    offsets = torch.tensor([3, 0])
    plain = [
        apply_rotary_emb(x, TABLE, TABLE, seqlen_offsets=offsets),
        RotaryEmbedding(8)(x[:, :, :, None].clone()),
    ]
    plain.append(apply_rotary_emb(x[0], TABLE, TABLE, cu_seqlens=BOUNDS))
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        assert torch.equal(apply_rotary_emb(x, TABLE, TABLE, seqlen_offsets=offsets), plain[0])
        assert torch.equal(RotaryEmbedding(8)(x[:, :, :, None].clone()), plain[1])
        assert torch.equal(apply_rotary_emb(x[0], TABLE, TABLE, cu_seqlens=BOUNDS), plain[2])
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


class Wrapped(torch.Tensor):
    """A subclass; all its operations go through `__torch_function__`."""


@pytest.mark.parametrize("which", range(5))
def test_subclasses_and_tensors_without_memory(which):
    x, offsets = torch.randn(5, 3, 8), torch.tensor([3, 0])
    plain = [x, TABLE, TABLE.sin(), offsets, BOUNDS]
    rotate = lambda x, cos, sin, offsets, bounds: apply_rotary_emb(x, cos, sin, False, False, offsets, bounds)  # noqa: E731
    given = list(plain)
    given[which] = plain[which].as_subclass(Wrapped)
    assert torch.equal(rotate(*given).as_subclass(torch.Tensor), rotate(*plain))
    assert rotate(*[x.to("meta") for x in plain]).shape == x.shape
    with FakeTensorMode() as mode:
        assert rotate(*[mode.from_tensor(x) for x in plain]).shape == x.shape


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda x, c: apply_rotary_emb(x, c, c[:3]), "cos and sin"),
        (lambda x, c: apply_rotary_emb(x[..., :6], c, c), "cos"),
        (lambda x, c: apply_rotary_emb(x, c, c, seqlen_offsets=5), "seqlen_offsets"),
        (lambda x, c: apply_rotary_emb(x, c, c, seqlen_offsets=-1), "seqlen_offsets"),
        (lambda x, c: apply_rotary_emb(x, c, c, seqlen_offsets=torch.tensor([0, 5])), "seqlen_offsets"),
        (lambda x, c: apply_rotary_emb(x, c, c, seqlen_offsets=torch.tensor([1])), "seqlen_offsets"),
        (
            lambda x, c: apply_rotary_emb(x, c, c, seqlen_offsets=torch.ones(2, device="meta").long()),
            "seqlen_offsets",
        ),
        (lambda x, c: apply_rotary_emb(x[0], c, c), "x"),
        (lambda x, c: apply_rotary_emb(x, c, c, cu_seqlens=torch.tensor([0, 5])), "x"),
        (lambda x, c: apply_rotary_emb(x[0], c, c, cu_seqlens=int32()), "cu_seqlens"),
        (lambda x, c: apply_rotary_emb(x[0], c, c, cu_seqlens=int32(0, 6)), "cu_seqlens"),
        (lambda x, c: apply_rotary_emb(x[0], c, c, cu_seqlens=int32(0, 4, 2)), "cu_seqlens"),
        (lambda x, c: apply_rotary_emb(x[0], c, c, False, False, 2**40, int32(0, 5)), "seqlen_offsets"),
        (
            lambda x, c: apply_rotary_emb(x, c, c, seqlen_offsets=2**63 - torch.tensor([1, 9])),
            "seqlen_offsets",
        ),
        (lambda x, c: apply_rotary_emb(x, c.to("meta"), c), "cos"),
        (lambda x, c: apply_rotary_emb_qkv_(x, c, c), "qkv"),
        (lambda x, c: apply_rotary_emb_qkv_(x, c, c, num_heads_q=2), "num_heads_q"),
        (lambda x, c: apply_rotary_emb_qkv_(x, c, c, num_heads_q=5), "num_heads_q"),
        (lambda x, c: apply_rotary_emb_kv_(x, c, c), "kv"),
    ],
)
def test_bad_values(call, name):
    raises(ValueError, f"{name} ", call, torch.randn(2, 5, 3, 8), torch.rand(9, 4))


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda x, c: apply_rotary_emb([x], c, c), "x"),
        (lambda x, c: apply_rotary_emb(x.to(torch.complex64), c, c), "x"),
        (lambda x, c: apply_rotary_emb(x.int(), c, c), "x"),
        (lambda x, c: apply_rotary_emb(x, None, c), "cos"),
        (lambda x, c: apply_rotary_emb(x, c, c.numpy()), "sin"),
        (lambda x, c: apply_rotary_emb(x, c.int(), c), "cos"),
        (lambda x, c: apply_rotary_emb(x[0], c, c, cu_seqlens=[0, 5]), "cu_seqlens"),
        (lambda x, c: apply_rotary_emb(x[0], c, c, cu_seqlens=torch.tensor([0.0, 5.0])), "cu_seqlens"),
        (lambda x, c: apply_rotary_emb(x, c, c, seqlen_offsets=torch.zeros(2)), "seqlen_offsets"),
        (lambda x, c: apply_rotary_emb_qkv_(None, c, c), "qkv"),
        (lambda x, c: apply_rotary_emb_qkv_(x, c, c, num_heads_q=1.0), "num_heads_q"),
        (lambda x, c: apply_rotary_emb_kv_("kv", c, c), "kv"),
        (lambda x, c: RotaryEmbedding(8)(None), "qkv"),
        (lambda x, c: RotaryEmbedding(8)(x, kv=3), "kv"),
        (lambda x, c: RotaryEmbedding(8.0), "dim"),
        (lambda x, c: RotaryEmbedding(8, base="1e4"), "base"),
    ],
)
def test_bad_types(call, name):
    raises(TypeError, f"{name} ", call, torch.randn(2, 5, 3, 8), torch.rand(9, 4))


@pytest.mark.parametrize("offsets", [7, torch.tensor([0, 7])], ids=str)
def test_nothing_is_written_before_all_is_checked(offsets):
    """The tables of k, or k itself, are at fault; q stays as it was."""
    qkv, (cos, sin) = torch.randn(2, 5, 3, 4, 16), tables(12)
    before = qkv.clone()
    named = {"cos_k": cos[:9], "sin_k": sin[:9], "seqlen_offsets": offsets}
    with pytest.raises((ValueError, TypeError)):
        apply_rotary_emb_qkv_(qkv, cos, sin, **named)
    with pytest.raises(ValueError, match=r"^kv must be"):
        RotaryEmbedding(16)(qkv[:, :, 0], kv=qkv[:, :, :, None, 0])
    assert torch.equal(qkv, before)
