"""CPU backend: attention forward and backward through torch operations, in blocks of queries.

At most about `SCORES_AT_ONCE` scores exist at any time, so memory grows linearly with the sequence length.
Half types are computed in fp32, fp32 and fp64 in themselves. Arguments come validated from `_operations`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any, TypeVar

import torch
from torch import Tensor

from flash_attn._layout import empty_out, empty_softmax_d, lse_dtype, probs_shape, write
from flash_attn._philox import keep_mask, new_rng_state
from flash_attn._validation import Gradients, Scoring, Shapes

SCORES_AT_ONCE = 2**21
Outputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


Function = TypeVar("Function", bound=Callable[..., Any])


def undisturbed(function: Function) -> Function:
    """Decorate what computes: outside autograd, and in the types it chose whatever autocast says."""
    return torch.no_grad()(torch.autocast("cpu", enabled=False)(function))


@dataclass(frozen=True)
class _Chunk:
    """Batch entries in the type that is computed in: q (B, h, sq, d), k (B, hk, sk, d), v (B, hk, sk, dv)."""

    q: Tensor
    k: Tensor
    v: Tensor
    slopes: Tensor | None  # (B, h, 1, 1)
    scoring: Scoring
    first_batch: int

    @property
    def offset(self) -> int:
        """Key that the first query is aligned with: the last query is aligned with the last key."""
        return self.k.shape[2] - self.q.shape[2]

    def grouped(self, x: Tensor) -> Tensor:
        """View (B, h, rows, n) as (B, hk, group * rows, n), to be multiplied with a KV head's matrix."""
        return x.reshape(x.shape[0], self.k.shape[1], -1, x.shape[-1])

    def scores(self, rows: range, cols: range) -> tuple[Tensor, Tensor | None]:
        """Return scaled, capped, biased and masked scores (B, h, rows, cols), and what tanh was taken of."""
        scoring, inner = self.scoring, None
        q, k = self.q[:, :, _slice(rows)], self.k[:, :, _slice(cols)]
        scores = (self.grouped(q) @ k.mT).view(*q.shape[:3], len(cols)).mul_(scoring.softmax_scale)
        if scoring.softcap > 0.0:
            inner = scores.div_(scoring.softcap)
            scores = inner.tanh().mul_(scoring.softcap)
        windowed = scoring.window_left >= 0 or scoring.window_right >= 0
        if windowed or self.slopes is not None:
            distance = _arange(rows, q).unsqueeze(1) + self.offset - _arange(cols, q)
            if self.slopes is not None:
                scores = scores - self.slopes * distance.abs()
            if windowed:
                scores.masked_fill_(_hidden(distance, scoring), -inf)
        return scores, inner

    def keep(self, rng_state: Tensor, rows: range, cols: range) -> Tensor:
        """Return the dropout mask (B, h, rows, cols), True where kept."""
        batch, num_heads = self.q.shape[:2]
        heads = range(self.first_batch * num_heads, (self.first_batch + batch) * num_heads)
        mask = keep_mask(rng_state, self.scoring.dropout_p, heads, rows, cols)
        return mask.view(batch, num_heads, len(rows), len(cols))

    def tiles(self, *factors: Tensor) -> Iterator[tuple[range, range]]:
        """Yield blocks of rows, each with the columns that any of its rows may see.

        `factors` are what hidden scores, which are 0, will be multiplied with. A block is one row, which
        sees all of its columns, if they are not finite: what a row does not see must not reach it as 0 * nan.
        """
        batch, num_heads, seqlen_q, _ = self.q.shape
        seqlen_k, left, right = self.k.shape[2], self.scoring.window_left, self.scoring.window_right
        step = _clamp(SCORES_AT_ONCE // max(1, batch * num_heads * seqlen_k), seqlen_q)
        if step > 1 and (left >= 0 or right >= 0) and not isfinite(sum(x.sum().item() for x in factors)):
            step = 1
        for start in range(0, seqlen_q, step):
            stop = min(start + step, seqlen_q)
            first = max(0, start + self.offset - left) if left >= 0 else 0
            last = min(seqlen_k, stop + self.offset + right) if right >= 0 else seqlen_k
            yield range(start, stop), range(first, max(first, last))


def _arange(r: range, like: Tensor) -> Tensor:
    return torch.arange(r.start, r.stop, device=like.device)


def _slice(r: range) -> slice:
    return slice(r.start, r.stop)


def _clamp(x: int, high: int) -> int:
    return max(1, min(x, high))


def _hidden(distance: Tensor, scoring: Scoring) -> Tensor:
    """Return which keys are outside the window; `distance` is the aligned query minus the key."""
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if scoring.window_left >= 0:
        hidden |= distance > scoring.window_left
    if scoring.window_right >= 0:
        hidden |= distance < -scoring.window_right
    return hidden


def _heads_first(x: Tensor) -> Tensor:
    """Return (B, s, h, d) as (B, h, s, d) in the type that is computed in."""
    return x.transpose(1, 2).to(lse_dtype(x.dtype))


def _chunks(
    q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, first_batch: int
) -> Iterator[tuple[slice, _Chunk]]:
    """Split q, k (b, s, h, d) and v into groups of batch entries whose scores for 16 rows fit the budget."""
    batch, seqlen_q, num_heads, _ = q.shape
    step = _clamp(SCORES_AT_ONCE // max(1, num_heads * k.shape[1] * min(seqlen_q, 16)), batch)
    slopes = scoring.alibi_slopes
    for start in range(0, batch, step):
        part = slice(start, min(start + step, batch))
        of_part = None
        if slopes is not None:
            if slopes.dim() == 1:
                of_part = slopes.expand(part.stop - start, num_heads)
            else:
                of_part = slopes[first_batch + start : first_batch + part.stop]
            of_part = of_part[..., None, None].to(lse_dtype(q.dtype))
        q_part, k_part, v_part = (_heads_first(x[part]) for x in (q, k, v))
        yield part, _Chunk(q_part, k_part, v_part, of_part, scoring, first_batch + start)


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
    for part, chunk in _chunks(q, k, v, scoring, first_batch):
        for rows, cols in chunk.tiles(chunk.v):
            at, seen = _slice(rows), _slice(cols)
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


@torch.inference_mode()
def attend_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, gradients: Gradients,
    softmax_d: Tensor, scoring: Scoring, first_batch: int = 0, rng_state: Tensor | None = None,
) -> None:  # fmt: skip
    """Write dq, dk, dv, those that are not None, and D = rowsum(dO * O), given as (b, h, sq).

    As in FlashAttention-2, section 3.1.2. P is recomputed from the LSE, which may be that of more keys than
    these (a ring of devices, say).
    """
    dq, dk, dv = gradients
    for part, chunk in _chunks(q, k, v, scoring, first_batch):
        do = _heads_first(dout[part])
        delta = (do * _heads_first(out[part])).sum(-1)
        softmax_d[part] = delta
        dk_sum, dv_sum = torch.zeros_like(chunk.k), torch.zeros_like(chunk.v)
        for rows, cols in chunk.tiles(chunk.q, chunk.k, chunk.v, do, delta):
            at, seen = _slice(rows), _slice(cols)
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


def _dropout_buffers(
    q: Tensor, shape: tuple[int, ...], scoring: Scoring, return_softmax: bool,
    generator: torch.Generator | None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Return (S_dmask, rng_state) as far as the call needs them."""
    if scoring.dropout_p == 0.0:
        return None, None
    probs = torch.zeros(shape, dtype=q.dtype, device=q.device) if return_softmax else None
    return probs, new_rng_state(q.device, generator)


@undisturbed
def forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, shapes: Shapes, scoring: Scoring,
    return_softmax: bool, generator: torch.Generator | None,
) -> Outputs:  # fmt: skip
    """Return (out, lse, S_dmask, rng_state) of q (b, sq, h, d), k (b, sk, hk, d), v (b, sk, hk, dv)."""
    (batch, seqlen_q, num_heads, _), (_, seqlen_k, _, _), (_, _, _, head_dim_v) = shapes
    out = empty_out(q, q.shape[-1], head_dim_v) if out is None else out
    lse = torch.empty(batch, num_heads, seqlen_q, dtype=lse_dtype(q.dtype), device=q.device)
    shape = probs_shape(batch, num_heads, seqlen_q, seqlen_k)
    probs, rng_state = _dropout_buffers(q, shape, scoring, return_softmax, generator)
    attend(q, k, v, out, lse, scoring, 0, rng_state, probs)
    return out, lse, probs, rng_state


@undisturbed
def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, gradients: Gradients,
    scoring: Scoring, deterministic: bool, rng_state: Tensor | None,
) -> Tensor:  # fmt: skip
    """Write dq, dk, dv, those that are not None, always deterministic; return softmax_d, zero past sq."""
    softmax_d = empty_softmax_d(q).zero_()
    d_rows = softmax_d[:, :, : q.shape[1]]
    attend_backward(dout, q, k, v, out, lse, gradients, d_rows, scoring, 0, rng_state)
    return softmax_d


def gather_pages(pages: Tensor, blocks: Tensor, length: int) -> Tensor:
    """Return the first `length` keys of the sequence whose pages `blocks` (n,) lists, (1, length, hk, d)."""
    used = blocks[: -(-length // pages.shape[1])].long()
    return pages[used].flatten(0, 1)[:length].unsqueeze(0)


@undisturbed
def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, shapes: Shapes, scoring: Scoring,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    leftpad_k: Tensor | None, seqused_k: Tensor | None, return_softmax: bool,
    generator: torch.Generator | None, block_table: Tensor | None,
) -> Outputs:  # fmt: skip
    """Return (out, lse (h, total_q), S_dmask, rng_state), by sequence; other rows are 0 with LSE +inf."""
    q_bounds, k_bounds = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    batch, (total_q, num_heads, _) = len(q_bounds) - 1, shapes[0]
    out = empty_out(q, q.shape[-1], v.shape[-1]) if out is None else out
    write(out, 0.0)
    lse = torch.full((num_heads, total_q), inf, dtype=lse_dtype(q.dtype), device=q.device)
    shape = probs_shape(batch, num_heads, max_seqlen_q, max_seqlen_k)
    probs, rng_state = _dropout_buffers(q, shape, scoring, return_softmax, generator)
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
        attend(q_rows, keys, values, out_rows, lse_rows, scoring, b, rng_state, of_sequence)
    return out, lse, probs, rng_state


def _only(x: Tensor | None, rows: slice) -> Tensor | None:
    """Return rows of a packed tensor as a batch of one; None stays None."""
    return None if x is None else x[None, rows]


@undisturbed
def varlen_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, gradients: Gradients,
    scoring: Scoring, deterministic: bool, rng_state: Tensor | None, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
) -> Tensor:  # fmt: skip
    """Write dq, dk, dv, those that are not None, zero outside the sequences; return softmax_d."""
    q_bounds, k_bounds = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    batch, (dq, dk, dv) = len(q_bounds) - 1, gradients
    softmax_d = empty_softmax_d(q, batch).zero_()
    for gradient in gradients:
        if gradient is not None:
            write(gradient, 0.0)
    for b in range(batch):
        rows, cols = slice(q_bounds[b], q_bounds[b + 1]), slice(k_bounds[b], k_bounds[b + 1])
        of_sequence = _only(dq, rows), _only(dk, cols), _only(dv, cols)
        attend_backward(
            dout[None, rows], q[None, rows], k[None, cols], v[None, cols], out[None, rows],
            lse[None, :, rows], of_sequence, softmax_d[None, :, rows], scoring, b, rng_state,
        )  # fmt: skip
    return softmax_d
