"""Autograd of attention: saves the inputs, the output and the LSE, and recomputes the probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flash_attn import _custom_ops as ops
from flash_attn._dispatch import needs_dispatcher
from flash_attn._forward_only import differentiable_once

InputGradients = tuple[Tensor | None, ...]
"""Of the arguments of `forward`, None where there is none."""


def must_record(inputs: Sequence[Tensor]) -> bool:
    """Return whether autograd must record the call. Arguments that are no tensors are left to the checks.

    Raises:
        NotImplementedError: an input carries a tangent, of which the kernels would know nothing.
    """
    needed = False
    try:
        for x in inputs:
            needed |= x.requires_grad
    except AttributeError:
        return False
    if forward_ad._current_level >= 0:
        _refuse_tangents(inputs)
    return needed and torch.is_grad_enabled()


def _refuse_tangents(inputs: Sequence[Tensor]) -> None:
    if any(forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise NotImplementedError("flash_attn has no forward-mode derivative: take gradients in reverse mode")


def split(inputs: Sequence[Any]) -> tuple[Any, ...]:
    """Return q, k, v of (q, k, v), (q, kv) or (qkv,), the latter packed in the last dimension but two.

    A packed entry of None stands for that many of them.
    """
    if len(inputs) == 3:
        return tuple(inputs)
    *unpacked, packed = inputs
    return (*unpacked, *((None,) * (3 - len(unpacked)) if packed is None else packed.unbind(-3)))


def record(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Apply an autograd function. torch.compile takes no tensor twice: views stand in for repeated ones."""
    if torch.compiler.is_compiling():
        distinct: list[Any] = []
        for x in arguments:
            repeated = isinstance(x, Tensor) and any([x is y for y in distinct])
            distinct.append(x.view_as(x) if repeated else x)
        arguments = tuple(distinct)
    return function.apply(*arguments)


def _buffers(inputs: Sequence[Tensor], needed: Sequence[bool]) -> tuple[list[Tensor | None], InputGradients]:
    """Return unset gradients of the inputs that need one, and their parts dq, dk and dv."""
    gradients = [torch.empty_like(x) if need else None for x, need in zip(inputs, needed, strict=True)]
    return gradients, split(gradients)


def _function(name: str, *tensors: Any) -> Any:
    """Return what a custom op computes, or the op itself where the dispatcher must see the call."""
    return getattr(ops, f"_wrapped{name}") if needs_dispatcher(*tensors) else ops.plain(name)


def _row_sums(dout: Tensor, out: Tensor, dtype: torch.dtype) -> Tensor:
    """Return rowsum(dO * O) ([b,] h, rows) of dout and out ([b,] rows, h, dv)."""
    return (dout.to(dtype) * out.to(dtype)).sum(-1).transpose(-1, -2)


def _sink_gradient(sinks: Tensor, d: Tensor, lse: Tensor) -> Tensor:
    """Return the gradient of sinks (h,): a sink has the value 0, so that dS = -P D with D = rowsum(dO * O).

    d and lse are ([b,] h, rows). Rows of no sequence, where anything may lie, have an LSE of +inf.
    """
    probs = (sinks.to(lse.dtype).unsqueeze(-1) - lse).exp()
    dscores = (probs * d).masked_fill(lse == inf, 0.0)
    return -dscores.sum(-1).reshape(-1, sinks.shape[0]).sum(0).to(sinks.dtype)


class FlashAttention(torch.autograd.Function):
    """`inputs` as `split` takes them, of fixed length -> (out, softmax_lse, S_dmask).

    `scoring` is (dropout_p, softmax_scale, causal, window_left, window_right, softcap), `sinks` s_aux.
    """

    @staticmethod
    def forward(ctx: Any, sinks: Tensor | None, slopes: Tensor | None, scoring: tuple, deterministic: bool,
                return_softmax: bool, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        run = _function("_flash_attn_forward", *inputs, slopes, sinks)
        out, lse, probs, rng_state = run(*split(inputs), *scoring, slopes, return_softmax, s_aux=sinks)
        ctx.save_for_backward(out, lse, rng_state, slopes, sinks, *inputs)
        ctx.scoring, ctx.deterministic = scoring, deterministic
        ctx.mark_non_differentiable(lse, probs)
        ctx.set_materialize_grads(False)  # no zeros for these two
        return out, lse, probs

    @staticmethod
    @differentiable_once("flash_attn")
    def backward(ctx: Any, dout: Tensor | None, *unused: Tensor | None) -> InputGradients:
        if dout is None:
            return (None,) * len(ctx.needs_input_grad)
        out, lse, rng_state, slopes, sinks, *inputs = ctx.saved_tensors
        gradients, parts = _buffers(inputs, ctx.needs_input_grad[-len(inputs) :])
        run = _function("_flash_attn_backward", *inputs, dout, out, lse, slopes)
        softmax_d = run(
            dout, *split(inputs), out, lse, *parts, *ctx.scoring, slopes, ctx.deterministic, rng_state
        )  # fmt: skip
        dsinks = None
        if ctx.needs_input_grad[0]:
            dsinks = _sink_gradient(sinks, softmax_d[..., : lse.shape[-1]], lse)
        return dsinks, None, None, None, None, *gradients


class VarlenFlashAttention(torch.autograd.Function):
    """The same of sequences packed end to end."""

    @staticmethod
    def forward(ctx: Any, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
                sinks: Tensor | None, slopes: Tensor | None, scoring: tuple, deterministic: bool,
                return_softmax: bool, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        run = _function(
            "_flash_attn_varlen_forward", *inputs, cu_seqlens_q, cu_seqlens_k, slopes, sinks
        )  # fmt: skip
        out, lse, probs, rng_state = run(
            *split(inputs), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *scoring, slopes,
            return_softmax, s_aux=sinks,
        )  # fmt: skip
        ctx.save_for_backward(out, lse, rng_state, slopes, sinks, cu_seqlens_q, cu_seqlens_k, *inputs)
        ctx.max_seqlens, ctx.scoring, ctx.deterministic = (max_seqlen_q, max_seqlen_k), scoring, deterministic
        ctx.mark_non_differentiable(lse, probs)
        ctx.set_materialize_grads(False)  # no zeros for these two
        return out, lse, probs

    @staticmethod
    @differentiable_once("flash_attn")
    def backward(ctx: Any, dout: Tensor | None, *unused: Tensor | None) -> InputGradients:
        if dout is None:
            return (None,) * len(ctx.needs_input_grad)
        out, lse, rng_state, slopes, sinks, cu_seqlens_q, cu_seqlens_k, *inputs = ctx.saved_tensors
        gradients, parts = _buffers(inputs, ctx.needs_input_grad[-len(inputs) :])
        run = _function(
            "_flash_attn_varlen_backward", *inputs, dout, out, lse, cu_seqlens_q, cu_seqlens_k, slopes
        )  # fmt: skip
        run(
            dout, *split(inputs), out, lse, *parts, cu_seqlens_q, cu_seqlens_k, *ctx.max_seqlens,
            *ctx.scoring, slopes, ctx.deterministic, rng_state,
        )  # fmt: skip
        dsinks = None
        if ctx.needs_input_grad[4]:
            dsinks = _sink_gradient(sinks, _row_sums(dout, out, lse.dtype), lse)
        return *(None,) * 4, dsinks, *(None,) * 4, *gradients
