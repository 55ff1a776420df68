"""Every check of every argument of attention, before anything is allocated or launched.

Contents of device tensors are checked on CPU only, where reading them costs no synchronisation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from itertools import combinations, pairwise
from typing import Any

import torch
from torch import Tensor

from flash_attn import _device
from flash_attn._abi import KEY_GROUP, MAX_HEAD_DIM, MAX_SEQLEN, MAX_SPLITS
from flash_attn._arguments import (
    FP32_MAX,
    as_flag,
    as_float,
    as_int,
    check_device,
    check_tensor,
    fail,
    refuse_gradients,
)
from flash_attn._calls import Gradients, Options, Scoring, Shapes, new
from flash_attn._layout import lse_dtype, overlap, overlaps_itself, storage_address

INT32_MAX = 2**31 - 1
NO_PAIRS = (str, bytes, bytearray, Set, Mapping)
FP32_TINY = 2.0**-126
MAX_SCALE = 2.0**100  # scores up to 2^27 before scaling stay finite in fp32
MAX_DROPOUT_P = 1.0 - 2.0**-24  # the last fp32 number below 1
CUDA_DTYPES = frozenset({torch.float16, torch.bfloat16})
CPU_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
Labels = tuple[str, str, str]
QKV: Labels = ("q", "k", "v")
GRADIENTS: Labels = ("dq", "dk", "dv")


def _dtype_names(dtypes: frozenset[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _check_dtype(q: Tensor, name: str) -> None:
    device = q.device.type
    if device not in ("cpu", "cuda", "meta"):
        fail(ValueError, name, "on a cpu or cuda device", q.device)
    allowed = CUDA_DTYPES if _device.on_cuda(q) else CPU_DTYPES
    if q.dtype not in allowed:
        fail(TypeError, name, f"one of {_dtype_names(allowed)} on {device}", q.dtype)


def check_qkv(q: Tensor, k: Tensor, v: Tensor, rank_q: int, rank_k: int, labels: Labels = QKV) -> Shapes:
    """Check types, dtypes, devices, ranks, heads and head dims of q, k, v; return their shapes.

    The head dim of v may differ from that of q and k. What is right on CUDA passes at one glance; anything
    else is looked at in detail.
    """
    if isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor):
        try:
            dtype, at, q_shape, k_shape, v_shape = q.dtype, q.get_device(), q.shape, k.shape, v.shape
        except RuntimeError:  # of a nested tensor, which has no shape
            q_shape = torch.Size()
        if (
            len(q_shape) == rank_q and len(k_shape) == rank_k
            and dtype in CUDA_DTYPES and k.dtype is dtype and v.dtype is dtype
            and k.get_device() == at == v.get_device()  # which costs a third of `device`
            and (q.is_cuda or (q.is_cpu and k.device == q.device == v.device))
            and (v_shape == k_shape or _differ_in_head_dim(v_shape, k_shape))
            and 0 < q_shape[-1] <= MAX_HEAD_DIM and q_shape[-1] == k_shape[-1]
            and k_shape[-2] and not q_shape[-2] % k_shape[-2]
        ):  # fmt: skip
            return q_shape, k_shape, v_shape
    _check_kind(q, k, v, labels)
    _check_shapes(q, k, v, rank_q, rank_k, labels)
    return q.shape, k.shape, v.shape


def _differ_in_head_dim(v_shape: torch.Size, k_shape: torch.Size) -> bool:
    """Return whether the shape of v is right beside that of k although they are not equal."""
    return v_shape[:-1] == k_shape[:-1] and 0 < v_shape[-1] <= MAX_HEAD_DIM


def _check_kind(q: Tensor, k: Tensor, v: Tensor, labels: Labels) -> None:
    for x, name in zip((q, k, v), labels, strict=True):
        check_tensor(x, name)
    _check_dtype(q, labels[0])
    for x, name in ((k, labels[1]), (v, labels[2])):
        if x.dtype != q.dtype:
            fail(TypeError, name, f"of {labels[0]}'s dtype ({q.dtype})", x.dtype)
    for x, name in ((k, labels[1]), (v, labels[2])):
        check_device(x, name, q, labels[0])


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, rank_q: int, rank_k: int, labels: Labels) -> None:
    for x, name, rank in ((q, labels[0], rank_q), (k, labels[1], rank_k), (v, labels[2], rank_k)):
        if len(x.shape) != rank:
            fail(ValueError, name, f"a tensor of {rank} dimensions", f"shape {tuple(x.shape)}")
    if v.shape[:-1] != k.shape[:-1]:
        allowed = f"of {labels[1]}'s shape {tuple(k.shape)} up to the head dim"
        fail(ValueError, labels[2], allowed, tuple(v.shape))
    num_heads, head_dim = q.shape[-2:]
    num_heads_k = k.shape[-2]
    if not 0 < head_dim <= MAX_HEAD_DIM:
        fail(ValueError, labels[0], f"of head dim 1 to {MAX_HEAD_DIM}", head_dim)
    if k.shape[-1] != head_dim:
        fail(ValueError, labels[1], f"of {labels[0]}'s head dim ({head_dim})", k.shape[-1])
    if not 0 < v.shape[-1] <= MAX_HEAD_DIM:
        fail(ValueError, labels[2], f"of head dim 1 to {MAX_HEAD_DIM}", v.shape[-1])
    if num_heads_k == 0 or num_heads % num_heads_k:
        allowed = f"of a number of heads that divides {labels[0]}'s ({num_heads})"
        fail(ValueError, labels[1], allowed, num_heads_k)


def check_batch(k: Tensor, batch: int, name: str = "k", q_name: str = "q") -> None:
    """Check that k (b, sk, hk, d) has q's batch size."""
    if k.shape[0] != batch:
        fail(ValueError, name, f"of {q_name}'s batch size ({batch})", k.shape[0])


