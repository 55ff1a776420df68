"""The operation behind `flash_attn_with_kvcache`: check its arguments, then run where the tensors are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash_attn import _backends, _device
from flash_attn import _validation as check
from flash_attn._abi import MAX_SEQLEN, ROTARY_MULTIPLE
from flash_attn._arguments import as_flag, as_int, check_memory, check_tensor, fail
from flash_attn._backends import cpu, cuda
from flash_attn._calls import Cache, CacheForward, Options, Rotary, Scoring, Shapes, Tables, new
from flash_attn._dispatch import is_tracing


def _check_cache(q: Tensor, cache: Cache, batch: int, entries: int) -> None:
    """Check the cache tensors, of `entries` entries or pages, and what selects their rows."""
    k, _, seqlens, batch_idx, leftpad, block_table = cache
    if isinstance(seqlens, Tensor):
        check.check_index(seqlens, "cache_seqlens", q, (batch,))
    if batch_idx is not None or leftpad is not None:
        for x, name in ((batch_idx, "cache_batch_idx"), (leftpad, "cache_leftpad")):
            if x is not None:
                check.check_index(x, name, q, (batch,))
                if block_table is not None:
                    fail(ValueError, name, "None with a block_table", "a tensor")
    if block_table is not None:
        check.check_index(block_table, "block_table", q, (batch, -1))
        check.check_page_size(k, "k_cache")
    elif batch_idx is None and entries < batch:
        fail(ValueError, "k_cache", f"of at least q's batch size ({batch})", entries)


def _check_new(q: Tensor, cache: Cache, shapes: Shapes, k: Tensor | None, v: Tensor | None) -> int:
    """Check the keys and values to append; return how many there are per sequence.

    `shapes` are those of q and the cache.
    """
    if k is None and v is None:
        return 0
    if k is None or v is None:
        missing = "k" if k is None else "v"
        fail(ValueError, missing, "given together with its pair", None)
    if cache.seqlens is None:
        fail(ValueError, "cache_seqlens", "given where k and v are appended", None)
    if isinstance(k, Tensor) and isinstance(v, Tensor):
        k_shape, v_shape, cached, cached_v = k.shape, v.shape, *shapes[1:]
        if (
            len(k_shape) == 4 == len(v_shape) and k.dtype is v.dtype is q.dtype
            and k.get_device() == q.get_device() == v.get_device()
            and (q.is_cuda or k.device == q.device == v.device)
            and k_shape[0] == shapes[0][0] and k_shape[2] == cached[2] and k_shape[3] == cached[3]
            and (v_shape == k_shape or v_shape[:3] == k_shape[:3]) and v_shape[3] == cached_v[3]
        ):  # fmt: skip
            return k_shape[1]
    check.check_qkv(q, k, v, 4, 4)
    check.check_batch(k, q.shape[0])
    if k.shape[2] != cache.k.shape[2]:
        fail(ValueError, "k", f"of k_cache's number of heads ({cache.k.shape[2]})", k.shape[2])
    if v.shape[3] != cache.v.shape[3]:
        fail(ValueError, "v", f"of v_cache's head dim ({cache.v.shape[3]})", v.shape[3])
    return k.shape[1]


def _check_on_cpu(cache: Cache, s_new: int) -> None:
    """Check on CPU that the cache can be written in place, and that lengths, rows and pages lie inside of it.

    The CUDA backend asks for more of its strides and does not read the rest.
    """
    for x, name in ((cache.k, "k_cache"), (cache.v, "v_cache")):
        if x.stride(3) != 1 and x.shape[3] > 1:
            fail(ValueError, name, "contiguous in its last dimension", f"strides {x.stride()}")
    if isinstance(cache.seqlens, Tensor):
        check.check_range(cache.seqlens, "cache_seqlens", 0, cache.capacity - s_new)
    if cache.batch_idx is not None:
        check.check_range(cache.batch_idx, "cache_batch_idx", 0, cache.k.shape[0] - 1)
    if cache.block_table is not None:
        filled = cache.capacity if cache.seqlens is None else cache.seqlens
        lengths = torch.as_tensor(filled, device="cpu").expand(cache.block_table.shape[0]) + s_new
        check.check_pages(cache.block_table, lengths, cache.k.shape[1], cache.k.shape[0])
    if cache.leftpad is not None:
        filled = cache.capacity if cache.seqlens is None else cache.seqlens
        if bool(((cache.leftpad < 0) | (cache.leftpad > filled)).any()):
            fail(ValueError, "cache_leftpad", "between 0 and cache_seqlens", cache.leftpad.tolist())


def _last_position(q: Tensor, cache: Cache, s_new: int, scoring: Scoring) -> int | None:
    """Return the largest position that is rotated, None where that is not known without reading a GPU."""
    seqlens, batch, seqlen_q = cache.seqlens, q.shape[0], q.shape[1]
    if not batch or (_device.on_cuda(q) and not isinstance(seqlens, int)):
        return None
    longest = int(seqlens.max()) if isinstance(seqlens, Tensor) else seqlens or 0
    moving = scoring.window_left >= 0 or scoring.window_right >= 0
    return longest + max(s_new, seqlen_q if moving else 1) - 1


def _check_rotary(q: Tensor, tables: Tables, appends: bool, last: int | None) -> Rotary:
    """Check the rotary tables; `last` is the largest position that they must hold, where it is known."""
    cos, sin, interleaved = tables
    if cos is None or sin is None:
        missing, given = ("rotary_cos", "rotary_sin") if cos is None else ("rotary_sin", "rotary_cos")
        fail(ValueError, given, f"None where {missing} is", "a tensor")
    for x, name in ((cos, "rotary_cos"), (sin, "rotary_sin")):
        check_tensor(x, name)
        if x.dtype != q.dtype:
            fail(TypeError, name, f"of q's dtype ({q.dtype})", x.dtype)
        if x.device != q.device:
            fail(ValueError, name, f"on the device of q ({q.device})", x.device)
    if not appends:
        fail(ValueError, "rotary_cos", "None where no k is appended", "a tensor")
    if cos.dim() != 2 or cos.shape != sin.shape:
        allowed = "of rotary_cos's shape, (s_ro, rotary_dim / 2)"
        fail(ValueError, "rotary_sin", allowed, tuple(sin.shape))
    rotary_dim = 2 * cos.shape[1]
    if rotary_dim % ROTARY_MULTIPLE or rotary_dim > q.shape[-1]:
        allowed = f"of a rotary_dim that is a multiple of {ROTARY_MULTIPLE} and at most {q.shape[-1]}"
        fail(ValueError, "rotary_cos", allowed, rotary_dim)
    if last is not None and last >= cos.shape[0]:
        fail(ValueError, "rotary_cos", f"of more than {last} rows", cos.shape[0])
    return Rotary(cos, sin, as_flag(interleaved, "rotary_interleaved"))


def _check_kind(
    q: Tensor, cache: Cache, k: Any, v: Any, tables: Tables | None, options: Options, out: Any
) -> None:
    """Refuse calls of which there is no custom op, on tensors whose memory only a dispatcher knows.

    The CUDA backend looks for the memory by itself.
    """
    if is_tracing():
        raise NotImplementedError("flash_attn_with_kvcache is not implemented for torch.jit.trace")
    if _device.on_cuda(q):
        return
    if q.is_meta:
        raise NotImplementedError("flash_attn_with_kvcache is not implemented for meta tensors")
    cos, sin, _ = tables or (None, None, None)
    named = {
        "q": q, "k_cache": cache.k, "v_cache": cache.v, "k": k, "v": v, "cache_seqlens": cache.seqlens,
        "rotary_cos": cos, "rotary_sin": sin, "cache_batch_idx": cache.batch_idx,
        "cache_leftpad": cache.leftpad, "block_table": cache.block_table, "alibi_slopes": options[5],
        "out": out, "s_aux": options[6],
    }  # fmt: skip
    for name, x in named.items():
        check_memory(x, name)


def forward_kvcache(
    q: Tensor, cache: Cache, k: Tensor | None, v: Tensor | None, tables: Tables | None, options: Options,
    out: Tensor | None, num_splits: int, need_lse: bool = True,
) -> tuple[Tensor, Any]:  # fmt: skip
    """Return (out, lse (b, h, sq)); k and v are rotated and appended to the cache in place. No gradients.

    Without `need_lse`, CUDA does not compute the LSE: it is None.
    """
    k_cache, v_cache, seqlens, _, _, block_table = cache
    shapes = check.check_qkv(q, k_cache, v_cache, 4, 4, ("q", "k_cache", "v_cache"))
    (batch, seqlen_q, _, head_dim), k_shape, v_shape = shapes
    on_cuda = _device.on_cuda(q)
    backend: _backends.Backend = cuda if on_cuda else cpu
    if not on_cuda or is_tracing():
        _check_kind(q, cache, k, v, tables, options, out)
    if seqlens is not None and type(seqlens) is not int and not isinstance(seqlens, Tensor):
        seqlens = as_int(seqlens, "cache_seqlens")
        cache = cache._replace(seqlens=seqlens)
    _check_cache(q, cache, batch, k_shape[0])
    s_new = _check_new(q, cache, shapes, k, v)
    if type(num_splits) is not int or num_splits:
        num_splits = check.check_num_splits(num_splits)
    capacity = k_shape[1] if block_table is None else cache.capacity
    if capacity > MAX_SEQLEN:
        fail(ValueError, "k_cache", f"of room for at most {MAX_SEQLEN} keys a sequence", capacity)
    scoring = check.check_scoring(options, q, head_dim, batch, seqlen_q, capacity, tables is not None)
    if isinstance(seqlens, int) and not 0 <= seqlens <= capacity - s_new:
        fail(ValueError, "cache_seqlens", f"in [0, {capacity - s_new}]", seqlens)
    if not on_cuda:
        _check_on_cpu(cache, s_new)
    rotary = None
    if tables is not None:
        rotary = _check_rotary(q, tables, k is not None, _last_position(q, cache, s_new, scoring))
    if out is not None:
        read = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v}
        check.check_out(out, q, v_shape, read)
    if s_new and not on_cuda:
        check.check_appended(k_cache, v_cache)
    fields = q, cache, k, v, shapes, rotary, scoring, out, num_splits, need_lse
    return backend.forward_kvcache(new(CacheForward, fields))


def kvcache_num_splits(q: Tensor, k_cache: Tensor, block_table: Tensor | None = None) -> int:
    """Return into how many parts `flash_attn_with_kvcache` splits the keys with num_splits 0.

    Only their shapes count, not what they hold; on CPU keys are not split. Score modifiers and a larger head
    dim of v are left out: on Hopper they may change the number of calls with many queries.

    Raises:
        TypeError, ValueError: tensors that a call would not take.
        RuntimeError: the GPU is too old, or the library has no kernel for the call.
    """
    shapes = check.check_qkv(q, k_cache, k_cache, 4, 4, ("q", "k_cache", "k_cache"))
    pages = 1
    if block_table is not None:
        check.check_index(block_table, "block_table", q, (q.shape[0], -1))
        check.check_page_size(k_cache, "k_cache")
        pages = block_table.shape[1]
    return _backends.of(q).num_key_parts(q, k_cache, shapes, pages * k_cache.shape[1])
