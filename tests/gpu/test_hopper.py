"""What is particular to the sm90 family: packed heads, tiles that suit the call, tensor maps, tile queue."""

from itertools import accumulate

import pytest
import torch
from conftest import cuda_problem, kernels
from oracle import Options, assert_lse, assert_within, attention, varlen_attention

from flash_attn import flash_attn_func, flash_attn_varlen_func
from flash_attn._kernel_key import KernelKey

KEYS = list(filter(None, map(KernelKey.parse, kernels())))
MISSING = cuda_problem() or (
    "" if "sm90" in {key.family for key in KEYS} else "no kernels of the sm90 family"
)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(MISSING), reason=MISSING or "")]

MASKS = {
    "full": Options(),
    "causal": Options(causal=True),
    "windowed": Options(window_size=(70, 9)),
}


def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options) -> None:
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True, **options.arguments())
    truth, truth_lse = attention(q, k, v, options)
    assert_within(out, truth, attention(q, k, v, options, q.dtype)[0])
    assert_lse(lse, truth_lse)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("group", [2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize("seqlen_q", [1, 5, 24, 100])
@pytest.mark.parametrize("head_dim", [64, 128, 192])
def test_few_queries_of_a_group(head_dim, seqlen_q, group, mask):
    """Groups of query heads that share keys fill a tile together; groups of 5 fit no tile."""
    q = make(2, seqlen_q, 2 * group, head_dim)
    k, v = make(2, 333, 2, head_dim), make(2, 333, 2, head_dim)
    check(q, k, v, MASKS[mask])


@pytest.mark.parametrize("mask", MASKS)
def test_few_queries_of_a_group_varlen(mask):
    """With queries that see no key, an empty sequence on either side, and tokens of no sequence."""
    lengths, total_q = ([3, 0, 40, 17], [200, 7, 9, 0]), 60 + 500
    q, k, v = make(total_q, 8, 128), make(216, 2, 128), make(216, 2, 128)
    cu_q, cu_k = (torch.tensor([0, *accumulate(n)], device="cuda", dtype=torch.int32) for n in lengths)
    out, lse, _ = flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, 40, 200, return_attn_probs=True, **MASKS[mask].arguments()
    )
    truth, truth_lse = varlen_attention(q, k, v, *lengths, MASKS[mask])
    assert_within(out, truth, varlen_attention(q, k, v, *lengths, MASKS[mask], q.dtype)[0])
    assert_lse(lse, truth_lse)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("seqlen", [511, 513, 1024, 1027, 1100])
def test_tiles_for_few_and_for_many_keys(seqlen, mask):
    q, k, v = (make(1, seqlen, 2, 128) for _ in range(3))
    check(q, k, v, MASKS[mask])


def test_varlen_without_a_single_key():
    q, nothing = make(30, 4, 64), make(0, 2, 64)
    cu_q = torch.tensor([0, 10, 30], device="cuda", dtype=torch.int32)
    out, lse, _ = flash_attn_varlen_func(
        q, nothing, nothing, cu_q, torch.zeros_like(cu_q), 20, 1, return_attn_probs=True
    )
    assert not out.any() and lse.isposinf().all()


def test_varlen_without_a_single_query():
    nothing, k = make(0, 4, 64), make(30, 2, 64)
    bounds = torch.zeros(2, device="cuda", dtype=torch.int32)
    key_bounds = torch.tensor([0, 30], device="cuda", dtype=torch.int32)
    out, lse, _ = flash_attn_varlen_func(nothing, k, k, bounds, key_bounds, 128, 30, return_attn_probs=True)
    assert out.shape == (0, 4, 64) and lse.shape == (4, 0)


@pytest.mark.parametrize("mask", MASKS)
def test_layouts_that_are_read_in_place(mask):
    """Heads before rows, parts of one packed tensor, one head for all and one sequence for all."""
    q = make(2, 4, 150, 64).transpose(1, 2)
    k, v = make(2, 200, 2, 4, 64).unbind(2)
    check(q, k, v, MASKS[mask])
    check(
        q, make(2, 200, 1, 64).expand(-1, -1, 4, -1), make(1, 200, 4, 64).expand(2, -1, -1, -1), MASKS[mask]
    )


def test_many_more_tiles_than_multiprocessors_again_and_again():
    """The tile queue is back at its start after every call, whatever the number of tiles."""
    for batch in (1, 7, 33):
        q, k, v = (make(batch, 200, 16, 64) for _ in range(3))
        expected = attention(q, k, v, Options(causal=True))[0]
        yardstick = attention(q, k, v, Options(causal=True), q.dtype)[0]
        for _ in range(3):
            assert_within(flash_attn_func(q, k, v, causal=True), expected, yardstick)