def as_window(window_size: Any) -> tuple[int, int]:
    """Return `window_size` as two integers from -1 to the largest of int32, which is more than any length."""
    try:
        if type(window_size) is not tuple and isinstance(window_size, NO_PAIRS):
            raise TypeError
        left, right = window_size
    except (TypeError, ValueError):
        fail(TypeError, "window_size", "a pair of integers", repr(window_size))
    left, right = as_int(left, "window_size[0]"), as_int(right, "window_size[1]")
    return max(-1, min(left, INT32_MAX)), max(-1, min(right, INT32_MAX))


def normalise_window(causal: bool, left: int, right: int, seqlen_q: int, seqlen_k: int) -> tuple[int, int]:
    """Return the window with causal folded in: -1 where it hides no key, right = 0 if causal.

    `seqlen_q` and `seqlen_k` are the lengths, or bounds of them. The first query stands at key seqlen_k -
    seqlen_q and must see the last one, the last query at the last key and must see the first one.
    """
    if left < 0 or left >= seqlen_k - 1:
        left = -1
    if causal:
        right = 0
    return left, (-1 if right < 0 or right >= seqlen_q - 1 else right)


def check_scoring(
    options: Options, q: Tensor, head_dim: int, batch: int, seqlen_q: int, seqlen_k: int,
    keeps_window: bool = False,
) -> Scoring:  # fmt: skip
    """Check and normalise what turns q (.., h, head_dim) and k into probabilities.

    With `keeps_window`, a window that hides no key stays one.
    """
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, s_aux = options
    if softmax_scale is None:
        scale = head_dim**-0.5
    else:
        scale = softmax_scale if type(softmax_scale) is float else as_float(softmax_scale, "softmax_scale")
        if not -MAX_SCALE <= scale <= MAX_SCALE:
            fail(ValueError, "softmax_scale", f"in [-{MAX_SCALE:.4g}, {MAX_SCALE:.4g}]", scale)
    if type(dropout_p) is not float:
        dropout_p = as_float(dropout_p, "dropout_p")
    if not 0.0 <= dropout_p <= MAX_DROPOUT_P:
        fail(ValueError, "dropout_p", "in [0, 1), in fp32 too", dropout_p)
    if type(softcap) is not float:
        softcap = as_float(softcap, "softcap")
    if softcap != 0.0 and not (FP32_TINY <= softcap <= FP32_MAX and dropout_p == 0.0):
        if softcap > 0.0 and dropout_p > 0.0:
            fail(ValueError, "softcap", "0 where dropout_p > 0", f"{softcap} with dropout_p {dropout_p}")
        fail(ValueError, "softcap", f"0, or from {FP32_TINY:g} to {FP32_MAX:g} (normal in fp32)", softcap)
    if type(causal) is not bool:
        causal = as_flag(causal, "causal")
    window_left = window_right = None
    if type(window_size) is tuple and len(window_size) == 2:
        window_left, window_right = window_size
    if type(window_left) is not int or type(window_right) is not int:
        window_left, window_right = as_window(window_size)
    if not (causal or window_left >= 0 or window_right >= 0):
        window_left = window_right = -1
    elif keeps_window:
        window_left = max(-1, min(window_left, seqlen_k))
        window_right = 0 if causal else max(-1, min(window_right, seqlen_q))
    else:
        window_left, window_right = normalise_window(causal, window_left, window_right, seqlen_q, seqlen_k)
    if alibi_slopes is not None:
        check_alibi(alibi_slopes, q, batch)
    sinks = None if s_aux is None else check_sinks(s_aux, q)
    fields = scale, softcap, window_left, window_right, dropout_p, alibi_slopes, sinks
    return new(Scoring, fields)


