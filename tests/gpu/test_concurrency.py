"""Calls that overlap, in streams and in graphs, and calls that repeat: same results, bit for bit.

On Hopper the blocks of a kernel draw tiles from a counter in memory, so that which block computes what
differs from run to run, and two kernels at once must not draw from one counter.
"""

import os

import pytest
import torch
from conftest import cuda_problem
from oracle import Options
from problems import BF16, HEAD_DIM_PAIRS, qkv
from problems import check as check_result

from flash_attn import build_info, flash_attn_func
from flash_attn._backends.cuda import gpu
from flash_attn._backends.cuda.tile_counter import TileCounters

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(cuda_problem()), reason=str(cuda_problem()))]

ROUNDS = 20
# More tiles than a GPU runs at once, and few enough blocks of each call for two calls to overlap.
LONG, WIDE = (1, 4096, 4, 128, 128), (3, 1500, 6, 64, 64)


def make(batch: int, seqlen: int, heads: int, head_dim: int, head_dim_v: int) -> tuple[torch.Tensor, ...]:
    return qkv(batch, seqlen, seqlen, (heads, heads), (head_dim, head_dim_v), device="cuda")


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
    check_result(out, None, q, k, v, Options(causal=True))


def runs_on_hopper() -> bool:
    forced = os.environ.get("FLASH_ATTN_FORCE_FAMILY", "sm90")
    return torch.cuda.get_device_capability() == (9, 0) and forced == "sm90"


def need_hopper() -> None:
    if not runs_on_hopper():
        pytest.skip("only Hopper's kernels count tiles")


@pytest.mark.parametrize("shape", [LONG, WIDE, (2, 2000, 8, 192, 128)], ids=str)
def test_200_causal_calls_are_bitwise_equal(require_kernel, shape):
    require_kernel("cuda", BF16, *shape[3:])
    q, k, v = make(*shape)
    first = flash_attn_func(q, k, v, causal=True)
    check(q, k, v, first)
    different = sum(~torch.eq(flash_attn_func(q, k, v, causal=True), first).all() for _ in range(200))
    assert int(different) == 0


def test_calls_on_two_streams_at_once():
    inputs = [make(*shape) for shape in (LONG, WIDE)]
    expected = [flash_attn_func(*x, causal=True) for x in inputs]
    for x, out in zip(inputs, expected, strict=True):
        check(*x, out)
    torch.cuda.synchronize()
    streams, outs = [torch.cuda.Stream() for _ in inputs], [[] for _ in inputs]
    for _ in range(ROUNDS):
        for stream, x, found in zip(streams, inputs, outs, strict=True):
            with torch.cuda.stream(stream):
                found.append(flash_attn_func(*x, causal=True))
    torch.cuda.synchronize()
    for found, out in zip(outs, expected, strict=True):
        assert all(torch.equal(x, out) for x in found)


def capture(x: tuple[torch.Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """Capture a call, in torch's one stream for captures."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_attn_func(*x, causal=True)
    return graph, out


def test_two_graphs_replayed_at_once():
    """Beside each other and beside a call of the stream that both were captured in."""
    inputs = [make(*shape) for shape in (LONG, WIDE)]
    expected = [flash_attn_func(*x, causal=True) for x in inputs]
    for x, out in zip(inputs, expected, strict=True):
        check(*x, out)
    captured = [capture(x) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(ROUNDS):
        for _, out in captured:
            out.fill_(float("nan"))
        torch.cuda.synchronize()
        for stream, (graph, _) in zip(streams, captured, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(torch.cuda.graph.default_capture_stream):
            third = flash_attn_func(*inputs[0], causal=True)
        torch.cuda.synchronize()
        for (_, out), truth in zip(captured, expected, strict=True):
            assert torch.equal(out, truth)
        assert torch.equal(third, expected[0])


def test_counters_are_zero_after_calls():
    need_hopper()
    for shape in (LONG, WIDE, (2, 1, 4, 64, 64), (1, 40, 2, 128, 128)):
        flash_attn_func(*make(*shape), causal=True)
    torch.cuda.synchronize()
    counters = gpu.tile_counters.known.values()
    assert counters and not any(x.any() for x in counters)


def test_the_counter_of_a_stream_does_not_live_in_a_pool_of_the_caller(monkeypatch):
    """What a caller's memory pool holds after a call is that caller's alone, as torch.compile checks."""
    need_hopper()
    if not hasattr(torch.cuda, "use_mem_pool"):
        pytest.skip("this torch has no memory pools to choose")
    counters = TileCounters()
    monkeypatch.setattr(gpu, "tile_counter", counters.of)
    x, pool, stream = make(*WIDE), torch.cuda.MemPool(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream), torch.cuda.use_mem_pool(pool):
        out = flash_attn_func(*x, causal=True)
    stream.synchronize()
    check(*x, out)
    del out
    assert counters.known.keys() == {(stream.device_index, stream.cuda_stream)}
    blocks = [block for segment in pool.snapshot() for block in segment["blocks"]]
    assert all(block["state"] == "inactive" for block in blocks)


def test_only_kernels_for_hopper_draw_tiles():
    flash_attn_func(*make(*WIDE))
    draws_tiles = gpu.prepared(torch.cuda.current_device()).draws_tiles
    assert draws_tiles == (runs_on_hopper() and "sm90" in build_info()["families"])


@pytest.mark.parametrize("head_dims", HEAD_DIM_PAIRS, ids=str)
def test_graphs_of_another_head_dim_of_v(require_kernel, head_dims):
    require_kernel("cuda", BF16, *head_dims)
    x = make(2, 300, 4, *head_dims)
    graph, out = capture(x)
    graph.replay()
    check(*x, out)
