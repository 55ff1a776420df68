"""The operations behind the public functions: check the arguments, then run where the tensors are.

Without autograd and without custom-op dispatch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn import _backends, _device
from flash_attn import _validation as check
from flash_attn._arguments import as_flag, check_memory, fail
from flash_attn._calls import (
    Backward,
    Differentiated,
    Forward,
    Gradients,
    Options,
    Outputs,
    Scoring,
    Sequences,
    new,
)


def forward(
    q: Tensor, k: Tensor, v: Tensor, options: Options, return_softmax: bool = False,
    out: Tensor | None = None, generator: torch.Generator | None = None, need_lse: bool = True,
) -> Outputs:  # fmt: skip
    """Return (out, lse (b, h, sq), S_dmask, rng_state) of q (b, sq, h, d), k (b, sk, hk, d) and v.

    v is (b, sk, hk, dv), out (b, sq, h, dv). The last two are None without dropout, S_dmask also without
    `return_softmax`. Without `need_lse`, CUDA does not compute the LSE: it is None.
    """
    shapes = check.check_qkv(q, k, v, 4, 4)
    (batch, seqlen_q, _, head_dim), (k_batch, seqlen_k, _, _), v_shape = shapes
    if k_batch != batch:
        check.check_batch(k, batch)
    scoring = check.check_scoring(options, q, head_dim, batch, seqlen_q, seqlen_k)
    if out is not None:
        check.check_out(out, q, v_shape, {"q": q, "k": k, "v": v})
    fields = q, k, v, out, shapes, scoring, None, 0, return_softmax, generator, need_lse
    return _backends.of(q).forward(new(Forward, fields))


def check_sequences(q: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> int:
    """Check what says where packed sequences start, but not what it says; return their number b."""
    batch = check.check_cu_seqlens(cu_seqlens_q, "cu_seqlens_q", q)
    check.check_cu_seqlens(cu_seqlens_k, "cu_seqlens_k", q, batch)
    return batch


def check_key_bounds(q: Tensor, k: Tensor, batch: int, sequences: Sequences) -> None:
    """Check what says which keys of each sequence are used, but not what it says."""
    leftpad_k, seqused_k, block_table = sequences[4:]
    for x, name in ((leftpad_k, "leftpad_k"), (seqused_k, "seqused_k")):
        if x is not None:
            check.check_index(x, name, q, (batch,))
    if block_table is not None:
        check.check_index(block_table, "block_table", q, (batch, -1))
        check.check_page_size(k, "k")
        if leftpad_k is not None:
            fail(ValueError, "leftpad_k", "None with a block_table", "a tensor")


def _check_varlen(q: Tensor, k: Tensor, sequences: Sequences) -> tuple[int, Sequences]:
    """Check how sequences are packed, on CPU what they say as well; return (b, sequences)."""
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, leftpad_k, seqused_k, block_table = sequences
    batch = check_sequences(q, cu_seqlens_q, cu_seqlens_k)
    longest_q = check.check_max_seqlen(max_seqlen_q, "max_seqlen_q")
    longest_k = check.check_max_seqlen(max_seqlen_k, "max_seqlen_k")
    if longest_q is not max_seqlen_q or longest_k is not max_seqlen_k:
        sequences = sequences._replace(max_seqlen_q=longest_q, max_seqlen_k=longest_k)
    reads = q.is_cpu and not _device.on_cuda(q)
    if reads:
        check_memory(cu_seqlens_q, "cu_seqlens_q")
        check_memory(cu_seqlens_k, "cu_seqlens_k")
        total_k = k.shape[0] if block_table is None else None
        check.check_lengths(cu_seqlens_q, "cu_seqlens_q", q.shape[0], longest_q, "max_seqlen_q")
        check.check_lengths(cu_seqlens_k, "cu_seqlens_k", total_k, longest_k, "max_seqlen_k")
    if block_table is not None or leftpad_k is not None or seqused_k is not None:
        check_key_bounds(q, k, batch, sequences)
        if reads:
            _check_used_keys(k, sequences)
    return batch, sequences


def _check_used_keys(k: Tensor, sequences: Sequences) -> None:
    """Check on CPU that the keys used lie in their sequences, and those in pages that exist."""
    leftpad_k, seqused_k, block_table = sequences[4:]
    for x, name in ((block_table, "block_table"), (leftpad_k, "leftpad_k"), (seqused_k, "seqused_k")):
        check_memory(x, name)
    lengths = sequences.cu_seqlens_k.diff()
    if block_table is not None:
        capacity = block_table.shape[1] * k.shape[1]
        check.check_range(lengths, "cu_seqlens_k (paged)", 0, capacity)
        check.check_pages(block_table, lengths if seqused_k is None else seqused_k, k.shape[1], k.shape[0])
        lengths = torch.full_like(lengths, capacity)
    for x, name in ((leftpad_k, "leftpad_k"), (seqused_k, "seqused_k")):
        if x is not None and bool(((x < 0) | (x > lengths)).any()):
            allowed = f"between 0 and each sequence's length {lengths.tolist()}"
            fail(ValueError, name, allowed, x.tolist())


def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, options: Options, return_softmax: bool = False,
    out: Tensor | None = None, generator: torch.Generator | None = None, need_lse: bool = True,
    num_splits: int = 0,
) -> Outputs:  # fmt: skip
    """Return (out, lse (h, total_q), S_dmask, rng_state) of packed q (total_q, h, d); None as in `forward`.

    k is (total_k, hk, d), or with a block table (b, max_blocks) pages (num_blocks, page_size, hk, d); v is as
    k, with dv. `num_splits` counts for pages.
    """
    block_table = sequences.block_table
    shapes = check.check_qkv(q, k, v, 3, 3 if block_table is None else 4)
    batch, sequences = _check_varlen(q, k, sequences)
    if type(num_splits) is not int or num_splits:
        num_splits = check.check_num_splits(num_splits)
    longest_q, longest_k = sequences.max_seqlen_q, min(sequences.max_seqlen_k, shapes[1][0])
    if block_table is not None:
        longest_k = block_table.shape[1] * shapes[1][1]
    scoring = check.check_scoring(options, q, shapes[0][2], batch, min(longest_q, shapes[0][0]), longest_k)
    if out is not None:
        check.check_out(out, q, shapes[2], {"q": q, "k": k, "v": v})
    fields = q, k, v, out, shapes, scoring, sequences, num_splits, return_softmax, generator, need_lse
    return _backends.of(q).forward(new(Forward, fields))


def check_differentiated(tensors: Differentiated, lse_shape: tuple[int, ...]) -> None:
    """Check what a backward is given of its forward, and the gradient of the output."""
    dout, q, _, v, out, softmax_lse = tensors
    check.check_output(dout, "dout", q, v.shape)
    check.check_output(out, "out", q, v.shape)
    check.check_lse(softmax_lse, lse_shape, q)


def backward(
    tensors: Differentiated, gradients: Gradients, options: Options, deterministic: bool,
    rng_state: Tensor | None, sequences: Sequences | None = None,
) -> Tensor:  # fmt: skip
    """Write dq, dk and dv, those that are not None, zero past packed sequences; return softmax_d."""
    scoring, lse_shape, sequences = _check_backward(tensors, options, sequences)
    check_differentiated(tensors, lse_shape)
    dout, q, k, v, out, _ = tensors
    check.check_gradients(gradients, (q, k, v), {"dout": dout, "out": out})
    state = check.check_rng_state(rng_state, q) if scoring.dropout_p else None
    deterministic = as_flag(deterministic, "deterministic")
    fields = tensors, gradients, scoring, sequences, deterministic, state
    return _backends.of(q).backward(new(Backward, fields))


def _check_backward(
    tensors: Differentiated, options: Options, sequences: Sequences | None
) -> tuple[Scoring, tuple[int, ...], Sequences | None]:
    """Check the inputs of a forward; return how scores are formed, the shape of its LSE, its sequences."""
    _, q, k, v, _, _ = tensors
    rank = 4 if sequences is None else 3
    q_shape, k_shape, _ = check.check_qkv(q, k, v, rank, rank)
    num_heads = q_shape[-2]
    if sequences is None:
        batch, seqlen_q, seqlen_k = q_shape[0], q_shape[1], k_shape[1]
        check.check_batch(k, batch)
        lse_shape: tuple[int, ...] = (batch, num_heads, seqlen_q)
    else:
        batch, sequences = _check_varlen(q, k, sequences)
        seqlen_q = min(sequences.max_seqlen_q, q_shape[0])
        seqlen_k = min(sequences.max_seqlen_k, k_shape[0])
        lse_shape = (num_heads, q_shape[0])
    scoring = check.check_scoring(options, q, q_shape[-1], batch, seqlen_q, seqlen_k)
    return scoring, lse_shape, sequences
