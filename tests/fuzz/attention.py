"""Families of attention over tensors: fixed length, packed sequences, positional entries, custom ops."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from oracle import Options, attention, dropout_keeps, varlen_attention
from torch import Tensor

import flash_attn
import flash_attn_2_cuda as entry
from flash_attn import _philox
from flash_attn import flash_attn_interface as interface

from .case import Case, need, same_bits

SIMPLE = ("contiguous", "offset by an element", "odd rows", "sliced", "every other", "negative")
"""Layouts of packed tensors, whose parts are in the last dimension but two."""

Shape = tuple[int, int, int, int]


def masked(case: Case, options: Options, shape: Shape) -> Options:
    """Return options with the dropout mask that the next call draws."""
    torch.manual_seed(case.seed)
    if not options.dropout_p:
        return options
    state = _philox.new_rng_state(torch.device(case.device)).cpu()
    torch.manual_seed(case.seed)
    return replace(options, keep=dropout_keeps(state, options.dropout_p, shape).to(case.device))


def with_sinks(arguments: dict, sinks: Tensor | None) -> dict:
    return arguments if sinks is None else arguments | {"s_aux": sinks}


def attend(
    case: Case, call: Callable, reference: Callable, tensors: list[Tensor], out_shape: tuple[int, ...],
    given: bool, deterministic: bool,
) -> tuple[Tensor, Tensor, list[Tensor | None]]:  # fmt: skip
    """Run forward and, mostly, backward; check them against `reference(*tensors, dtype)` = (out, lse).

    `call(*tensors, **extra)` returns (out, lse, S_dmask). Returns out, the LSE and gradients, if any.
    """
    grad = case.chance(0.6)
    wanted = [grad and case.chance(0.8) for _ in tensors]
    leaves = [x.detach().requires_grad_(w) for x, w in zip(tensors, wanted, strict=True)]
    extra = {"out": case.output(*out_shape)} if given and not any(wanted) and case.chance(0.5) else {}
    case.note(gradients=wanted, given=bool(extra))

    def run() -> tuple:
        torch.manual_seed(case.seed)
        return call(*leaves, **extra)

    out, lse, _ = case.run(run)
    need(not extra or out is extra["out"], "what was returned is not out")
    case.check_forward(reference, [x.detach() for x in leaves], out, lse)
    found: list[Tensor | None] = [None] * len(leaves)
    if any(wanted):
        dout = case.tensor(*out_shape)
        needed = [x for x in leaves if x.requires_grad]
        case.poison()
        some = torch.autograd.grad(out, needed, dout, retain_graph=deterministic)
        if deterministic:
            again = torch.autograd.grad(out, needed, dout)
            need(all(map(same_bits, some, again)), "deterministic gradients have other bits the second time")
        iterator = iter(some)
        found = [next(iterator) if w else None for w in wanted]
        case.check_gradients(reference, leaves, dout, found)
    case.check_memory()
    return out, lse, found


def func(case: Case) -> None:
    """flash_attn_func and its packed siblings."""
    batch, (heads, heads_k), (d, dv) = case.pick(1, 1, 2, 3), case.heads(), case.head_dims()
    kind = case.pick("func", "func", "qkv", "kv")
    ((sq,), (sk,)) = case.lengths(1, batch * heads)
    if kind == "qkv":
        sk, heads, heads_k, dv = sq, heads_k, heads_k, d
    options = case.options(heads, batch, (sq, sk))
    if kind != "func":
        options, dv = replace(options, sinks=None), d
    deterministic = case.chance(0.3)
    case.note(kind=kind, batch=batch, deterministic=deterministic)
    chosen = masked(case, options, (batch, heads, sq, sk))
    named = options.arguments() | {"deterministic": deterministic, "return_attn_probs": True}
    if kind == "qkv":
        tensors = [case.tensor(batch, sq, 3, heads, d, layouts=SIMPLE)]
    elif kind == "kv":
        tensors = [case.tensor(batch, sq, heads, d), case.tensor(batch, sk, 2, heads_k, d, layouts=SIMPLE)]
    else:
        of_keys = batch, sk, heads_k
        tensors = [case.tensor(batch, sq, heads, d), case.tensor(*of_keys, d), case.tensor(*of_keys, dv)]

    def reference(*x: Tensor) -> tuple[Tensor, Tensor]:
        *x, dtype = x
        parts = {"qkv": lambda: x[0].unbind(2), "kv": lambda: (x[0], *x[1].unbind(2)), "func": lambda: x}
        return attention(*parts[kind](), chosen, dtype)

    calls = {
        "func": flash_attn.flash_attn_func, "kv": flash_attn.flash_attn_kvpacked_func,
        "qkv": flash_attn.flash_attn_qkvpacked_func,
    }  # fmt: skip
    named = with_sinks(named, options.sinks)
    attend(
        case, lambda *x, **extra: calls[kind](*x, **named, **extra), reference, tensors,
        (batch, sq, heads, dv), kind == "func", deterministic,
    )  # fmt: skip


def varlen(case: Case) -> None:
    """flash_attn_varlen_func and its packed siblings, tokens of no sequence behind the last one."""
    batch, (heads, heads_k), (d, dv) = case.pick(0, 1, 2, 3, 6), case.heads(), case.head_dims()
    kind = case.pick("func", "func", "qkv", "kv")
    lengths_q, lengths_k = case.lengths(batch, heads)
    tails = case.pick((0, 0), (1, 5), (130, 3))
    if kind == "qkv":
        lengths_k, tails, heads, dv = lengths_q, (tails[0],) * 2, heads_k, d
    longest = max(lengths_q, default=0), max(lengths_k, default=0)
    options = case.options(heads, batch, longest)
    if kind != "func":
        options, dv = replace(options, sinks=None), d
    deterministic, more = case.chance(0.3), case.pick(0, 0, 1, 200)
    case.note(kind=kind, batch=batch, deterministic=deterministic, tails=tails, more=more)
    chosen = masked(case, options, (batch, heads, *longest))
    total_q, total_k = sum(lengths_q) + tails[0], sum(lengths_k) + tails[1]
    if kind == "qkv":
        tensors = [case.tensor(total_q, 3, heads, d, layouts=SIMPLE)]
    elif kind == "kv":
        tensors = [case.tensor(total_q, heads, d), case.tensor(total_k, 2, heads_k, d, layouts=SIMPLE)]
    else:
        tensors = [case.tensor(total_q, heads, d), case.tensor(total_k, heads_k, d)]
        tensors.append(case.tensor(total_k, heads_k, dv))
    bounds = case.bounds(lengths_q), case.bounds(lengths_k)
    most = longest[0] + more, longest[1] + more

    def call(*x: Tensor, **extra: Tensor) -> tuple:
        named = options.arguments() | {"deterministic": deterministic, "return_attn_probs": True} | extra
        if kind == "qkv":
            return flash_attn.flash_attn_varlen_qkvpacked_func(*x, bounds[0], most[0], **named)
        if kind == "kv":
            return flash_attn.flash_attn_varlen_kvpacked_func(*x, *bounds, *most, **named)
        return flash_attn.flash_attn_varlen_func(*x, *bounds, *most, **with_sinks(named, options.sinks))

    def reference(*x: Tensor) -> tuple[Tensor, Tensor]:
        *x, dtype = x
        parts = {"qkv": lambda: x[0].unbind(1), "kv": lambda: (x[0], *x[1].unbind(1)), "func": lambda: x}
        return varlen_attention(*parts[kind](), lengths_q, lengths_k, chosen, dtype)

    given = kind == "func"
    out, lse, found = attend(
        case, call, reference, tensors, (total_q, heads, dv), given, deterministic
    )  # fmt: skip
    end = sum(lengths_q)
    need(not out[end:].any() and (lse[:, end:] == math.inf).all(), "rows behind the sequences are not empty")
    ends = {"qkv": (end,), "kv": (end, sum(lengths_k)), "func": (end, *(sum(lengths_k),) * 2)}[kind]
    for gradient, n in zip(found, ends, strict=True):
        need(gradient is None or not gradient[n:].any(), "gradients behind the sequences are not zero")


def used_keys(case: Case) -> None:
    """Packed keys of which some are used: seqused_k and leftpad_k. Forward."""
    batch, (heads, heads_k), (d, dv) = case.pick(1, 2, 4), case.heads(), case.head_dims()
    lengths_q, lengths_k = case.lengths(batch, heads)
    used = [case.rng.randint(0, n) for n in lengths_k] if case.chance(0.7) else None
    pads = [case.rng.randint(0, n) for n in used or lengths_k] if case.chance(0.7) else None
    case.note(batch=batch, used=used, pads=pads)
    longest = max(lengths_q), max(lengths_k)
    options = case.options(heads, batch, longest, plain=True)
    tensors = (
        case.tensor(sum(lengths_q), heads, d),
        *(case.tensor(sum(lengths_k), heads_k, n) for n in (d, dv)),
    )
    bounds = case.bounds(lengths_q), case.bounds(lengths_k)
    index = [None if x is None else case.index(x) for x in (pads, used)]
    out, lse, *_ = case.run(
        lambda: interface._flash_attn_varlen_forward(
            *tensors, *bounds, *longest, 0.0, options.softmax_scale, options.causal, *options.window_size,
            options.softcap, options.alibi_slopes, leftpad_k=index[0], seqused_k=index[1],
            s_aux=options.sinks,
        )[:2]
    )  # fmt: skip
    case.check_forward(
        lambda *x: varlen_attention(*x[:3], lengths_q, lengths_k, options, x[3], pads, used),
        tensors,
        out,
        lse,
    )
    case.check_memory()


def entries(case: Case) -> None:
    """The extension module by position, and the custom ops, with outputs and gradients that are given."""
    batch, (heads, heads_k), (d, dv) = case.pick(1, 2, 3), case.heads(), case.head_dims()
    ((sq,), (sk,)) = case.lengths(1, batch * heads)
    options = replace(case.options(heads, batch, (sq, sk), plain=True), sinks=None)
    scale = d**-0.5 if options.softmax_scale is None else options.softmax_scale
    of_keys = batch, sk, heads_k
    q, k, v = case.tensor(batch, sq, heads, d), case.tensor(*of_keys, d), case.tensor(*of_keys, dv)
    given = case.output(batch, sq, heads, dv)
    window = options.window_size
    rest = options.alibi_slopes, 0.0, scale, options.causal, *window, options.softcap
    out, lse, _, state = entry.fwd(q, k, v, given, *rest, False, None)
    need(out is given, "what was returned is not out")

    def reference(*x: Tensor) -> tuple[Tensor, Tensor]:
        return attention(*x[:-1], options, x[-1])

    case.check_forward(reference, (q, k, v), out, lse)
    dout, written = case.tensor(batch, sq, heads, dv), [case.output(*x.shape) for x in (q, k, v)]
    deterministic = case.chance(0.5)
    found = entry.bwd(dout, q, k, v, out, lse, *written, *rest, deterministic, None, state)
    need(all(x is y for x, y in zip(found, written, strict=False)), "gradients are not those that were given")
    case.check_gradients(reference, (q, k, v), dout, written)
    scoring = 0.0, scale, options.causal, *window, options.softcap, options.alibi_slopes
    same = interface._wrapped_flash_attn_forward(q, k, v, *scoring, False)
    need(same_bits(same[0], out) and same_bits(same[1], lse), "the custom op gives other bits")
    again = [torch.full_like(x, math.nan, memory_format=torch.contiguous_format) for x in (q, k, v)]
    d_rows = interface._wrapped_flash_attn_backward(dout, q, k, v, out, lse, *again, *scoring, deterministic)
    case.check_gradients(reference, (q, k, v), dout, again)
    expected = (dout.double() * out.double()).sum(-1).transpose(1, 2)
    need(torch.allclose(d_rows[..., :sq].double(), expected, atol=1e-4, rtol=1e-3), "softmax_d is off")
    need(not d_rows[..., sq:].any(), "softmax_d is not zero past the queries")
    case.check_memory()
