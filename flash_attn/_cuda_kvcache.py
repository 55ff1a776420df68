"""CUDA backend of calls over a KV cache or pages: packs `_abi.SplitParams`, calls the library.

Written for host time, as `_cuda`: one struct and one call for appending, attention and merging.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn import _abi, _cuda
from flash_attn import _validation as check
from flash_attn._cpu_kvcache import Cache, Rotary
from flash_attn._layout import empty_out
from flash_attn._splits import heuristic
from flash_attn._validation import Scoring

_pack = _abi.SPLIT_PARAMS.pack


class _Queries(NamedTuple):
    """How the rows of q (b, sq, h, d), or (total_q, h, d) with cu_seqlens, fall into sequences."""

    batch: int
    seqlen_q: int
    total_q: int
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None


def _check_in_place(x: Tensor, name: str) -> None:
    """Refuse a cache that kernels cannot read where it is."""
    if not _cuda.readable(x):
        allowed = (
            "of a head dim and strides that are multiples of 8, at an address that is a multiple of 16"
            " (a cache is not copied)"
        )
        got = f"shape {tuple(x.shape)}, strides {x.stride()}, address % 16 = {x.data_ptr() % 16}"
        check.fail(ValueError, name, allowed, got)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _index(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.is_contiguous() else x.contiguous()


def _tables(rotary: Rotary | None) -> tuple[Tensor | None, Tensor | None]:
    """Return cos and sin as the kernel reads them: contiguous and aligned."""
    if rotary is None:
        return None, None
    cos, sin = (
        x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
        for x in rotary[:2]
    )
    return cos, sin


def _attend(
    q: Tensor, cache: Cache, k: Tensor | None, v: Tensor | None, rotary: Rotary | None, scoring: Scoring,
    out: Tensor, lse: Tensor | None, lse_strides: tuple[int, int], queries: _Queries, num_splits: int,
) -> None:  # fmt: skip
    """Append k and v, then write out and lse; num_splits 0 stands for the heuristic."""
    k_cache, v_cache, seqlens, batch_idx, leftpad, block_table = cache
    batch, seqlen_q, total_q, cu_seqlens_q, cu_seqlens_k = queries
    entries, rows, num_heads_k, head_dim = k_cache.shape
    num_heads, head_dim_v = q.shape[-2], v_cache.shape[3]
    capacity = rows if block_table is None else rows * block_table.shape[1]
    device = q.get_device()
    stream = _cuda.raw_stream(device)
    library = _cuda.library_on(device)
    if not num_splits:
        num_splits = heuristic(
            batch, num_heads_k, seqlen_q * (num_heads // num_heads_k), capacity, _cuda.multiprocessors(device)
        )
    partial = partial_rows = 0
    if num_splits > 1:
        partial_rows = total_q * num_heads * num_splits
        workspace = torch.empty(partial_rows * (head_dim_v + 1), dtype=torch.float32, device=q.device)
        partial = workspace.data_ptr()
    cos, sin = _tables(rotary)
    rotated = None if rotary is None else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    packed_batch = _cuda.NOT_PACKED if cu_seqlens_q is None else _cuda.PACKED
    new_strides = (0,) * 6 if k is None or v is None else (*k.stride()[:3], *v.stride()[:3])
    lengths = None if isinstance(seqlens, int) else seqlens
    indices = [_index(x) for x in (cu_seqlens_q, cu_seqlens_k, leftpad, lengths, batch_idx, block_table)]
    cu_q_at, cu_k_at, leftpad_at, lengths_at, batch_idx_at, table_at = map(_address, indices)
    strides = (
        *packed_batch, *q.stride()[:-1], *k_cache.stride()[:3], *v_cache.stride()[:3], *packed_batch,
        *out.stride()[:-1],
    )  # fmt: skip
    addresses = q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), out.data_ptr()
    sizes = batch, seqlen_q, capacity, total_q, num_heads, num_heads_k
    forward = _cuda.pack_forward(
        addresses, _address(lse), (cu_q_at, cu_k_at, 0, leftpad_at), 0, 0, strides, lse_strides, sizes,
        entries, (head_dim, head_dim_v), _cuda.with_contiguous_slopes(scoring), q.dtype, device,
        library.family,
    )  # fmt: skip
    packed = _pack(
        forward, lengths_at, batch_idx_at, table_at, _address(k), _address(v), _address(cos), _address(sin),
        _address(rotated), partial, partial + 4 * partial_rows * head_dim_v, *new_strides,
        0 if block_table is None else block_table.shape[1], entries, 0 if block_table is None else rows,
        capacity if seqlens is None else seqlens if isinstance(seqlens, int) else 0,
        0 if k is None else k.shape[1], 0 if cos is None else cos.shape[0],
        0 if cos is None else 2 * cos.shape[1], rotary is not None and rotary.interleaved, num_splits,
    )  # fmt: skip
    status = library.split(packed, stream)
    if status:
        _cuda.fail(status, q, max(head_dim, head_dim_v), library, _abi.Direction.SPLIT)


def _run(
    q: Tensor, cache: Cache, k: Tensor | None, v: Tensor | None, rotary: Rotary | None, scoring: Scoring,
    out: Tensor, lse: Tensor | None, lse_strides: tuple[int, int], queries: _Queries, num_splits: int,
) -> None:  # fmt: skip
    """`_attend` with copies of what kernels cannot read, or write, where it is; the cache is refused then."""
    _check_in_place(cache.k, "k_cache")
    _check_in_place(cache.v, "v_cache")
    target = out if _cuda.readable(out) else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    k, v = (None if x is None else _cuda.aligned(x) for x in (k, v))
    _attend(_cuda.aligned(q), cache, k, v, rotary, scoring, target, lse, lse_strides, queries, num_splits)
    if target is not out:
        out.copy_(target)


def forward_kvcache(
    q: Tensor, cache: Cache, k: Tensor | None, v: Tensor | None, rotary: Rotary | None, scoring: Scoring,
    out: Tensor | None, num_splits: int, need_lse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return (out, lse (b, h, sq) or None) of q (b, sq, h, d) over the cache, with k and v appended.

    Raises:
        ValueError: a cache that kernels cannot read where it is.
        RuntimeError: as in `_cuda.forward`.
    """
    batch, seqlen_q, num_heads, _ = q.shape
    if out is None:
        out = empty_out(q, cache.v.shape[3])
    strides = num_heads * seqlen_q, seqlen_q
    lse = _cuda.empty_lse((batch, num_heads, seqlen_q), (*strides, 1), q) if need_lse else None
    queries = _Queries(batch, seqlen_q, batch * seqlen_q)
    _run(q, cache, k, v, rotary, scoring, out, lse, strides, queries, num_splits)
    return out, lse


def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, scoring: Scoring, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, max_seqlen_q: int, seqused_k: Tensor | None, block_table: Tensor, need_lse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return (out, lse (h, total_q) or None) of q (total_q, h, d) over pages k (num_blocks, page, hk, d).

    Raises:
        ValueError, RuntimeError: as in `forward_kvcache`.
    """
    total_q, num_heads, _ = q.shape
    if out is None:
        out = empty_out(q, v.shape[3])
    lse = _cuda.empty_lse((num_heads, total_q), (total_q, 1), q) if need_lse else None
    queries = _Queries(cu_seqlens_q.numel() - 1, max_seqlen_q, total_q, cu_seqlens_q, cu_seqlens_k)
    cache = Cache(k, v, seqused_k, None, None, block_table)
    _run(q, cache, None, None, None, scoring, out, lse, (0, total_q), queries, 0)
    return out, lse
