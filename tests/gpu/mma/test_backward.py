"""Gradients where only a GPU shows them: long sequences, every kernel, streams, graphs, memory, repeats.

tests/flash_attn has the semantics, on CUDA too.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import cuda_problem, kernels
from oracle import Options
from problems import BF16, MASKS, bounds, check_gradients, check_varlen_gradients, int32, packed_qkv, qkv

from flash_attn import _abi, flash_attn_func
from flash_attn._backends.cuda.library import load
from flash_attn.flash_attn_interface import (
    _flash_attn_backward,
    _flash_attn_forward,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
)


def problem() -> str | None:
    """Return why these tests cannot run here, None if they can."""
    built = any(key.startswith("backward") for key in kernels())
    return cuda_problem() or (None if built else "no backward kernels are built")


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(problem()), reason=str(problem()))]

FP16 = torch.float16
LONG_MASKS = ("full", "causal", "wide window")
HEAD_DIMS = (32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256)
SHORT = ((1, 1), (113, 203), (108, 256), (203, 113), (256, 130), (64, 1025))
LONG = ((1023, 1024), (1024, 1023), (2048, 2048), (2048, 700))
NAN = float("nan")
Tensors = tuple[torch.Tensor, ...]


def make(
    batch: int, seqlen_q: int, seqlen_k: int, heads: tuple[int, int] = (4, 2),
    head_dims: int | tuple[int, int] = 64, dtype: torch.dtype = BF16, device: str = "cuda",
) -> Tensors:  # fmt: skip
    return qkv(batch, seqlen_q, seqlen_k, heads, head_dims, dtype, device, grad=True)


def run(inputs: Tensors, dout: torch.Tensor, **named) -> Tensors:
    return torch.autograd.grad(flash_attn_func(*inputs, **named), inputs, dout)


def check(inputs: Tensors, options: Options, deterministic: bool = False) -> None:
    dout = torch.randn_like(inputs[0])
    found = run(inputs, dout, **options.arguments(), deterministic=deterministic)
    check_gradients(found, inputs, dout, options)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("mask", LONG_MASKS)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_short(require_backward, head_dim, mask, dtype):
    require_backward("cuda", dtype, head_dim)
    for lengths in SHORT:
        check(make(2, *lengths, (4, 2), head_dim, dtype), MASKS[mask])


@pytest.mark.parametrize("head_dim", _abi.HEAD_DIMS)
@pytest.mark.parametrize("mask", LONG_MASKS)
@pytest.mark.parametrize("deterministic", [False, True])
def test_long(require_backward, head_dim, mask, deterministic):
    require_backward("cuda", BF16, head_dim)
    for lengths in LONG:
        check(make(1, *lengths, (2, 1), head_dim), MASKS[mask], deterministic)


@pytest.mark.parametrize("head_dim", _abi.HEAD_DIMS)
@pytest.mark.parametrize("mask", LONG_MASKS)
def test_modifiers(require_backward, head_dim, mask):
    """Softcap with slopes; dropout with slopes, its mask read off S_dmask."""
    require_backward("cuda", BF16, head_dim)
    slopes = torch.rand(2, 4, device="cuda") / 10
    options = replace(MASKS[mask], alibi_slopes=slopes)
    check(make(2, 300, 427, (4, 2), head_dim), replace(options, softcap=15.0))
    inputs = make(2, 300, 427, (4, 2), head_dim)
    dout, options = torch.randn_like(inputs[0]), replace(options, dropout_p=0.17)
    out, _, s_dmask = flash_attn_func(*inputs, **options.arguments(), return_attn_probs=True)
    found = torch.autograd.grad(out, inputs, dout)
    keep = ~torch.signbit(s_dmask[..., :300, :427])
    check_gradients(found, inputs, dout, replace(options, keep=keep))


@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (12, 1)], ids=str)
@pytest.mark.parametrize("mask", LONG_MASKS)
def test_groups(require_backward, heads, mask):
    require_backward("cuda", BF16, 128)
    check(make(3, 330, 450, heads, 128), MASKS[mask])


@pytest.mark.parametrize("head_dim", _abi.HEAD_DIMS)
@pytest.mark.parametrize("mask", LONG_MASKS)
@pytest.mark.parametrize("wanted", ["dq dk dv", "dq", "dk dv"])
def test_gradients_and_workspace_start_as_nan(require_backward, head_dim, mask, wanted):
    """More queries than keys: under a mask some of either see none. Freed NaN is handed out as workspace."""
    require_backward("cuda", BF16, head_dim)
    q, k, v = qkv(2, 333, 177, (4, 2), head_dim, device="cuda")
    options = MASKS[mask]
    scoring = (0.0, None, options.causal, *options.window_size, 0.0, None)
    out, lse, _, _ = _flash_attn_forward(q, k, v, *scoring, False)
    dout, rows = torch.randn_like(out), 2 * 4 * 384
    expected = (dout.double() * out.double()).sum(-1).transpose(1, 2)
    for deterministic in (False, True):
        given = [
            torch.full_like(x, NAN) if name in wanted else None
            for name, x in (("dq", q), ("dk", k), ("dv", v))
        ]
        columns = head_dim + deterministic if "dq" in wanted else 0
        freed = [torch.full((n,), NAN, device="cuda") for n in (rows, rows * (1 + columns))]
        del freed
        softmax_d = _flash_attn_backward(dout, q, k, v, out, lse, *given, *scoring, deterministic)
        check_gradients(given, (q, k, v), dout, options)
        torch.testing.assert_close(softmax_d[..., :333].double(), expected, atol=1e-4, rtol=1e-4)
        assert not softmax_d[..., 333:].any()


@pytest.mark.parametrize("head_dim", _abi.HEAD_DIMS)
@pytest.mark.parametrize("mask", LONG_MASKS)
def test_50_deterministic_repeats_are_bitwise_equal(require_backward, head_dim, mask):
    require_backward("cuda", BF16, head_dim)
    inputs = make(2, 777, 1030, (8, 2), head_dim)
    dout, named = torch.randn_like(inputs[0]), MASKS[mask].arguments() | {"deterministic": True}
    first = run(inputs, dout, **named)
    check_gradients(first, inputs, dout, MASKS[mask])
    for _ in range(50):
        assert all(torch.equal(a, b) for a, b in zip(run(inputs, dout, **named), first, strict=True))


def test_varlen_repeats_are_bitwise_equal(require_backward):
    require_backward("cuda", BF16, 64)
    lengths = [300, 0, 1, 700, 40], [500, 9, 0, 300, 40]
    inputs = packed_qkv(lengths, device="cuda", grad=True, trailing=59)
    arguments, dout = bounds(lengths, "cuda"), torch.randn_like(inputs[0])

    def gradients():
        out = flash_attn_varlen_func(*inputs, *arguments, causal=True, deterministic=True)
        return torch.autograd.grad(out, inputs, dout)

    first = gradients()
    check_varlen_gradients(first, inputs, dout, lengths, Options(causal=True))
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(gradients(), first, strict=True))


def test_garbage_beyond_a_sequence_does_not_leak(require_backward):
    """NaN in rows that belong to no sequence, in everything that is read."""
    require_backward("cuda", BF16, 64)
    lengths = [70], [100]
    q, k, v = packed_qkv(lengths, (2, 2), device="cuda", trailing=130)
    dout = torch.randn_like(q)
    q[70:], k[100:], v[100:], dout[70:] = NAN, NAN, NAN, NAN
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = flash_attn_varlen_func(*leaves, *bounds(lengths, "cuda"), causal=True)
    dq, dk, dv = torch.autograd.grad(out, leaves, dout)
    assert not (dq[70:].any() or dk[100:].any() or dv[100:].any())
    inside = tuple(x.detach()[None, :n] for x, n in ((q, 70), (k, 100), (v, 100)))
    actual = (dq[None, :70], dk[None, :100], dv[None, :100])
    check_gradients(actual, inside, dout[None, :70], Options(causal=True))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_each_graph_replay_draws_a_new_dropout_mask(require_backward, head_dim):
    """Forward and backward in one graph; every replay's gradients are those of its own mask and inputs."""
    require_backward("cuda", BF16, head_dim)
    inputs = make(2, 130, 200, (4, 2), head_dim)
    dout = torch.randn_like(inputs[0])

    def step() -> tuple[torch.Tensor, Tensors]:
        out, _, s_dmask = flash_attn_func(*inputs, dropout_p=0.3, causal=True, return_attn_probs=True)
        return s_dmask, torch.autograd.grad(out, inputs, dout)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        s_dmask, actual = step()
    masks = []
    for _ in range(3):
        with torch.no_grad():
            for x in (*inputs, dout):
                x.normal_()
        for x in actual:
            x.fill_(NAN)
        graph.replay()
        keep = ~torch.signbit(s_dmask[..., :130, :200])
        options = Options(causal=True, dropout_p=0.3, keep=keep)
        check_gradients(actual, inputs, dout, options)
        masks.append(keep)
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])


