"""What tests of attention share: masks, makers of tensors, and calls with their checks against the oracle.

Tensors lie on torch's default device where none is named. `lengths` are those of the queries and of the keys
of packed sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from oracle import Options, assert_gradients, assert_lse, assert_within, attention, varlen_attention
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

BF16 = torch.bfloat16
Device = torch.device | str | None
Lengths = tuple[list[int], list[int]]

MASKS = {
    "full": Options(),
    "causal": Options(causal=True),
    "window": Options(window_size=(17, 5)),
    "left": Options(window_size=(33, -1)),
    "right": Options(window_size=(-1, 29)),
    "causal window": Options(causal=True, window_size=(25, 7)),
    "diagonal": Options(window_size=(0, 0)),
    "wide window": Options(window_size=(130, 9)),
}
FEW_MASKS = ("full", "causal", "window")
"""One mask for each kind of kernel; the wide window, of several blocks of keys, is for long sequences."""

HEAD_DIM_PAIRS = ((192, 128), (128, 192), (64, 96), (40, 24), (32, 256))
"""Pairs of the head dim of q and k and that of v and out which differ."""


def qkv(
    batch: int, seqlen_q: int, seqlen_k: int, heads: tuple[int, int] = (4, 2),
    head_dims: int | tuple[int, int] = 64, dtype: torch.dtype = BF16, device: Device = None,
    grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return random q (b, sq, h, d), k (b, sk, hk, d) and v (b, sk, hk, dv)."""
    head_dim, head_dim_v = (head_dims, head_dims) if isinstance(head_dims, int) else head_dims
    of_keys = batch, seqlen_k, heads[1]
    shapes = (batch, seqlen_q, heads[0], head_dim), (*of_keys, head_dim), (*of_keys, head_dim_v)
    q, k, v = (torch.randn(shape, dtype=dtype, device=device, requires_grad=grad) for shape in shapes)
    return q, k, v


