"""What only a GPU can show: streams, graphs, devices, 64-bit offsets, memory, and which kernel runs."""

import os

import pytest
import torch
from conftest import cuda_problem, kernels
from oracle import Options
from problems import BF16, FEW_MASKS, MASKS, bounds, check, check_varlen, packed_qkv, qkv

from flash_attn import _abi, flash_attn_func
from flash_attn._backends.cuda.library import load
from flash_attn._kernel_key import KernelKey
from flash_attn.flash_attn_interface import flash_attn_gpu, flash_attn_varlen_func

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(cuda_problem()), reason=str(cuda_problem()))]


def make(
    batch: int, seqlen: int, heads: int, head_dim: int = 64, dtype: torch.dtype = BF16, device: str = "cuda"
) -> tuple[torch.Tensor, ...]:
    """Return q, k and v of one shape."""
    return qkv(batch, seqlen, seqlen, (heads, heads), head_dim, dtype, device)


def test_runs_on_the_current_stream():
    """The inputs are overwritten on a side stream just before the call, behind a long kernel."""
    stream = torch.cuda.Stream()
    values = make(2, 200, 4)
    q, k, v = (torch.zeros_like(x) for x in values)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for x, value in zip((q, k, v), values, strict=True):
            x.copy_(value)
        out = flash_attn_func(q, k, v, causal=True)
    torch.cuda.synchronize()
    check(out, None, *values, Options(causal=True))