def check_sinks(s_aux: Tensor, q: Tensor) -> Tensor:
    """Check attention sinks, (h,) of any floating dtype; return them contiguous, in the LSE's dtype."""
    check_tensor(s_aux, "s_aux")
    if not s_aux.dtype.is_floating_point:
        fail(TypeError, "s_aux", "of a floating dtype", s_aux.dtype)
    check_device(s_aux, "s_aux", q, "q")
    if s_aux.shape != q.shape[-2:-1]:
        fail(ValueError, "s_aux", f"of shape ({q.shape[-2]},)", tuple(s_aux.shape))
    return s_aux.detach().to(lse_dtype(q.dtype)).contiguous().resolve_neg()


def check_alibi(slopes: Tensor, q: Tensor, batch: int) -> None:
    """Check ALiBi slopes: fp32 (h,) or (b, h) on q's device."""
    check_tensor(slopes, "alibi_slopes")
    if slopes.dtype != torch.float32:
        fail(TypeError, "alibi_slopes", "of dtype torch.float32", slopes.dtype)
    check_device(slopes, "alibi_slopes", q, "q")
    num_heads = q.shape[-2]
    if tuple(slopes.shape) not in ((num_heads,), (batch, num_heads)):
        allowed = f"of shape ({num_heads},) or ({batch}, {num_heads})"
        fail(ValueError, "alibi_slopes", allowed, tuple(slopes.shape))


def check_index(x: Tensor, name: str, q: Tensor, shape: tuple[int, ...]) -> None:
    """Check an int32 tensor of the given shape on q's device; -1 in `shape` stands for any size."""
    if (
        type(x) is Tensor and x.dtype is torch.int32 and x.shape == shape
        and ((q.is_cuda and x.get_device() == q.get_device()) or x.device == q.device)
    ):  # fmt: skip
        return
    check_tensor(x, name)
    if x.dtype != torch.int32:
        fail(TypeError, name, "of dtype torch.int32", x.dtype)
    check_device(x, name, q, "q")
    actual = x.shape
    if len(actual) != len(shape) or any(a != s for a, s in zip(actual, shape, strict=True) if s >= 0):
        expected = f"({', '.join('any' if s < 0 else str(s) for s in shape)})"
        fail(ValueError, name, f"of shape {expected}", tuple(actual))


