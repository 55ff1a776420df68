"""Forward on CUDA: two allocations, one struct, one call of the library."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from flash_attn import _abi
from flash_attn._arguments import check_memory
from flash_attn._backends.cuda import gpu
from flash_attn._backends.cuda.kvcache import forward_pages
from flash_attn._backends.cuda.params import FIXED_LENGTH, Geometry, Sizes, fail, pack_forward
from flash_attn._backends.cuda.tensors import (
    NOT_PACKED,
    PACKED,
    aligned,
    empty_lse,
    locate,
    pointer,
    readable,
    readable_scoring,
    writable,
)
from flash_attn._calls import Forward, Outputs, Scoring, Sequences
from flash_attn._layout import empty_out, padded_head_dim, probs_shape, write
from flash_attn._philox import new_rng_state

PROBS_AT = _abi.ForwardParams.probs.offset


Dropout = tuple[bool, torch.Generator | None]
"""Whether S_dmask is wanted, and the generator of what is dropped."""


def _dropout_buffers(q: Tensor, sizes: Sizes, dropout: Dropout) -> tuple[Tensor | None, Tensor]:
    """Return (S_dmask, unset and only if asked for, rng_state)."""
    batch, seqlen_q, seqlen_k, _, num_heads, _ = sizes
    return_softmax, generator = dropout
    probs = q.new_empty(probs_shape(batch, num_heads, seqlen_q, seqlen_k)) if return_softmax else None
    return probs, new_rng_state(q.device, generator)


def _run(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, geometry: Geometry, scoring: Scoring,
    dropout: Dropout,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Write out and lse with one kernel; return (S_dmask, rng_state)."""
    sizes, total_k, head_dims, _, sequences = geometry
    if 0 in sizes or not total_k:
        write(out, 0.0)
        if lse is not None:
            lse.fill_(inf)
        return _dropout_buffers(q, sizes, dropout) if scoring.dropout_p else (None, None)
    batch_stride = PACKED if sequences[0] else NOT_PACKED
    places = locate(q, k, v, out, head_dims[0] | head_dims[1], batch_stride, batch_stride)
    if not places[-1]:
        return _run_copies(q, k, v, out, lse, geometry, scoring, dropout)
    _, _, _, _, dropout_p, slopes, sinks = scoring
    if slopes is not None or sinks is not None:
        scoring = readable_scoring(scoring)
    rng_at = counter_at = 0
    probs = rng_state = None
    if dropout_p:
        probs, rng_state = _dropout_buffers(q, sizes, dropout)
        rng_at = rng_state.data_ptr()
    device = q.get_device()
    stream = gpu.raw_stream(device)
    library, draws_tiles = gpu.prepared(device)
    if draws_tiles:
        counter = gpu.tile_counter(device, stream)
        counter_at = counter.data_ptr()
    buffers = 0 if lse is None else lse.data_ptr(), rng_at, counter_at
    packed = pack_forward(places, geometry, scoring, buffers, q.dtype, device, library.family)
    status = library.forward(packed, stream)
    if probs is not None and not status:
        address = probs.data_ptr().to_bytes(8, "little")
        status = library.dropout_probs(packed[:PROBS_AT] + address + packed[PROBS_AT + 8 :], stream)
    if status:
        fail(status, q.dtype, device, max(head_dims), library)
    return probs, rng_state


def _run_copies(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, geometry: Geometry, scoring: Scoring,
    dropout: Dropout,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """`_run` with copies of those tensors that the kernels cannot read, or write, where they are."""
    check_memory(out, "out")
    target = out if readable(out) else writable(out)
    sizes, total_k, (head_dim, head_dim_v), lse_strides, sequences = geometry
    head_dims = padded_head_dim(head_dim), padded_head_dim(head_dim_v)
    padded = sizes, total_k, head_dims, lse_strides, sequences
    q, k, v = aligned(q, "q"), aligned(k, "k"), aligned(v, "v")
    result = _run(q, k, v, target, lse, padded, scoring, dropout)
    if target is not out:
        write(out, target[..., :head_dim_v])
    return result


def forward(call: Forward) -> Outputs:
    """Attend; see `Backend.forward`.

    Raises:
        RuntimeError: the GPU is too old, the kernel is not built, or CUDA reports an error.
        NotImplementedError: dropout with a block table.
    """
    q, k, v, out, shapes, scoring, sequences, _, return_softmax, generator, need_lse = call
    if sequences is not None:
        return _varlen_forward(call, sequences)
    (batch, seqlen_q, num_heads, head_dim), (_, seqlen_k, num_heads_k, _), (_, _, _, head_dim_v) = shapes
    if out is None:
        out = empty_out(q, head_dim, head_dim_v)
    lse_strides = num_heads * seqlen_q, seqlen_q
    lse = empty_lse((batch, num_heads, seqlen_q), (*lse_strides, 1), q) if need_lse else None
    sizes = batch, seqlen_q, seqlen_k, batch * seqlen_q, num_heads, num_heads_k
    geometry = sizes, batch, (head_dim, head_dim_v), lse_strides, FIXED_LENGTH
    probs, rng_state = _run(q, k, v, out, lse, geometry, scoring, (return_softmax, generator))
    return out, lse, probs, rng_state


def _varlen_forward(call: Forward, sequences: Sequences) -> Outputs:
    """Attend within packed sequences; rows past the last are 0 with LSE +inf."""
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, leftpad_k, seqused_k, block_table = sequences
    q, k, v, out, shapes, scoring, _, _, return_softmax, generator, need_lse = call
    if block_table is not None:
        if scoring.dropout_p > 0.0:
            raise NotImplementedError(
                "dropout with a block_table is not implemented on CUDA yet; the CPU backend has it"
            )
        return *forward_pages(call, sequences, block_table), None, None
    (total_q, num_heads, head_dim), (total_k, num_heads_k, _), (_, _, head_dim_v) = shapes
    if out is None:
        out = empty_out(q, head_dim, head_dim_v)
    lse = empty_lse((num_heads, total_q), (total_q, 1), q) if need_lse else None
    kept: list[Tensor] = []
    at = (
        pointer(cu_seqlens_q, "cu_seqlens_q", kept), pointer(cu_seqlens_k, "cu_seqlens_k", kept),
        pointer(seqused_k, "seqused_k", kept), pointer(leftpad_k, "leftpad_k", kept),
    )  # fmt: skip
    sizes = cu_seqlens_q.numel() - 1, max_seqlen_q, max_seqlen_k, total_q, num_heads, num_heads_k
    geometry = sizes, total_k, (head_dim, head_dim_v), (0, total_q), at
    probs, rng_state = _run(q, k, v, out, lse, geometry, scoring, (return_softmax, generator))
    return out, lse, probs, rng_state
