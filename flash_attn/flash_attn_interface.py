"""The public functions, with the names, argument order, defaults and shapes of flash-attn 2.8.3.

b = batch, s = sequence length, h = query heads, hk = key/value heads (h is a multiple of hk), d = head dim, 1
to 256. fp16 and bf16 on CUDA; those, fp32 and fp64 on CPU. Exact attention without the score matrix in
memory: Dao et al., "FlashAttention" (2022); Dao, "FlashAttention-2" (2023). From here a call goes to
`_operations`, then to `_cuda` or `_cpu`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import flash_attn_2_cuda as flash_attn_gpu
from flash_attn import _kvcache, _operations
from flash_attn import _validation as check
from flash_attn._arguments import as_flag, as_float, refuse_gradients
from flash_attn._autograd import FlashAttention, VarlenFlashAttention, must_record, record, split
from flash_attn._cuda_kvcache import kvcache_num_splits
from flash_attn._custom_ops import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
    _wrapped_flash_attn_backward,
    _wrapped_flash_attn_forward,
    _wrapped_flash_attn_varlen_backward,
    _wrapped_flash_attn_varlen_forward,
)
from flash_attn._dispatch import needs_dispatcher
from flash_attn._forward_only import forward_only
from flash_attn._layout import PROBS_BLOCK, maybe_contiguous, round_multiple

__all__ = [
    "_flash_attn_backward",
    "_flash_attn_forward",
    "_flash_attn_varlen_backward",
    "_flash_attn_varlen_forward",
    "_get_block_size_n",
    "_wrapped_flash_attn_backward",
    "_wrapped_flash_attn_forward",
    "_wrapped_flash_attn_varlen_backward",
    "_wrapped_flash_attn_varlen_forward",
    "flash_attn_func",
    "flash_attn_gpu",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "kvcache_num_splits",
    "maybe_contiguous",
    "round_multiple",
]

Window = tuple[int, int]
Scoring = tuple[float, float | None, bool, int, int, float]
Result = Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]
REFUSALS = (TypeError, ValueError, NotImplementedError)
MAX_WINDOW = 2**31


def _get_block_size_n(device: torch.device, head_dim: int, is_dropout: bool, is_causal: bool) -> int:
    """Return the number of keys that S_dmask is rounded up to."""
    return PROBS_BLOCK


def _result(return_attn_probs: bool, out: Tensor, lse: Tensor, probs: Tensor | None) -> Result:
    if not return_attn_probs:
        return out
    return out, lse, torch.empty(0, dtype=out.dtype, device=out.device) if probs is None else probs


def _window(window_size: Window) -> tuple[int, int]:
    if type(window_size) is tuple and len(window_size) == 2:
        left, right = window_size
        if type(left) is int and type(right) is int and -1 <= left < MAX_WINDOW and -1 <= right < MAX_WINDOW:
            return left, right
    return check.as_window(window_size)


def _scoring(
    dropout_p: float, softmax_scale: float | None, causal: bool, window_size: Window, softcap: float
) -> Scoring:
    """Return the arguments as the numbers that they stand for."""
    return (
        dropout_p if type(dropout_p) is float else as_float(dropout_p, "dropout_p"),
        softmax_scale
        if softmax_scale is None or type(softmax_scale) is float
        else as_float(softmax_scale, "softmax_scale"),
        causal if type(causal) is bool else as_flag(causal, "causal"),
        *_window(window_size),
        softcap if type(softcap) is float else as_float(softcap, "softcap"),
    )


def _records(inputs: tuple[Tensor, ...], out: Tensor | None, alibi_slopes: Tensor | None) -> bool:
    """Return whether autograd must record a call, in which case no `out` may be given."""
    refuse_gradients(alibi_slopes=alibi_slopes)
    if not must_record(inputs):
        return False
    if out is not None:
        raise NotImplementedError("out must be None where a tensor requires grad: forward only")
    return True


def _written(made: Tensor, out: Tensor | None) -> Tensor:
    """Return `out`, if given, with what the custom op has made."""
    if out is None:
        return made
    check.check_like(out, "out", made, "the result")
    return out.copy_(made)


def _attend(
    inputs: tuple[Tensor, ...], dropout_p: float, softmax_scale: float | None, causal: bool,
    window_size: Window, softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
    return_attn_probs: bool, out: Tensor | None = None, s_aux: Tensor | None = None,
) -> Result:  # fmt: skip
    """`flash_attn_func` of (q, k, v), (q, kv) or (qkv,)."""
    if type(return_attn_probs) is not bool:
        return_attn_probs = as_flag(return_attn_probs, "return_attn_probs")
    scoring = _scoring(dropout_p, softmax_scale, causal, window_size, softcap)
    if _records(inputs if s_aux is None else (*inputs, s_aux), out, alibi_slopes):
        result = record(
            FlashAttention, s_aux, alibi_slopes, scoring, as_flag(deterministic, "deterministic"),
            return_attn_probs, *inputs,
        )  # fmt: skip
        return result if return_attn_probs else result[0]
    q, k, v = split(inputs)
    arguments = q, k, v, *scoring, alibi_slopes, return_attn_probs
    if needs_dispatcher(*inputs, alibi_slopes, out, s_aux):
        made, lse, probs, _ = _wrapped_flash_attn_forward(*arguments, s_aux=s_aux)
        out = _written(made, out)
    else:
        out, lse, probs, _ = _operations.forward(
            *arguments, out=out, need_lse=return_attn_probs, s_aux=s_aux
        )  # fmt: skip
    return _result(return_attn_probs, out, lse, probs)


def _attend_varlen(
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
    scoring = _scoring(dropout_p, softmax_scale, causal, window_size, softcap)
    max_seqlen_q = check.check_max_seqlen(max_seqlen_q, "max_seqlen_q")
    max_seqlen_k = check.check_max_seqlen(max_seqlen_k, "max_seqlen_k")
    recorded = inputs if s_aux is None else (*inputs, s_aux)
    records = _records(recorded, out, alibi_slopes)
    if records and block_table is None and seqused_k is None:
        result = record(
            VarlenFlashAttention, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, s_aux, alibi_slopes,
            scoring, as_flag(deterministic, "deterministic"), return_attn_probs, *inputs,
        )  # fmt: skip
        return result if return_attn_probs else result[:2] if need_lse else result[0]
    q, k, v = split(inputs)
    arguments = (
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *scoring, alibi_slopes,
        return_attn_probs, block_table,
    )  # fmt: skip
    indices = cu_seqlens_q, cu_seqlens_k, block_table, seqused_k
    if needs_dispatcher(*inputs, *indices, alibi_slopes, out, s_aux):
        made, lse, probs, _ = _wrapped_flash_attn_varlen_forward(
            *arguments, seqused_k=seqused_k, s_aux=s_aux
        )  # fmt: skip
        out = _written(made, out)
    else:
        run = partial(
            _operations.varlen_forward, *arguments, seqused_k=seqused_k, out=out,
            need_lse=return_attn_probs or need_lse, s_aux=s_aux,
        )  # fmt: skip
        what = "flash_attn_varlen_func with a block_table or seqused_k"
        out, lse, probs, _ = forward_only(what, run, *recorded) if records else run()
    return (out, lse) if need_lse and not return_attn_probs else _result(return_attn_probs, out, lse, probs)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    out: Tensor | None = None,
    s_aux: Tensor | None = None,
) -> Result:
    """Attention softmax(scores) v, where scores = q k^T * softmax_scale, capped, biased and masked.

    Positions are aligned at the last query and the last key: query i stands at key i + sk - sq. A query that
    sees no key gives zeros and an LSE of +inf. Differentiable once in q, k and v.

    Args:
        q: (b, sq, h, d). Only the last dimension need be contiguous; a copy is made if it is not.
        k, v: (b, sk, hk, d) and (b, sk, hk, dv), of q's dtype and device; dv may differ from d.
        dropout_p: probability in [0, 1) of dropping an attention probability; 0.0 in evaluation.
        softmax_scale: factor of q k^T, 1/sqrt(d) if None.
        causal: hide keys after the query's position.
        window_size: (left, right), keys visible on each side of the query's position; -1 for all of them.
        softcap: if positive, scores become softcap * tanh(scores / softcap), before bias and mask; not with
            dropout.
        alibi_slopes: fp32 (h,) or (b, h); adds -slope * |i + sk - sq - j| (Press et al., "Train Short, Test
            Long").
        deterministic: the same gradients, bit for bit, on every run; on CUDA slower, and with 4 bytes more
            per query and head during the backward.
        return_attn_probs: return more than `out`; for testing.
        out: (b, sq, h, dv), of q's dtype, to write the result into; not where a tensor requires grad.
        s_aux: attention sinks, (h,) of any floating dtype: a score for each head that counts in the softmax
            and in the LSE, but has no value. Differentiable.

    Returns:
        out (b, sq, h, dv), or (out, softmax_lse, S_dmask) with `return_attn_probs`: softmax_lse (b, h, sq) is
        the natural logarithm of the sum of exp(scores), fp32 (fp64 for fp64 input); S_dmask is empty without
        dropout, else (b, h, sq rounded up to 128, sk rounded up to 128) with the probabilities before
        dropout, negative where dropped.

    Raises:
        TypeError, ValueError: an argument of the wrong type, or of a wrong value, shape or device; it is
            named.
        RuntimeError: this build or GPU cannot run it; the message has the command that builds what is
            missing.
        NotImplementedError: forward-mode derivatives.
    """
    return _attend(
        (q, k, v), dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs, out, s_aux,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` of q, k, v packed in one tensor qkv (b, s, 3, h, d), uncopied."""
    check.check_packed(qkv, "qkv", 5, 3)
    try:
        return _attend(
            (qkv,), dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
            return_attn_probs,
        )  # fmt: skip
    except REFUSALS as error:
        refusal = error
    check.check_parts(qkv, "qkv")
    raise refusal


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` of q (b, sq, h, d) and k, v packed in one tensor kv (b, sk, 2, hk, d), uncopied."""
    check.check_packed(kv, "kv", 5, 2)
    try:
        return _attend(
            (q, kv), dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
            return_attn_probs,
        )  # fmt: skip
    except REFUSALS as error:
        refusal = error
    check.check_parts(kv, "kv", q)
    raise refusal


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    out: Tensor | None = None,
    seqused_k: Tensor | None = None,
    return_softmax_lse: bool = False,
    s_aux: Tensor | None = None,
) -> Result:
    """Attention within each of b sequences packed end to end; the rest as in `flash_attn_func`.

    Sequence i has the rows cu_seqlens[i] to cu_seqlens[i + 1]; it may be empty. Rows past cu_seqlens[b] give
    zeros, and get zero gradients. That cu_seqlens starts at 0, never decreases and fits the tokens is checked
    on CPU only.

    Args:
        q: (total_q, h, d).
        k: (total_k, hk, d), or with `block_table` pages (num_blocks, page_size, hk, d), page_size a multiple
            of 16.
        v: as k, with a head dim dv that may differ from d.
        cu_seqlens_q, cu_seqlens_k: int32 (b + 1,), cumulative sequence lengths, on q's device.
        max_seqlen_q, max_seqlen_k: at least the longest sequence: rows past them are not computed. Checked on
            CPU only.
        block_table: int32 (b, max_blocks), the pages of each sequence's keys; forward only.
        out: (total_q, h, dv), as in `flash_attn_func`.
        seqused_k: int32 (b,), how many keys of each sequence are used; with a `block_table` it replaces the
            lengths of cu_seqlens_k. Forward only.
        return_softmax_lse: return the LSE too.
        s_aux: as in `flash_attn_func`.

    Returns:
        out (total_q, h, dv), or with `return_softmax_lse` (out, softmax_lse), or with `return_attn_probs`
        (out, softmax_lse, S_dmask): softmax_lse (h, total_q), S_dmask as in `flash_attn_func`.
    """
    return _attend_varlen(
        (q, k, v), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs, block_table, out, seqused_k,
        return_softmax_lse, s_aux,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` of q, k, v packed in qkv (total, 3, h, d), cu_seqlens int32 (b + 1,)."""
    check.check_packed(qkv, "qkv", 4, 3)
    try:
        return _attend_varlen(
            (qkv,), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal,
            window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
        )  # fmt: skip
    except REFUSALS as error:
        refusal = error
    check.check_parts(qkv, "qkv")
    check.check_cu_seqlens(cu_seqlens, "cu_seqlens", qkv)
    max_seqlen = check.check_max_seqlen(max_seqlen, "max_seqlen")
    if qkv.is_cpu:
        check.check_lengths(cu_seqlens, "cu_seqlens", qkv.shape[0], max_seqlen, "max_seqlen")
    raise refusal


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` of q (total_q, h, d) and k, v packed in one tensor kv (total_k, 2, hk, d)."""
    check.check_packed(kv, "kv", 4, 2)
    try:
        return _attend_varlen(
            (q, kv), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
            window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
        )  # fmt: skip
    except REFUSALS as error:
        refusal = error
    check.check_parts(kv, "kv", q)
    raise refusal


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    out: Tensor | None = None,
    s_aux: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a key/value cache, to which k and v are appended first, in place. No gradients flow.

    The causal mask and the window count the keys after appending. A cache is read and written where it lies,
    never copied.

    Args:
        q: (b, sq, h, d).
        k_cache, v_cache: (b_cache, s_cache, hk, d or dv), or with `block_table` pages (num_blocks, page_size,
            hk, d or dv) of a multiple of 16 keys; the last dimension contiguous. dv may differ from d.
        k, v: (b, s_new, hk, d) and (b, s_new, hk, dv), written to the cache from position cache_seqlens on.
        rotary_cos, rotary_sin: (s_ro, rotary_dim / 2), rotary_dim a multiple of 16 and at most d: rotate k,
            at position cache_seqlens + i, and q, at cache_seqlens + i if causal or windowed, else all of it
            at cache_seqlens.
        cache_seqlens: int or int32 (b,), how many keys the cache holds before appending; all of it if None.
        cache_batch_idx: int32 (b,), the cache entry of each sequence; not with `block_table`.
        cache_leftpad: int32 (b,), how many leading keys to skip, counted in cache_seqlens; not with
            `block_table`.
        block_table: int32 (b, max_blocks), the pages of each sequence.
        rotary_interleaved: rotate pairs (0, 1), (2, 3)..; else the first half of rotary_dim against the
            second.
        num_splits: 0 to 128, into how many parts to split the keys, 0 for a heuristic; no effect beyond
            rounding.
        return_softmax_lse: return the LSE too.
        softmax_scale, causal, window_size, softcap, alibi_slopes, out, s_aux: as in `flash_attn_func`.

    Returns:
        out (b, sq, h, dv), or (out, softmax_lse (b, h, sq)) with `return_softmax_lse`.

    Raises:
        TypeError, ValueError, RuntimeError: as in `flash_attn_func`.
        NotImplementedError: meta tensors.
    """
    if type(return_softmax_lse) is not bool:
        return_softmax_lse = as_flag(return_softmax_lse, "return_softmax_lse")
    window_left, window_right = _window(window_size)
    arguments = (
        q, k_cache, v_cache, k, v, cache_seqlens, rotary_cos, rotary_sin, cache_batch_idx, cache_leftpad,
        block_table, alibi_slopes, out, softmax_scale, causal, window_left, window_right, softcap,
        rotary_interleaved, num_splits, return_softmax_lse, s_aux,
    )  # fmt: skip
    if torch.is_grad_enabled():
        refuse_gradients(alibi_slopes=alibi_slopes, rotary_cos=rotary_cos, rotary_sin=rotary_sin)
        if k is not None:
            refuse_gradients(k_cache=k_cache, v_cache=v_cache)
        run = partial(_kvcache.forward_kvcache, *arguments)
        out, lse = forward_only("flash_attn_with_kvcache", run, q, k_cache, v_cache, k, v, s_aux)
    else:
        out, lse = _kvcache.forward_kvcache(*arguments)
    return (out, lse) if return_softmax_lse else out
