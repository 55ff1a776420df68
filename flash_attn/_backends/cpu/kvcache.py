"""`flash_attn_with_kvcache` on the CPU: rotate, append in place, then attend, one sequence at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn._backends.cpu.attention import attend, gather_pages
from flash_attn._backends.cpu.chunks import undisturbed
from flash_attn._backends.cpu.rotary import turn
from flash_attn._calls import Cache, CacheForward, Rotary, Shapes
from flash_attn._layout import empty_out, lse_dtype


def _length(cache: Cache, b: int) -> int:
    """Return how many keys sequence `b` holds, leading padding included."""
    if cache.seqlens is None or isinstance(cache.seqlens, int):
        return cache.capacity if cache.seqlens is None else cache.seqlens
    return int(cache.seqlens[b])


def _entry(cache: Cache, b: int) -> int:
    """Return the batch entry of an unpaged cache that holds sequence `b`."""
    return b if cache.batch_idx is None else int(cache.batch_idx[b])


@torch.inference_mode()  # where a cache that was made in that mode may be written to
def _append(cache: Cache, b: int, k: Tensor, v: Tensor) -> None:
    """Write k (s_new, hk, d) and v (s_new, hk, dv) behind what sequence `b` holds."""
    positions = torch.arange(k.shape[0], device=k.device) + _length(cache, b)
    if cache.block_table is None:
        where = (torch.full_like(positions, _entry(cache, b)), positions)
    else:
        page_size = cache.k.shape[1]
        where = (cache.block_table[b].long()[positions // page_size], positions % page_size)
    cache.k[where], cache.v[where] = k, v


def _read(cache: Cache, b: int, length: int) -> tuple[Tensor, Tensor]:
    """Return keys (1, n, hk, d), values (1, n, hk, dv) of sequence `b` up to `length`, without padding."""
    if cache.block_table is not None:
        blocks = cache.block_table[b]
        return gather_pages(cache.k, blocks, length), gather_pages(cache.v, blocks, length)
    entry, first = _entry(cache, b), 0 if cache.leftpad is None else int(cache.leftpad[b])
    used = slice(first, max(first, length))
    return cache.k[None, entry, used], cache.v[None, entry, used]


def _rotated(x: Tensor, rotary: Rotary, positions: Tensor) -> Tensor:
    """Return x (s, h, d), whose rows are at `positions` (s,), rotated."""
    return turn(x, rotary.cos[positions], rotary.sin[positions], rotary.interleaved)


@undisturbed
def forward_kvcache(call: CacheForward) -> tuple[Tensor, Tensor]:
    """Append, then attend; see `Backend.forward_kvcache`. The LSE is always made."""
    q, cache, k, v, _, rotary, scoring, out, _, _ = call
    batch, seqlen_q, num_heads, _ = q.shape
    out = empty_out(q, q.shape[-1], cache.v.shape[-1]) if out is None else out
    lse = torch.empty(batch, num_heads, seqlen_q, dtype=lse_dtype(q.dtype), device=q.device)
    moving = scoring.window_left >= 0 or scoring.window_right >= 0
    for b in range(batch):
        length, row_q = _length(cache, b), q[b]
        if rotary is not None:
            row_q = _rotated(row_q, rotary, length + torch.arange(seqlen_q, device=q.device) * moving)
        if k is not None and v is not None:
            positions = length + torch.arange(k.shape[1], device=k.device)
            _append(cache, b, k[b] if rotary is None else _rotated(k[b], rotary, positions), v[b])
            length += k.shape[1]
        keys, values = _read(cache, b, length)
        attend(row_q[None], keys, values, out[b : b + 1], lse[b : b + 1], scoring, b)
    return out, lse


def num_key_parts(q: Tensor, k_cache: Tensor, shapes: Shapes, capacity: int) -> int:
    """Return 1: keys are never split here."""
    return 1
