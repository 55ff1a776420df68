"""Random configurations against the fp64 oracle: whatever the API allows must be right."""

from __future__ import annotations

import pytest
import torch
from conftest import cuda_problem, has_kernel
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from oracle import (
    Options,
    assert_lse,
    assert_within,
    attention,
    gradients,
    shift_by_rounding,
    varlen_attention,
)
from problems import cu_seqlens

from flash_attn import _philox, flash_attn_func, flash_attn_varlen_func

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LENGTH = st.one_of(st.integers(0, 5), st.integers(0, 90))
LONGER = st.one_of(LENGTH, st.integers(0, 400))
SETTINGS = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


@st.composite
def options(draw, batch, heads, generator, device):
    alibi = draw(st.sampled_from([None, (heads,), (batch, heads)]))
    dropout_p = draw(st.sampled_from([0.0, 0.0, 0.15, 0.6]))
    return Options(
        causal=draw(st.booleans()),
        window_size=(draw(st.integers(-1, 40)), draw(st.integers(-1, 40))),
        softmax_scale=draw(st.sampled_from([None, 0.3, -0.1, 0.0])),
        softcap=0.0 if dropout_p else draw(st.sampled_from([0.0, 2.0, 20.0])),
        alibi_slopes=None if alibi is None else torch.rand(alibi, generator=generator).to(device),
        dropout_p=dropout_p,
    )


@st.composite
def head_dims(draw, largest):
    head_dim = draw(st.integers(1, largest))
    return head_dim, draw(st.one_of(st.just(head_dim), st.integers(1, largest)))


@st.composite
def heads(draw):
    heads_k = draw(st.integers(1, 3))
    return heads_k * draw(st.integers(1, 3)), heads_k


def random(generator, *shape, dtype, device):
    return torch.randn(shape, generator=generator).to(device, dtype)


def laid_out(x, layout):
    """Return x with the same values in another layout."""
    if layout == "heads first":
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    return x.mT.contiguous().mT if layout == "last strided" else x


def under_mask(chosen, seed, shape, device):
    """Return the options with the dropout mask that a call after `manual_seed(seed)` draws."""
    torch.manual_seed(seed)
    if not chosen.dropout_p:
        return chosen
    state = _philox.new_rng_state(torch.device(device)).cpu()
    batch, heads, *lengths = shape
    keep = _philox.keep_mask(state, chosen.dropout_p, range(batch * heads), *map(range, lengths))
    torch.manual_seed(seed)
    return Options(**chosen.arguments(), keep=keep.view(shape).to(device))


def draw_fixed_length(data, device, dtype, heads, seed, length, max_head_dim):
    """Return `run(q, k, v) -> (out, lse)`, `reference(q, k, v, dtype)` of the same, and q, k, v."""
    generator = torch.Generator().manual_seed(seed)
    batch, (head_dim, head_dim_v) = data.draw(st.integers(0, 3)), data.draw(head_dims(max_head_dim))
    seqlen_q, seqlen_k = data.draw(length), data.draw(length)
    chosen = data.draw(options(batch, heads[0], generator, device))
    of_keys = batch, seqlen_k, heads[1]
    shapes = (batch, seqlen_q, heads[0], head_dim), (*of_keys, head_dim), (*of_keys, head_dim_v)
    layout = st.sampled_from(["contiguous", "heads first", "last strided"])
    tensors = [laid_out(random(generator, *s, dtype=dtype, device=device), data.draw(layout)) for s in shapes]
    masked = under_mask(chosen, seed, (batch, heads[0], seqlen_q, seqlen_k), device)

    def run(*leaves):
        return flash_attn_func(*leaves, **chosen.arguments(), return_attn_probs=True)[:2]

    return run, lambda q, k, v, d: attention(q, k, v, masked, d), tensors


