"""From the arguments of a public function to its operation: by autograd, by a custom op, or at once.

Written for host time: arguments that are what they should be pass at a glance. `_operations` checks them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from flash_attn import _kvcache, _operations
from flash_attn import _validation as check
from flash_attn._arguments import as_flag, as_float, refuse_gradients
from flash_attn._autograd import FlashAttention, VarlenFlashAttention, must_record, record, split
from flash_attn._custom_ops import _wrapped_flash_attn_forward, _wrapped_flash_attn_varlen_forward
from flash_attn._dispatch import is_watched, needs_dispatcher
from flash_attn._forward_only import forward_only

Window = tuple[int, int]
Scoring = tuple[float, float | None, bool, int, int, float]
Result = Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]


def _result(return_attn_probs: bool, out: Tensor, lse: Tensor, probs: Tensor | None) -> Result:
    if not return_attn_probs:
        return out
    return out, lse, torch.empty(0, dtype=out.dtype, device=out.device) if probs is None else probs


def window(window_size: Window) -> tuple[int, int]:
    if type(window_size) is tuple and len(window_size) == 2:
        left, right = window_size
        if type(left) is int and type(right) is int:
            return left, right
    return check.as_window(window_size)


def _numbers(scoring: tuple[Any, ...]) -> Scoring:
    """Return (dropout_p, softmax_scale, causal, left, right, softcap) as the types that a custom op takes."""
    dropout_p, softmax_scale, causal, left, right, softcap = scoring
    return (
        as_float(dropout_p, "dropout_p"),
        None if softmax_scale is None else as_float(softmax_scale, "softmax_scale"),
        as_flag(causal, "causal"), *check.as_window((left, right)), as_float(softcap, "softcap"),
    )  # fmt: skip


def _refuse_out(out: Tensor | None) -> None:
    if out is not None:
        raise NotImplementedError("out must be None where a tensor requires grad: forward only")


def _written(made: Tensor, out: Tensor | None) -> Tensor:
    """Return `out`, if given, with what the custom op has made."""
    if out is None:
        return made
    check.check_like(out, "out", made, "the result")
    return out.copy_(made)


def attend(
    inputs: tuple[Tensor, ...], dropout_p: float, softmax_scale: float | None, causal: bool,
    window_size: Window, softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
    return_attn_probs: bool, out: Tensor | None = None, s_aux: Tensor | None = None,
) -> Result:  # fmt: skip
    """`flash_attn_func` of (q, k, v), (q, kv) or (qkv,)."""
    if type(return_attn_probs) is not bool:
        return_attn_probs = as_flag(return_attn_probs, "return_attn_probs")
    scoring = (dropout_p, softmax_scale, causal, *window(window_size), softcap)
    if alibi_slopes is not None:
        refuse_gradients(alibi_slopes=alibi_slopes)
    if must_record(inputs if s_aux is None else (*inputs, s_aux)):
        _refuse_out(out)
        result = record(
            FlashAttention, s_aux, alibi_slopes, _numbers(scoring), as_flag(deterministic, "deterministic"),
            return_attn_probs, *inputs,
        )  # fmt: skip
        return result if return_attn_probs else result[0]
    q, k, v = split(inputs)
    plain = type(q) is type(k) is type(v) is Tensor and alibi_slopes is None is s_aux and out is None
    if is_watched() or (q.is_meta if plain else needs_dispatcher(*inputs, alibi_slopes, out, s_aux)):
        made, lse, probs, _ = _wrapped_flash_attn_forward(
            q, k, v, *_numbers(scoring), alibi_slopes, return_attn_probs, s_aux=s_aux
        )  # fmt: skip
        out = _written(made, out)
    else:
        out, lse, probs, _ = _operations.forward(
            q, k, v, *scoring, alibi_slopes, return_attn_probs, out=out, need_lse=return_attn_probs,
            s_aux=s_aux,
        )  # fmt: skip
    return _result(return_attn_probs, out, lse, probs)


def attend_varlen(
    inputs: tuple[Tensor, ...], cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float, softmax_scale: float | None, causal: bool, window_size: Window,
    softcap: float, alibi_slopes: Tensor | None, deterministic: bool, return_attn_probs: bool,
    block_table: Tensor | None = None, out: Tensor | None = None, seqused_k: Tensor | None = None,
    need_lse: bool = False, s_aux: Tensor | None = None,
) -> Result:  # fmt: skip
    """`flash_attn_varlen_func` of (q, k, v), (q, kv) or (qkv,); `need_lse` makes it (out, softmax_lse)."""
    if type(return_attn_probs) is not bool or type(need_lse) is not bool:
        return_attn_probs = as_flag(return_attn_probs, "return_attn_probs")
        need_lse = as_flag(need_lse, "return_softmax_lse")
    scoring = (dropout_p, softmax_scale, causal, *window(window_size), softcap)
    if alibi_slopes is not None:
        refuse_gradients(alibi_slopes=alibi_slopes)
    recorded = inputs if s_aux is None else (*inputs, s_aux)
    records = must_record(recorded)
    indices = cu_seqlens_q, cu_seqlens_k, block_table, seqused_k
    dispatched = needs_dispatcher(*inputs, *indices, alibi_slopes, out, s_aux)
    if records or dispatched:
        _refuse_out(out if records else None)
        scoring = _numbers(scoring)
        max_seqlen_q = check.check_max_seqlen(max_seqlen_q, "max_seqlen_q")
        max_seqlen_k = check.check_max_seqlen(max_seqlen_k, "max_seqlen_k")
    if records and block_table is None and seqused_k is None:
        result = record(
            VarlenFlashAttention, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, s_aux, alibi_slopes,
            scoring, as_flag(deterministic, "deterministic"), return_attn_probs, *inputs,
        )  # fmt: skip
        return result if return_attn_probs else result[:2] if need_lse else result[0]
    arguments = (
        *split(inputs), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *scoring, alibi_slopes,
        return_attn_probs, block_table, None, seqused_k,
    )  # fmt: skip
    if dispatched:
        made, lse, probs, _ = _wrapped_flash_attn_varlen_forward(*arguments, s_aux=s_aux)
        out = _written(made, out)
    else:
        arguments = (*arguments, out, None, return_attn_probs or need_lse, s_aux)
        if records:
            what = "flash_attn_varlen_func with a block_table or seqused_k"
            run = partial(_operations.varlen_forward, *arguments)
            out, lse, probs, _ = forward_only(what, run, *recorded)
        else:
            out, lse, probs, _ = _operations.varlen_forward(*arguments)
    return (out, lse) if need_lse and not return_attn_probs else _result(return_attn_probs, out, lse, probs)


def record_cache(*arguments: Any) -> tuple[Tensor, Any]:
    """Return (out, lse) of `_kvcache.forward_kvcache` where a tensor may require grad: none gets any."""
    q, k_cache, v_cache, k, v, _, rotary_cos, rotary_sin, _, _, _, alibi_slopes, *_, s_aux = arguments
    refuse_gradients(alibi_slopes=alibi_slopes, rotary_cos=rotary_cos, rotary_sin=rotary_sin)
    if k is not None:
        refuse_gradients(k_cache=k_cache, v_cache=v_cache)
    inputs = q, k_cache, v_cache, k, v, s_aux
    return forward_only("flash_attn_with_kvcache", partial(_kvcache.forward_kvcache, *arguments), *inputs)