def check_cu_seqlens(cu_seqlens: Tensor, name: str, q: Tensor, batch: int | None = None) -> int:
    """Check cumulative sequence lengths, int32 (b + 1,); return b."""
    if isinstance(cu_seqlens, Tensor) and cu_seqlens.dtype is torch.int32 and cu_seqlens.dim() == 1:
        found = cu_seqlens.numel() - 1
        if found >= 0 and (batch is None or found == batch) and cu_seqlens.device == q.device:
            return found
    check_index(cu_seqlens, name, q, (-1 if batch is None else batch + 1,))
    fail(ValueError, name, "of length b + 1", "an empty tensor")


def check_lengths(cu_seqlens: Tensor, name: str, total: int | None, max_seqlen: int, max_name: str) -> None:
    """Check on CPU that cu_seqlens goes from 0 up to at most `total`, in steps of at most `max_seqlen`."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0:
        fail(ValueError, name, "0 in its first entry", bounds[0])
    lengths = [end - start for start, end in pairwise(bounds)]
    if min(lengths, default=0) < 0:
        fail(ValueError, name, "non-decreasing", bounds)
    if total is not None and bounds[-1] > total:
        fail(ValueError, name, f"at most {total} (the number of tokens) in its last entry", bounds[-1])
    if max(lengths, default=0) > max_seqlen:
        fail(ValueError, max_name, f"at least the longest sequence ({max(lengths)})", max_seqlen)


def check_max_seqlen(x: Any, name: str) -> int:
    """Return a maximal sequence length as an int that fits int32."""
    value = x if type(x) is int else as_int(x, name)
    if not 0 <= value <= MAX_SEQLEN:
        fail(ValueError, name, f"in [0, {MAX_SEQLEN}]", value)
    return value


def check_num_splits(num_splits: Any) -> int:
    """Return a number of parts of the keys as an int, 0 for a heuristic."""
    value = num_splits if type(num_splits) is int else as_int(num_splits, "num_splits")
    if not 0 <= value <= MAX_SPLITS:
        fail(ValueError, "num_splits", f"in [0, {MAX_SPLITS}]", value)
    return value


def check_range(x: Tensor, name: str, low: int, high: int) -> None:
    """Check on CPU that every entry of `x` lies in [low, high]."""
    if x.numel() and not (low <= int(x.min()) and int(x.max()) <= high):
        fail(ValueError, name, f"in [{low}, {high}]", x.tolist())


def check_page_size(k: Tensor, name: str) -> None:
    """Check that the pages of k (num_blocks, page_size, hk, d) hold whole groups of keys, at least one."""
    if k.shape[1] == 0 or k.shape[1] % KEY_GROUP:
        allowed = f"of a page size (dimension 1) that is a positive multiple of {KEY_GROUP}"
        fail(ValueError, name, allowed, k.shape[1])


def check_pages(block_table: Tensor, lengths: Tensor, page_size: int, num_pages: int) -> None:
    """Check on CPU the entries of a block table (b, max_blocks) that sequences of `lengths` (b,) keys use."""
    used = (lengths.clamp(min=0) + page_size - 1) // page_size
    in_use = torch.arange(block_table.shape[1], device=used.device) < used[:, None]
    check_range(block_table[in_use], "block_table", 0, num_pages - 1)


def check_like(
    x: Tensor, name: str, like: Tensor, like_name: str, shape: tuple[int, ...] | None = None
) -> None:
    """Check that `x` has the dtype and device of `like`, and its shape if no other is given."""
    check_tensor(x, name)
    if x.dtype != like.dtype:
        fail(TypeError, name, f"of {like_name}'s dtype ({like.dtype})", x.dtype)
    check_device(x, name, like, like_name)
    shape = tuple(like.shape) if shape is None else shape
    if tuple(x.shape) != shape:
        fail(ValueError, name, f"of shape {shape}", tuple(x.shape))


def check_output(x: Tensor, name: str, q: Tensor, v_shape: Sequence[int]) -> None:
    """Check that `x` is as the output: like q (.., h, d), but of the head dim of v."""
    check_like(x, name, q, "q", (*q.shape[:-1], v_shape[-1]))


def check_out(out: Tensor, q: Tensor, v_shape: Sequence[int], read: dict[str, Tensor | None]) -> None:
    """Check the tensor that a result is to be written to, apart from all that the call reads."""
    check_output(out, "out", q, v_shape)
    if out.is_neg():
        fail(ValueError, "out", "no negative view", "one")
    refuse_gradients(out=out)
    check_apart(out, "out")
    for name, x in read.items():
        if x is not None and overlap(out, x):
            fail(ValueError, "out", f"apart from {name}", "memory that they share")


def check_apart(x: Tensor, name: str) -> None:
    """Check that no element of a tensor that is written to is there twice."""
    if overlaps_itself(x):
        fail(ValueError, name, "a tensor that is not expanded", f"strides {x.stride()}")


def check_appended(k_cache: Tensor, v_cache: Tensor) -> None:
    """Check a cache that keys are appended to: no element may be there twice, nor be in the other one."""
    check_apart(k_cache, "k_cache")
    check_apart(v_cache, "v_cache")
    if overlap(k_cache, v_cache):
        fail(ValueError, "v_cache", "apart from k_cache, to be appended to", "memory that they share")


def check_lse(lse: Tensor, shape: tuple[int, ...], q: Tensor) -> None:
    """Check the softmax LSE that a backward was given."""
    check_tensor(lse, "softmax_lse")
    if lse.dtype != torch.float32 and (_device.on_cuda(q) or lse.dtype != torch.float64):
        fail(TypeError, "softmax_lse", "of dtype torch.float32", lse.dtype)
    check_device(lse, "softmax_lse", q, "q")
    if tuple(lse.shape) != shape:
        fail(ValueError, "softmax_lse", f"of shape {shape}", tuple(lse.shape))


def check_rng_state(rng_state: Tensor | None, q: Tensor) -> Tensor:
    """Check that a backward with dropout was given the forward's (seed, offset), and return it."""
    if not isinstance(rng_state, Tensor):
        fail(TypeError, "rng_state", "the forward's tensor where dropout_p > 0", type(rng_state).__name__)
    if rng_state.dtype != torch.int64 or tuple(rng_state.shape) != (2,):
        got = f"{rng_state.dtype} of shape {tuple(rng_state.shape)}"
        fail(ValueError, "rng_state", "int64 of shape (2,)", got)
    check_device(rng_state, "rng_state", q, "q")
    return rng_state


def check_gradients(
    gradients: Gradients, inputs: tuple[Tensor, Tensor, Tensor], read: dict[str, Tensor]
) -> None:
    """Check what dq, dk and dv, if not None, are to be written to.

    No element may be there twice, nor be one of the inputs or of what else is `read`.
    """
    given = []
    for x, name, like, like_name in zip(gradients, GRADIENTS, inputs, QKV, strict=True):
        if x is not None:
            check_like(x, name, like, like_name)
            check_apart(x, name)
            given.append((x, name))
    sources = [*zip(inputs, QKV, strict=True), *((x, name) for name, x in read.items())]
    written = {storage_address(x) for x, _ in given}
    if len(written) == len(given) and written.isdisjoint(storage_address(x) for x, _ in sources):
        return
    pairs = [*combinations(given, 2), *((source, x) for source in sources for x in given)]
    for (x, name), (y, y_name) in pairs:
        if overlap(x, y):
            fail(ValueError, y_name, f"apart from {name}", "memory that they share")
