"""What is particular to the sm90 family: packed heads, tiles that suit the call, tensor maps, tile queue."""

import pytest
import torch
from conftest import cuda_problem, kernels
from oracle import Options, assert_within, attention
from problems import BF16, MASKS, check, check_varlen, int32, packed_qkv, qkv, run, run_varlen

from flash_attn import flash_attn_func, flash_attn_varlen_func
from flash_attn._kernel_key import KernelKey

KEYS = list(filter(None, map(KernelKey.parse, kernels())))
MISSING = cuda_problem() or (
    "" if "sm90" in {key.family for key in KEYS} else "no kernels of the sm90 family"
)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(MISSING), reason=MISSING or "")]

LONG_MASKS = ("full", "causal", "wide window")


def make(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=BF16)


def run_and_check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options) -> None:
    check(*run(q, k, v, options), q, k, v, options)


@pytest.mark.parametrize("mask", LONG_MASKS)
@pytest.mark.parametrize("group", [2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize("seqlen_q", [1, 5, 24, 100])
@pytest.mark.parametrize("head_dim", [64, 128, 192])
def test_few_queries_of_a_group(head_dim, seqlen_q, group, mask):
    """Groups of query heads that share keys fill a tile together; groups of 5 fit no tile."""
    inputs = qkv(2, seqlen_q, 333, (2 * group, 2), head_dim, device="cuda")
    run_and_check(*inputs, MASKS[mask])


@pytest.mark.parametrize("mask", LONG_MASKS)
def test_few_queries_of_a_group_varlen(mask):
    """With queries that see no key, an empty sequence on either side, and tokens of no sequence."""
    lengths = [3, 0, 40, 17], [200, 7, 9, 0]
    inputs = packed_qkv(lengths, (8, 2), 128, device="cuda", trailing=500)
    check_varlen(*run_varlen(*inputs, lengths, MASKS[mask]), *inputs, lengths, MASKS[mask])


@pytest.mark.parametrize("mask", LONG_MASKS)
@pytest.mark.parametrize("seqlen", [511, 513, 1024, 1027, 1100])
def test_tiles_for_few_and_for_many_keys(seqlen, mask):
    run_and_check(*qkv(1, seqlen, seqlen, (2, 2), 128, device="cuda"), MASKS[mask])


def test_varlen_without_a_single_key():
    q, *nothing = packed_qkv(([10, 20], [0, 0]), device="cuda")
    bounds = int32(0, 10, 30, device="cuda"), int32(0, 0, 0, device="cuda")
    out, lse, _ = flash_attn_varlen_func(q, *nothing, *bounds, 20, 1, return_attn_probs=True)
    assert not out.any() and lse.isposinf().all()


def test_varlen_without_a_single_query():
    nothing, k, v = packed_qkv(([0], [30]), device="cuda")
    bounds = int32(0, 0, device="cuda"), int32(0, 30, device="cuda")
    out, lse, _ = flash_attn_varlen_func(nothing, k, v, *bounds, 128, 30, return_attn_probs=True)
    assert out.shape == (0, 4, 64) and lse.shape == (4, 0)


@pytest.mark.parametrize("mask", LONG_MASKS)
def test_layouts_that_are_read_in_place(mask):
    """Heads before rows, parts of one packed tensor, one head for all and one sequence for all."""
    q = make(2, 4, 150, 64).transpose(1, 2)
    k, v = make(2, 200, 2, 4, 64).unbind(2)
    run_and_check(q, k, v, MASKS[mask])
    run_and_check(
        q, make(2, 200, 1, 64).expand(-1, -1, 4, -1), make(1, 200, 4, 64).expand(2, -1, -1, -1), MASKS[mask]
    )


def test_many_more_tiles_than_multiprocessors_again_and_again():
    """The tile queue is back at its start after every call, whatever the number of tiles."""
    for batch in (1, 7, 33):
        q, k, v = qkv(batch, 200, 200, (16, 16), device="cuda")
        expected = attention(q, k, v, Options(causal=True))[0]
        yardstick = attention(q, k, v, Options(causal=True), q.dtype)[0]
        for _ in range(3):
            assert_within(flash_attn_func(q, k, v, causal=True), expected, yardstick)
