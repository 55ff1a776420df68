"""Random configurations against the fp64 oracle: whatever the API allows must be right."""

from __future__ import annotations

from itertools import accumulate

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import (
    Options,
    assert_lse,
    assert_within,
    attention,
    dropout_keeps,
    gradients,
    varlen_attention,
)

from flash_attn import _philox, flash_attn_func, flash_attn_varlen_func

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LENGTH = st.one_of(st.integers(0, 5), st.integers(0, 90))
SETTINGS = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


@st.composite
def options(draw, batch, heads, generator):
    alibi = draw(st.sampled_from([None, (heads,), (batch, heads)]))
    dropout_p = draw(st.sampled_from([0.0, 0.0, 0.15, 0.6]))
    return Options(
        causal=draw(st.booleans()),
        window_size=(draw(st.integers(-1, 40)), draw(st.integers(-1, 40))),
        softmax_scale=draw(st.sampled_from([None, 0.3, -0.1, 0.0])),
        softcap=0.0 if dropout_p else draw(st.sampled_from([0.0, 2.0, 20.0])),
        alibi_slopes=None if alibi is None else torch.rand(alibi, generator=generator),
        dropout_p=dropout_p,
    )


@st.composite
def heads(draw):
    heads_k = draw(st.integers(1, 3))
    return heads_k * draw(st.integers(1, 3)), heads_k


def random(generator, *shape, dtype):
    return torch.randn(shape, generator=generator).to(dtype)


def laid_out(x, layout):
    """Return x with the same values in another layout."""
    if layout == "heads first":
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    return x.mT.contiguous().mT if layout == "last strided" else x


def under_mask(chosen, seed, shape):
    """Return the options with the dropout mask that a call after `manual_seed(seed)` draws."""
    torch.manual_seed(seed)
    if not chosen.dropout_p:
        return chosen
    keep = dropout_keeps(_philox.new_rng_state(torch.device("cpu")), chosen.dropout_p, shape)
    torch.manual_seed(seed)
    return Options(**chosen.arguments(), keep=keep)


def check(run, reference, tensors):
    """Compare `run(*leaves) -> (out, lse)` and its gradients with `reference(*leaves, dtype)`."""
    leaves = [x.requires_grad_() for x in tensors]
    out, lse = run(*leaves)
    dtype = out.dtype
    truth, truth_lse = reference(*tensors, torch.float64)
    assert_within(out, truth.detach(), reference(*tensors, dtype)[0].detach())
    assert_lse(lse, truth_lse.detach())
    dout = torch.randn_like(out)
    actual = torch.autograd.grad(out, leaves, dout)
    exact, rough = (
        gradients(lambda *x, d=d: reference(*x, d)[0], tuple(tensors), dout, d)
        for d in (torch.float64, dtype)
    )
    for a, t, y in zip(actual, exact, rough, strict=True):
        assert_within(a, t, y, factor=3.0)


@SETTINGS
@given(
    data=st.data(),
    heads=heads(),
    seed=st.integers(0, 2**31),
    batch=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
)
def test_fixed_length(data, heads, seed, batch, dtype):
    generator = torch.Generator().manual_seed(seed)
    seqlen_q, seqlen_k, head_dim = data.draw(LENGTH), data.draw(LENGTH), data.draw(st.integers(1, 70))
    chosen = data.draw(options(batch, heads[0], generator))
    shapes = (batch, seqlen_q, heads[0], head_dim), *((batch, seqlen_k, heads[1], head_dim),) * 2
    layout = st.sampled_from(["contiguous", "heads first", "last strided"])
    tensors = [laid_out(random(generator, *s, dtype=dtype), data.draw(layout)) for s in shapes]
    masked = under_mask(chosen, seed, (batch, heads[0], seqlen_q, seqlen_k))

    def run(*leaves):
        return flash_attn_func(*leaves, **chosen.arguments(), return_attn_probs=True)[:2]

    check(run, lambda q, k, v, d: attention(q, k, v, masked, d), tensors)


@SETTINGS
@given(data=st.data(), heads=heads(), seed=st.integers(0, 2**31), dtype=st.sampled_from(DTYPES))
def test_varlen(data, heads, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    pairs = data.draw(st.lists(st.tuples(LENGTH, LENGTH), max_size=4))
    lengths = [n for n, _ in pairs], [n for _, n in pairs]
    head_dim, trailing = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 9))
    chosen = data.draw(options(len(pairs), heads[0], generator))
    totals = [sum(n) + trailing for n in lengths]
    shapes = (totals[0], heads[0], head_dim), *((totals[1], heads[1], head_dim),) * 2
    tensors = [random(generator, *s, dtype=dtype) for s in shapes]
    cu_seqlens = [torch.tensor([0, *accumulate(n)], dtype=torch.int32) for n in lengths]
    longest = [max(n, default=0) for n in lengths]
    masked = under_mask(chosen, seed, (len(pairs), heads[0], *longest))

    def run(*leaves):
        arguments = chosen.arguments()
        return flash_attn_varlen_func(*leaves, *cu_seqlens, *longest, **arguments, return_attn_probs=True)[:2]

    check(run, lambda q, k, v, d: varlen_attention(q, k, v, *lengths, masked, d), tensors)
