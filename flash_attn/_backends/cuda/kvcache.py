"""Calls over a KV cache or pages on CUDA: one struct and one call for appending, attention and merging.

Written for host time, as the forward. Whatever a kernel reads stays referenced until it is enqueued.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn import _abi
from flash_attn import _validation as check
from flash_attn._arguments import check_memory, fail
from flash_attn._backends.cuda import gpu, params
from flash_attn._backends.cuda.params import pack_forward
from flash_attn._backends.cuda.plan import plan_cache
from flash_attn._backends.cuda.tensors import (
    NOT_PACKED,
    PACKED,
    Places,
    aligned,
    empty_lse,
    locate,
    pointer,
    readable,
    readable_scoring,
    writable,
)
from flash_attn._calls import Cache, CacheForward, Forward, Rotary, Sequences, Shapes
from flash_attn._layout import empty_out, padded_head_dim, write

CACHE_NAMES = ("k_cache", "v_cache")
PAGES_NAMES = ("k", "v")
WGMMA = int(_abi.Design.WGMMA)
NO_ROTARY = (0, 0, 0), (0, 0, 0)

_pack = _abi.CACHE_PARAMS.pack


Lookup = tuple[int, int, int, int, int, int, int, int]
"""How the keys of each sequence are found, 0 for what is not given: the block table's address and stride, the
page size, the capacity, the address of the lengths or their value, cache_batch_idx and cache_leftpad.
"""


NewKeys = tuple[tuple[int, int], tuple[int, ...], int, bool]
"""Where keys and values to append lie: addresses, strides, their number, and if kernels can use them."""

NO_KEYS: NewKeys = (0, 0), (0,) * 6, 0, True


def _new_keys(k: Tensor, v: Tensor, cache: Cache, shapes: Shapes, places: Places) -> NewKeys:
    """Find where k and v lie, as `locate` does; check that no elements of the cache they go to coincide."""
    k_batch, k_row, k_head, k_last = k.stride()
    v_batch, v_row, v_head, v_last = v.stride()
    k_at, v_at = k.data_ptr(), v.data_ptr()
    usable = not (
        (k_batch | k_row | k_head | v_batch | v_row | v_head) & 7 or (k_at | v_at) & 15
        or not k_last == v_last == 1 or not (k_at and v_at) or k.is_neg() or v.is_neg()
    )  # fmt: skip
    (_, keys_at, values_at, _), strides, _ = places
    k_cache, v_cache = cache[0], cache[1]
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        _check_nested(cache, shapes, strides, abs(values_at - keys_at))
    elif abs(values_at - keys_at) < 2 * max(k_cache.numel(), v_cache.numel()):
        check.check_appended(k_cache, v_cache)
    return (k_at, v_at), (k_batch, k_row, k_head, v_batch, v_row, v_head), k.shape[1], usable


def _check_nested(cache: Cache, shapes: Shapes, strides: tuple[int, ...], distance: int) -> None:
    """Check a cache of any strides that is appended to, at a glance where they nest, of tensors far apart."""
    _, (entries, rows, heads, head_dim), v_shape = shapes
    k_entry, k_row, k_head, v_entry, v_row, v_head = strides[3:9]
    nested = (
        k_head >= head_dim and k_row >= heads * k_head and k_entry >= rows * k_row
        and v_head >= v_shape[3] and v_row >= heads * v_head and v_entry >= rows * v_row
    )  # fmt: skip
    if not nested or distance < 2 * entries * max(k_entry, v_entry):
        check.check_appended(cache.k, cache.v)


def _lookup(cache: Cache, rows: int, kept: list[Tensor]) -> Lookup:
    """Find what selects the keys of each sequence in a cache whose entries, or pages, have so many rows."""
    _, _, seqlens, batch_idx, leftpad, block_table = cache
    table_at = page_size = table_stride = idx_at = pad_at = seqlens_at = seqlen = 0
    capacity = rows
    if block_table is not None:
        table_at = pointer(block_table, "block_table", kept)
        table_stride, page_size = block_table.shape[1], rows
        capacity *= table_stride
    if isinstance(seqlens, Tensor):
        seqlens_at = pointer(seqlens, "cache_seqlens", kept)
    else:
        seqlen = capacity if seqlens is None else seqlens
    if batch_idx is not None or leftpad is not None:
        idx_at = pointer(batch_idx, "cache_batch_idx", kept)
        pad_at = pointer(leftpad, "cache_leftpad", kept)
    return table_at, table_stride, page_size, capacity, seqlens_at, seqlen, idx_at, pad_at


def _rotary_fields(
    q_shape: tuple[int, ...], q: Tensor, rotary: Rotary, kept: list[Tensor]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the addresses of cos, sin and q rotated, and (rotary_rows, rotary_dim, rotary_interleaved)."""
    cos, sin, interleaved = rotary
    cos_at, sin_at = pointer(cos, "rotary_cos", kept, 16), pointer(sin, "rotary_sin", kept, 16)
    kept.append(torch.empty(q_shape, dtype=q.dtype, device=q.device))
    return (cos_at, sin_at, kept[-1].data_ptr()), (cos.shape[0], 2 * cos.shape[1], interleaved)