def test_a_deterministic_backward_is_captured_without_a_warm_up(require_backward):
    require_backward("cuda", FP16, 96)
    inputs = make(1, 300, 300, (2, 1), 96, FP16)
    dout, options = torch.randn_like(inputs[0]), Options(window_size=(90, 40))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = run(inputs, dout, **options.arguments(), deterministic=True)
    for _ in range(2):
        graph.replay()
        check_gradients(actual, inputs, dout, options)


def test_runs_on_the_stream_of_the_forward(require_backward):
    """Everything is overwritten on a side stream just before, behind a long kernel."""
    require_backward("cuda", BF16, 64)
    inputs = make(2, 200, 300)
    values = [x.detach().clone() for x in inputs]
    dout = torch.randn_like(inputs[0])
    true_dout, options = dout.clone(), Options(causal=True)
    with torch.no_grad():
        for x in (*inputs, dout):
            x.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            for x, value in zip((*inputs, dout), (*values, true_dout), strict=True):
                x.copy_(value)
        actual = run(inputs, dout, causal=True)
    torch.cuda.synchronize()
    check_gradients(actual, inputs, dout, options)


def test_backwards_on_two_streams_at_once(require_backward):
    """Workspaces of calls that overlap must not be shared."""
    require_backward("cuda", BF16, 64)
    require_backward("cuda", BF16, 128)
    problems = [make(1, 2048, 2048, (4, 4)), make(2, 1500, 1500, (3, 3), 128)]
    douts = [torch.randn_like(q) for q, _, _ in problems]
    named = {"causal": True, "deterministic": True}
    expected = [run(x, dout, **named) for x, dout in zip(problems, douts, strict=True)]
    streams, found = [torch.cuda.Stream() for _ in problems], [[], []]
    torch.cuda.synchronize()
    for _ in range(10):
        for stream, x, dout, results in zip(streams, problems, douts, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(run(x, dout, **named))
    torch.cuda.synchronize()
    for results, truth in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for result in results for a, b in zip(result, truth, strict=True))


