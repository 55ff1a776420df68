"""The operations behind the public functions: check the arguments, then run where the tensors are.

Without autograd and without custom-op dispatch. What CUDA cannot do yet raises NotImplementedError here.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from flash_attn import _cpu, _cuda, _cuda_backward, _cuda_kvcache, _gpu
from flash_attn import _validation as check
from flash_attn._arguments import as_flag, check_memory, fail

Outputs = tuple[Tensor, Any, Tensor | None, Tensor | None]
"""(out, lse, S_dmask, rng_state); lse is a Tensor, or None where the caller did not need one."""


def not_on_cuda(what: str) -> NoReturn:
    """Say what CUDA cannot do yet and what can."""
    raise NotImplementedError(f"{what} is not implemented on CUDA yet; the CPU backend has it")


def forward(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_left: int = -1, window_right: int = -1, softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, return_softmax: bool = False, out: Tensor | None = None,
    generator: torch.Generator | None = None, need_lse: bool = True, s_aux: Tensor | None = None,
) -> Outputs:  # fmt: skip
    """Return (out, lse (b, h, sq), S_dmask, rng_state) of q (b, sq, h, d), k (b, sk, hk, d) and v.

    v is (b, sk, hk, dv), out (b, sq, h, dv). The last two are None without dropout, S_dmask also without
    `return_softmax`. Without `need_lse`, CUDA does not compute the LSE: it is None.
    """
    shapes = check.check_qkv(q, k, v, 4, 4)
    (batch, seqlen_q, _, head_dim), (k_batch, seqlen_k, _, _), v_shape = shapes
    if k_batch != batch:
        check.check_batch(k, batch)
    scoring = check.check_scoring(
        q, head_dim, batch, seqlen_q, seqlen_k, dropout_p, softmax_scale, causal, window_left, window_right,
        softcap, alibi_slopes, s_aux,
    )  # fmt: skip
    if out is not None:
        check.check_out(out, q, v_shape, {"q": q, "k": k, "v": v})
    if _gpu.serves(q):
        return _cuda.forward(q, k, v, out, shapes, scoring, return_softmax, generator, need_lse)
    return _cpu.forward(q, k, v, out, shapes, scoring, return_softmax, generator)


def check_sequences(q: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> int:
    """Check what says where packed sequences start, but not what it says; return their number b."""
    batch = check.check_cu_seqlens(cu_seqlens_q, "cu_seqlens_q", q)
    check.check_cu_seqlens(cu_seqlens_k, "cu_seqlens_k", q, batch)
    return batch


def check_key_bounds(
    q: Tensor, k: Tensor, batch: int, block_table: Tensor | None, leftpad_k: Tensor | None,
    seqused_k: Tensor | None,
) -> None:  # fmt: skip
    """Check what says which keys of each sequence are used, but not what it says."""
    for x, name in ((leftpad_k, "leftpad_k"), (seqused_k, "seqused_k")):
        if x is not None:
            check.check_index(x, name, q, (batch,))
    if block_table is not None:
        check.check_index(block_table, "block_table", q, (batch, -1))
        check.check_page_size(k, "k")
        if leftpad_k is not None:
            fail(ValueError, "leftpad_k", "None with a block_table", "a tensor")


def _check_varlen(
    q: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    total_k: int | None,
) -> tuple[int, int, int]:  # fmt: skip
    """Check the sequences of packed q and k; return (b, max_seqlen_q, max_seqlen_k). Paged: no `total_k`."""
    batch = check_sequences(q, cu_seqlens_q, cu_seqlens_k)
    max_seqlen_q = check.check_max_seqlen(max_seqlen_q, "max_seqlen_q")
    max_seqlen_k = check.check_max_seqlen(max_seqlen_k, "max_seqlen_k")
    if q.is_cpu and not _gpu.serves(q):
        check_memory(cu_seqlens_q, "cu_seqlens_q")
        check_memory(cu_seqlens_k, "cu_seqlens_k")
        check.check_lengths(cu_seqlens_q, "cu_seqlens_q", q.shape[0], max_seqlen_q, "max_seqlen_q")
        check.check_lengths(cu_seqlens_k, "cu_seqlens_k", total_k, max_seqlen_k, "max_seqlen_k")
    return batch, max_seqlen_q, max_seqlen_k


def _check_used_keys(
    k: Tensor, cu_seqlens_k: Tensor, block_table: Tensor | None, leftpad_k: Tensor | None,
    seqused_k: Tensor | None,
) -> None:  # fmt: skip
    """Check on CPU that the keys used lie in their sequences, and those in pages that exist."""
    for x, name in ((block_table, "block_table"), (leftpad_k, "leftpad_k"), (seqused_k, "seqused_k")):
        check_memory(x, name)
    lengths = cu_seqlens_k.diff()
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
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_left: int = -1, window_right: int = -1, softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    return_softmax: bool = False, block_table: Tensor | None = None, leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None, out: Tensor | None = None, generator: torch.Generator | None = None,
    need_lse: bool = True, s_aux: Tensor | None = None, num_splits: int = 0,
) -> Outputs:  # fmt: skip
    """Return (out, lse (h, total_q), S_dmask, rng_state) of packed q (total_q, h, d); None as in `forward`.

    k is (total_k, hk, d), or with `block_table` (b, max_blocks) pages (num_blocks, page_size, hk, d); v is as
    k, with dv. `num_splits` counts for pages.
    """
    paged, on_gpu = block_table is not None, _gpu.serves(q)
    shapes = check.check_qkv(q, k, v, 3, 4 if paged else 3)
    total_k = None if paged else shapes[1][0]
    batch, max_seqlen_q, max_seqlen_k = _check_varlen(
        q, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, total_k
    )  # fmt: skip
    if paged or leftpad_k is not None or seqused_k is not None:
        check_key_bounds(q, k, batch, block_table, leftpad_k, seqused_k)
        if q.is_cpu and not on_gpu:
            _check_used_keys(k, cu_seqlens_k, block_table, leftpad_k, seqused_k)
    if type(num_splits) is not int or num_splits:
        num_splits = check.check_num_splits(num_splits)
    longest_k = min(max_seqlen_k, k.shape[0])
    if block_table is not None:
        longest_k = block_table.shape[1] * k.shape[1]
    scoring = check.check_scoring(
        q, shapes[0][2], batch, min(max_seqlen_q, shapes[0][0]), longest_k, dropout_p, softmax_scale, causal,
        window_left, window_right, softcap, alibi_slopes, s_aux,
    )  # fmt: skip
    if out is not None:
        check.check_out(out, q, shapes[2], {"q": q, "k": k, "v": v})
    if block_table is not None and on_gpu:
        if scoring.dropout_p > 0.0:
            not_on_cuda("dropout with a block_table")
        return *_cuda_kvcache.varlen_forward(
            q, k, v, out, scoring, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, seqused_k, block_table, need_lse,
            num_splits,
        ), None, None  # fmt: skip
    backend, last = (_cuda, need_lse) if on_gpu else (_cpu, block_table)
    return backend.varlen_forward(
        q, k, v, out, shapes, scoring, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, leftpad_k,
        seqused_k, return_softmax, generator, last,
    )  # fmt: skip


def check_differentiated(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
    lse_shape: tuple[int, ...],
) -> None:  # fmt: skip
    """Check what a backward is given of its forward, and the gradient of the output."""
    check.check_output(dout, "dout", q, v.shape)
    check.check_output(out, "out", q, v.shape)
    check.check_lse(softmax_lse, lse_shape, q)


def _check_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
    lse_shape: tuple[int, ...], gradients: check.Gradients, rng_state: Tensor | None, dropout_p: float,
) -> Tensor | None:  # fmt: skip
    """Check what only a backward is given; return the rng_state if it is used."""
    check_differentiated(dout, q, k, v, out, softmax_lse, lse_shape)
    check.check_gradients(gradients, (q, k, v), {"dout": dout, "out": out})
    return check.check_rng_state(rng_state, q) if dropout_p else None


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor | None,
    dk: Tensor | None, dv: Tensor | None, dropout_p: float, softmax_scale: float | None, causal: bool,
    window_left: int, window_right: int, softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
    rng_state: Tensor | None,
) -> Tensor:  # fmt: skip
    """Write dq, dk and dv, those that are not None; return softmax_d."""
    (batch, seqlen_q, num_heads, head_dim), (_, seqlen_k, _, _), _ = check.check_qkv(q, k, v, 4, 4)
    check.check_batch(k, batch)
    scoring = check.check_scoring(
        q, head_dim, batch, seqlen_q, seqlen_k, dropout_p, softmax_scale, causal, window_left, window_right,
        softcap, alibi_slopes,
    )  # fmt: skip
    gradients, lse_shape = (dq, dk, dv), (batch, num_heads, seqlen_q)
    state = _check_backward(
        dout, q, k, v, out, softmax_lse, lse_shape, gradients, rng_state, scoring.dropout_p
    )  # fmt: skip
    run = _cuda_backward.backward if _gpu.serves(q) else _cpu.backward
    deterministic = as_flag(deterministic, "deterministic")
    return run(dout, q, k, v, out, softmax_lse, gradients, scoring, deterministic, state)


def varlen_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor | None,
    dk: Tensor | None, dv: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float, softmax_scale: float | None, causal: bool, window_left: int,
    window_right: int, softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
    rng_state: Tensor | None,
) -> Tensor:  # fmt: skip
    """Write dq, dk and dv, those that are not None, zero past the sequences; return softmax_d."""
    (total_q, num_heads, head_dim), (total_k, _, _), _ = check.check_qkv(q, k, v, 3, 3)
    batch, max_seqlen_q, max_seqlen_k = _check_varlen(
        q, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, total_k
    )  # fmt: skip
    scoring = check.check_scoring(
        q, head_dim, batch, min(max_seqlen_q, total_q), min(max_seqlen_k, total_k), dropout_p, softmax_scale,
        causal, window_left, window_right, softcap, alibi_slopes,
    )  # fmt: skip
    gradients, lse_shape = (dq, dk, dv), (num_heads, total_q)
    state = _check_backward(
        dout, q, k, v, out, softmax_lse, lse_shape, gradients, rng_state, scoring.dropout_p
    )  # fmt: skip
    run = _cuda_backward.varlen_backward if _gpu.serves(q) else _cpu.varlen_backward
    return run(
        dout, q, k, v, out, softmax_lse, gradients, scoring, as_flag(deterministic, "deterministic"),
        state, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    )  # fmt: skip
