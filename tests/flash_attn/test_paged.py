"""`flash_attn_varlen_func` over pages: prefill and decoding in one call, against the fp64 oracle."""

from __future__ import annotations

import pytest
import torch
from oracle import Options
from plans import forced
from problems import (
    BF16,
    FEW_MASKS,
    MASKS,
    bounds,
    by_sequence,
    check_varlen,
    cu_seqlens,
    in_pages,
    int32,
    packed_qkv,
    run_varlen,
)

from flash_attn import flash_attn_varlen_func
from flash_attn._abi import Design
from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

LENGTHS = [1, 0, 37, 5, 1, 90], [70, 9, 37, 0, 1, 96]  # decoding beside prefill
SCORINGS = {**{mask: MASKS[mask] for mask in FEW_MASKS}, "softcap": Options(causal=True, softcap=5.0)}


@pytest.fixture(autouse=True)
def kernels(default_device, require_split):
    require_split(default_device, BF16, 64)


def make(page_size, lengths=LENGTHS, head_dims=64):
    """Return q, k and v with three tokens behind the last sequence, q and pages, and the block table."""
    q, k, v = packed_qkv(lengths, head_dims=head_dims, trailing=3)
    pages, table = in_pages(page_size, *(by_sequence(x[:-3], lengths[1]) for x in (k, v)))
    return (q, k, v), (q, *pages), table


def check(page_size, options, lengths=LENGTHS, head_dims=64):
    tensors, paged, table = make(page_size, lengths, head_dims)
    check_varlen(*run_varlen(*paged, lengths, options, block_table=table), *tensors, lengths, options)


@pytest.mark.parametrize("page_size", [16, 48, 256])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_prefill_and_decoding_in_one_call(page_size, scoring):
    check(page_size, SCORINGS[scoring])


@pytest.mark.parametrize("head_dims", [(64, 40), (59, 59), (64, 27), (3, 1)], ids=str)
@pytest.mark.parametrize("page_size", [32, 256])
def test_other_head_dims(page_size, head_dims):
    check(page_size, Options(causal=True), head_dims=head_dims)


@pytest.mark.parametrize("head_dim_v", [64, 40, 27])
def test_split_keys(head_dim_v):
    """In the tiles for many queries, the kernel of which on Hopper is another."""
    with forced(3, Design.WGMMA):
        check(48, Options(causal=True), (LENGTHS[0], [700, 9, 37, 0, 1, 960]), (64, head_dim_v))


def test_alibi_slopes_of_each_sequence():
    check(16, Options(causal=True, alibi_slopes=torch.rand(len(LENGTHS[0]), 4)))


def test_seqused_k_counts_instead_of_cu_seqlens_k():
    """Engines pass the lengths of the cache as seqused_k; cu_seqlens_k then says nothing."""
    used, (cu_q, _, *longest) = [33, 9, 37, 0, 1, 50], bounds(LENGTHS)
    tensors, paged, table = make(16)
    out, lse, *_ = _flash_attn_varlen_forward(
        *paged, cu_q, torch.zeros_like(cu_q), *longest, 0.0, None, True, block_table=table,
        seqused_k=int32(*used),
    )  # fmt: skip
    check_varlen(out, lse, *tensors, LENGTHS, Options(causal=True), used=used)


def test_rows_of_no_sequence_are_empty():
    _, paged, table = make(16)
    starts = torch.zeros(len(table) + 1, dtype=torch.int32)
    out, lse, *_ = _flash_attn_varlen_forward(
        *paged, starts, starts, 0, max(LENGTHS[1]), 0.0, None, True, block_table=table
    )
    assert not out.any() and (lse == torch.inf).all()


def test_not_a_single_query():
    _, (q, *pages), table = make(16)
    starts, ends = torch.zeros(len(table) + 1, dtype=torch.int32), cu_seqlens(LENGTHS[1])
    out, lse, *_ = _flash_attn_varlen_forward(
        q[:0], *pages, starts, ends, 200, max(LENGTHS[1]), 0.0, None, True, block_table=table
    )
    assert out.shape == (0, 4, 64) and lse.shape == (4, 0)


def test_a_block_table_without_columns():
    """No sequence has a key: it lies nowhere."""
    q, pages = torch.randn(5, 4, 64).to(BF16), torch.randn(3, 16, 2, 64).to(BF16)
    table = torch.empty(1, 0, dtype=torch.int32)
    out = flash_attn_varlen_func(q, pages, pages, int32(0, 5), int32(0, 0), 5, 0, block_table=table)
    assert not out.any()
