"""CUDA backend: brings tensors into a layout that kernels read, packs their parameters, calls the library.

Written for host time: a call makes two allocations, packs one struct and makes one ctypes call; attributes
are read once. Arguments come validated from `_operations`. Next in the path: `_abi.ForwardParams`, then the
library's dispatch table.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any, NoReturn

import torch
from torch import Tensor

from flash_attn import _abi, _gpu, _library
from flash_attn._arguments import address, check_memory
from flash_attn._layout import empty_out, padded_head_dim, probs_shape, write
from flash_attn._philox import new_rng_state
from flash_attn._validation import Scoring, Shapes

Outputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
Sizes = tuple[int, int, int, int, int, int]

DTYPES = {torch.float16: int(_abi.Dtype.FP16), torch.bfloat16: int(_abi.Dtype.BF16)}
DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
PROBS_AT = _abi.ForwardParams.probs.offset
FIXED_LENGTH = (0, 0, 0, 0)
PACKED: tuple[int, ...] = (0,)
NOT_PACKED: tuple[int, ...] = ()

_pack = _abi.FORWARD_PARAMS.pack


def fail(
    status: int, q: Tensor, head_dim: int, library: _library.Library,
    direction: _abi.Direction = _abi.Direction.FORWARD,
) -> NoReturn:  # fmt: skip
    """Raise what a nonzero status means; a kernel that is missing comes with the command that builds it."""
    text = (library.last_error() or b"").decode() or f"status {status}"
    if status in (_abi.Status.NOT_BUILT, _abi.Status.UNSUPPORTED_DEVICE):
        major, minor = _gpu.capability(q.get_device())
        arch = _library.arch_of(10 * major + minor, library.family)
        command = _library.build_command(arch, head_dim, DTYPE_NAMES[q.dtype], direction)
        text = f"{text}; build it with `{command}`"
    raise RuntimeError(f"flash_attn: {text}")


def readable(x: Tensor) -> bool:
    """Return whether kernels can read x (.., h, d), or write it, where it is.

    They need a contiguous last dimension, rows that are a multiple of 8 elements, a base aligned to 16 bytes,
    strides that are multiples of 8 elements, and the signs that memory holds. `_attend` asks the same of its
    tensors at one glance.
    """
    *strides, last = x.stride()
    elements = x.shape[-1]
    for stride in strides:
        elements |= stride
    return last == 1 and not elements & 7 and not x.data_ptr() & 15 and not x.is_neg()


def writable(x: Tensor) -> Tensor:
    """Allocate what kernels can write in place of x (.., h, d): contiguous, rows as long as kernels need."""
    shape = (*x.shape[:-1], padded_head_dim(x.shape[-1]))
    return torch.empty(shape, dtype=x.dtype, device=x.device)


def aligned(x: Tensor, name: str) -> Tensor:
    """Return x (.., h, d) as kernels read it, copied only where it must be; short rows get zeros appended.

    Raises:
        TypeError: x has no memory of its own.
    """
    check_memory(x, name)
    if readable(x):
        return x
    copy, head_dim = writable(x), x.shape[-1]
    copy[..., :head_dim].copy_(x)
    if copy.shape[-1] != head_dim:
        copy[..., head_dim:].zero_()
    return copy


def contiguous(x: Tensor, name: str, alignment: int = 4) -> Tensor:
    """Return what is no (.., h, d) as kernels read it: contiguous, at a multiple of `alignment` bytes.

    Raises:
        TypeError: x has no memory of its own.
    """
    at = address(x)
    if at and not at & alignment - 1 and x.is_contiguous() and not x.is_neg():
        return x
    check_memory(x, name)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)


def readable_scoring(scoring: Scoring) -> Scoring:
    """Return `scoring` with ALiBi slopes and sinks, if any, as kernels read them."""
    slopes, sinks = scoring.alibi_slopes, scoring.sinks
    if slopes is not None:
        scoring = scoring._replace(alibi_slopes=contiguous(slopes, "alibi_slopes"))
    return scoring if sinks is None else scoring._replace(sinks=contiguous(sinks, "s_aux"))


def pack_forward(
    addresses: Sequence[int], lse_at: int, sequences: Sequence[int], rng_at: int, counter_at: int,
    strides: Sequence[int], lse_strides: Sequence[int], sizes: Sizes, total_k: int,
    head_dims: tuple[int, int], scoring: Scoring, dtype: torch.dtype, device: int, family: int,
) -> bytes:  # fmt: skip
    """Pack ForwardParams of q, k, v and out, given as addresses and as strides of batch, row and head.

    The rest is as in `_attend`; ALiBi slopes and sinks are as `readable_scoring` returns them.
    """
    batch, seqlen_q, seqlen_k, total_q, num_heads, num_heads_k = sizes
    softmax_scale, softcap, window_left, window_right, dropout_p, slopes, sinks = scoring
    slopes_at = slopes_stride = 0
    if slopes is not None:
        slopes_at, slopes_stride = slopes.data_ptr(), num_heads if slopes.dim() == 2 else 0
    return _pack(
        *addresses, lse_at, *sequences, slopes_at, 0 if sinks is None else sinks.data_ptr(), rng_at, 0,
        counter_at, *strides, *lse_strides, slopes_stride, total_q, total_k, batch, num_heads, num_heads_k,
        seqlen_q, seqlen_k, *head_dims,
        window_left, window_right, DTYPES[dtype], device, family, softmax_scale, softcap, dropout_p,
        1.0 / (1.0 - dropout_p) if dropout_p else 1.0,
    )  # fmt: skip


def _dropout_buffers(
    q: Tensor, sizes: Sizes, return_softmax: bool, generator: torch.Generator | None
) -> tuple[Tensor | None, Tensor]:
    """Return (S_dmask, unset and only if asked for, rng_state)."""
    batch, seqlen_q, seqlen_k, _, num_heads, _ = sizes
    probs = q.new_empty(probs_shape(batch, num_heads, seqlen_q, seqlen_k)) if return_softmax else None
    return probs, new_rng_state(q.device, generator)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, scoring: Scoring, sizes: Sizes,
    head_dims: tuple[int, int], lse_strides: tuple[int, int], sequences: Sequence[int], return_softmax: bool,
    generator: torch.Generator | None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Write out and lse with one kernel; return (S_dmask, rng_state).

    Tensors are (b, s, h, n), or (total, h, n) of packed sequences; `head_dims` is n of q and k, and of v and
    out. `sizes` is (batch, seqlen_q, seqlen_k, total_q, num_heads, num_heads_k), `sequences` the addresses of
    cu_seqlens_q, cu_seqlens_k, seqused_k and leftpad_k, 0 for none.
    """
    batch, seqlen_q, seqlen_k, total_q, num_heads, _ = sizes
    total_k = k.shape[0] if sequences[0] else batch
    if not (batch and total_q and seqlen_q and seqlen_k and num_heads and total_k):
        write(out, 0.0)
        if lse is not None:
            lse.fill_(inf)
        return _dropout_buffers(q, sizes, return_softmax, generator) if scoring.dropout_p else (None, None)
    batch_stride = PACKED if sequences[0] else NOT_PACKED
    q_batch, q_row, q_head, q_last = batch_stride + q.stride()
    k_batch, k_row, k_head, k_last = batch_stride + k.stride()
    v_batch, v_row, v_head, v_last = batch_stride + v.stride()
    o_batch, o_row, o_head, o_last = batch_stride + out.stride()
    try:
        q_at, k_at, v_at, o_at = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
    except RuntimeError:  # of a tensor without storage, which is named below
        q_at = k_at = v_at = o_at = 0
    k_v_strides = k_batch | k_row | k_head | v_batch | v_row | v_head
    head_dim, head_dim_v = head_dims
    elements = head_dim | head_dim_v | q_batch | q_row | q_head | k_v_strides | o_batch | o_row | o_head
    if (
        elements & 7 or (q_at | k_at | v_at | o_at) & 15 or not q_last == k_last == v_last == o_last == 1
        or not (q_at and k_at and v_at and o_at)
        or q.is_neg() or k.is_neg() or v.is_neg()
    ):  # fmt: skip
        return _attend_copies(
            q, k, v, out, lse, scoring, sizes, head_dims, lse_strides, sequences, return_softmax, generator
        )  # fmt: skip
    if scoring[-2] is not None or scoring[-1] is not None:  # slopes, sinks
        scoring = readable_scoring(scoring)
    rng_at = 0
    probs = rng_state = None
    if scoring.dropout_p:
        probs, rng_state = _dropout_buffers(q, sizes, return_softmax, generator)
        rng_at = rng_state.data_ptr()
    device = q.get_device()
    stream = _gpu.raw_stream(device)
    library, hopper = _gpu.prepared(device)
    counter = _gpu.tile_counter(device, stream) if hopper else None
    strides = (
        q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, o_batch, o_row, o_head
    )  # fmt: skip
    packed = pack_forward(
        (q_at, k_at, v_at, o_at), 0 if lse is None else lse.data_ptr(), sequences, rng_at,
        0 if counter is None else counter.data_ptr(), strides, lse_strides, sizes, total_k, head_dims,
        scoring, q.dtype, device, library.family,
    )  # fmt: skip
    status = library.forward(packed, stream)
    if probs is not None and not status:
        address = probs.data_ptr().to_bytes(8, "little")
        status = library.dropout_probs(packed[:PROBS_AT] + address + packed[PROBS_AT + 8 :], stream)
    if status:
        fail(status, q, max(head_dims), library)
    return probs, rng_state