@pytest.mark.parametrize("head_dim", [64, 256])
def test_graph_replay_reads_new_inputs(head_dim):
    q, k, v = make(2, 130, 4, head_dim)
    flash_attn_func(q, k, v, causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_attn_func(q, k, v, causal=True)
    for _ in range(3):
        for x in (q, k, v):
            x.normal_()
        out.fill_(float("nan"))
        graph.replay()
        check(out, None, q, k, v, Options(causal=True))


def test_a_kernel_may_run_for_the_first_time_inside_a_capture():
    q, k, v = make(1, 40, 2, 96, torch.float16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_attn_func(q, k, v, window_size=(9, 3), softcap=11.0)
    graph.replay()
    check(out, None, q, k, v, Options(window_size=(9, 3), softcap=11.0))


def test_each_graph_replay_draws_a_new_dropout_mask():
    q, k, v = make(2, 128, 4)
    flash_attn_func(q, k, v, dropout_p=0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, _, probs = flash_attn_func(q, k, v, dropout_p=0.5, return_attn_probs=True)
    masks = []
    for _ in range(2):
        graph.replay()
        masks.append(probs.signbit())
    assert not torch.equal(*masks)
    assert all(abs(mask.float().mean() - 0.5) < 0.01 for mask in masks)


@pytest.mark.parametrize("expanded", [False, True])
def test_more_than_2_31_elements(expanded):
    """The last batch entry lies beyond the reach of 32-bit offsets."""
    batch, seqlen, heads, head_dim = 2100, 128, 64, 128
    q, k = (
        torch.randn(n, seqlen, heads, head_dim, device="cuda", dtype=BF16).expand(batch, -1, -1, -1)
        for n in (batch, 1 if expanded else batch)
    )
    assert q.numel() > 2**31
    out = flash_attn_func(q, k, k, causal=True)
    for entry in (0, batch // 2, batch - 1):
        at = slice(entry, entry + 1)
        check(out[at], None, q[at], k[at], k[at], Options(causal=True))


def test_varlen_rows_beyond_2_31_elements():
    lengths = [100, 299_700, 200], [100, 128, 200]
    q, k, v = packed_qkv(lengths, (64, 64), 128, device="cuda")
    assert q.numel() > 2**31
    out = flash_attn_varlen_func(q, k, v, *bounds(lengths, "cuda"))
    check(out[None, -200:], None, *(x[None, -200:] for x in (q, k, v)), Options())


@pytest.mark.parametrize("with_lse", [False, True])
def test_memory_is_the_output_and_the_lse(with_lse):
    q, k, v = make(1, 16_384, 4, 128)
    flash_attn_func(q, k, v)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    flash_attn_func(q, k, v, causal=True, return_attn_probs=with_lse)
    expected = q.numel() * 2 + (16_384 * 4 * 4 if with_lse else 0)
    assert torch.cuda.max_memory_allocated() - before <= expected + 1024


def freed_nan(*shape: int) -> int:
    """Fill fp32 memory of that shape with NaN, free it, and return its address: the next to be handed out."""
    return torch.full(shape, float("nan"), device="cuda").data_ptr()


@pytest.mark.parametrize("head_dim", _abi.HEAD_DIMS)
@pytest.mark.parametrize("mask", FEW_MASKS)
def test_outputs_are_written_in_full(require_kernel, head_dim, mask):
    """out and LSE start as NaN. Under a mask the first of more queries than keys see no key."""
    require_kernel("cuda", BF16, head_dim)
    options = MASKS[mask]
    q, k, v = qkv(3, 333, 77, (5, 5), head_dim, device="cuda")
    given, lse_at = torch.full_like(q, float("nan")), freed_nan(3, 5, 333)
    out, lse, *_ = flash_attn_gpu.fwd(
        q, k, v, given, None, 0.0, head_dim**-0.5, options.causal, *options.window_size, 0.0, False, None
    )
    assert out is given and lse.data_ptr() == lse_at
    check(out, lse, q, k, v, options)


@pytest.mark.parametrize("head_dim", _abi.HEAD_DIMS)
@pytest.mark.parametrize("mask", FEW_MASKS)
def test_varlen_outputs_are_written_in_full(require_kernel, head_dim, mask):
    """As above; also a sequence without keys, one without queries, and tokens of no sequence."""
    require_kernel("cuda", BF16, head_dim)
    options, lengths = MASKS[mask], ([170, 0, 40, 130], [0, 7, 90, 60])
    q, k, v = packed_qkv(lengths, (5, 5), head_dim, device="cuda", trailing=200)
    cu_q, cu_k, *longest = bounds(lengths, "cuda")
    given, lse_at = torch.full_like(q, float("nan")), freed_nan(5, len(q))
    out, lse, *_ = flash_attn_gpu.varlen_fwd(
        q, k, v, given, cu_q, cu_k, None, None, None, None, *longest, 0.0, head_dim**-0.5, False,
        options.causal, *options.window_size, 0.0, False, None,
    )  # fmt: skip
    assert out is given and lse.data_ptr() == lse_at
    check_varlen(out, lse, q, k, v, lengths, options)


def test_garbage_beyond_a_sequence_does_not_leak():
    """NaN in rows that belong to no sequence, next to the last keys of one."""
    lengths = [70], [100]
    q, k, v = packed_qkv(lengths, (2, 2), device="cuda", trailing=200)
    q[70:], k[100:], v[100:] = (float("nan"),) * 3
    out = flash_attn_varlen_func(q, k, v, *bounds(lengths, "cuda"), causal=True)
    check(out[None, :70], None, q[None, :70], k[None, :100], v[None, :100], Options(causal=True))


def test_nan_inputs_stay_visible():
    q, k, v = make(1, 64, 1)
    q[0, 5] = float("nan")
    out = flash_attn_func(q, k, v)
    assert out[0, 5].isnan().all() and not out[0, 6:].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, BF16])
@pytest.mark.parametrize("head_dim", _abi.HEAD_DIMS)
def test_repeats_are_bitwise_equal(head_dim, dtype):
    q, k, v = qkv(2, 333, 517, (4, 2), head_dim, dtype, "cuda")
    first = flash_attn_func(q, k, v, causal=True)
    assert all(torch.equal(flash_attn_func(q, k, v, causal=True), first) for _ in range(50))


def chosen_kernel(**fields: int) -> bytes | None:
    """Key of the kernel that would run for bf16 and these fields of the parameters."""
    return load().forward_kernel(bytes(_abi.ForwardParams(dtype=_abi.Dtype.BF16, **fields)))


@pytest.mark.parametrize("family", ["sm80", "sm86"])
@pytest.mark.parametrize("window, mask", [((-1, -1), "full"), ((-1, 0), "causal"), ((8, 0), "windowed")])
def test_the_forced_family_runs(family, window, mask):
    if not any(key.startswith(f"forward_{family}_bf16_d128") for key in kernels()):
        pytest.skip(f"no {family} kernels in this build")
    forced = _abi.Family[family.upper()]
    windows = {"window_left": window[0], "window_right": window[1]}
    key = chosen_kernel(head_dim=104, head_dim_v=104, family=forced, **windows)
    assert key == f"forward_{family}_bf16_d128_{mask}".encode()


def test_the_largest_family_that_fits_is_chosen():
    if os.environ.get("FLASH_ATTN_FORCE_FAMILY"):
        pytest.skip("a family is forced")
    keys = filter(None, map(KernelKey.parse, kernels()))
    families = {key.family for key in keys if (key.dtype, key.head_dim, key.mask) == ("bf16", 64, "full")}
    if torch.cuda.get_device_capability() != (9, 0) or not families & {"sm80", "sm90"}:
        pytest.skip("written for Hopper with kernels of sm80 or sm90")
    best = "sm90" if "sm90" in families else "sm80"
    key = chosen_kernel(head_dim=64, head_dim_v=64, window_left=-1, window_right=-1)
    assert key == f"forward_{best}_bf16_d64_full".encode()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_current():
    q, k, v = make(2, 100, 4, device="cuda:1")
    assert torch.cuda.current_device() == 0
    out = flash_attn_func(q, k, v, causal=True)
    assert out.device == q.device and torch.cuda.current_device() == 0
    check(out, None, q, k, v, Options(causal=True))
