"""The positional entry points of flash-attn's extension module, for libraries that call it directly.

Each argument is positional; shapes are those of the public function of the same purpose in `flash_attn`.
`fwd_kvcache` takes cache lengths as an int32 tensor or None. No function records gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["bwd", "fwd", "fwd_kvcache", "varlen_bwd", "varlen_fwd"]

Generator = torch.Generator | None


def _four(out: Tensor, lse: Tensor, probs: Tensor | None, rng_state: Tensor | None) -> list[Tensor]:
    from flash_attn._custom_ops import _filled

    return list(_filled(out, lse, probs, rng_state))


def fwd(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, alibi_slopes: Tensor | None, p_dropout: float,
    softmax_scale: float, is_causal: bool, window_size_left: int, window_size_right: int, softcap: float,
    return_softmax: bool, gen: Generator,
) -> list[Tensor]:  # fmt: skip
    """Return [out, softmax_lse, S_dmask, rng_state]; written to `out` if given."""
    from flash_attn import _operations

    window_size = window_size_left, window_size_right
    options = p_dropout, softmax_scale, is_causal, window_size, softcap, alibi_slopes, None
    return _four(*_operations.forward(q, k, v, options, return_softmax, out, gen))


def varlen_fwd(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    seqused_k: Tensor | None, leftpad_k: Tensor | None, block_table: Tensor | None,
    alibi_slopes: Tensor | None, max_seqlen_q: int, max_seqlen_k: int, p_dropout: float, softmax_scale: float,
    zero_tensors: bool, is_causal: bool, window_size_left: int, window_size_right: int, softcap: float,
    return_softmax: bool, gen: Generator,
) -> list[Tensor]:  # fmt: skip
    """Return [out, softmax_lse, S_dmask, rng_state]; written to `out` if given."""
    from flash_attn import _operations
    from flash_attn._calls import Sequences

    sequences = Sequences(
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, leftpad_k, seqused_k, block_table
    )
    window_size = window_size_left, window_size_right
    options = p_dropout, softmax_scale, is_causal, window_size, softcap, alibi_slopes, None
    return _four(*_operations.varlen_forward(q, k, v, sequences, options, return_softmax, out, gen))


def _like(given: Any, x: Any) -> Any:
    """Return the given gradient of x or a new one; what is no tensor is left to the checks."""
    return torch.empty_like(x) if given is None and isinstance(x, Tensor) else given


def _refuse_generator(gen: Any) -> None:
    from flash_attn._arguments import fail

    if gen is not None:
        fail(ValueError, "gen", "None in a backward, which is given the forward's rng_state", gen)


def bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor | None,
    dk: Tensor | None, dv: Tensor | None, alibi_slopes: Tensor | None, p_dropout: float, softmax_scale: float,
    is_causal: bool, window_size_left: int, window_size_right: int, softcap: float, deterministic: bool,
    gen: Generator, rng_state: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """Return [dq, dk, dv, softmax_d]; written to the given gradients if there are some.

    `gen` must be None: `rng_state` says what was dropped.
    """
    from flash_attn import _operations
    from flash_attn._calls import Differentiated

    _refuse_generator(gen)
    dq, dk, dv = _like(dq, q), _like(dk, k), _like(dv, v)
    tensors = Differentiated(dout, q, k, v, out, softmax_lse)
    window_size = window_size_left, window_size_right
    options = p_dropout, softmax_scale, is_causal, window_size, softcap, alibi_slopes, None
    softmax_d = _operations.backward(tensors, (dq, dk, dv), options, deterministic, rng_state)
    return [dq, dk, dv, softmax_d]


def varlen_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor | None,
    dk: Tensor | None, dv: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    alibi_slopes: Tensor | None, max_seqlen_q: int, max_seqlen_k: int, p_dropout: float, softmax_scale: float,
    zero_tensors: bool, is_causal: bool, window_size_left: int, window_size_right: int, softcap: float,
    deterministic: bool, gen: Generator, rng_state: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """Return [dq, dk, dv, softmax_d]; written to the given gradients if there are some.

    `gen` must be None: `rng_state` says what was dropped.
    """
    from flash_attn import _operations
    from flash_attn._calls import Differentiated, Sequences

    _refuse_generator(gen)
    dq, dk, dv = _like(dq, q), _like(dk, k), _like(dv, v)
    tensors = Differentiated(dout, q, k, v, out, softmax_lse)
    sequences = Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    window_size = window_size_left, window_size_right
    options = p_dropout, softmax_scale, is_causal, window_size, softcap, alibi_slopes, None
    softmax_d = _operations.backward(tensors, (dq, dk, dv), options, deterministic, rng_state, sequences)
    return [dq, dk, dv, softmax_d]


def fwd_kvcache(
    q: Tensor, kcache: Tensor, vcache: Tensor, k: Tensor | None, v: Tensor | None, seqlens_k: Tensor | None,
    rotary_cos: Tensor | None, rotary_sin: Tensor | None, cache_batch_idx: Tensor | None,
    leftpad_k: Tensor | None, block_table: Tensor | None, alibi_slopes: Tensor | None, out: Tensor | None,
    softmax_scale: float, is_causal: bool, window_size_left: int, window_size_right: int, softcap: float,
    rotary_interleaved: bool, num_splits: int,
) -> list[Tensor]:  # fmt: skip
    """Return [out, softmax_lse]; k and v are appended to the cache in place."""
    from flash_attn import _kvcache
    from flash_attn._calls import Cache

    cache = Cache(kcache, vcache, seqlens_k, cache_batch_idx, leftpad_k, block_table)
    rotary = None
    if rotary_cos is not None or rotary_sin is not None:
        rotary = rotary_cos, rotary_sin, rotary_interleaved
    window_size = window_size_left, window_size_right
    options = 0.0, softmax_scale, is_causal, window_size, softcap, alibi_slopes, None
    return list(_kvcache.forward_kvcache(q, cache, k, v, rotary, options, out, num_splits))
