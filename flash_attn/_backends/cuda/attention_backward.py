"""Backward on CUDA: allocates the workspace, packs the parameters and calls the library."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn import _abi
from flash_attn._abi import WORKSPACE_ROWS
from flash_attn._arguments import check_memory
from flash_attn._backends.cuda import gpu
from flash_attn._backends.cuda.params import FIXED_LENGTH, Geometry, fail, pack_forward
from flash_attn._backends.cuda.plan import plan_backward
from flash_attn._backends.cuda.tensors import (
    NOT_PACKED,
    PACKED,
    aligned,
    contiguous,
    locate,
    pointer,
    readable,
    readable_scoring,
    writable,
)
from flash_attn._calls import Backward, Differentiated, Gradients, new
from flash_attn._layout import empty_softmax_d, padded_head_dim, padded_rows, round_multiple, write
from flash_attn._validation import GRADIENTS

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


def _launch(call: Backward, softmax_d: Tensor, geometry: Geometry) -> None:
    """Run the kernels on tensors as they can read and write them; `softmax_d` has whole blocks of rows."""
    (dout, q, k, v, out, lse), gradients, scoring, _, deterministic, rng_state = call
    sizes, total_k, head_dims, _, sequences = geometry
    batch, _, seqlen_k, _, num_heads, num_heads_k = sizes
    of_batch = PACKED if sequences[0] else NOT_PACKED
    # Usable they are: copies took the place of those that were not.
    places = locate(q, k, v, out, head_dims[0] | head_dims[1], of_batch, of_batch)
    others = dout, *gradients
    others_at = [0 if x is None else x.data_ptr() for x in others]
    strides = [s for x in others for s in (ABSENT if x is None else of_batch + x.stride())[:3]]
    device = q.get_device()
    library = gpu.prepared(device).library
    key_parts, head_dim = plan_backward(
        library, device, q.dtype, batch, seqlen_k, num_heads, num_heads_k, max(head_dims),
        scoring.window_left, scoring.window_right, gradients[1] is not None,
    )  # fmt: skip
    batches, rows = 1 if sequences[0] else batch, softmax_d.stride(-2)
    key_rows = padded_rows(total_k, batch) if sequences[0] else round_multiple(seqlen_k, WORKSPACE_ROWS)
    workspace = _workspace(
        q, rows * num_heads * batches, 0 if gradients[0] is None else head_dim, deterministic,
        2 * key_parts * num_heads_k * batches * key_rows * head_dim if key_parts > 1 else 0,
    )  # fmt: skip
    scoring = readable_scoring(scoring)
    lse_batch, lse_head, *_ = of_batch + lse.stride()
    geometry = sizes, total_k, head_dims, (lse_batch, lse_head), sequences
    buffers = lse.data_ptr(), 0 if rng_state is None else rng_state.data_ptr(), 0
    forward = pack_forward(places, geometry, scoring, buffers, q.dtype, device, library.family)
    packed = _pack(
        forward, *others_at, softmax_d.data_ptr(), workspace.lse_log2,
        workspace.row_sums or softmax_d.data_ptr(), *workspace[3:], *strides, rows, key_rows, key_parts,
    )  # fmt: skip
    status = library.backward(packed, gpu.raw_stream(device))
    del workspace  # no sooner: the next allocation on this stream may be given it
    if status:
        fail(status, q.dtype, device, max(head_dims), library, _abi.Direction.BACKWARD)


def _targets(gradients: Gradients, k: Tensor, v: Tensor) -> Gradients:
    """Return where kernels can write the gradients: dk and dv both if one is wanted, by one kernel."""
    for x, name in zip(gradients, GRADIENTS, strict=True):
        check_memory(x, name)
    dq, dk, dv = [x if x is None or readable(x) else writable(x) for x in gradients]
    if (dk is None) != (dv is None):
        dk, dv = writable(k) if dk is None else dk, writable(v) if dv is None else dv
    return dq, dk, dv


def _differentiate(call: Backward, softmax_d: Tensor, geometry: Geometry) -> None:
    """Write the gradients, by way of copies where kernels cannot read or write tensors where they are."""
    (dout, q, k, v, out, lse), gradients, scoring, sequences, deterministic, rng_state = call
    batch, seqlen_q, seqlen_k, total_q, num_heads, _ = geometry[0]
    if not (batch and total_q and seqlen_q and seqlen_k and num_heads and k.shape[0]):
        for x in (*gradients, softmax_d):
            if x is not None:
                write(x, 0.0)
        return
    targets = _targets(gradients, k, v)
    check_memory(lse, "softmax_lse")
    lse = lse if lse.stride(-1) == 1 and not lse.is_neg() else contiguous(lse, "softmax_lse")
    tensors = (
        aligned(dout, "dout"), aligned(q, "q"), aligned(k, "k"), aligned(v, "v"), aligned(out, "out"), lse
    )  # fmt: skip
    rng_state = None if rng_state is None else contiguous(rng_state, "rng_state")
    fields = new(Differentiated, tensors), targets, scoring, sequences, deterministic, rng_state
    _launch(new(Backward, fields), softmax_d, geometry)
    for x, target in zip(gradients, targets, strict=True):
        if x is not None and target is not None and target is not x:
            write(x, target[..., : x.shape[-1]])


def backward(call: Backward) -> Tensor:
    """Differentiate; see `Backend.backward`.

    Raises:
        RuntimeError: as in `forward`.
    """
    _, q, k, v, _, _ = call.tensors
    num_heads, num_heads_k = q.shape[-2], k.shape[-2]
    head_dims = padded_head_dim(q.shape[-1]), padded_head_dim(v.shape[-1])
    kept: list[Tensor] = []
    if call.sequences is None:
        softmax_d, at = empty_softmax_d(q), FIXED_LENGTH
        batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
        total_q = batch * seqlen_q
    else:
        cu_seqlens_q, cu_seqlens_k, seqlen_q, seqlen_k, *_ = call.sequences
        starts_q = pointer(cu_seqlens_q, "cu_seqlens_q", kept)
        at = starts_q, pointer(cu_seqlens_k, "cu_seqlens_k", kept), 0, 0
        batch, total_q = cu_seqlens_q.numel() - 1, q.shape[0]
        softmax_d = empty_softmax_d(q, batch)
    sizes = batch, seqlen_q, seqlen_k, total_q, num_heads, num_heads_k
    _differentiate(call, softmax_d, (sizes, k.shape[0], head_dims, (0, 0), at))
    return softmax_d
