"""Autograd of attention: saves q, k, v, out and the LSE, and recomputes the probabilities in backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flash_attn import _custom_ops as ops
from flash_attn._layout import maybe_contiguous
from flash_attn._operations import refuse_gradient
from flash_attn._validation import QKV, Labels

Gradients = tuple[Tensor | None, ...]


def gradient_needed(q: Tensor, k: Tensor, v: Tensor, labels: Labels = QKV) -> bool:
    """Return whether autograd must record the call. Arguments that are no tensors are left to the checks.

    Raises:
        NotImplementedError: it must, and the tensors are on CUDA, where there is no backward yet.
    """
    try:
        needed = (q.requires_grad or k.requires_grad or v.requires_grad) and torch.is_grad_enabled()
    except AttributeError:
        return False
    if not needed:
        return False
    refuse_gradient(*zip(labels, (q, k, v), strict=True))
    return True


def _function(name: str, q: Tensor) -> Any:
    """Return the plain function of that name, or its custom op where the dispatcher must see the call."""
    return getattr(ops, f"_wrapped{name}" if ops.needs_dispatcher(q) else name)


class FlashAttention(torch.autograd.Function):
    """q (b, sq, h, d), k (b, sk, hk, d), v (b, sk, hk, dv) -> (out, softmax_lse, S_dmask).

    `scoring` is (dropout_p, softmax_scale, causal, window_left, window_right, softcap).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, scoring: tuple,
                deterministic: bool, return_softmax: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        run = _function("_flash_attn_forward", q)
        out, lse, probs, rng_state = run(q, k, v, *scoring, slopes, return_softmax)
        ctx.save_for_backward(q, k, v, out, lse, rng_state, slopes)
        ctx.scoring, ctx.deterministic = scoring, deterministic
        ctx.mark_non_differentiable(lse, probs)
        return out, lse, probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, *unused: Tensor) -> Gradients:
        q, k, v, out, lse, rng_state, slopes = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        run = _function("_flash_attn_backward", q)
        run(
            maybe_contiguous(dout), q, k, v, out, lse, dq, dk, dv, *ctx.scoring, slopes, ctx.deterministic,
            rng_state,
        )  # fmt: skip
        return dq, dk, dv, None, None, None, None


class VarlenFlashAttention(torch.autograd.Function):
    """Packed q (total_q, h, d), k (total_k, hk, d), v (total_k, hk, dv) -> as above, as is `scoring`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
                max_seqlen_q: int, max_seqlen_k: int, slopes: Tensor | None, scoring: tuple,
                deterministic: bool, return_softmax: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        run = _function("_flash_attn_varlen_forward", q)
        out, lse, probs, rng_state = run(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *scoring, slopes, return_softmax
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse, rng_state, slopes, cu_seqlens_q, cu_seqlens_k)
        ctx.max_seqlens, ctx.scoring, ctx.deterministic = (max_seqlen_q, max_seqlen_k), scoring, deterministic
        ctx.mark_non_differentiable(lse, probs)
        return out, lse, probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, *unused: Tensor) -> Gradients:
        q, k, v, out, lse, rng_state, slopes, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        run = _function("_flash_attn_varlen_backward", q)
        run(
            maybe_contiguous(dout), q, k, v, out, lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k,
            *ctx.max_seqlens, *ctx.scoring, slopes, ctx.deterministic, rng_state,
        )  # fmt: skip
        return dq, dk, dv, *(None,) * 8
