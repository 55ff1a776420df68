"""The operations under flash-attn's private names, and as custom ops `torch.ops.flash_attn.*`.

The ops (`_wrapped_...`) go through torch's dispatcher, so that torch.compile, fake tensors, tensor
subclasses and dispatch modes (selective checkpointing, FLOP counters) see one opaque operation. The functions
run at once unless one of these is there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from flash_attn import _operations
from flash_attn import _validation as check
from flash_attn._calls import Differentiated, Sequences, new
from flash_attn._dispatch import needs_dispatcher
from flash_attn._forward_only import forward_only
from flash_attn._layout import empty_out, empty_softmax_d, lse_dtype, probs_shape

Filled = tuple[Tensor, Tensor, Tensor, Tensor]
"""Outputs, of which none is None."""

_SCORING = (
    "float dropout_p, float? softmax_scale, bool causal, "
    "SymInt window_size_left{}, SymInt window_size_right{}, "
)
_FORWARD_TAIL = "float softcap{}, Tensor? alibi_slopes{}, bool return_softmax{}"
_LENGTHS = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
_GRADIENTS = (
    "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    "Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv, "
)
_BACKWARD_TAIL = "float softcap, Tensor? alibi_slopes, bool deterministic, Tensor? rng_state=None"
_OUTPUTS = " -> (Tensor, Tensor, Tensor, Tensor)"

_SCHEMAS = {
    "_flash_attn_forward": (
        "(Tensor q, Tensor k, Tensor v, " + _SCORING.format("", "") + _FORWARD_TAIL.format("", "", "")
        + ", Tensor? s_aux=None)" + _OUTPUTS
    ),
    "_flash_attn_varlen_forward": (
        "(Tensor q, Tensor k, Tensor v, " + _LENGTHS + _SCORING.format("=-1", "=-1")
        + _FORWARD_TAIL.format("=0.0", "=None", "=False")
        + ", Tensor? block_table=None, Tensor? leftpad_k=None, Tensor? seqused_k=None, "
        + "bool zero_tensors=False, SymInt num_splits=0, Tensor? s_aux=None)" + _OUTPUTS
    ),
    "_flash_attn_backward": "(" + _GRADIENTS + _SCORING.format("", "") + _BACKWARD_TAIL + ") -> Tensor",
    "_flash_attn_varlen_backward": (
        "(" + _GRADIENTS + _LENGTHS + _SCORING.format("", "") + _BACKWARD_TAIL
        + ", bool zero_tensors=False) -> Tensor"
    ),
}  # fmt: skip


def _dispatched(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate what a custom op of that name computes: a call goes through the op where it must."""
    name = function.__name__

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        given = (*arguments, *named.values())
        if needs_dispatcher(*given):
            return getattr(torch.ops.flash_attn, name)(*arguments, **named)
        if name.endswith("backward"):
            return function(*arguments, **named)
        return forward_only(name, lambda: function(*arguments, **named), *given)

    return call


def _filled(out: Tensor, lse: Tensor, probs: Tensor | None, rng_state: Tensor | None) -> Filled:
    """Replace what a call has not made by tensors of any content, for callers that expect four."""
    if probs is None:
        probs = torch.empty(0, dtype=out.dtype, device=out.device)
    if rng_state is None:
        rng_state = torch.empty(2, dtype=torch.int64, device=out.device)
    return out, lse, probs, rng_state


@_dispatched
def _flash_attn_forward(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float | None, causal: bool,
    window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: Tensor | None,
    return_softmax: bool, s_aux: Tensor | None = None,
) -> Filled:  # fmt: skip
    """Return (out, softmax_lse, S_dmask, rng_state); shapes as in `flash_attn_func`, no gradients."""
    window_size = window_size_left, window_size_right
    options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, s_aux
    return _filled(*_operations.forward(q, k, v, options, return_softmax))


@_dispatched
def _flash_attn_varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float, softmax_scale: float | None, causal: bool,
    window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, return_softmax: bool = False, block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None, seqused_k: Tensor | None = None, zero_tensors: bool = False,
    num_splits: int = 0, s_aux: Tensor | None = None,
) -> Filled:  # fmt: skip
    """Return (out, softmax_lse, S_dmask, rng_state); shapes as in `flash_attn_varlen_func`, no gradients.

    `seqused_k` int32 (b,) limits the keys used per sequence, `leftpad_k` int32 (b,) skips leading ones,
    counted in it. Rows outside the sequences are zero whatever `zero_tensors` says. `num_splits` is as in
    `flash_attn_with_kvcache` and counts where there is a `block_table`.
    """
    sequences = Sequences(
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, leftpad_k, seqused_k, block_table
    )
    window_size = window_size_left, window_size_right
    options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, s_aux
    return _filled(
        *_operations.varlen_forward(q, k, v, sequences, options, return_softmax, num_splits=num_splits)
    )


