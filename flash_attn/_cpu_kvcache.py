"""CPU backend of `flash_attn_with_kvcache`: rotate, append in place, then attend, one sequence at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn._cpu import attend, gather_pages, undisturbed
from flash_attn._layout import empty_out, lse_dtype
from flash_attn._rotary import rotate
from flash_attn._validation import Scoring


class Cache(NamedTuple):
    """The KV cache and how its rows are found; see `flash_attn_with_kvcache`."""

    k: Tensor
    v: Tensor
    seqlens: Tensor | int | None
    batch_idx: Tensor | None
    leftpad: Tensor | None
    block_table: Tensor | None

    @property
    def capacity(self) -> int:
        """Number of keys that one sequence has room for."""
        pages = 1 if self.block_table is None else self.block_table.shape[1]
        return pages * self.k.shape[1]

    def length(self, b: int) -> int:
        """Return how many keys sequence `b` holds, leading padding included."""
        if self.seqlens is None or isinstance(self.seqlens, int):
            return self.capacity if self.seqlens is None else self.seqlens
        return int(self.seqlens[b])

    def row(self, b: int) -> int:
        """Return the batch entry of an unpaged cache that holds sequence `b`."""
        return b if self.batch_idx is None else int(self.batch_idx[b])

    @torch.inference_mode()  # where a cache that was made in that mode may be written to
    def append(self, b: int, k: Tensor, v: Tensor) -> None:
        """Write k (s_new, hk, d) and v (s_new, hk, dv) behind what sequence `b` holds."""
        positions = torch.arange(k.shape[0], device=k.device) + self.length(b)
        if self.block_table is None:
            where = (torch.full_like(positions, self.row(b)), positions)
        else:
            page_size = self.k.shape[1]
            where = (self.block_table[b].long()[positions // page_size], positions % page_size)
        self.k[where], self.v[where] = k, v

    def read(self, b: int, length: int) -> tuple[Tensor, Tensor]:
        """Return keys (1, n, hk, d), values (1, n, hk, dv) of entry `b` up to `length`, without padding."""
        if self.block_table is not None:
            blocks = self.block_table[b]
            return gather_pages(self.k, blocks, length), gather_pages(self.v, blocks, length)
        first = 0 if self.leftpad is None else int(self.leftpad[b])
        used = slice(first, max(first, length))
        return self.k[None, self.row(b), used], self.v[None, self.row(b), used]


class Rotary(NamedTuple):
    """Rotary tables cos, sin (s_ro, rotary_dim / 2) and the layout of pairs."""

    cos: Tensor
    sin: Tensor
    interleaved: bool

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate x (s, h, d), whose rows are at `positions` (s,)."""
        return rotate(x, self.cos[positions], self.sin[positions], self.interleaved)


@undisturbed
def forward_kvcache(
    q: Tensor, cache: Cache, k: Tensor | None, v: Tensor | None, rotary: Rotary | None, scoring: Scoring,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (out, lse (b, h, sq)) of q (b, sq, h, d) over the cache, with k and v appended.

    k is (b, s_new, hk, d), v (b, s_new, hk, dv).
    """
    batch, seqlen_q, num_heads, _ = q.shape
    out = empty_out(q, q.shape[-1], cache.v.shape[-1]) if out is None else out
    lse = torch.empty(batch, num_heads, seqlen_q, dtype=lse_dtype(q.dtype), device=q.device)
    moving = scoring.window_left >= 0 or scoring.window_right >= 0
    for b in range(batch):
        length, row_q = cache.length(b), q[b]
        if rotary is not None:
            row_q = rotary(row_q, length + torch.arange(seqlen_q, device=q.device) * moving)
        if k is not None and v is not None:
            positions = length + torch.arange(k.shape[1], device=k.device)
            cache.append(b, k[b] if rotary is None else rotary(k[b], positions), v[b])
            length += k.shape[1]
        keys, values = cache.read(b, length)
        attend(row_q[None], keys, values, out[b : b + 1], lse[b : b + 1], scoring, b)
    return out, lse
