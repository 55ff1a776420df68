"""Backward on CUDA: allocates the workspace, packs `_abi.BackwardParams` and calls the library.

Arguments come validated from `_operations`. Gradients that are None are not wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn import _abi, _cuda, _gpu, _library
from flash_attn._abi import WORKSPACE_ROWS
from flash_attn._arguments import check_memory
from flash_attn._layout import empty_softmax_d, padded_head_dim, padded_rows, round_multiple, write
from flash_attn._splits import choose_key_parts
from flash_attn._validation import GRADIENTS, Gradients, Scoring

ABSENT = (0, 0, 0, 0)

_pack = _abi.BACKWARD_PARAMS.pack


class _Workspace(NamedTuple):
    """Memory of a call, and where its parts lie, 0 for those that are not used."""

    memory: Tensor
    lse_log2: int
    row_sums: int
    dq: int
    semaphores: int
    key_partials: int


def _workspace(q: Tensor, rows: int, dq_columns: int, ordered: bool, partials: int) -> _Workspace:
    """Allocate memory for so many rows of queries.

    No sums of rows in bf16, where they are softmax_d. No dq if `dq_columns` is 0, no semaphores, which put
    the additions to it in order, unless `ordered`; `partials` is the size of the partial gradients of k and
    v. As `rows` is a multiple of WORKSPACE_ROWS, each part is aligned.
    """
    dq_size = rows * dq_columns
    semaphores = rows if dq_size and ordered else 0
    row_sums = rows if q.dtype == torch.float16 else 0
    sizes = rows, row_sums, dq_size, semaphores, partials
    memory = torch.empty_strided((sum(sizes),), (1,), dtype=torch.float32, device=q.device)
    at, places = memory.data_ptr(), []
    for size in sizes:
        places.append(at if size else 0)
        at += 4 * size
    return _Workspace(memory, *places)


def _launch(
    inputs: Sequence[Tensor], lse: Tensor, gradients: Sequence[Tensor | None], softmax_d: Tensor,
    scoring: Scoring, sizes: _cuda.Sizes, head_dims: tuple[int, int], sequences: Sequence[int],
    deterministic: bool, rng_state: Tensor | None,
) -> None:  # fmt: skip
    """Run the kernels on q, k, v, out, dout and dq, dk, dv as they can read and write them.

    The rest is as in `_cuda._attend`; `softmax_d` has whole blocks of rows.
    """
    q, k = inputs[:2]
    batch_stride = _cuda.PACKED if sequences[0] else _cuda.NOT_PACKED
    tensors = (*inputs, *gradients)
    addresses = [0 if x is None else x.data_ptr() for x in tensors]
    of_each = [ABSENT if x is None else batch_stride + x.stride() for x in tensors]
    strides = [step for x in of_each for step in x[:3]]
    device = q.get_device()
    library = _gpu.prepared(device).library
    batch, _, seqlen_k, _, num_heads, num_heads_k = sizes
    batches = 1 if sequences[0] else batch
    rows = softmax_d.stride(-2)
    key_rows = padded_rows(k.shape[0], batch) if sequences[0] else round_multiple(seqlen_k, WORKSPACE_ROWS)
    parts = 1
    if gradients[1] is not None and num_heads > num_heads_k:
        masked = scoring.window_left >= 0 or scoring.window_right >= 0
        multiprocessors = _gpu.multiprocessors(device)
        parts = choose_key_parts(batch, num_heads, num_heads_k, seqlen_k, masked, multiprocessors)
    head_dim = _library.kernel_head_dim(max(head_dims))
    workspace = _workspace(
        q, rows * num_heads * batches, 0 if gradients[0] is None else head_dim, deterministic,
        2 * parts * num_heads_k * batches * key_rows * head_dim if parts > 1 else 0,
    )  # fmt: skip
    scoring = _cuda.readable_scoring(scoring)
    forward = _cuda.pack_forward(
        addresses[:4], lse.data_ptr(), sequences, 0 if rng_state is None else rng_state.data_ptr(), 0,
        strides[:12], (batch_stride + lse.stride())[:2], sizes, k.shape[0], head_dims, scoring, q.dtype,
        device, library.family,
    )  # fmt: skip
    packed = _pack(
        forward, *addresses[4:], softmax_d.data_ptr(), workspace.lse_log2,
        workspace.row_sums or softmax_d.data_ptr(), *workspace[3:], *strides[12:], rows, key_rows, parts,
    )  # fmt: skip
    status = library.backward(packed, _gpu.raw_stream(device))
    del workspace  # no sooner: the next allocation on this stream may be given it
    if status:
        _cuda.fail(status, q, max(head_dims), library, _abi.Direction.BACKWARD)


def _differentiate(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, gradients: Gradients,
    softmax_d: Tensor, scoring: Scoring, sizes: _cuda.Sizes, sequences: Sequence[int], deterministic: bool,
    rng_state: Tensor | None,
) -> None:  # fmt: skip
    """Write the gradients, by way of copies where kernels cannot read or write tensors where they are."""
    batch, seqlen_q, seqlen_k, total_q, num_heads, _ = sizes
    if not (batch and total_q and seqlen_q and seqlen_k and num_heads and k.shape[0]):
        for x in (*gradients, softmax_d):
            if x is not None:
                write(x, 0.0)
        return
    for x, name in zip(gradients, GRADIENTS, strict=True):
        check_memory(x, name)
    targets = [x if x is None or _cuda.readable(x) else _cuda.writable(x) for x in gradients]
    if (targets[1] is None) != (targets[2] is None):  # one kernel computes both
        pairs = zip((k, v), targets[1:], strict=True)
        targets[1:] = [_cuda.writable(x) if target is None else target for x, target in pairs]
    named = zip((q, k, v, out, dout), ("q", "k", "v", "out", "dout"), strict=True)
    check_memory(lse, "softmax_lse")
    _launch(
        [_cuda.aligned(x, name) for x, name in named],
        lse if lse.stride(-1) == 1 and not lse.is_neg() else _cuda.contiguous(lse, "softmax_lse"),
        targets, softmax_d, scoring, sizes,
        (padded_head_dim(q.shape[-1]), padded_head_dim(v.shape[-1])), sequences, deterministic,
        None if rng_state is None else _cuda.contiguous(rng_state, "rng_state"),
    )  # fmt: skip
    for x, target in zip(gradients, targets, strict=True):
        if x is not None and target is not None and target is not x:
            write(x, target[..., : x.shape[-1]])


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, gradients: Gradients,
    scoring: Scoring, deterministic: bool, rng_state: Tensor | None,
) -> Tensor:  # fmt: skip
    """Write the gradients of q (b, sq, h, d), k (b, sk, hk, d) and v; return softmax_d, zero past sq.

    Raises:
        RuntimeError: as in `_cuda.forward`.
    """
    (batch, seqlen_q, num_heads, _), (_, seqlen_k, num_heads_k, _) = q.shape, k.shape
    softmax_d = empty_softmax_d(q)
    sizes = batch, seqlen_q, seqlen_k, batch * seqlen_q, num_heads, num_heads_k
    _differentiate(
        dout, q, k, v, out, lse, gradients, softmax_d, scoring, sizes, _cuda.FIXED_LENGTH, deterministic,
        rng_state,
    )  # fmt: skip
    return softmax_d


def varlen_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, gradients: Gradients,
    scoring: Scoring, deterministic: bool, rng_state: Tensor | None, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
) -> Tensor:  # fmt: skip
    """Write the gradients of packed q (total_q, h, d), k (total_k, hk, d) and v, zero past the sequences.

    Returns softmax_d, zero between the sequences.

    Raises:
        RuntimeError: as in `_cuda.forward`.
    """
    batch = cu_seqlens_q.numel() - 1
    (total_q, num_heads, _), (_, num_heads_k, _) = q.shape, k.shape
    softmax_d = empty_softmax_d(q, batch)
    cu_seqlens_q = _cuda.contiguous(cu_seqlens_q, "cu_seqlens_q")
    cu_seqlens_k = _cuda.contiguous(cu_seqlens_k, "cu_seqlens_k")
    sequences = cu_seqlens_q.data_ptr(), cu_seqlens_k.data_ptr(), 0, 0
    sizes = batch, max_seqlen_q, max_seqlen_k, total_q, num_heads, num_heads_k
    _differentiate(
        dout, q, k, v, out, lse, gradients, softmax_d, scoring, sizes, sequences, deterministic, rng_state
    )  # fmt: skip
    return softmax_d