@_dispatched
def _flash_attn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor | None,
    dk: Tensor | None, dv: Tensor | None, dropout_p: float, softmax_scale: float | None, causal: bool,
    window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: Tensor | None,
    deterministic: bool, rng_state: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Write dq, dk, dv, those that are not None; return softmax_d, fp32.

    softmax_d (b, h, sq rounded up to WORKSPACE_ROWS) is rowsum(dO * O) of each query, zero past sq.
    `deterministic` adds dq up in a fixed order.
    """
    tensors = new(Differentiated, (dout, q, k, v, out, softmax_lse))
    window_size = window_size_left, window_size_right
    options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, None
    return _operations.backward(tensors, (dq, dk, dv), options, deterministic, rng_state)


@_dispatched
def _flash_attn_varlen_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor | None,
    dk: Tensor | None, dv: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float, softmax_scale: float | None, causal: bool, window_size_left: int,
    window_size_right: int, softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
    rng_state: Tensor | None = None, zero_tensors: bool = False,
) -> Tensor:  # fmt: skip
    """Write dq, dk, dv, those that are not None, zero past the sequences; return softmax_d.

    softmax_d (h, total_q + WORKSPACE_ROWS * b) is fp32, its layout the backend's own.
    """
    tensors = new(Differentiated, (dout, q, k, v, out, softmax_lse))
    sequences = Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    window_size = window_size_left, window_size_right
    options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, None
    return _operations.backward(tensors, (dq, dk, dv), options, deterministic, rng_state, sequences)


def _fake_outputs(
    q: Tensor, v: Tensor, lse_shape: tuple[int, ...], probs: tuple[int, ...], has_probs: bool
) -> Filled:
    out = empty_out(q, q.shape[-1], v.shape[-1])
    lse = q.new_empty(lse_shape, dtype=lse_dtype(q.dtype))
    return out, lse, q.new_empty(probs if has_probs else (0,)), q.new_empty((2,), dtype=torch.int64)


def _check_bias(q: Tensor, batch: int, alibi_slopes: Tensor | None, s_aux: Tensor | None = None) -> None:
    if alibi_slopes is not None:
        check.check_alibi(alibi_slopes, q, batch)
    if s_aux is not None:
        check.check_sinks(s_aux, q)


def _fake_forward(
    q, k, v, dropout_p, softmax_scale, causal, left, right, softcap, alibi_slopes, return_softmax, s_aux=None
):  # fmt: skip
    (batch, seqlen_q, num_heads, _), k_shape, _ = check.check_qkv(q, k, v, 4, 4)
    check.check_batch(k, batch)
    _check_bias(q, batch, alibi_slopes, s_aux)
    probs = probs_shape(batch, num_heads, seqlen_q, k_shape[1])
    return _fake_outputs(q, v, (batch, num_heads, seqlen_q), probs, return_softmax and dropout_p > 0.0)


def _fake_varlen_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
    left=-1, right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None, leftpad_k=None,
    seqused_k=None, zero_tensors=False, num_splits=0, s_aux=None,
):  # fmt: skip
    check.check_qkv(q, k, v, 3, 3 if block_table is None else 4)
    batch = _operations.check_sequences(q, cu_seqlens_q, cu_seqlens_k)
    sequences = Sequences(
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, leftpad_k, seqused_k, block_table
    )
    _operations.check_key_bounds(q, k, batch, sequences)
    _check_bias(q, batch, alibi_slopes, s_aux)
    total_q, num_heads, _ = q.shape
    probs = probs_shape(batch, num_heads, max_seqlen_q, max_seqlen_k)
    return _fake_outputs(q, v, (num_heads, total_q), probs, return_softmax and dropout_p > 0.0)


def _fake_backward(
    dout, q, k, v, out, lse, dq, dk, dv, dropout_p, softmax_scale, causal, left, right, softcap, alibi_slopes,
    *unused, **unused_named,
):  # fmt: skip
    (batch, seqlen_q, num_heads, _), _, _ = check.check_qkv(q, k, v, 4, 4)
    check.check_batch(k, batch)
    _check_bias(q, batch, alibi_slopes)
    _operations.check_differentiated(Differentiated(dout, q, k, v, out, lse), (batch, num_heads, seqlen_q))
    return empty_softmax_d(q)


def _fake_varlen_backward(
    dout, q, k, v, out, lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
    softmax_scale, causal, left, right, softcap, alibi_slopes, *unused, **unused_named,
):  # fmt: skip
    (total_q, num_heads, _), _, _ = check.check_qkv(q, k, v, 3, 3)
    batch = _operations.check_sequences(q, cu_seqlens_q, cu_seqlens_k)
    _check_bias(q, batch, alibi_slopes)
    _operations.check_differentiated(Differentiated(dout, q, k, v, out, lse), (num_heads, total_q))
    return empty_softmax_d(q, batch)


def plain(name: str) -> Callable[..., Any]:
    """Return what the function or custom op of that name computes, for tensors that it can read.

    It is looked up in `sys.modules`: an operator is registered once in a process, whereas the package may be
    imported again.
    """
    return getattr(sys.modules[__name__], name).__wrapped__


def _no_gradient(ctx: Any, *unused: Any) -> Any:
    raise NotImplementedError("an operator of flash_attn has no gradient: call the public function")


def _register(name: str) -> Any:
    """Define the custom op of the function of that name, unless it is there already, and return it."""
    if not hasattr(torch.ops.flash_attn, name):
        qualified = f"flash_attn::{name}"
        torch.library.define(qualified, _SCHEMAS[name])
        fake = name.replace("_flash_attn", "_fake")
        torch.library.impl(qualified, "default", lambda *a, **named: plain(name)(*a, **named))
        torch.library.register_fake(
            qualified, lambda *a, **named: getattr(sys.modules[__name__], fake)(*a, **named)
        )
        if name.endswith("forward"):
            torch.library.register_autograd(qualified, _no_gradient)
    return getattr(torch.ops.flash_attn, name)


_wrapped_flash_attn_forward = _register("_flash_attn_forward")
_wrapped_flash_attn_varlen_forward = _register("_flash_attn_varlen_forward")
_wrapped_flash_attn_backward = _register("_flash_attn_backward")
_wrapped_flash_attn_varlen_backward = _register("_flash_attn_varlen_backward")
