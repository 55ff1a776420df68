"""The operation behind `flash_attn_with_kvcache`: check its arguments, then run where the tensors are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash_attn import _cuda_kvcache, _gpu
from flash_attn import _validation as check
from flash_attn._abi import MAX_SEQLEN, ROTARY_MULTIPLE
from flash_attn._arguments import as_flag, as_int, check_memory, check_tensor, fail
from flash_attn._cpu_kvcache import Cache, Rotary
from flash_attn._cpu_kvcache import forward_kvcache as forward_on_cpu
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


def _check_new(q: Tensor, cache: Cache, shapes: check.Shapes, k: Tensor | None, v: Tensor | None) -> int:
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


def _refuse_without_memory(**given: Any) -> None:
    """Refuse tensors, given by name, without memory to read or to append to: there is no custom op."""
    for name, x in given.items():
        check_memory(x, name)


def _check_on_cpu(cache: Cache, s_new: int) -> None:
    """Check on CPU that the cache can be written in place, and that lengths, rows and pages lie inside of it.

    CUDA asks for more of its strides (`_cuda_kvcache`) and does not read the rest.
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


def _check_rotary(
    q: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool, appends: bool, last: int | None
) -> Rotary:
    """Check the rotary tables; `last` is the largest position that they must hold, where it is known."""
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


def forward_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None,
    cache_seqlens: int | Tensor | None, rotary_cos: Tensor | None, rotary_sin: Tensor | None,
    cache_batch_idx: Tensor | None, cache_leftpad: Tensor | None, block_table: Tensor | None,
    alibi_slopes: Tensor | None, out: Tensor | None, softmax_scale: float | None, causal: bool,
    window_left: int, window_right: int, softcap: float, rotary_interleaved: bool, num_splits: int,
    need_lse: bool = True, s_aux: Tensor | None = None,
) -> tuple[Tensor, Any]:  # fmt: skip
    """Return (out, lse (b, h, sq)); k and v are rotated and appended to the cache in place. No gradients.

    Without `need_lse`, CUDA does not compute the LSE: it is None.
    """
    q_shape, k_shape, v_shape = check.check_qkv(q, k_cache, v_cache, 4, 4, ("q", "k_cache", "v_cache"))
    on_cuda = _gpu.serves(q)
    if is_tracing():
        raise NotImplementedError("flash_attn_with_kvcache is not implemented for torch.jit.trace")
    if not on_cuda:  # the CUDA backend asks for itself
        if q.is_meta:
            raise NotImplementedError("flash_attn_with_kvcache is not implemented for meta tensors")
        _refuse_without_memory(
            q=q, k_cache=k_cache, v_cache=v_cache, k=k, v=v, cache_seqlens=cache_seqlens,
            rotary_cos=rotary_cos, rotary_sin=rotary_sin, cache_batch_idx=cache_batch_idx,
            cache_leftpad=cache_leftpad, block_table=block_table, alibi_slopes=alibi_slopes, out=out,
            s_aux=s_aux,
        )  # fmt: skip
    batch, seqlen_q, _, head_dim = q_shape
    if cache_seqlens is not None and not isinstance(cache_seqlens, Tensor):
        cache_seqlens = as_int(cache_seqlens, "cache_seqlens")
    fields = k_cache, v_cache, cache_seqlens, cache_batch_idx, cache_leftpad, block_table
    cache = tuple.__new__(Cache, fields)  # as in check_scoring
    _check_cache(q, cache, batch, k_shape[0])
    s_new = _check_new(q, cache, (q_shape, k_shape, v_shape), k, v)
    if type(num_splits) is not int or num_splits:
        num_splits = check.check_num_splits(num_splits)
    capacity = k_shape[1] if block_table is None else cache.capacity
    if capacity > MAX_SEQLEN:
        fail(ValueError, "k_cache", f"of room for at most {MAX_SEQLEN} keys a sequence", capacity)
    scoring = check.check_scoring(
        q, head_dim, batch, seqlen_q, capacity, 0.0, softmax_scale, causal, window_left, window_right,
        softcap, alibi_slopes, s_aux, rotary_cos is not None,
    )  # fmt: skip
    last = None
    if isinstance(cache_seqlens, int) and not 0 <= cache_seqlens <= capacity - s_new:
        fail(ValueError, "cache_seqlens", f"in [0, {capacity - s_new}]", cache_seqlens)
    if not on_cuda:
        _check_on_cpu(cache, s_new)
    if rotary_cos is not None and batch and (not on_cuda or isinstance(cache_seqlens, int)):
        longest = int(cache_seqlens.max()) if isinstance(cache_seqlens, Tensor) else cache_seqlens or 0
        moving = scoring.window_left >= 0 or scoring.window_right >= 0
        last = longest + max(s_new, seqlen_q if moving else 1) - 1
    rotary = None
    if rotary_cos is not None or rotary_sin is not None:
        rotary = _check_rotary(q, rotary_cos, rotary_sin, rotary_interleaved, k is not None, last)
    if out is not None:
        read = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v}
        check.check_out(out, q, v_shape, read)
    if s_new and not on_cuda:
        check.check_appended(k_cache, v_cache)
    if on_cuda:
        shapes = q_shape, k_shape, v_shape
        return _cuda_kvcache.forward_kvcache(
            q, cache, k, v, shapes, rotary, scoring, out, num_splits, need_lse
        )  # fmt: skip
    return forward_on_cpu(q, cache, k, v, rotary, scoring, out)
