"""Attention by the formula, in any dtype: what every backend is measured against.

It shares no code with the package. Dense, one mask written out, GQA by repeating heads. `attention` in fp64
is the truth; in the input's dtype it is the yardstick for rounding: a kernel may be off by twice its error,
or three times for gradients, plus 1e-5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

HEAD_DIM_PAIRS = ((192, 128), (128, 192), (64, 96), (40, 24), (32, 256))
"""Pairs of the head dim of q and k and that of v and out which differ."""


@dataclass(frozen=True)
class Options:
    """Arguments of attention as the public functions name them; `keep` and `sinks` are not among `arguments`.

    `keep` is the dropout mask (b, h, sq, sk), True where kept; `sinks` (h,) are scores that have no value.
    """

    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softmax_scale: float | None = None
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    dropout_p: float = 0.0
    keep: Tensor | None = None
    sinks: Tensor | None = None

    def arguments(self) -> dict:
        """Return what a public function takes."""
        names = ("causal", "window_size", "softmax_scale", "softcap", "alibi_slopes", "dropout_p")
        return {name: getattr(self, name) for name in names}


def visible(seqlen_q: int, seqlen_k: int, options: Options, device: torch.device) -> Tensor:
    """Return which keys (sq, sk) each query sees."""
    left, right = (int(x) for x in options.window_size)
    i = torch.arange(seqlen_q, device=device)[:, None] + seqlen_k - seqlen_q
    j = torch.arange(seqlen_k, device=device)[None, :]
    seen = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if left >= 0:
        seen &= j >= i - left
    if options.causal:
        seen &= j <= i
    elif right >= 0:
        seen &= j <= i + right
    return seen


def scores(q: Tensor, k: Tensor, options: Options, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return S (b, h, sq, sk) of q (b, sq, h, d), k (b, sk, hk, d), -inf where masked, and what is seen."""
    q, k = q.to(dtype), k.to(dtype).repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scale = q.shape[-1] ** -0.5 if options.softmax_scale is None else options.softmax_scale
    s = torch.einsum("bihd,bjhd->bhij", q * scale, k)
    if options.softcap > 0:
        s = options.softcap * torch.tanh(s / options.softcap)
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    if options.alibi_slopes is not None:
        i = torch.arange(seqlen_q, device=q.device)[:, None] + seqlen_k - seqlen_q
        distance = (i - torch.arange(seqlen_k, device=q.device)).abs()
        slopes = options.alibi_slopes.to(dtype).reshape(-1, q.shape[2], 1, 1)
        s = s - slopes * distance.to(dtype)
    seen = visible(seqlen_q, seqlen_k, options, q.device)
    return s.masked_fill(~seen, -math.inf), seen