def _run(
    call: CacheForward, out: Tensor, lse: Tensor | None, lse_strides: tuple[int, int],
    sizes: tuple[int, int, int], sequences: Sequences | None = None, copied: bool = False,
) -> None:  # fmt: skip
    """Append k and v, then write out and lse.

    The rows of q (b, sq, h, d), or (total_q, h, d) of `sequences`, fall into sequences by `sizes`: (batch,
    seqlen_q, total_q). With `copied`, all but the cache is as kernels read it best, head dims padded to
    HEAD_DIM_MULTIPLE.
    """
    q, cache, k, v, shapes, rotary, scoring, _, num_splits, _ = call
    q_shape, (entries, rows, num_heads_k, cache_head_dim), v_shape = shapes
    (batch, seqlen_q, total_q), num_heads, cache_head_dim_v = sizes, q_shape[-2], v_shape[3]
    of_q = NOT_PACKED if sequences is None else PACKED
    places = locate(q, cache[0], cache[1], out, cache_head_dim | cache_head_dim_v, of_q, NOT_PACKED)
    new_at, new_strides, seqlen_new, news_usable = NO_KEYS
    if k is not None and v is not None:
        new_at, new_strides, seqlen_new, news_usable = _new_keys(k, v, cache, shapes, places)
    usable = places[-1] and news_usable
    if not (usable or copied):
        return _run_copies(call, out, lse, lse_strides, sizes, sequences)
    kept: list[Tensor] = []
    lookup = _lookup(cache, rows, kept)
    table_at, table_stride, page_size, capacity, seqlens_at, seqlen, idx_at, pad_at = lookup
    starts_q = starts_k = 0
    if sequences is not None:
        starts_q = pointer(sequences.cu_seqlens_q, "cu_seqlens_q", kept)
        starts_k = pointer(sequences.cu_seqlens_k, "cu_seqlens_k", kept)
    device = q.get_device()
    stream = gpu.raw_stream(device)
    library, dtype = gpu.prepared(device).library, q.dtype
    head_dims = cache_head_dim, cache_head_dim_v
    if not usable:
        head_dims = padded_head_dim(cache_head_dim), padded_head_dim(cache_head_dim_v)
    softmax_scale, softcap, _, _, _, slopes, sinks = scoring
    num_splits, design = plan_cache(
        library, device, dtype, batch, seqlen_q, num_heads, num_heads_k, capacity, head_dims, num_splits,
        usable, softmax_scale, softcap, slopes is not None,
    )  # fmt: skip
    counter_at = partial_at = partial_rows = 0
    if design == WGMMA:
        kept.append(gpu.tile_counter(device, stream))
        counter_at = kept[-1].data_ptr()
    if num_splits > 1:
        partial_rows = total_q * num_heads * num_splits
        kept.append(q.new_empty(partial_rows * (head_dims[1] + 1), dtype=torch.float32))
        partial_at = kept[-1].data_ptr()
    rotary_at, rotary_sizes = NO_ROTARY if rotary is None else _rotary_fields(q_shape, q, rotary, kept)
    if slopes is not None or sinks is not None:
        scoring = readable_scoring(scoring)
    geometry = (
        (batch, seqlen_q, capacity, total_q, num_heads, num_heads_k), entries, head_dims, lse_strides,
        (starts_q, starts_k, 0, pad_at),
    )  # fmt: skip
    buffers = 0 if lse is None else lse.data_ptr(), 0, counter_at
    forward = pack_forward(places, geometry, scoring, buffers, dtype, device, library.family)
    packed = _pack(
        forward, seqlens_at, idx_at, table_at, *new_at, *rotary_at, partial_at,
        partial_at + 4 * partial_rows * head_dims[1], *new_strides, table_stride, entries, page_size, seqlen,
        seqlen_new, *rotary_sizes, num_splits, design, cache_head_dim, cache_head_dim_v,
    )  # fmt: skip
    status = library.cache(packed, stream)
    if status:
        params.fail(status, dtype, device, max(head_dims), library, _abi.Direction.SPLIT)


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