def packed_qkv(
    lengths: Lengths, heads: tuple[int, int] = (4, 2), head_dims: int | tuple[int, int] = 64,
    dtype: torch.dtype = BF16, device: Device = None, grad: bool = False, trailing: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return random q (total_q, h, d), k and v, with `trailing` tokens behind the last sequence."""
    totals = [sum(x) + trailing for x in lengths]
    q, k, v = (x[0].requires_grad_(grad) for x in qkv(1, *totals, heads, head_dims, dtype, device))
    return q, k, v


def zeros(*shape: int, dtype: torch.dtype = BF16, device: Device = None) -> Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device)


def int32(*values: int, device: Device = None) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def cu_seqlens(lengths: Sequence[int], device: Device = None) -> Tensor:
    """Return where sequences of these lengths begin, and where the last one ends."""
    return int32(0, *accumulate(lengths), device=device)


def bounds(lengths: Lengths, device: Device = None) -> tuple[Tensor, Tensor, int, int]:
    """Return cu_seqlens_q, cu_seqlens_k, max_seqlen_q and max_seqlen_k."""
    longest_q, longest_k = (max(x, default=0) for x in lengths)
    return cu_seqlens(lengths[0], device), cu_seqlens(lengths[1], device), longest_q, longest_k


def rotary_tables(rows: int, rotary_dim: int, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (rows, rotary_dim / 2) of random angles."""
    angles = torch.rand(rows, rotary_dim // 2) * 6
    return angles.cos().to(dtype), angles.sin().to(dtype)


def by_sequence(x: Tensor, lengths: list[int]) -> Tensor:
    """Return packed sequences (total, hk, d) as a cache (b, s, hk, d), NaN behind each."""
    return pad_sequence(x.split(lengths), batch_first=True, padding_value=torch.nan)


def in_pages(page_size: int, *caches: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return caches (b, s, hk, d) as pages in random order, and the block table they have in common.

    Three pages belong to no sequence; they, and what is behind the last key, are NaN.
    """
    batch, capacity = caches[0].shape[:2]
    blocks = -(-capacity // page_size)
    table = torch.randperm(batch * blocks + 3)[: batch * blocks].view(batch, blocks).int()
    pages = []
    for cache in caches:
        paged = cache.new_full((batch * blocks + 3, page_size, *cache.shape[2:]), torch.nan)
        whole = cache.new_full((batch, blocks * page_size, *cache.shape[2:]), torch.nan)
        whole[:, :capacity] = cache
        paged[table.flatten().long()] = whole.view(-1, *paged.shape[1:])
        pages.append(paged)
    return pages, table


def run(q: Tensor, k: Tensor, v: Tensor, options: Options, **named) -> tuple[Tensor, Tensor]:
    """Return out (b, sq, h, dv) and lse (b, h, sq)."""
    arguments = options.arguments() | {"s_aux": options.sinks}
    return flash_attn_func(q, k, v, **arguments, return_attn_probs=True, **named)[:2]


def run_varlen(
    q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, options: Options, **named
) -> tuple[Tensor, Tensor]:
    """Return out (total_q, h, dv) and lse (h, total_q); k and v may be pages."""
    arguments = options.arguments() | {"s_aux": options.sinks, "return_softmax_lse": True}
    return flash_attn_varlen_func(q, k, v, *bounds(lengths, q.device), **arguments, **named)


def run_cache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, options: Options, **named
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return out (b, sq, h, dv) and lse (b, h, sq) over a cache, or over pages."""
    arguments = options.arguments() | {"s_aux": options.sinks, "return_softmax_lse": True}
    del arguments["dropout_p"]
    return flash_attn_with_kvcache(q, k_cache, v_cache, **arguments, **named)


def check(out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, options: Options) -> None:
    """Compare a result, without an LSE if None, with the oracle's of q (b, sq, h, d), k and v."""
    truth, truth_lse = attention(q, k, v, options)
    assert_within(out, truth, attention(q, k, v, options, q.dtype)[0])
    if lse is not None:
        assert_lse(lse, truth_lse)


def check_varlen(
    out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, options: Options,
    leftpad: list[int] | None = None, used: list[int] | None = None,
) -> None:  # fmt: skip
    """Compare as `check`, packed sequences."""
    truth, truth_lse = varlen_attention(q, k, v, *lengths, options, leftpad=leftpad, used=used)
    assert_within(out, truth, varlen_attention(q, k, v, *lengths, options, q.dtype, leftpad, used)[0])
    if lse is not None:
        assert_lse(lse, truth_lse)


def check_sequences(
    out: Tensor, lse: Tensor, q: Tensor, sequences: Sequence[tuple[Tensor, Tensor]], options: Options
) -> None:
    """Compare as `check`, given the keys and values (n, hk, d) of each of the batch's sequences."""
    assert len(sequences) == len(q)
    for b, (k, v) in enumerate(sequences):
        mine, slopes = options, options.alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            mine = replace(options, alibi_slopes=slopes[b])
        check(out[b : b + 1], lse[b : b + 1], q[b : b + 1], k[None], v[None], mine)


def check_gradients(
    found: Sequence[Tensor | None], inputs: Sequence[Tensor], dout: Tensor, options: Options
) -> None:
    """Compare gradients, those that are not None, with the oracle's at q, k and v."""
    assert_gradients(found, lambda q, k, v, d: attention(q, k, v, options, d)[0], tuple(inputs), dout)


def check_varlen_gradients(
    found: Sequence[Tensor | None], inputs: Sequence[Tensor], dout: Tensor, lengths: Lengths, options: Options
) -> None:
    """Compare as `check_gradients`, packed sequences."""
    assert_gradients(
        found, lambda q, k, v, d: varlen_attention(q, k, v, *lengths, options, d)[0], tuple(inputs), dout
    )  # fmt: skip
