"""CUDA backend of calls over a KV cache or pages: packs `_abi.CacheParams`, calls the library.

Written for host time, as `_cuda`: one struct and one call for appending, attention and merging.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn import _abi, _cuda, _gpu
from flash_attn import _validation as check
from flash_attn._arguments import check_memory, fail
from flash_attn._cpu_kvcache import Cache, Rotary
from flash_attn._layout import empty_out, padded_head_dim, write
from flash_attn._splits import WGMMA_FROM, plan, wgmma_tile
from flash_attn._validation import Scoring, Shapes

CACHE_NAMES = ("k_cache", "v_cache")
PAGES_NAMES = ("k", "v")

_pack = _abi.CACHE_PARAMS.pack


def kvcache_num_splits(q: Tensor, k_cache: Tensor, block_table: Tensor | None = None) -> int:
    """Return into how many parts `flash_attn_with_kvcache` splits the keys with num_splits 0.

    Only their shapes count, not what they hold; on CPU keys are not split. Score modifiers and a larger head
    dim of v are left out: on Hopper they may change the number of calls with many queries.
    """
    check.check_qkv(q, k_cache, k_cache, 4, 4, ("q", "k_cache", "k_cache"))
    if block_table is not None:
        check.check_index(block_table, "block_table", q, (q.shape[0], -1))
        check.check_page_size(k_cache, "k_cache")
    if not _gpu.serves(q):
        return 1
    batch, seqlen_q, num_heads, head_dim = q.shape
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    num_heads_k = k_cache.shape[2]
    rows, device = seqlen_q * (num_heads // num_heads_k), q.get_device()
    wgmma = None
    if _gpu.prepared(device).hopper and _cuda.readable(k_cache):
        wgmma = wgmma_tile(seqlen_q, num_heads, num_heads_k, head_dim, packs=True)
    return plan(batch, num_heads_k, rows, capacity, _gpu.multiprocessors(device), wgmma).num_splits


def _check_in_place(cache: Cache, names: tuple[str, str]) -> None:
    """Refuse a cache that kernels cannot read where it is, not even element by element."""
    for x, name in zip((cache.k, cache.v), names, strict=True):
        check_memory(x, name)
        if x.is_neg():
            fail(ValueError, name, "no negative view (it is not copied)", "one")
        if (x.stride(-1) != 1 and x.shape[-1] > 1) or x.data_ptr() % x.element_size():
            allowed = "contiguous in its last dimension, at an address of whole elements (it is not copied)"
            got = f"strides {x.stride()}, address % {x.element_size()} = {x.data_ptr() % x.element_size()}"
            fail(ValueError, name, allowed, got)


def _attend(
    q: Tensor, cache: Cache, k: Tensor | None, v: Tensor | None, rotary: Rotary | None, scoring: Scoring,
    out: Tensor, lse: Tensor | None, lse_strides: tuple[int, int], shapes: Shapes,
    sizes: tuple[int, int, int], num_splits: int, names: tuple[str, str],
    cu_seqlens: tuple[Tensor, Tensor] | None = None, copied: bool = False,
) -> None:  # fmt: skip
    """Append k and v, then write out and lse; num_splits 0 stands for the heuristic.

    `sizes` is (batch, seqlen_q, total_q): how the rows of q (b, sq, h, d), or (total_q, h, d) with
    `cu_seqlens` (of q, of k), fall into sequences. `names` are those of the cache's tensors. With `copied`,
    all but those are as kernels read them best, head dims padded to HEAD_DIM_MULTIPLE.

    Whatever a kernel reads stays referenced by a local variable until it is enqueued.
    """
    k_cache, v_cache, seqlens, batch_idx, leftpad, block_table = cache
    batch, seqlen_q, total_q = sizes
    batch_stride = _cuda.NOT_PACKED if cu_seqlens is None else _cuda.PACKED
    q_batch, q_row, q_head, q_last = batch_stride + q.stride()
    o_batch, o_row, o_head, o_last = batch_stride + out.stride()
    k_batch, k_row, k_head, k_last = k_cache.stride()
    v_batch, v_row, v_head, v_last = v_cache.stride()
    try:
        q_at, k_at, v_at, o_at = q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), out.data_ptr()
    except RuntimeError:  # of a tensor without storage, which is named below
        q_at = k_at = v_at = o_at = 0
    q_shape, (entries, rows, num_heads_k, cache_head_dim), v_shape = shapes
    num_heads, cache_head_dim_v = q_shape[-2], v_shape[3]
    strides = q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, o_batch, o_row, o_head
    elements = cache_head_dim | cache_head_dim_v | q_batch | q_row | q_head | k_batch | k_row | k_head
    elements |= v_batch | v_row | v_head | o_batch | o_row | o_head
    addresses = q_at | k_at | v_at | o_at
    contiguous = q_last == k_last == v_last == o_last == 1
    new_at, new_strides, seqlen_new = (0, 0), (0,) * 6, 0
    if k is not None and v is not None:
        kn_batch, kn_row, kn_head, kn_last = k.stride()
        vn_batch, vn_row, vn_head, vn_last = v.stride()
        new_strides = kn_batch, kn_row, kn_head, vn_batch, vn_row, vn_head
        elements |= kn_batch | kn_row | kn_head | vn_batch | vn_row | vn_head
        contiguous &= kn_last == vn_last == 1
        new_at, seqlen_new = (k.data_ptr(), v.data_ptr()), k.shape[1]
        contiguous &= new_at[0] > 0 < new_at[1] and not (k.is_neg() or v.is_neg())
        nested = (
            k_head >= cache_head_dim and k_row >= num_heads_k * k_head and k_batch >= rows * k_row
            and v_head >= cache_head_dim_v and v_row >= num_heads_k * v_head and v_batch >= rows * v_row
        )  # fmt: skip
        if not nested or abs(v_at - k_at) < 2 * entries * max(k_batch, v_batch):
            check.check_appended(k_cache, v_cache)
        addresses |= new_at[0] | new_at[1]
    aligned = contiguous and not (elements & 7 or addresses & 15)
    if not copied and (
        not aligned or not (q_at and k_at and v_at and o_at)
        or q.is_neg() or k_cache.is_neg() or v_cache.is_neg()
    ):  # fmt: skip
        return _attend_copies(
            q, cache, k, v, rotary, scoring, out, lse, lse_strides, shapes, sizes, num_splits, names,
            cu_seqlens,
        )  # fmt: skip
    head_dim, head_dim_v = padded_head_dim(cache_head_dim), padded_head_dim(cache_head_dim_v)
    device = q.get_device()
    stream = _gpu.raw_stream(device)
    library, hopper = _gpu.prepared(device)
    page_size, table_at, table_stride, capacity = 0, 0, 0, rows
    if block_table is not None:
        block_table = _cuda.contiguous(block_table, "block_table")
        table_at, table_stride = block_table.data_ptr(), block_table.shape[1]
        page_size, capacity = rows, rows * table_stride
    group_rows = seqlen_q * (num_heads // num_heads_k)
    wgmma, design, counter_at = None, _abi.Design.MMA, 0
    if hopper and aligned and group_rows >= WGMMA_FROM:
        packs = scoring.alibi_slopes is None and not scoring.softcap and scoring.softmax_scale > 0.0
        wgmma = wgmma_tile(seqlen_q, num_heads, num_heads_k, max(head_dim, head_dim_v), packs)
    if wgmma is not None or not num_splits:
        multiprocessors = _gpu.multiprocessors(device)
        num_splits, design = plan(
            batch, num_heads_k, group_rows, capacity, multiprocessors, wgmma, num_splits
        )  # fmt: skip
    if design == _abi.Design.WGMMA:
        counter = _gpu.tile_counter(device, stream)
        counter_at = counter.data_ptr()
    partial_at = partial_rows = 0
    if num_splits > 1:
        partial_rows = total_q * num_heads * num_splits
        partial = q.new_empty(partial_rows * (head_dim_v + 1), dtype=torch.float32)
        partial_at = partial.data_ptr()
    rotary_at, rotary_sizes = (0, 0, 0), (0, 0, 0)
    if rotary is not None:
        cos = _cuda.contiguous(rotary.cos, "rotary_cos", 16)
        sin = _cuda.contiguous(rotary.sin, "rotary_sin", 16)
        rotated = torch.empty(q_shape, dtype=q.dtype, device=q.device)
        rotary_at = cos.data_ptr(), sin.data_ptr(), rotated.data_ptr()
        rotary_sizes = cos.shape[0], 2 * cos.shape[1], rotary.interleaved
    seqlen, seqlens_at, batch_idx_at, leftpad_at, packed_at = 0, 0, 0, 0, (0, 0)
    if isinstance(seqlens, Tensor):
        seqlens_at = seqlens.data_ptr()
        if not seqlens_at or seqlens_at & 3 or not seqlens.is_contiguous() or seqlens.is_neg():
            seqlens = _cuda.contiguous(seqlens, "cache_seqlens")
            seqlens_at = seqlens.data_ptr()
    else:
        seqlen = capacity if seqlens is None else seqlens
    if batch_idx is not None:
        batch_idx = _cuda.contiguous(batch_idx, "cache_batch_idx")
        batch_idx_at = batch_idx.data_ptr()
    if leftpad is not None:
        leftpad = _cuda.contiguous(leftpad, "cache_leftpad")
        leftpad_at = leftpad.data_ptr()
    if cu_seqlens is not None:
        cu_seqlens_q = _cuda.contiguous(cu_seqlens[0], "cu_seqlens_q")
        cu_seqlens_k = _cuda.contiguous(cu_seqlens[1], "cu_seqlens_k")
        packed_at = cu_seqlens_q.data_ptr(), cu_seqlens_k.data_ptr()
    if scoring[-2] is not None or scoring[-1] is not None:  # slopes, sinks
        scoring = _cuda.readable_scoring(scoring)
    forward = _cuda.pack_forward(
        (q_at, k_at, v_at, o_at), 0 if lse is None else lse.data_ptr(), (*packed_at, 0, leftpad_at), 0,
        counter_at, strides, lse_strides, (batch, seqlen_q, capacity, total_q, num_heads, num_heads_k),
        entries, (head_dim, head_dim_v), scoring, q.dtype, device, library.family,
    )  # fmt: skip
    packed = _pack(
        forward, seqlens_at, batch_idx_at, table_at, *new_at, *rotary_at, partial_at,
        partial_at + 4 * partial_rows * head_dim_v, *new_strides, table_stride, entries, page_size, seqlen,
        seqlen_new, *rotary_sizes, num_splits, design, cache_head_dim, cache_head_dim_v,
    )  # fmt: skip
    status = library.cache(packed, stream)
    if status:
        _cuda.fail(status, q, max(head_dim, head_dim_v), library, _abi.Direction.SPLIT)


def _attend_copies(
    q: Tensor, cache: Cache, k: Tensor | None, v: Tensor | None, rotary: Rotary | None, scoring: Scoring,
    out: Tensor, lse: Tensor | None, lse_strides: tuple[int, int], shapes: Shapes,
    sizes: tuple[int, int, int], num_splits: int, names: tuple[str, str],
    cu_seqlens: tuple[Tensor, Tensor] | None,
) -> None:  # fmt: skip
    """`_attend` with copies of what kernels cannot read, or write, where it is; the cache is used in place.

    One that is not aligned has a kernel of its own, which reads it element by element.
    """
    _check_in_place(cache, names)
    check_memory(out, "out")
    target = out if _cuda.readable(out) else _cuda.writable(out)
    q = _cuda.aligned(q, "q")
    k, v = (None if x is None else _cuda.aligned(x, name) for x, name in ((k, "k"), (v, "v")))
    _attend(
        q, cache, k, v, rotary, scoring, target, lse, lse_strides, (q.shape, *shapes[1:]), sizes, num_splits,
        names, cu_seqlens, copied=True,
    )  # fmt: skip
    if target is not out:
        write(out, target[..., : out.shape[-1]])


def forward_kvcache(
    q: Tensor, cache: Cache, k: Tensor | None, v: Tensor | None, shapes: Shapes, rotary: Rotary | None,
    scoring: Scoring, out: Tensor | None, num_splits: int, need_lse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return (out, lse (b, h, sq) or None) of q (b, sq, h, d) over the cache, with k and v appended.

    Raises:
        ValueError: a cache whose last dimension is not contiguous, or that is expanded and appended to.
        RuntimeError: as in `_cuda.forward`.
    """
    (batch, seqlen_q, num_heads, head_dim), _, v_shape = shapes
    if out is None:
        out = empty_out(q, head_dim, v_shape[3])
    strides = num_heads * seqlen_q, seqlen_q
    lse = _cuda.empty_lse((batch, num_heads, seqlen_q), (*strides, 1), q) if need_lse else None
    sizes = batch, seqlen_q, batch * seqlen_q
    _attend(q, cache, k, v, rotary, scoring, out, lse, strides, shapes, sizes, num_splits, CACHE_NAMES)
    return out, lse


def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, scoring: Scoring, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, max_seqlen_q: int, seqused_k: Tensor | None, block_table: Tensor, need_lse: bool,
    num_splits: int = 0,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return (out, lse (h, total_q) or None) of q (total_q, h, d) over pages k (num_blocks, page, hk, d).

    Raises:
        ValueError, RuntimeError: as in `forward_kvcache`.
    """
    shapes = q.shape, k.shape, v.shape
    total_q, num_heads, _ = shapes[0]
    if out is None:
        out = empty_out(q, q.shape[-1], v.shape[3])
    lse = _cuda.empty_lse((num_heads, total_q), (total_q, 1), q) if need_lse else None
    sizes, cu_seqlens = (cu_seqlens_q.numel() - 1, max_seqlen_q, total_q), (cu_seqlens_q, cu_seqlens_k)
    cache = Cache(k, v, seqused_k, None, None, block_table)
    _attend(
        q, cache, None, None, None, scoring, out, lse, (0, total_q), shapes, sizes, num_splits, PAGES_NAMES,
        cu_seqlens,
    )  # fmt: skip
    return out, lse