def draw_varlen(data, device, dtype, heads, seed, length, max_head_dim):
    """As `draw_fixed_length`, of packed sequences with tokens behind the last."""
    generator = torch.Generator().manual_seed(seed)
    pairs = data.draw(st.lists(st.tuples(length, length), max_size=4))
    lengths = [n for n, _ in pairs], [n for _, n in pairs]
    (head_dim, head_dim_v), trailing = data.draw(head_dims(max_head_dim)), data.draw(st.integers(0, 9))
    chosen = data.draw(options(len(pairs), heads[0], generator, device))
    totals = [sum(n) + trailing for n in lengths]
    of_keys = totals[1], heads[1]
    shapes = (totals[0], heads[0], head_dim), (*of_keys, head_dim), (*of_keys, head_dim_v)
    tensors = [random(generator, *s, dtype=dtype, device=device) for s in shapes]
    starts, longest = [cu_seqlens(n, device) for n in lengths], [max(n, default=0) for n in lengths]
    masked = under_mask(chosen, seed, (len(pairs), heads[0], *longest), device)

    def run(*leaves):
        arguments = chosen.arguments()
        return flash_attn_varlen_func(*leaves, *starts, *longest, **arguments, return_attn_probs=True)[:2]

    return run, lambda q, k, v, d: varlen_attention(q, k, v, *lengths, masked, d), tensors


def check_forward(run, reference, tensors):
    """Compare `run` with `reference`. Of few elements the yardstick may be right by luck: it is off by the
    rounding of the output at least.
    """
    out, lse = run(*tensors)
    truth, truth_lse = (x.detach() for x in reference(*tensors, torch.float64))
    rough = reference(*tensors, out.dtype)[0].detach().double()
    rounded = truth * (1 + torch.finfo(out.dtype).eps / 2)
    worst = max((rough, rounded), key=lambda x: (x - truth).abs().sum())
    assert_within(out, truth, worst)
    assert_lse(lse, truth_lse)
    return out


def check(run, reference, tensors):
    """Compare `run` and its gradients with `reference`. As above, the yardstick may be right by luck."""
    leaves = [x.requires_grad_() for x in tensors]
    out = check_forward(run, reference, leaves)
    dout = torch.randn_like(out)
    actual = torch.autograd.grad(out, leaves, dout)
    exact, rough = (
        gradients(lambda *x, d=d: reference(*x, d)[0], tuple(tensors), dout, d)
        for d in (torch.float64, out.dtype)
    )
    shifts = shift_by_rounding(reference, tensors, dout)
    for a, t, y, shift in zip(actual, exact, rough, shifts, strict=True):
        worst = max((y.double(), t + shift), key=lambda x: (x - t).abs().sum())
        assert_within(a, t, worst, factor=3.0)


DRAWN = {"data": st.data(), "heads": heads(), "seed": st.integers(0, 2**31)}


@SETTINGS
@given(dtype=st.sampled_from(DTYPES), **DRAWN)
def test_fixed_length(data, heads, seed, dtype):
    check(*draw_fixed_length(data, "cpu", dtype, heads, seed, LENGTH, 70))


@SETTINGS
@given(dtype=st.sampled_from(DTYPES), **DRAWN)
def test_varlen(data, heads, seed, dtype):
    check(*draw_varlen(data, "cpu", dtype, heads, seed, LENGTH, 40))


@pytest.mark.gpu
@pytest.mark.skipif(bool(cuda_problem()), reason=str(cuda_problem()))
@pytest.mark.parametrize("draw", [draw_fixed_length, draw_varlen])
@SETTINGS
@given(dtype=st.sampled_from(DTYPES[:2]), **DRAWN)
def test_on_cuda(draw, data, heads, seed, dtype):
    run, reference, tensors = draw(data, "cuda", dtype, heads, seed, LONGER, 256)
    head_dim = max(x.shape[-1] for x in tensors)
    assume(has_kernel(dtype, head_dim))
    (check if has_kernel(dtype, head_dim, "backward") else check_forward)(run, reference, tensors)