def _run_copies(
    call: CacheForward, out: Tensor, lse: Tensor | None, lse_strides: tuple[int, int],
    sizes: tuple[int, int, int], sequences: Sequences | None,
) -> None:  # fmt: skip
    """`_run` with copies of what kernels cannot read, or write, where it is; the cache is used in place.

    One that is not aligned has a kernel of its own, which reads it element by element.
    """
    _check_in_place(call.cache, CACHE_NAMES if sequences is None else PAGES_NAMES)
    check_memory(out, "out")
    target = out if readable(out) else writable(out)
    q = aligned(call.q, "q")
    k, v = (None if x is None else aligned(x, name) for x, name in ((call.k, "k"), (call.v, "v")))
    call = call._replace(q=q, k=k, v=v, shapes=(q.shape, *call.shapes[1:]))
    _run(call, target, lse, lse_strides, sizes, sequences, copied=True)
    if target is not out:
        write(out, target[..., : out.shape[-1]])


def forward_kvcache(call: CacheForward) -> tuple[Tensor, Tensor | None]:
    """Append, then attend; see `Backend.forward_kvcache`.

    Raises:
        ValueError: a cache whose last dimension is not contiguous, or that is expanded and appended to.
        RuntimeError: as in `forward`.
    """
    q, shapes, out, need_lse = call[0], call[4], call[7], call[9]
    (batch, seqlen_q, num_heads, head_dim), _, v_shape = shapes
    if out is None:
        out = empty_out(q, head_dim, v_shape[3])
    strides = num_heads * seqlen_q, seqlen_q
    lse = empty_lse((batch, num_heads, seqlen_q), (*strides, 1), q) if need_lse else None
    sizes = batch, seqlen_q, batch * seqlen_q
    _run(call, out, lse, strides, sizes)
    return out, lse


def forward_pages(call: Forward, sequences: Sequences, block_table: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return (out, lse (h, total_q) or None) of packed q over pages, of which the table's are in use.

    Raises:
        ValueError, RuntimeError: as in `forward_kvcache`.
    """
    q, k, v, out, shapes, scoring, _, num_splits, _, _, need_lse = call
    (total_q, num_heads, head_dim), _, v_shape = shapes
    if out is None:
        out = empty_out(q, head_dim, v_shape[3])
    lse = empty_lse((num_heads, total_q), (total_q, 1), q) if need_lse else None
    cache = Cache(k, v, sequences.seqused_k, None, None, block_table)
    sizes = sequences.cu_seqlens_q.numel() - 1, sequences.max_seqlen_q, total_q
    over_pages = CacheForward(q, cache, None, None, shapes, None, scoring, out, num_splits, need_lse)
    _run(over_pages, out, lse, (0, total_q), sizes, sequences)
    return out, lse


def num_key_parts(q: Tensor, k_cache: Tensor, shapes: Shapes, capacity: int) -> int:
    """Return the plan's number of parts, without score modifiers, for values of the keys' head dim."""
    (batch, seqlen_q, num_heads, head_dim), (_, _, num_heads_k, _), _ = shapes
    device = q.get_device()
    return plan_cache(
        gpu.prepared(device).library, device, q.dtype, batch, seqlen_q, num_heads, num_heads_k, capacity,
        (padded_head_dim(head_dim),) * 2, 0, readable(k_cache), 1.0, 0.0, False,
    ).num_splits  # fmt: skip
