"""Rotation of the stand-in, by the oracle."""

from __future__ import annotations

from types import SimpleNamespace

import oracle
import torch
from torch import Tensor

from .memory import Memory, need
from .params import DTYPES, check_flags


def rotated(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool, sign: float = 1.0
) -> Tensor:
    """Return x (s, h, d) rotated by tables (rows, d' / 2); a row whose position they lack stays as it is."""
    there = (positions >= 0) & (positions < len(cos))
    out = x.clone()
    out[there] = oracle.rotated(x[there], cos, sign * sin, positions[there], interleaved).to(x.dtype)
    return out


def rotate_rows(memory: Memory, r: SimpleNamespace) -> None:
    """Write `out`, which may be x."""
    check_flags(r, "interleaved", "conjugate", "fp32_tables")
    need(r.dtype in DTYPES, f"dtype is {r.dtype}")
    need(r.head_dim > 0 and r.head_dim % 8 == 0, f"head_dim is {r.head_dim}")
    multiple = 8 if r.interleaved else 16
    need(0 < r.rotary_dim <= r.head_dim and r.rotary_dim % multiple == 0, f"rotary_dim is {r.rotary_dim}")
    dtype, packed = DTYPES[r.dtype], bool(r.cu_seqlens)
    shape = (1, r.rows) if packed else (r.batch, r.seqlen)
    need(packed or r.rows == r.batch * r.seqlen, f"rows is {r.rows}")
    shape = *shape, r.num_heads, r.head_dim
    x = memory.heads(r, "x", shape, dtype, packed=packed).clone()
    out = memory.heads(r, "out", shape, dtype, packed=packed, written=True)
    tables = []
    for name in ("cos", "sin"):
        need(getattr(r, name) % 16 == 0, f"{name} is at {getattr(r, name):#x}")
        kind = torch.float32 if r.fp32_tables else dtype
        tables.append(memory.dense(name, getattr(r, name), (r.table_rows, r.rotary_dim // 2), kind))
    bounds = memory.integers("cu_seqlens", r.cu_seqlens, r.batch + 1) if packed else None
    offsets = memory.integers("offsets", r.offsets, r.batch) if r.offsets else [r.offset] * r.batch
    out.copy_(x)
    for i, offset in enumerate(offsets):
        at, first, end = (0, *bounds[i : i + 2]) if packed else (i, 0, r.seqlen)
        positions = offset + torch.arange(end - first, device="cpu")
        sign = -1.0 if r.conjugate else 1.0
        out[at, first:end] = rotated(x[at, first:end], *tables, positions, bool(r.interleaved), sign)
