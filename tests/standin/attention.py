"""Attention of the stand-in: what the kernels of the forward and the backward compute, by the oracle."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from types import SimpleNamespace
from typing import NamedTuple

import torch
from oracle import Options, attention, dropout_keeps, probabilities, scores
from torch import Tensor

from flash_attn import _abi

from .memory import Memory, need
from .params import DTYPES, check_forward

BLOCK = 128
"""Rows to which workspaces and S_dmask are padded."""

Sizes = tuple[int, int, int, int]


class Part(NamedTuple):
    """What is computed at once: which sequences, where in the tensors' batch, and their rows of q and k."""

    sequences: slice
    batch: slice
    rows: slice
    keys: slice


def padded(rows: int) -> int:
    return -(-rows // BLOCK) * BLOCK


def clamp(length: int, limit: int) -> int:
    return min(max(length, 0), limit)


def shape_of(p: SimpleNamespace, name: str) -> Sizes:
    """Return the shape of q, k, v or out, a batch of one where sequences are packed."""
    of_q, packed = name in ("q", "out"), bool(p.cu_seqlens_q)
    rows = (p.total_q if of_q else p.total_k) if packed else (p.seqlen_q if of_q else p.seqlen_k)
    head_dim = p.head_dim if name in ("q", "k") else p.head_dim_v
    return 1 if packed else p.batch, rows, p.num_heads if of_q else p.num_heads_k, head_dim


def tensor(memory: Memory, p: SimpleNamespace, name: str, written: bool = False) -> Tensor:
    packed = bool(p.cu_seqlens_q)
    return memory.heads(p, name, shape_of(p, name), DTYPES[p.dtype], packed=packed, written=written)


def lse_of(memory: Memory, p: SimpleNamespace) -> Tensor | None:
    """Return the LSE (batch, heads, rows of q), None where it is not wanted."""
    if not p.softmax_lse:
        return None
    batch, rows, num_heads, _ = shape_of(p, "q")
    strides = 0 if p.cu_seqlens_q else p.lse_batch_stride, p.lse_head_stride, 1
    return memory.view("softmax_lse", p.softmax_lse, (batch, num_heads, rows), strides, torch.float32)


def bounds_of(memory: Memory, p: SimpleNamespace, of: str) -> list[int]:
    """Return where each packed sequence of q or k starts, and where the last ends."""
    return memory.integers(f"cu_seqlens_{of}", getattr(p, f"cu_seqlens_{of}"), p.batch + 1)


def check_bounds(bounds: list[int], of: str, longest: int, total: int) -> None:
    need(bounds == sorted(bounds) and bounds[0] >= 0 and bounds[-1] <= total, f"cu_seqlens_{of} is {bounds}")
    lengths = [end - start for start, end in pairwise(bounds)]
    need(max(lengths, default=0) <= longest, f"seqlen_{of} is {longest}, but a sequence is longer: {lengths}")


def parts(memory: Memory, p: SimpleNamespace) -> Iterator[Part]:
    """Yield all sequences at once where they are alike, else one after the other."""
    if not (p.cu_seqlens_q or p.seqused_k or p.leftpad_k):
        need(not p.cu_seqlens_k, "cu_seqlens_k without cu_seqlens_q")
        whole = slice(0, p.batch)
        yield Part(whole, whole, slice(0, p.seqlen_q), slice(0, p.seqlen_k))
        return
    used = memory.integers("seqused_k", p.seqused_k, p.batch) if p.seqused_k else None
    pads = memory.integers("leftpad_k", p.leftpad_k, p.batch) if p.leftpad_k else None
    starts_q, starts_k = [0] * (p.batch + 1), [0] * (p.batch + 1)
    if p.cu_seqlens_q:
        starts_q, starts_k = bounds_of(memory, p, "q"), bounds_of(memory, p, "k")
        check_bounds(starts_q, "q", p.seqlen_q, p.total_q)
        check_bounds(starts_k, "k", p.seqlen_k, p.total_k)
    for i in range(p.batch):
        first, length = starts_k[i], starts_k[i + 1] - starts_k[i] if p.cu_seqlens_q else p.seqlen_k
        if used is not None:
            length = clamp(used[i], length)
        skipped = 0 if pads is None else clamp(pads[i], length)
        rows = slice(starts_q[i], starts_q[i + 1]) if p.cu_seqlens_q else slice(0, p.seqlen_q)
        at = 0 if p.cu_seqlens_q else i
        yield Part(slice(i, i + 1), slice(at, at + 1), rows, slice(first + skipped, first + length))


@lru_cache(maxsize=4)
def _keeps(seed: int, offset: int, dropout_p: float, shape: Sizes) -> Tensor:
    return dropout_keeps(torch.tensor([seed, offset], device="cpu"), dropout_p, shape)


def options_of(memory: Memory, p: SimpleNamespace, sequences: slice, rows: int = 0, keys: int = 0) -> Options:
    """Return how scores are formed, and with dropout the mask of the first rows and keys of each sequence."""
    slopes = sinks = keep = None
    if p.alibi_slopes:
        strides = p.alibi_batch_stride, 1
        slopes = memory.view(
            "alibi_slopes", p.alibi_slopes, (p.batch, p.num_heads), strides, torch.float32
        )[sequences]  # fmt: skip
    if p.sinks:
        sinks = memory.dense("sinks", p.sinks, (p.num_heads,), torch.float32)
    if p.dropout_p:
        seed, offset = memory.dense("rng_state", p.rng_state, (2,), torch.int64).tolist()
        shape = p.batch, p.num_heads, p.seqlen_q, p.seqlen_k
        keep = _keeps(seed, offset, p.dropout_p, shape)[sequences, :, :rows, :keys]
    window = p.window_left, p.window_right
    return Options(False, window, p.softmax_scale, p.softcap, slopes, p.dropout_p, keep, sinks)


def end_rows(memory: Memory, p: SimpleNamespace, out: Tensor, lse: Tensor | None) -> None:
    """Write the rows past the last packed sequence, which see no key."""
    if p.cu_seqlens_q:
        end = bounds_of(memory, p, "q")[-1]
        out[:, end:] = 0.0
        if lse is not None:
            lse[..., end:] = math.inf


def _check_call(memory: Memory, p: SimpleNamespace) -> None:
    check_forward(p)
    need(p.batch and p.seqlen_q and p.seqlen_k, f"sizes are {p.batch}, {p.seqlen_q}, {p.seqlen_k}")
    if p.tile_counter:
        need(memory.integers("tile_counter", p.tile_counter, 1) == [0], "tile_counter is not zero")


def forward(memory: Memory, p: SimpleNamespace) -> None:
    """Write out and the LSE."""
    _check_call(memory, p)
    out, lse = tensor(memory, p, "out", written=True), lse_of(memory, p)
    if lse is not None:
        lse.fill_(math.nan)
    q, k, v = (tensor(memory, p, name) for name in "qkv")
    for part in parts(memory, p):
        rows, keys = q[part.batch, part.rows], k[part.batch, part.keys]
        options = options_of(memory, p, part.sequences, rows.shape[1], keys.shape[1])
        found, found_lse = attention(rows, keys, v[part.batch, part.keys], options)
        out[part.batch, part.rows] = found.to(out.dtype)
        if lse is not None:
            lse[part.batch, :, part.rows] = found_lse.float()
    end_rows(memory, p, out, lse)


def dropout_probs(memory: Memory, p: SimpleNamespace) -> None:
    """Write S_dmask: probabilities, negative where they are dropped."""
    _check_call(memory, p)
    need(p.dropout_p, "there is no dropout")
    shape = p.batch, p.num_heads, padded(p.seqlen_q), padded(p.seqlen_k)
    probs = memory.dense("probs", p.probs, shape, DTYPES[p.dtype]).zero_()
    q, k = tensor(memory, p, "q"), tensor(memory, p, "k")
    for part in parts(memory, p):
        rows, keys = q[part.batch, part.rows], k[part.batch, part.keys]
        options = options_of(memory, p, part.sequences, rows.shape[1], keys.shape[1])
        found, _ = probabilities(rows, keys, options, torch.float64)
        signed = torch.where(options.keep, found, -found).to(probs.dtype)
        probs[part.sequences, :, : rows.shape[1], : keys.shape[1]] = signed


def gradients(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk, dv and D = rowsum(dO * O) (b, h, sq) from the output and the LSE, as a backward does."""
    q, k, v, out, dout, lse = (x.double() for x in (q, k, v, out, dout, lse))
    group = q.shape[2] // k.shape[2]
    with torch.enable_grad():
        leaves = q.requires_grad_(), k.requires_grad_()
        s = scores(*leaves, options, torch.float64)[0]
    p = torch.exp(s.detach() - lse[..., None])
    kept = 1.0 if options.keep is None else options.keep / (1.0 - options.dropout_p)
    dp = torch.einsum("bihd,bjhd->bhij", dout, v.repeat_interleave(group, dim=2)) * kept
    d = (dout * out).sum(-1).transpose(1, 2)
    dv = torch.einsum("bhij,bihd->bjhd", p * kept, dout).unflatten(2, (-1, group)).sum(3)
    dq, dk = torch.autograd.grad(s, leaves, p * (dp - d[..., None]))
    return dq, dk, dv, d


def _workspaces(memory: Memory, b: SimpleNamespace) -> Tensor:
    """Poison the workspaces, as large as they must be, and return softmax_d (batch, heads, rows) as zeros."""
    p, packed = b.forward, bool(b.forward.cu_seqlens_q)
    batch, rows_k = shape_of(p, "k")[:2]
    for name, (rows, length) in {"rows": (b.rows, p.seqlen_q), "key_rows": (b.key_rows, rows_k)}.items():
        total = p.total_q if name == "rows" else p.total_k
        enough = padded(total + BLOCK * p.batch) if packed else padded(length)
        need(rows == enough, f"{name} is {rows}, not {enough}")
    head_dim = next(d for d in _abi.HEAD_DIMS if d >= max(p.head_dim, p.head_dim_v))
    shape = batch, p.num_heads, b.rows
    memory.poison("softmax_lse_log2", b.softmax_lse_log2, shape, torch.float32)
    need(p.dtype == _abi.Dtype.FP16 or b.row_sums == b.softmax_d, "row_sums is not softmax_d")
    memory.poison("row_sums", b.row_sums, shape, torch.float32)
    if b.dq:
        memory.poison("dq_accumulator", b.dq_accumulator, (*shape, head_dim), torch.float32)
    if b.semaphores:
        memory.poison("semaphores", b.semaphores, shape, torch.float32)
    group = p.num_heads // p.num_heads_k
    need(b.key_parts > 0 and group % b.key_parts == 0, f"key_parts is {b.key_parts}, of {group} heads")
    if b.key_parts > 1:
        partials = 2 * b.key_parts, batch * p.num_heads_k, b.key_rows, head_dim
        memory.poison("key_partials", b.key_partials, partials, torch.float32)
    return memory.dense("softmax_d", b.softmax_d, shape, torch.float32).zero_()


def backward(memory: Memory, b: SimpleNamespace) -> None:
    """Write softmax_d and the gradients that are wanted."""
    p, packed = b.forward, bool(b.forward.cu_seqlens_q)
    _check_call(memory, p)
    need(bool(b.dk) == bool(b.dv), "dk without dv")
    softmax_d = _workspaces(memory, b)
    targets = {}
    for name, like in (("dq", "q"), ("dk", "k"), ("dv", "v")):
        if getattr(b, name):
            shape = shape_of(p, like)
            targets[name] = memory.heads(b, name, shape, DTYPES[p.dtype], packed=packed, written=True)
            if packed:
                targets[name][:, bounds_of(memory, p, "q" if name == "dq" else "k")[-1] :] = 0.0
    q, k, v, out = (tensor(memory, p, name) for name in ("q", "k", "v", "out"))
    dout = memory.heads(b, "dout", shape_of(p, "out"), DTYPES[p.dtype], packed=packed)
    lse = lse_of(memory, p)
    need(lse is not None, "softmax_lse is null")
    for part in parts(memory, p):
        batch, rows, keys, i = part.batch, part.rows, part.keys, part.sequences.start
        seqlen_q, seqlen_k = rows.stop - rows.start, keys.stop - keys.start
        *found, d = gradients(
            q[batch, rows], k[batch, keys], v[batch, keys], out[batch, rows], dout[batch, rows],
            lse[batch, :, rows], options_of(memory, p, part.sequences, seqlen_q, seqlen_k),
        )  # fmt: skip
        for name, gradient, where in zip(("dq", "dk", "dv"), found, (rows, keys, keys), strict=True):
            if name in targets:
                targets[name][batch, where] = gradient.to(targets[name].dtype)
        first = (rows.start + BLOCK * i) // BLOCK * BLOCK if packed else 0
        softmax_d[batch, :, first : first + seqlen_q] = d.float()
