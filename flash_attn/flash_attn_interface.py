"""The public functions, with the names, argument order, defaults and shapes of flash-attn 2.8.3.

b = batch, s = sequence length, h = query heads, hk = key/value heads (h is a multiple of hk), d = head dim, 1
to 256. fp16 and bf16 on CUDA; those, fp32 and fp64 on CPU. Exact attention without the score matrix in
memory: Dao et al., "FlashAttention" (2022); Dao, "FlashAttention-2" (2023). From here a call goes to
`_entry`, then to `_operations`, then to a backend (`_backends`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import flash_attn_2_cuda as flash_attn_gpu
from flash_attn import _kvcache
from flash_attn._abi import PROBS_BLOCK
from flash_attn._arguments import as_flag
from flash_attn._calls import Cache, Sequences, new
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
from flash_attn._entry import Result, attend, attend_varlen, record_cache
from flash_attn._kvcache import kvcache_num_splits
from flash_attn._layout import maybe_contiguous, round_multiple
from flash_attn._packed import blame_parts, check_packed

Window = tuple[int, int]

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


def _get_block_size_n(device: torch.device, head_dim: int, is_dropout: bool, is_causal: bool) -> int:
    """Return the number of keys that S_dmask is rounded up to."""
    return PROBS_BLOCK


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
    options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, s_aux
    return attend((q, k, v), options, deterministic, return_attn_probs, out)


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
    check_packed(qkv, "qkv", 5, 3)
    options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, None
    run = partial(attend, (qkv,), options, deterministic, return_attn_probs)
    return blame_parts(run, qkv, "qkv")


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
    check_packed(kv, "kv", 5, 2)
    options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, None
    run = partial(attend, (q, kv), options, deterministic, return_attn_probs)
    return blame_parts(run, kv, "kv", q)


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
    sequences = Sequences(
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, None, seqused_k, block_table
    )
    options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, s_aux
    return attend_varlen(
        (q, k, v), sequences, options, deterministic, return_attn_probs, out, return_softmax_lse
    )


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
    check_packed(qkv, "qkv", 4, 3)
    sequences = Sequences(cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, None
    run = partial(attend_varlen, (qkv,), sequences, options, deterministic, return_attn_probs)
    return blame_parts(run, qkv, "qkv", lengths=(cu_seqlens, max_seqlen))


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
    check_packed(kv, "kv", 4, 2)
    sequences = Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, None
    run = partial(attend_varlen, (q, kv), sequences, options, deterministic, return_attn_probs)
    return blame_parts(run, kv, "kv", q)


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
    run: Callable[..., tuple[Tensor, Any]] = _kvcache.forward_kvcache
    if torch.is_grad_enabled():
        try:
            wanted = q.requires_grad or k_cache.requires_grad or v_cache.requires_grad
            if k is not None and v is not None:
                wanted = wanted or k.requires_grad or v.requires_grad
        except AttributeError:  # of what is no tensor, which the checks name
            wanted = False
        if wanted or alibi_slopes is not None or rotary_cos is not None or s_aux is not None:
            run = record_cache
    cache = new(Cache, (k_cache, v_cache, cache_seqlens, cache_batch_idx, cache_leftpad, block_table))
    tables = None
    if rotary_cos is not None or rotary_sin is not None:
        tables = rotary_cos, rotary_sin, rotary_interleaved
    options = 0.0, softmax_scale, causal, window_size, softcap, alibi_slopes, s_aux
    out, lse = run(q, cache, k, v, tables, options, out, num_splits, return_softmax_lse)
    return (out, lse) if return_softmax_lse else out