def probabilities(q: Tensor, k: Tensor, options: Options, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return P before dropout (b, h, sq, sk) and the LSE (b, h, sq); q and k are as in `scores`."""
    s, seen = scores(q, k, options, dtype)
    if options.sinks is not None:
        sinks = options.sinks.to(dtype)[:, None, None].expand(*s.shape[:3], 1)
        s = torch.cat([s, sinks], dim=-1)
    blind = ~seen.any(-1)
    probs = s.masked_fill(blind[:, None], 0.0).softmax(-1).masked_fill(blind[:, None], 0.0)
    lse = s.logsumexp(-1) if s.shape[-1] else s.new_zeros(s.shape[:-1])
    return probs[..., : seen.shape[1]], lse.masked_fill(blind, math.inf)


def attention(
    q: Tensor, k: Tensor, v: Tensor, options: Options, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Return out (b, sq, h, dv) and lse (b, h, sq) for v (b, sk, hk, dv), computed in `dtype`."""
    probs, lse = probabilities(q, k, options, dtype)
    if options.keep is not None:
        probs = probs * options.keep.to(dtype) / (1 - options.dropout_p)
    v = v.to(dtype).repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    return torch.einsum("bhij,bjhd->bihd", probs, v), lse


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths_q: list[int], lengths_k: list[int], options: Options,
    dtype: torch.dtype = torch.float64, leftpad: list[int] | None = None, used: list[int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return out (total_q, h, dv) and lse (h, total_q) of packed sequences, one at a time."""
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=dtype, device=q.device)
    lse = torch.full((q.shape[1], q.shape[0]), math.inf, dtype=dtype, device=q.device)
    row, col, parts = 0, 0, []
    for b, (nq, nk) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        last = col + (nk if used is None else used[b])
        first = min(last, col + (0 if leftpad is None else leftpad[b]))
        mine = options
        if options.alibi_slopes is not None and options.alibi_slopes.dim() == 2:
            mine = replace(mine, alibi_slopes=options.alibi_slopes[b])
        if options.keep is not None:
            mine = replace(mine, keep=options.keep[b : b + 1, :, :nq, : last - first])
        o, part_lse = attention(
            q[None, row : row + nq], k[None, first:last], v[None, first:last], mine, dtype
        )
        parts.append(o[0])
        lse[:, row : row + nq] = part_lse[0]
        row, col = row + nq, col + nk
    parts.append(out[row:])
    return torch.cat(parts), lse


def gradients(
    compute: Callable[[Tensor, Tensor, Tensor], Tensor],
    inputs: tuple[Tensor, ...],
    dout: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """Return the gradients of `compute` at `inputs`, by autograd in `dtype`."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = compute(*leaves)
    if not out.requires_grad:
        return tuple(torch.zeros_like(x) for x in leaves)
    return torch.autograd.grad(out, leaves, dout.to(dtype), allow_unused=True, materialize_grads=True)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """Return x (s, h, d) in fp64, its pairs rotated by rows `positions` of tables (rows, d' / 2)."""
    out, half = x.double().clone(), cos.shape[1]
    c, s = (table[positions].double()[:, None] for table in (cos, sin))
    halves = slice(0, half), slice(half, 2 * half)
    first, second = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else halves
    a, b = out[..., first].clone(), out[..., second].clone()
    out[..., first], out[..., second] = a * c - b * s, b * c + a * s
    return out


def shift_by_rounding(
    reference: Callable[..., tuple[Tensor, Tensor]], inputs: tuple[Tensor, ...], dout: Tensor
) -> tuple[Tensor, ...]:
    """Return how gradients shift because a backward has the rounded output: D = rowsum(dO * O) of it.

    `reference(*inputs, dtype)` is (out, lse). D enters dS = P * (dP - D), and P is the gradient of the LSE.
    """

    def compute(*leaves):
        out, lse = reference(*leaves, torch.float64)
        lost = (out.to(dout.dtype).double() - out).detach()
        return lse.masked_fill(lse.isinf(), 0.0) * (dout.double() * lost).sum(-1).mT

    like_lse = torch.ones_like(reference(*inputs, torch.float64)[1])
    return gradients(compute, inputs, like_lse, torch.float64)


def assert_within(actual: Tensor, truth: Tensor, yardstick: Tensor, factor: float = 2.0) -> None:
    """Assert that `actual` is off by at most `factor` times what `yardstick` is, plus 1e-5."""
    assert actual.shape == truth.shape
    if actual.numel() == 0:
        return
    error = (actual.double() - truth.double()).abs().max().item()
    allowed = factor * (yardstick.double() - truth.double()).abs().max().item() + 1e-5
    assert error <= allowed, f"worst error {error:.3g}, allowed {allowed:.3g}"


def assert_gradients(
    actual: Sequence[Tensor | None], compute: Callable[..., Tensor], inputs: tuple[Tensor, ...], dout: Tensor
) -> None:
    """Assert that gradients, unless None, are within the tolerance of those of `compute(*inputs, dtype)`."""
    exact, rough = (
        gradients(lambda *x, d=dtype: compute(*x, d), inputs, dout, dtype)
        for dtype in (torch.float64, dout.dtype)
    )
    for a, truth, yardstick, x in zip(actual, exact, rough, inputs, strict=True):
        if a is not None:
            assert a.dtype == x.dtype
            assert_within(a, truth, yardstick, factor=3.0)


def assert_lse(actual: Tensor, truth: Tensor) -> None:
    """Assert equal infinities and finite values within 1e-3 relative (absolute below 1)."""
    assert actual.shape == truth.shape
    assert torch.equal(actual.isinf(), truth.isinf())
    finite = truth.isfinite()
    a, t = actual[finite].double(), truth[finite].double()
    assert ((a - t).abs() <= 1e-3 * t.abs().clamp(min=1.0)).all()


def philox_4x32(counter: tuple[int, int, int, int], key: tuple[int, int], rounds: int) -> tuple[int, ...]:
    """Philox4x32 in plain integers (Salmon et al., 2011)."""
    mask = 2**32 - 1
    a, b, c, d = counter
    x, y = key
    for _ in range(rounds):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (right >> 32) ^ b ^ x, right & mask, (left >> 32) ^ d ^ y, left & mask
        x, y = (x + 0x9E3779B9) & mask, (y + 0xBB67AE85) & mask
    return a, b, c, d


@lru_cache(maxsize=1 << 18)
def _words(
    row_block: int, lane: int, col_block: int, batch_head: int, seed: int, offset: int
) -> tuple[int, ...]:
    counter = ((row_block << 5) | lane, col_block, batch_head, offset & 0xFFFFFFFF)
    return philox_4x32(counter, (seed & 0xFFFFFFFF, seed >> 32), 7)


def dropout_keeps(rng_state: Tensor, dropout_p: float, shape: tuple[int, int, int, int]) -> Tensor:
    """Return the dropout mask (b, h, sq, sk) element by element, as the specification words it."""
    batch, num_heads, seqlen_q, seqlen_k = shape
    seed, offset = rng_state.tolist()
    threshold = math.floor((1 - dropout_p) * 65536 + 0.5)
    keep = torch.empty(shape, dtype=torch.bool)
    for bh in range(batch * num_heads):
        for i in range(seqlen_q):
            row = []
            for j in range(seqlen_k):
                lane = (i % 8) * 4 + (j % 8) // 2
                word = _words(i >> 4, lane, j >> 4, bh, seed, offset)[((j >> 3) & 1) * 2 + ((i >> 3) & 1)]
                row.append((word >> 16 if j % 2 else word & 0xFFFF) < threshold)
            keep[bh // num_heads, bh % num_heads, i] = torch.tensor(row, dtype=torch.bool)
    return keep
