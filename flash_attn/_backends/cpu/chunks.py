"""Blocks of scores on the CPU: at most about `SCORES_AT_ONCE` of them exist at any time, so that memory grows
linearly with the sequence length.

Half types are computed in fp32, fp32 and fp64 in themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any, TypeVar

import torch
from torch import Tensor

from flash_attn._calls import Scoring
from flash_attn._layout import lse_dtype
from flash_attn._philox import keep_mask

SCORES_AT_ONCE = 2**21

Function = TypeVar("Function", bound=Callable[..., Any])


def undisturbed(function: Function) -> Function:
    """Decorate what computes: outside autograd, and in the types it chose whatever autocast says."""
    return torch.no_grad()(torch.autocast("cpu", enabled=False)(function))


@dataclass(frozen=True)
class Chunk:
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
        q, k = self.q[:, :, as_slice(rows)], self.k[:, :, as_slice(cols)]
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


def as_slice(r: range) -> slice:
    """Return the slice of the same indices."""
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


def heads_first(x: Tensor) -> Tensor:
    """Return (B, s, h, d) as (B, h, s, d) in the type that is computed in."""
    return x.transpose(1, 2).to(lse_dtype(x.dtype))


def chunks(
    q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, first_batch: int
) -> Iterator[tuple[slice, Chunk]]:
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
        q_part, k_part, v_part = (heads_first(x[part]) for x in (q, k, v))
        yield part, Chunk(q_part, k_part, v_part, of_part, scoring, first_batch + start)
