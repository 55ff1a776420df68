"""Attention backward on the CPU, in blocks of queries; always deterministic."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn._backends.cpu.chunks import as_slice, chunks, heads_first, undisturbed
from flash_attn._calls import Backward, Differentiated, Gradients, Scoring, Sequences
from flash_attn._layout import empty_softmax_d, write


@torch.inference_mode()
def _differentiate(
    tensors: Differentiated, gradients: Gradients, softmax_d: Tensor, scoring: Scoring,
    rng_state: Tensor | None, first_batch: int = 0,
) -> None:  # fmt: skip
    """Write dq, dk, dv, those that are not None, and D = rowsum(dO * O), given as (b, h, sq).

    As in FlashAttention-2, section 3.1.2. P is recomputed from the LSE, which may be that of more keys than
    these (a ring of devices, say).
    """
    dout, q, k, v, out, lse = tensors
    dq, dk, dv = gradients
    for part, chunk in chunks(q, k, v, scoring, first_batch):
        do = heads_first(dout[part])
        delta = (do * heads_first(out[part])).sum(-1)
        softmax_d[part] = delta
        dk_sum, dv_sum = torch.zeros_like(chunk.k), torch.zeros_like(chunk.v)
        for rows, cols in chunk.tiles(chunk.q, chunk.k, chunk.v, do, delta):
            at, seen = as_slice(rows), as_slice(cols)
            if dq is not None and not cols:
                dq[part, at] = 0.0
            if not cols or dq is dk is dv is None:
                continue
            scores, inner = chunk.scores(rows, cols)
            p = (scores - lse[part, :, at, None]).exp_()
            do_rows = chunk.grouped(do[:, :, at])
            keep = None
            if rng_state is not None:
                keep = chunk.keep(rng_state, rows, cols).to(p.dtype) / (1.0 - scoring.dropout_p)
            if dv is not None:
                dv_sum[:, :, seen] += chunk.grouped(p if keep is None else p * keep).mT @ do_rows
            if dq is dk is None:
                continue
            dp = (do_rows @ chunk.v[:, :, seen].mT).view_as(p)
            if keep is not None:
                dp *= keep
            ds = (dp - delta[:, :, at, None]).mul_(p).mul_(scoring.softmax_scale)
            if inner is not None:  # 1 - tanh^2 would have no digits left where tanh saturates
                ds *= inner.cosh_().reciprocal_().square_()
            ds = chunk.grouped(ds)
            if dk is not None:
                dk_sum[:, :, seen] += ds.mT @ chunk.grouped(chunk.q[:, :, at])
            if dq is not None:
                dq_rows = (ds @ chunk.k[:, :, seen]).view(*p.shape[:3], q.shape[-1])
                dq[part, at] = dq_rows.transpose(1, 2).to(dq.dtype)
        for target, total in ((dk, dk_sum), (dv, dv_sum)):
            if target is not None:
                target[part] = total.transpose(1, 2).to(target.dtype)


@undisturbed
def backward(call: Backward) -> Tensor:
    """Differentiate; see `Backend.backward`. softmax_d is zero past the sequences."""
    if call.sequences is not None:
        return _varlen_backward(call, call.sequences)
    q = call.tensors.q
    softmax_d = empty_softmax_d(q).zero_()
    d_rows = softmax_d[:, :, : q.shape[1]]
    _differentiate(call.tensors, call.gradients, d_rows, call.scoring, call.rng_state)
    return softmax_d


def _only(x: Tensor | None, rows: slice) -> Tensor | None:
    """Return rows of a packed tensor as a batch of one; None stays None."""
    return None if x is None else x[None, rows]


def _varlen_backward(call: Backward, sequences: Sequences) -> Tensor:
    q_bounds, k_bounds = sequences.cu_seqlens_q.tolist(), sequences.cu_seqlens_k.tolist()
    batch, (dq, dk, dv) = len(q_bounds) - 1, call.gradients
    dout, q, k, v, out, lse = call.tensors
    softmax_d = empty_softmax_d(q, batch).zero_()
    for gradient in call.gradients:
        if gradient is not None:
            write(gradient, 0.0)
    for b in range(batch):
        rows, cols = slice(q_bounds[b], q_bounds[b + 1]), slice(k_bounds[b], k_bounds[b + 1])
        tensors = Differentiated(
            dout[None, rows], q[None, rows], k[None, cols], v[None, cols], out[None, rows], lse[None, :, rows]
        )
        gradients = _only(dq, rows), _only(dk, cols), _only(dv, cols)
        _differentiate(tensors, gradients, softmax_d[None, :, rows], call.scoring, call.rng_state, b)
    return softmax_d