def _attend_copies(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, scoring: Scoring, sizes: Sizes,
    head_dims: tuple[int, int], *arguments: Any,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """`_attend` with copies of those tensors that the kernels cannot read, or write, where they are."""
    check_memory(out, "out")
    target = out if readable(out) else writable(out)
    padded = padded_head_dim(head_dims[0]), padded_head_dim(head_dims[1])
    q, k, v = aligned(q, "q"), aligned(k, "k"), aligned(v, "v")
    result = _attend(q, k, v, target, lse, scoring, sizes, padded, *arguments)
    if target is not out:
        write(out, target[..., : head_dims[1]])
    return result


def empty_lse(shape: tuple[int, ...], strides: tuple[int, ...], q: Tensor) -> Tensor:
    """Allocate a contiguous fp32 tensor; torch.empty would spend half a microsecond more on its arguments."""
    return torch.empty_strided(shape, strides, dtype=torch.float32, device=q.device)


def forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, shapes: Shapes, scoring: Scoring,
    return_softmax: bool, generator: torch.Generator | None, need_lse: bool = True,
) -> Outputs:  # fmt: skip
    """Return (out, lse (b, h, sq) or None, S_dmask, rng_state) of q (b, sq, h, d), k (b, sk, hk, d), v.

    Raises:
        RuntimeError: the GPU is too old, the kernel is not built, or CUDA reports an error.
    """
    (batch, seqlen_q, num_heads, head_dim), (_, seqlen_k, num_heads_k, _), (_, _, _, head_dim_v) = shapes
    if out is None:
        out = empty_out(q, head_dim, head_dim_v)
    lse_strides = num_heads * seqlen_q, seqlen_q
    lse = empty_lse((batch, num_heads, seqlen_q), (*lse_strides, 1), q) if need_lse else None
    sizes = batch, seqlen_q, seqlen_k, batch * seqlen_q, num_heads, num_heads_k
    probs, rng_state = _attend(
        q, k, v, out, lse, scoring, sizes, (head_dim, head_dim_v), lse_strides, FIXED_LENGTH, return_softmax,
        generator,
    )  # fmt: skip
    return out, lse, probs, rng_state


