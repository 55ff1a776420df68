"""Tensors as kernels read and write them: where they lie, and copies of those that kernels cannot use there.

Kernels need a contiguous last dimension, rows of a multiple of 8 elements, a base aligned to 16 bytes,
strides that are multiples of 8 elements, and the signs that memory holds. Written for host time: attributes
are read once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flash_attn._abi import Dtype
from flash_attn._arguments import check_memory
from flash_attn._calls import Scoring
from flash_attn._layout import padded_head_dim

DTYPES = {torch.float16: int(Dtype.FP16), torch.bfloat16: int(Dtype.BF16)}
DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}

PACKED: tuple[int, ...] = (0,)
"""The stride of a batch that packed sequences, or none, have in place of their own."""
NOT_PACKED: tuple[int, ...] = ()


Places = tuple[tuple[int, int, int, int], tuple[int, ...], bool]
"""Where q, k, v and out lie: addresses, strides of batch, row and head, and if kernels can use them."""


def locate(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, elements: int, of_q: tuple[int, ...], of_k: tuple[int, ...]
) -> Places:
    """Find where the tensors lie; `elements` has the bits of all head dims.

    `of_q` and `of_k` are PACKED or NOT_PACKED, for q and out and for k and v.
    """
    q_batch, q_row, q_head, q_last = of_q + q.stride()
    k_batch, k_row, k_head, k_last = of_k + k.stride()
    v_batch, v_row, v_head, v_last = of_k + v.stride()
    o_batch, o_row, o_head, o_last = of_q + out.stride()
    try:
        q_at, k_at, v_at, o_at = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
    except RuntimeError:  # of a tensor without storage, which `check_memory` names
        q_at = k_at = v_at = o_at = 0
    elements |= q_batch | q_row | q_head | k_batch | k_row | k_head
    elements |= v_batch | v_row | v_head | o_batch | o_row | o_head
    usable = not (
        elements & 7 or (q_at | k_at | v_at | o_at) & 15 or not q_last == k_last == v_last == o_last == 1
        or not (q_at and k_at and v_at and o_at) or q.is_neg() or k.is_neg() or v.is_neg()
    )  # fmt: skip
    strides = (
        q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, o_batch, o_row, o_head
    )  # fmt: skip
    return (q_at, k_at, v_at, o_at), strides, usable


def readable(x: Tensor) -> bool:
    """Return whether kernels can read x (.., h, d), or write it, where it is. `locate` asks the same."""
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


def pointer(x: Tensor | None, name: str, kept: list[Tensor], alignment: int = 4) -> int:
    """Return where x, no (.., h, d), lies as kernels read it: contiguous, at a multiple of `alignment` bytes.

    It is 0 for None. What is read is appended to `kept`, to stay referenced until the kernel is enqueued.

    Raises:
        TypeError: x has no memory of its own.
    """
    if x is None:
        return 0
    try:
        at = x.data_ptr()
    except RuntimeError:  # of a tensor without storage, which `check_memory` names
        at = 0
    if not at or at & alignment - 1 or not x.is_contiguous() or x.is_neg():
        check_memory(x, name)
        x = torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)
        at = x.data_ptr()
    kept.append(x)
    return at


def contiguous(x: Tensor, name: str, alignment: int = 4) -> Tensor:
    """Return x as `pointer` finds it."""
    kept: list[Tensor] = []
    pointer(x, name, kept, alignment)
    return kept[0]


def readable_scoring(scoring: Scoring) -> Scoring:
    """Return `scoring` with ALiBi slopes and sinks, if any, as kernels read them."""
    slopes, sinks = scoring.alibi_slopes, scoring.sinks
    if slopes is not None:
        scoring = scoring._replace(alibi_slopes=contiguous(slopes, "alibi_slopes"))
    return scoring if sinks is None else scoring._replace(sinks=contiguous(sinks, "s_aux"))


def empty_lse(shape: tuple[int, ...], strides: Sequence[int], q: Tensor) -> Tensor:
    """Allocate a contiguous fp32 tensor; torch.empty would spend half a microsecond more on its arguments."""
    return torch.empty_strided(shape, strides, dtype=torch.float32, device=q.device)
