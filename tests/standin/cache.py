"""Calls over a KV cache or pages of the stand-in: appends, rotates and attends, sequence by sequence."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import torch
from oracle import attention
from torch import Tensor

from . import attention as plain
from .attention import clamp
from .memory import Memory, need
from .params import DTYPES, MAX_SPLITS, check_flags, check_forward
from .rotary import rotated

KEY_GROUP = 16
"""Page sizes are multiples of it."""


def _check(s: SimpleNamespace) -> None:
    p = s.forward
    check_forward(p)
    check_flags(s, "rotary_interleaved", "design")
    need(1 <= s.num_splits <= MAX_SPLITS, f"num_splits is {s.num_splits}")
    for name in ("cache_entries", "page_size", "cache_seqlen", "seqlen_new", "rotary_rows", "rotary_dim"):
        need(getattr(s, name) >= 0, f"{name} is {getattr(s, name)}")
    need(not p.seqused_k, "seqused_k over a cache")
    need(not p.dropout_p, "dropout over a cache")
    need(s.page_size % KEY_GROUP == 0, f"page_size is {s.page_size}")
    if s.page_size:
        need(not (s.cache_batch_idx or p.leftpad_k), "pages with cache_batch_idx or leftpad_k")
        need(p.seqlen_k % s.page_size == 0, f"room for {p.seqlen_k} keys in pages of {s.page_size}")
    if p.cu_seqlens_q:
        need(s.page_size and not s.seqlen_new and not s.rotary_cos, "cu_seqlens_q over what are no pages")
    need(bool(s.rotary_cos) == bool(s.rotary_sin), "rotary_cos without rotary_sin")
    need(s.rotary_dim % 16 == 0 and s.rotary_dim <= p.head_dim, f"rotary_dim is {s.rotary_dim}")


class Cache:
    """Keys and values of every sequence, in rows of their own or in pages."""

    def __init__(self, memory: Memory, s: SimpleNamespace) -> None:
        p = s.forward
        self.page_size, self.entries, self.room = s.page_size, s.cache_entries, p.seqlen_k
        rows = s.page_size or p.seqlen_k
        self.head_dims = p.head_dim, p.head_dim_v
        own = getattr(s, "cache_head_dim", p.head_dim), getattr(s, "cache_head_dim_v", p.head_dim_v)
        self.k, self.v = (
            memory.heads(
                p, name, (s.cache_entries, rows, p.num_heads_k, dim), DTYPES[p.dtype],
                aligned=not hasattr(s, "cache_head_dim"),
            )
            for name, dim in zip("kv", own, strict=True)
        )  # fmt: skip
        self.index = list(range(p.batch))
        if s.cache_batch_idx:
            self.index = memory.integers("cache_batch_idx", s.cache_batch_idx, p.batch)
        if s.page_size:
            pages = p.batch, p.seqlen_k // s.page_size
            strides = s.block_table_stride, 1
            self.table = memory.view("block_table", s.block_table, pages, strides, torch.int32).long()
        lengths = [s.cache_seqlen] * p.batch
        if s.cache_seqlens:
            lengths = memory.integers("cache_seqlens", s.cache_seqlens, p.batch)
        elif p.cu_seqlens_q:
            starts = plain.bounds_of(memory, p, "k")
            lengths = [end - start for start, end in pairwise(starts)]
        pads = memory.integers("leftpad_k", p.leftpad_k, p.batch) if p.leftpad_k else [0] * p.batch
        self.lengths, self.pads = ([clamp(n, self.room) for n in found] for found in (lengths, pads))

    def places(self, i: int, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Return entry, -1 where there is none, and row of each of a sequence's keys."""
        keys = torch.arange(first, end, device="cpu")
        if self.page_size:
            entries, rows = self.table[i, keys // self.page_size], keys % self.page_size
        else:
            entries, rows = torch.full_like(keys, self.index[i]), keys
        return entries.masked_fill((entries < 0) | (entries >= self.entries), -1), rows

    def append(self, i: int, k: Tensor, v: Tensor) -> None:
        """Write a sequence's new keys, those that the cache has room for."""
        first = max(self.lengths[i], self.pads[i])
        entries, rows = self.places(i, first, max(min(self.lengths[i] + len(k), self.room), first))
        there = entries >= 0
        for x, new in ((self.k, k), (self.v, v)):
            skipped = new[first - self.lengths[i] :][: len(entries)]
            x[entries[there], rows[there]] = skipped[there][..., : x.shape[-1]]

    def read(self, i: int, appended: int) -> list[Tensor]:
        """Return the keys and values (1, n, hk, d) that a sequence sees, zero where there are none."""
        end = min(self.lengths[i] + appended, self.room)
        entries, rows = self.places(i, self.pads[i], max(end, self.pads[i]))
        found = []
        for x, head_dim in zip((self.k, self.v), self.head_dims, strict=True):
            whole = x.new_zeros(1, len(rows), x.shape[2], head_dim)
            there = entries >= 0
            whole[0, there, :, : x.shape[-1]] = x[entries[there], rows[there]]
            found.append(whole)
        return found


def _tables(memory: Memory, s: SimpleNamespace) -> tuple[Tensor, Tensor] | None:
    if not s.rotary_cos:
        return None
    shape = s.rotary_rows, s.rotary_dim // 2
    for name in ("rotary_cos", "rotary_sin"):
        need(getattr(s, name) % 16 == 0, f"{name} is at {getattr(s, name):#x}")
    p = s.forward
    memory.poison("q_rotated", s.q_rotated, plain.shape_of(p, "q"), DTYPES[p.dtype])
    return tuple(
        memory.dense(name, getattr(s, name), shape, DTYPES[p.dtype]) for name in ("rotary_cos", "rotary_sin")
    )


def _new_keys(memory: Memory, s: SimpleNamespace) -> list[Tensor]:
    p = s.forward
    shape = p.batch, s.seqlen_new, p.num_heads_k
    return [
        memory.heads(s, f"{name}_new", (*shape, dim), DTYPES[p.dtype])
        for name, dim in (("k", p.head_dim), ("v", p.head_dim_v))
    ]


def attend(memory: Memory, s: SimpleNamespace) -> None:
    """Append to the cache, then write out and the LSE."""
    p = s.forward
    _check(s)
    cache = Cache(memory, s)
    k_new, v_new = _new_keys(memory, s)
    q, tables = plain.tensor(memory, p, "q"), _tables(memory, s)
    out, lse = plain.tensor(memory, p, "out", written=True), plain.lse_of(memory, p)
    if lse is not None:
        lse.fill_(math.nan)
    if s.num_splits > 1:
        parts = *plain.shape_of(p, "q")[:3], s.num_splits
        memory.poison("out_partial", s.out_partial, (*parts, p.head_dim_v), torch.float32)
        memory.poison("lse_partial", s.lse_partial, parts, torch.float32)
    starts = plain.bounds_of(memory, p, "q") if p.cu_seqlens_q else None
    if starts:
        plain.check_bounds(starts, "q", p.seqlen_q, p.total_q)
    moves = p.window_left >= 0 or p.window_right >= 0
    for i in range(p.batch):
        at, rows = (0, slice(starts[i], starts[i + 1])) if starts else (i, slice(0, p.seqlen_q))
        queries, keys, first = q[at : at + 1, rows], k_new[i], cache.lengths[i]
        if tables is not None:
            steps = torch.arange(queries.shape[1], device="cpu") * moves
            queries = rotated(queries[0], *tables, first + steps, bool(s.rotary_interleaved))[None]
            steps = torch.arange(s.seqlen_new, device="cpu")
            keys = rotated(keys, *tables, first + steps, bool(s.rotary_interleaved))
        cache.append(i, keys, v_new[i])
        options = plain.options_of(memory, p, slice(i, i + 1))
        found, found_lse = attention(queries, *cache.read(i, s.seqlen_new), options)
        out[at, rows] = found[0].to(out.dtype)
        if lse is not None:
            lse[at, :, rows] = found_lse[0].float()
    plain.end_rows(memory, p, out, lse)
