"""`flash_attn_varlen_func` over pages: prefill and decoding in one call, against the fp64 oracle."""

from __future__ import annotations

import pytest
import torch
from oracle import Options, assert_lse, assert_within, varlen_attention

from flash_attn import _cuda_kvcache, flash_attn_varlen_func
from flash_attn._abi import Design
from flash_attn._splits import Plan
from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

HEADS, HEADS_K = 4, 2
LENGTHS_Q = [1, 0, 37, 5, 1, 90]  # decoding beside prefill; three tokens behind the last sequence
LENGTHS_K = [70, 9, 37, 0, 1, 96]
EXTRA = 3
MASKS = {
    "full": Options(),
    "causal": Options(causal=True),
    "window": Options(window_size=(17, 5)),
    "softcap": Options(causal=True, softcap=5.0),
}


@pytest.fixture(autouse=True)
def default_device(device, require_split):
    """Make every tensor of a test on its device."""
    require_split(device, torch.bfloat16, 64)
    with torch.device(device):
        yield


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def make(page_size, lengths_k=LENGTHS_K, head_dim=64, head_dim_v=64, dtype=torch.bfloat16):
    """Return q, packed k and v, the same in pages whose unused rows are NaN, and the block table."""
    q = torch.randn(sum(LENGTHS_Q) + EXTRA, HEADS, head_dim).to(dtype)
    packed = [torch.randn(sum(lengths_k), HEADS_K, dim).to(dtype) for dim in (head_dim, head_dim_v)]
    blocks = -(-max(lengths_k) // page_size)
    table = torch.randperm(len(lengths_k) * blocks + 2)[: len(lengths_k) * blocks].view(-1, blocks).int()
    pages = []
    for x in packed:
        paged = torch.full((int(table.max()) + 1, page_size, *x.shape[1:]), torch.nan, dtype=dtype)
        for row, keys in zip(table.long(), x.split(lengths_k), strict=True):
            whole = paged[row].flatten(0, 1)
            whole[: len(keys)] = keys
            paged[row] = whole.view(-1, *paged.shape[1:])
        pages.append(paged)
    return q, packed, pages, table


def check(out, lse, q, packed, options, lengths_k=LENGTHS_K, used=None):
    truth, truth_lse = varlen_attention(q, *packed, LENGTHS_Q, lengths_k, options, used=used)
    yardstick, _ = varlen_attention(q, *packed, LENGTHS_Q, lengths_k, options, q.dtype, used=used)
    assert_within(out, truth, yardstick)
    assert_lse(lse, truth_lse)


@pytest.mark.parametrize("page_size", [16, 48, 256])
@pytest.mark.parametrize("mask", MASKS)
def test_prefill_and_decoding_in_one_call(page_size, mask):
    q, packed, pages, table = make(page_size)
    out, lse, _ = flash_attn_varlen_func(
        q, *pages, bounds(LENGTHS_Q), bounds(LENGTHS_K), max(LENGTHS_Q), max(LENGTHS_K), block_table=table,
        return_attn_probs=True, causal=MASKS[mask].causal, window_size=MASKS[mask].window_size,
        softcap=MASKS[mask].softcap,
    )  # fmt: skip
    check(out, lse, q, packed, MASKS[mask])


@pytest.mark.parametrize("head_dims", [(64, 40), (59, 59), (64, 27), (3, 1)], ids=str)
def test_other_head_dims(head_dims):
    q, packed, pages, table = make(32, head_dim=head_dims[0], head_dim_v=head_dims[1])
    out, lse, _ = flash_attn_varlen_func(
        q, *pages, bounds(LENGTHS_Q), bounds(LENGTHS_K), max(LENGTHS_Q), max(LENGTHS_K), block_table=table,
        return_attn_probs=True, causal=True,
    )  # fmt: skip
    check(out, lse, q, packed, Options(causal=True))


@pytest.mark.parametrize("head_dim_v", [64, 40, 27])
def test_split_keys(head_dim_v, monkeypatch):
    """In the tiles for many queries, the kernel of which on Hopper is another."""
    monkeypatch.setattr(_cuda_kvcache, "plan", lambda *call: Plan(3, Design.WGMMA))
    lengths_k = [700, 9, 37, 0, 1, 960]
    q, packed, pages, table = make(48, lengths_k, head_dim_v=head_dim_v)
    out, lse, _ = flash_attn_varlen_func(
        q, *pages, bounds(LENGTHS_Q), bounds(lengths_k), max(LENGTHS_Q), max(lengths_k), block_table=table,
        return_attn_probs=True, causal=True,
    )  # fmt: skip
    check(out, lse, q, packed, Options(causal=True), lengths_k)


def test_alibi_slopes_of_each_sequence():
    q, packed, pages, table = make(16)
    options = Options(causal=True, alibi_slopes=torch.rand(len(LENGTHS_Q), HEADS))
    out, lse, _ = flash_attn_varlen_func(
        q, *pages, bounds(LENGTHS_Q), bounds(LENGTHS_K), max(LENGTHS_Q), max(LENGTHS_K), block_table=table,
        return_attn_probs=True, causal=True, alibi_slopes=options.alibi_slopes,
    )  # fmt: skip
    check(out, lse, q, packed, options)


def test_seqused_k_counts_instead_of_cu_seqlens_k():
    """Engines pass the lengths of the cache as seqused_k; cu_seqlens_k then says nothing."""
    used = [33, 9, 37, 0, 1, 50]
    q, packed, pages, table = make(16)
    out, lse, *_ = _flash_attn_varlen_forward(
        q, *pages, bounds(LENGTHS_Q), torch.zeros(7, dtype=torch.int32), max(LENGTHS_Q), max(LENGTHS_K), 0.0,
        None, True, block_table=table, seqused_k=torch.tensor(used, dtype=torch.int32),
    )  # fmt: skip
    check(out, lse, q, packed, Options(causal=True), used=used)


def test_rows_of_no_sequence_are_empty():
    q, _, pages, table = make(16)
    starts = torch.zeros(len(table) + 1, dtype=torch.int32)
    out, lse, *_ = _flash_attn_varlen_forward(
        q, *pages, starts, starts, 0, max(LENGTHS_K), 0.0, None, True, block_table=table
    )
    assert not out.any() and (lse == torch.inf).all()


def test_not_a_single_query():
    q, _, pages, table = make(16)
    starts = torch.zeros(len(table) + 1, dtype=torch.int32)
    out, lse, *_ = _flash_attn_varlen_forward(
        q[:0], *pages, starts, bounds(LENGTHS_K), 200, max(LENGTHS_K), 0.0, None, True, block_table=table
    )
    assert out.shape == (0, HEADS, 64) and lse.shape == (HEADS, 0)


def test_a_block_table_without_columns(device, require_split):
    """No sequence has a key: it lies nowhere."""
    require_split(device, torch.bfloat16, 64)
    q, pages = (torch.randn(shape, device=device).bfloat16() for shape in ((5, 4, 64), (3, 16, 2, 64)))
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 5], [0, 0]))
    table = torch.empty(1, 0, dtype=torch.int32, device=device)
    out = flash_attn_varlen_func(q, pages, pages, cu_q, cu_k, 5, 0, block_table=table)
    assert not out.any()
