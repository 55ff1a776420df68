"""Attention forward on the CPU, in blocks of queries."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from flash_attn._backends.cpu.chunks import as_slice, chunks, undisturbed
from flash_attn._calls import Forward, Outputs, Scoring, Sequences
from flash_attn._layout import empty_out, lse_dtype, probs_shape, write
from flash_attn._philox import new_rng_state


def _softmax(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return P and the LSE of each row of scores (B, h, rows, cols), which counts its head's sink, if any.

    A row without visible key has P = 0 and LSE = +inf.
    """
    maximum = scores.amax(-1, keepdim=True)
    empty = maximum == -inf
    if sinks is not None:
        sinks = sinks.to(scores.dtype)[:, None, None]
        maximum = torch.maximum(maximum, sinks)
    maximum = maximum.masked_fill(empty, 0.0)
    probs = (scores - maximum).exp_()
    total = probs.sum(-1, keepdim=True)
    if sinks is not None:
        total += (sinks - maximum).exp().masked_fill(empty, 0.0)
    probs /= total.masked_fill(empty, 1.0)
    return probs, (maximum + total.log()).masked_fill(empty, inf).squeeze(-1)


@torch.inference_mode()  # where a caller's tensor that was made in that mode may be written to
def attend(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scoring: Scoring, first_batch: int = 0,
    rng_state: Tensor | None = None, probs: Tensor | None = None,
) -> None:  # fmt: skip
    """Write out (b, sq, h, dv), lse (b, h, sq) and the signed probabilities of q against k and v.

    k is (b, sk, hk, d), v (b, sk, hk, dv). `first_batch` is the index of q's first entry in the caller's
    batch.
    """
    for part, chunk in chunks(q, k, v, scoring, first_batch):
        for rows, cols in chunk.tiles(chunk.v):
            at, seen = as_slice(rows), as_slice(cols)
            if probs is not None and rng_state is not None:
                kept = chunk.keep(rng_state, rows, range(k.shape[1]))
                probs[part, :, at, : k.shape[1]] = torch.where(kept, 0.0, -0.0).to(probs.dtype)
            if not cols:
                out[part, at] = 0.0
                lse[part, :, at] = inf
                continue
            p, lse[part, :, at] = _softmax(chunk.scores(rows, cols)[0], scoring.sinks)
            if rng_state is not None:
                keep = chunk.keep(rng_state, rows, cols)
                if probs is not None:
                    probs[part, :, at, seen] = torch.where(keep, p, -p).to(probs.dtype)
                p = p * keep / (1.0 - scoring.dropout_p)
            block = (chunk.grouped(p) @ chunk.v[:, :, seen]).view(*p.shape[:3], v.shape[-1])
            out[part, at] = block.transpose(1, 2).to(out.dtype)


def gather_pages(pages: Tensor, blocks: Tensor, length: int) -> Tensor:
    """Return the first `length` keys of the sequence whose pages `blocks` (n,) lists, (1, length, hk, d)."""
    used = blocks[: -(-length // pages.shape[1])].long()
    return pages[used].flatten(0, 1)[:length].unsqueeze(0)


def _dropout_buffers(
    call: Forward, batch: int, seqlen_q: int, seqlen_k: int
) -> tuple[Tensor | None, Tensor | None]:
    """Return (S_dmask, rng_state) as far as the call needs them."""
    if call.scoring.dropout_p == 0.0:
        return None, None
    q, probs = call.q, None
    if call.return_softmax:
        shape = probs_shape(batch, q.shape[-2], seqlen_q, seqlen_k)
        probs = torch.zeros(shape, dtype=q.dtype, device=q.device)
    return probs, new_rng_state(q.device, call.generator)


@undisturbed
def forward(call: Forward) -> Outputs:
    """Attend; see `Backend.forward`. The LSE is always made."""
    q, v, out = call.q, call.v, call.out
    out = empty_out(q, q.shape[-1], v.shape[-1]) if out is None else out
    if call.sequences is not None:
        return _varlen_forward(call, out, call.sequences)
    batch, seqlen_q, num_heads, _ = q.shape
    lse = torch.empty(batch, num_heads, seqlen_q, dtype=lse_dtype(q.dtype), device=q.device)
    probs, rng_state = _dropout_buffers(call, batch, seqlen_q, call.k.shape[1])
    attend(q, call.k, v, out, lse, call.scoring, 0, rng_state, probs)
    return out, lse, probs, rng_state


def _varlen_forward(call: Forward, out: Tensor, sequences: Sequences) -> Outputs:
    """Attend by sequence; rows past the last are 0 with LSE +inf."""
    q, k, v = call[:3]
    cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, leftpad_k, seqused_k, block_table = sequences
    q_bounds, k_bounds = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    batch, (total_q, num_heads, _) = len(q_bounds) - 1, q.shape
    write(out, 0.0)
    lse = torch.full((num_heads, total_q), inf, dtype=lse_dtype(q.dtype), device=q.device)
    probs, rng_state = _dropout_buffers(call, batch, longest_q, longest_k)
    for b in range(batch):
        rows = slice(q_bounds[b], q_bounds[b + 1])
        length = k_bounds[b + 1] - k_bounds[b] if seqused_k is None else int(seqused_k[b])
        if block_table is not None:
            keys, values = (gather_pages(x, block_table[b], length) for x in (k, v))
        else:
            first = k_bounds[b] + (0 if leftpad_k is None else int(leftpad_k[b]))
            keys, values = (x[first : max(first, k_bounds[b] + length)].unsqueeze(0) for x in (k, v))
        of_sequence = None if probs is None else probs[b : b + 1]
        q_rows, out_rows, lse_rows = q[None, rows], out[None, rows], lse[None, :, rows]
        attend(q_rows, keys, values, out_rows, lse_rows, call.scoring, b, rng_state, of_sequence)
    return out, lse, probs, rng_state