def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, shapes: Shapes, scoring: Scoring,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    leftpad_k: Tensor | None, seqused_k: Tensor | None, return_softmax: bool,
    generator: torch.Generator | None, need_lse: bool = True,
) -> Outputs:  # fmt: skip
    """Return (out, lse (h, total_q) or None, S_dmask, rng_state) of q (total_q, h, d), k (total_k, hk, d), v.

    Raises:
        RuntimeError: as in `forward`.
    """
    (total_q, num_heads, head_dim), (_, num_heads_k, _), (_, _, head_dim_v) = shapes
    if out is None:
        out = empty_out(q, head_dim, head_dim_v)
    lse = empty_lse((num_heads, total_q), (total_q, 1), q) if need_lse else None
    cu_seqlens_q = contiguous(cu_seqlens_q, "cu_seqlens_q")
    cu_seqlens_k = contiguous(cu_seqlens_k, "cu_seqlens_k")
    used_at = pad_at = 0
    if seqused_k is not None:
        seqused_k = contiguous(seqused_k, "seqused_k")
        used_at = seqused_k.data_ptr()
    if leftpad_k is not None:
        leftpad_k = contiguous(leftpad_k, "leftpad_k")
        pad_at = leftpad_k.data_ptr()
    at = cu_seqlens_q.data_ptr(), cu_seqlens_k.data_ptr(), used_at, pad_at
    sizes = cu_seqlens_q.numel() - 1, max_seqlen_q, max_seqlen_k, total_q, num_heads, num_heads_k
    probs, rng_state = _attend(
        q, k, v, out, lse, scoring, sizes, (head_dim, head_dim_v), (0, total_q), at, return_softmax, generator
    )  # fmt: skip
    return out, lse, probs, rng_state
