"""From the arguments of a public function to its operation: by autograd, by a custom op, or at once.

Written for host time: arguments that are what they should be pass at a glance. The operations check them.
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
from flash_attn._calls import Cache, Options, Sequences, Tables
from flash_attn._custom_ops import _wrapped_flash_attn_forward, _wrapped_flash_attn_varlen_forward
from flash_attn._dispatch import is_watched, needs_dispatcher
from flash_attn._forward_only import forward_only

Result = Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]


def _numbers(options: Options) -> tuple[float, float | None, bool, int, int, float]:
    """Return what is no tensor of `options`, as the types that a custom op takes."""
    dropout_p, softmax_scale, causal, window_size, softcap, _, _ = options
    return (
        as_float(dropout_p, "dropout_p"),
        None if softmax_scale is None else as_float(softmax_scale, "softmax_scale"),
        as_flag(causal, "causal"), *check.as_window(window_size), as_float(softcap, "softcap"),
    )  # fmt: skip


def _result(out: Tensor, lse: Tensor, probs: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return out, lse, torch.empty(0, dtype=out.dtype, device=out.device) if probs is None else probs


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
    inputs: tuple[Tensor, ...], options: Options, deterministic: bool, return_attn_probs: bool,
    out: Tensor | None = None,
) -> Result:  # fmt: skip
    """`flash_attn_func` of (q, k, v), (q, kv) or (qkv,)."""
    if type(return_attn_probs) is not bool:
        return_attn_probs = as_flag(return_attn_probs, "return_attn_probs")
    alibi_slopes, s_aux = options[5], options[6]
    if alibi_slopes is not None:
        refuse_gradients(alibi_slopes=alibi_slopes)
    if must_record(inputs if s_aux is None else (*inputs, s_aux)):
        _refuse_out(out)
        result = record(
            FlashAttention, s_aux, alibi_slopes, _numbers(options), as_flag(deterministic, "deterministic"),
            return_attn_probs, *inputs,
        )  # fmt: skip
        return result if return_attn_probs else result[0]
    q, k, v = inputs if len(inputs) == 3 else split(inputs)
    plain = type(q) is type(k) is type(v) is Tensor and alibi_slopes is None is s_aux and out is None
    if is_watched() or (q.is_meta if plain else needs_dispatcher(*inputs, alibi_slopes, out, s_aux)):
        made, lse, probs, _ = _wrapped_flash_attn_forward(
            q, k, v, *_numbers(options), alibi_slopes, return_attn_probs, s_aux=s_aux
        )  # fmt: skip
        out = _written(made, out)
    else:
        out, lse, probs, _ = _operations.forward(
            q, k, v, options, return_attn_probs, out, None, return_attn_probs
        )
    return _result(out, lse, probs) if return_attn_probs else out


def attend_varlen(
    inputs: tuple[Tensor, ...], sequences: Sequences, options: Options, deterministic: bool,
    return_attn_probs: bool, out: Tensor | None = None, need_lse: bool = False,
) -> Result:  # fmt: skip
    """`flash_attn_varlen_func` of (q, k, v), (q, kv) or (qkv,); `need_lse` makes it (out, softmax_lse)."""
    if type(return_attn_probs) is not bool or type(need_lse) is not bool:
        return_attn_probs = as_flag(return_attn_probs, "return_attn_probs")
        need_lse = as_flag(need_lse, "return_softmax_lse")
    alibi_slopes, s_aux = options[5], options[6]
    if alibi_slopes is not None:
        refuse_gradients(alibi_slopes=alibi_slopes)
    cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, _, seqused_k, block_table = sequences
    recorded = inputs if s_aux is None else (*inputs, s_aux)
    records = must_record(recorded)
    indices = cu_seqlens_q, cu_seqlens_k, block_table, seqused_k
    dispatched = needs_dispatcher(*inputs, *indices, alibi_slopes, out, s_aux)
    if records or dispatched:
        _refuse_out(out if records else None)
        numbers = _numbers(options)
        dropout_p, softmax_scale, causal, left, right, softcap = numbers
        options = dropout_p, softmax_scale, causal, (left, right), softcap, alibi_slopes, s_aux
        longest_q = check.check_max_seqlen(longest_q, "max_seqlen_q")
        longest_k = check.check_max_seqlen(longest_k, "max_seqlen_k")
    if records and block_table is None and seqused_k is None:
        result = record(
            VarlenFlashAttention, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, s_aux, alibi_slopes,
            numbers, as_flag(deterministic, "deterministic"), return_attn_probs, *inputs,
        )  # fmt: skip
        return result if return_attn_probs else result[:2] if need_lse else result[0]
    if dispatched:
        made, lse, probs, _ = _wrapped_flash_attn_varlen_forward(
            *split(inputs), cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, *numbers, alibi_slopes,
            return_attn_probs, block_table, None, seqused_k, s_aux=s_aux,
        )  # fmt: skip
        out = _written(made, out)
    else:
        q, k, v = split(inputs)
        arguments = q, k, v, sequences, options, return_attn_probs, out, None, return_attn_probs or need_lse
        if records:
            what = "flash_attn_varlen_func with a block_table or seqused_k"
            run = partial(_operations.varlen_forward, *arguments)
            out, lse, probs, _ = forward_only(what, run, *recorded)
        else:
            out, lse, probs, _ = _operations.varlen_forward(*arguments)
    if return_attn_probs:
        return _result(out, lse, probs)
    return (out, lse) if need_lse else out


def record_cache(
    q: Tensor, cache: Cache, k: Tensor | None, v: Tensor | None, tables: Tables | None, options: Options,
    out: Tensor | None, num_splits: int, need_lse: bool,
) -> tuple[Tensor, Any]:  # fmt: skip
    """`_kvcache.forward_kvcache` where a tensor may require grad: none gets any."""
    slopes, s_aux = options[5], options[6]
    refuse_gradients(alibi_slopes=slopes)
    if tables is not None:
        refuse_gradients(rotary_cos=tables[0], rotary_sin=tables[1])
    if k is not None:
        refuse_gradients(k_cache=cache.k, v_cache=cache.v)
    run = partial(_kvcache.forward_kvcache, q, cache, k, v, tables, options, out, num_splits, need_lse)
    return forward_only("flash_attn_with_kvcache", run, q, cache.k, cache.v, k, v, s_aux)