def peak_bytes(call: Callable[[], object]) -> int:
    """Return how many bytes more than now `call` asks for at its peak, before any rounding."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    result = call()
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"]
    del result
    return peak - before


@pytest.mark.parametrize("deterministic", [False, True])
def test_memory_is_the_gradients_and_the_documented_workspace(require_backward, deterministic):
    require_backward("cuda", BF16, 128)
    seqlen, heads = 8192, 4
    inputs = make(1, seqlen, seqlen, (heads, heads), 128)
    out = flash_attn_func(*inputs, causal=True, deterministic=deterministic)
    dout = torch.randn_like(out)
    torch.autograd.grad(out, inputs, dout, retain_graph=True)
    rows = seqlen * heads
    expected = sum(2 * x.numel() for x in inputs) + rows * 4 * (128 + 2 + deterministic)
    assert peak_bytes(lambda: torch.autograd.grad(out, inputs, dout)) <= expected + 4096


def test_packed_gradients_take_no_memory_but_their_own(require_backward):
    require_backward("cuda", BF16, 128)
    qkv = torch.randn(1, 8192, 3, 4, 128, device="cuda", dtype=BF16, requires_grad=True)
    out = flash_attn_qkvpacked_func(qkv, causal=True)
    dout = torch.randn_like(out)
    expected = 2 * qkv.numel() + 8192 * 4 * 4 * (128 + 2)
    assert peak_bytes(lambda: torch.autograd.grad(out, qkv, dout)) <= expected + 4096


def need_memory(gigabytes: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if free < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory")


def test_more_than_2_31_elements(require_backward):
    """The last batch entry lies beyond the reach of 32-bit offsets."""
    require_backward("cuda", BF16, 128)
    need_memory(60)
    inputs = make(2100, 128, 128, (64, 64), 128)
    dout = torch.randn_like(inputs[0])
    assert dout.numel() > 2**31
    actual = run(inputs, dout, causal=True)
    for entry in (0, 1050, 2099):
        at = slice(entry, entry + 1)
        part = tuple(x.detach()[at] for x in inputs)
        check_gradients([x[at] for x in actual], part, dout[at], Options(causal=True))


def test_varlen_rows_beyond_2_31_elements(require_backward):
    require_backward("cuda", BF16, 128)
    need_memory(60)
    total, heads, head_dim = 300_000, 64, 128
    q = torch.randn(total, heads, head_dim, device="cuda", dtype=BF16, requires_grad=True)
    k, v = (torch.randn(428, heads, head_dim, device="cuda", dtype=BF16, requires_grad=True) for _ in "kv")
    arguments = bounds(([100, total - 300, 200], [100, 128, 200]), "cuda")
    dout = torch.randn_like(q)
    out = flash_attn_varlen_func(q, k, v, *arguments)
    dq, dk, dv = (x[None, -200:] for x in torch.autograd.grad(out, (q, k, v), dout))
    part = tuple(x.detach()[None, -200:] for x in (q, k, v))
    check_gradients((dq, dk, dv), part, dout[None, -200:], Options())


@pytest.mark.parametrize("family", ["sm80", "sm86", "sm90"])
@pytest.mark.parametrize("window, mask", [((-1, -1), "full"), ((-1, 0), "causal"), ((8, 0), "windowed")])
def test_the_forced_family_runs(family, window, mask):
    if not any(key.startswith(f"backward_{family}_bf16_d128") for key in kernels()):
        pytest.skip(f"no {family} backward kernels in this build")
    forward = _abi.ForwardParams(
        dtype=_abi.Dtype.BF16, head_dim=72, head_dim_v=104, window_left=window[0], window_right=window[1],
        family=_abi.Family[family.upper()],
    )  # fmt: skip
    key = load().backward_kernel(bytes(_abi.BackwardParams(forward)))
    assert key == f"backward_{family}_bf16_d128_{mask}".encode()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_current(require_backward):
    require_backward("cuda", BF16, 64)
    inputs = make(2, 100, 130, device="cuda:1")
    assert torch.cuda.current_device() == 0
    check(inputs, Options(causal=True))
    assert torch.cuda.current_device() == 0


def test_a_maximal_length_that_is_too_small_does_not_hang():
    """Lengths on a GPU cannot be checked: keys past the maximum have no thread block, nobody waits for it."""
    q, k, v = packed_qkv(([300], [300]), (2, 2), device="cuda", grad=True)
    starts = int32(0, 300, device="cuda")
    out = flash_attn_varlen_func(q, k, v, starts, starts, 300, 130, causal=True, deterministic=True)
    found = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    torch.cuda.synchronize()
    assert all(x[:64].isfinite().all() for x in found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dims", [*((d, d) for d in HEAD_DIMS), (192, 128), (40, 24)], ids=str)
@pytest.mark.parametrize(
    "seqlen_q, seqlen_k, mask",
    [(300, 1, {}), (300, 300, {"window_size": (0, 0)}), (70, 300, {"window_size": (0, 9), "causal": True}),
     (200, 100, {"causal": True})],
    ids=str,
)  # fmt: skip
def test_rows_that_see_one_key_have_no_gradient(dtype, head_dims, seqlen_q, seqlen_k, mask):
    """D is added up as dP is: where one key has all the weight they are equal, bit for bit."""
    inputs = make(2, seqlen_q, seqlen_k, (4, 2), head_dims, dtype)
    out = flash_attn_func(*inputs, **mask)
    dq, dk, _ = torch.autograd.grad(out, inputs, torch.randn_like(out))
    if mask == {"causal": True}:  # queries before the first key see none, the next one sees one
        assert not dq[:, : seqlen_q - seqlen_k + 1].any() and dq[:, seqlen_q - seqlen_k + 1 :].any()
    else:
        assert not dq.any() and not dk.any()
