"""The CUDA path without a GPU: a library that records what it is given, and CPU tensors for CUDA's."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from standin import STREAM, StandIn, make, strides, unpack

from flash_attn import _abi, _operations
from flash_attn._backends.cuda import gpu
from flash_attn._calls import Sequences

BF16 = torch.bfloat16


@pytest.fixture
def library(install):
    recorder = StandIn()
    install(recorder)
    return recorder


def options(dropout_p=0.0, causal=False, window_left=-1, window_right=-1, softcap=0.0, alibi_slopes=None):
    return dropout_p, None, causal, (window_left, window_right), softcap, alibi_slopes, None


def run(q, k, v, out=None, return_softmax=False, need_lse=True, **scores):
    return _operations.forward(q, k, v, options(**scores), return_softmax, out, need_lse=need_lse)


def run_varlen(q, k, v, *lengths, leftpad_k=None, seqused_k=None, **scores):
    return _operations.varlen_forward(q, k, v, Sequences(*lengths, leftpad_k, seqused_k), options(**scores))


def test_packed_fields(library):
    q, k, v = make()
    out, lse, probs, rng_state = run(q, k, v, causal=True, softcap=3.0)
    ((params, stream),) = library.calls
    assert stream == STREAM
    assert (params.q, params.k, params.v) == (q.data_ptr(), k.data_ptr(), v.data_ptr())
    assert (params.out, params.softmax_lse) == (out.data_ptr(), lse.data_ptr())
    for name, x in (("q", q), ("k", k), ("v", v), ("out", out)):
        assert strides(params, name) == x.stride()[:3]
    assert (params.lse_batch_stride, params.lse_head_stride) == lse.stride()[:2]
    assert (params.batch, params.num_heads, params.num_heads_k) == (2, 4, 2)
    assert (params.seqlen_q, params.seqlen_k, params.total_q) == (10, 12, 20)
    assert (params.head_dim, params.head_dim_v) == (64, 64)
    assert (params.window_left, params.window_right) == (-1, 0)
    assert params.dtype == _abi.Dtype.BF16 and params.device == -1 and params.family == 0
    assert params.softmax_scale == 0.125 and params.softcap == 3.0
    assert (params.dropout_p, params.dropout_rescale) == (0.0, 1.0)
    absent = "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "leftpad_k", "alibi_slopes", "rng_state", "probs"
    assert not any(getattr(params, name) for name in (*absent, "tile_counter"))
    assert params.alibi_batch_stride == 0
    assert probs is None and rng_state is None
    assert out.shape == q.shape and lse.shape == (2, 4, 10) and lse.dtype == torch.float32


def test_an_lse_that_nobody_wants_is_not_allocated(install):
    q, k, v = make()
    recorder = StandIn()
    install(recorder)
    out, lse, _, _ = run(q, k, v, need_lse=False)
    assert lse is None and out.shape == q.shape
    assert recorder.calls[0][0].softmax_lse == 0


@pytest.mark.parametrize("dtype", [torch.float16, BF16])
def test_dtype(library, dtype):
    run(*make(dtype=dtype))
    assert library.calls[0][0].dtype == {torch.float16: _abi.Dtype.FP16, BF16: _abi.Dtype.BF16}[dtype]


@pytest.mark.parametrize(
    "named, window",
    [
        ({}, (-1, -1)), ({"causal": True}, (-1, 0)), ({"window_left": 3, "window_right": 4}, (3, 4)),
        ({"window_left": 11, "window_right": 8}, (-1, 8)), ({"window_left": 10, "window_right": 9}, (10, -1)),
        ({"causal": True, "window_left": 3, "window_right": 4}, (3, 0)),
        ({"causal": True, "window_right": 50}, (-1, 0)), ({"window_left": -9}, (-1, -1)),
    ],
    ids=str,
)  # fmt: skip
def test_window(library, named, window):
    run(*make(), **named)
    params = library.calls[0][0]
    assert (params.window_left, params.window_right) == window


@pytest.mark.parametrize("named, left", [({"causal": True}, -1), ({"window_left": 4, "window_right": 0}, 4)])
def test_a_single_query_needs_no_right_window(library, named, left):
    run(*make(seqlen_q=1), **named)
    params = library.calls[0][0]
    assert (params.window_left, params.window_right) == (left, -1)


@pytest.mark.parametrize("shape, stride", [((4,), 0), ((2, 4), 4)], ids=str)
def test_alibi(library, shape, stride):
    slopes = torch.rand(shape)
    run(*make(), alibi_slopes=slopes)
    params = library.calls[0][0]
    assert (params.alibi_slopes, params.alibi_batch_stride) == (slopes.data_ptr(), stride)


def test_dropout(library):
    q, k, v = make()
    _, _, probs, rng_state = run(q, k, v, dropout_p=0.25, return_softmax=True)
    params = library.calls[0][0]
    assert params.dropout_p == 0.25 and params.rng_state == rng_state.data_ptr() and params.probs == 0
    ((with_probs, stream),) = library.probs_calls
    assert with_probs.probs == probs.data_ptr() and stream == STREAM
    assert vars(with_probs) | {"probs": 0} == vars(params)
    assert probs.shape == (2, 4, 128, 128) and probs.dtype == q.dtype
    run(q, k, v, dropout_p=0.25)
    assert len(library.probs_calls) == 1


@pytest.mark.parametrize("head_dim, padded", [(1, 8), (59, 64), (111, 112), (40, 40), (255, 256)])
def test_head_dim_is_padded_to_a_multiple_of_8(library, head_dim, padded):
    q, k, v = make(head_dim=head_dim)
    out, *_ = run(q, k, v)
    params = library.calls[0][0]
    assert params.head_dim == params.head_dim_v == padded
    assert params.softmax_scale == pytest.approx(head_dim**-0.5)
    assert out.shape == q.shape
    for name in ("q", "k", "v", "out"):
        assert all(s % 8 == 0 for s in strides(params, name)) and getattr(params, name) % 16 == 0


@pytest.mark.parametrize(
    "head_dim, head_dim_v, padded",
    [
        (192, 128, (192, 128)),
        (64, 96, (64, 96)),
        (59, 128, (64, 128)),
        (128, 17, (128, 24)),
        (1, 255, (8, 256)),
    ],
)
@pytest.mark.parametrize("varlen", [False, True])
def test_head_dim_of_v_differs(library, head_dim, head_dim_v, padded, varlen):
    q, k, v = make(head_dim=head_dim, head_dim_v=head_dim_v)
    if varlen:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        cu = torch.tensor([0, 12, 20]).int()
        out, *_ = run_varlen(q, k, v, cu, cu, 12, 12)
    else:
        out, *_ = run(q, k, v)
    params = library.calls[0][0]
    assert (params.head_dim, params.head_dim_v) == padded
    assert params.softmax_scale == pytest.approx(head_dim**-0.5)
    assert out.shape == (*q.shape[:-1], head_dim_v)
    for name, x, columns in (
        ("q", q, padded[0]),
        ("k", k, padded[0]),
        ("v", v, padded[1]),
        ("out", out, padded[1]),
    ):
        copied = getattr(params, name) != x.data_ptr()
        assert copied == (x.shape[-1] % 8 != 0), name
        assert strides(params, name)[1:] == (x.shape[-2] * columns, columns), name


def odd_layouts():
    storage = torch.zeros(2 * 12 * 4 * 67 + 4, dtype=BF16)
    return {
        "last stride": storage[: 2 * 12 * 64 * 4].view(2, 12, 64, 4).transpose(2, 3),
        "strides": storage[:-4].view(2, 12, 4, 67)[..., :64],
        "base": storage[4 : 4 + 2 * 12 * 4 * 64].view(2, 12, 4, 64),
        "one row of odd stride": storage.as_strided((1, 1, 1, 64), (3, 5, 7, 1)),
    }


@pytest.mark.parametrize("position", range(3))
def test_unaligned_tensors_are_copied(library, position):
    for name, x in odd_layouts().items():
        tensors = [torch.zeros(x.shape, dtype=BF16) for _ in range(3)]
        tensors[position] = x
        out, *_ = run(*tensors)
        params = library.calls[-1][0]
        for letter, given in zip("qkv", tensors, strict=True):
            assert (getattr(params, letter) != given.data_ptr()) == (given is x), name
        writable = all(s % 8 == 0 for s in out.stride()[:3])
        assert (params.out == out.data_ptr()) == writable, name
        for field in ("q", "k", "v", "out"):
            assert getattr(params, field) % 16 == 0 and all(s % 8 == 0 for s in strides(params, field)), name
        assert out.shape == x.shape and out.stride(-1) == 1


def test_aligned_views_are_not_copied(library):
    qkv = torch.randn(2, 10, 3, 4, 64).to(BF16)
    q, k, v = qkv.unbind(2)
    k = k[:1].expand(2, -1, -1, -1)
    run(q, k, v.transpose(1, 2).contiguous().transpose(1, 2))
    params = library.calls[0][0]
    assert (params.q, params.k) == (q.data_ptr(), k.data_ptr())
    assert params.k_batch_stride == 0 and params.v_head_stride == 640


@pytest.mark.parametrize("contiguous", [True, False])
def test_given_out(library, contiguous):
    q, k, v = make()
    given = torch.full_like(q, 7.0) if contiguous else torch.full((2, 10, 4, 67), 7.0, dtype=BF16)[..., :64]
    out, *_ = run(q, k, v, out=given)
    params = library.calls[0][0]
    assert out is given and (params.out == given.data_ptr()) == contiguous


@pytest.mark.parametrize("head_dim_v, step", [(59, 59), (64, 67), (64, 64), (24, 24), (17, 19)])
@pytest.mark.parametrize("head_dim", [59, 64])
@pytest.mark.parametrize("given", [False, True])
def test_what_the_kernel_writes_comes_back(library, monkeypatch, head_dim, head_dim_v, step, given):
    def write(packed, stream):
        params = unpack("forward", packed)
        ctypes.memset(params.out, 0x3F, 2 * params.batch * params.out_batch_stride)
        return 0

    monkeypatch.setattr(library, "forward", write)
    q, k, v = make(head_dim=head_dim, head_dim_v=head_dim_v)
    target = torch.zeros(2, 10, 4, step, dtype=BF16)[..., :head_dim_v] if given else None
    out, *_ = run(q, k, v, out=target)
    assert out.shape == (2, 10, 4, head_dim_v)
    assert (out.view(torch.int16) == 0x3F3F).all() and (out is target) == given


@pytest.mark.parametrize("shape", [{"batch": 0}, {"seqlen_q": 0}, {"seqlen_k": 0}], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_nothing_is_launched_for_empty_tensors(library, shape, dropout_p):
    out, lse, _, _ = run(*make(**shape), dropout_p=dropout_p, return_softmax=True)
    assert not library.calls and not library.probs_calls
    assert not out.any() and (lse == math.inf).all()


def test_varlen_fields(library):
    used, pads = torch.tensor([4, 15]).int(), torch.tensor([1, 2]).int()
    q, k, v = (x.flatten(0, 1) for x in make())
    cu_q, cu_k = torch.tensor([0, 3, 20]).int(), torch.tensor([0, 4, 24]).int()
    out, lse, _, _ = run_varlen(q, k, v, cu_q, cu_k, 17, 20, causal=True, seqused_k=used, leftpad_k=pads)
    params = library.calls[0][0]
    pointers = (params.cu_seqlens_q, params.cu_seqlens_k, params.seqused_k, params.leftpad_k)
    assert pointers == tuple(x.data_ptr() for x in (cu_q, cu_k, used, pads))
    assert (params.batch, params.seqlen_q, params.seqlen_k, params.total_q) == (2, 17, 20, 20)
    assert (params.q_row_stride, params.q_head_stride) == q.stride()[:2]
    assert (params.out_row_stride, params.out_head_stride) == out.stride()[:2]
    assert (params.lse_batch_stride, params.lse_head_stride) == (0, 20)
    assert out.shape == q.shape and lse.shape == (4, 20)


def test_varlen_indices_are_made_contiguous(library):
    q, k, v = (x.flatten(0, 1) for x in make())
    cu = torch.tensor([[0, 9], [3, 9], [20, 9]]).int()[:, 0]
    run_varlen(q, k, v, cu, cu, 17, 17)
    assert library.calls[0][0].cu_seqlens_q != cu.data_ptr()


def test_varlen_unaligned_tensors_are_copied(library):
    q, k, v = (x.flatten(0, 1) for x in make(head_dim=60))
    cu = torch.tensor([0, 12, 20]).int()
    out, *_ = run_varlen(q, k, v, cu, cu, 12, 12)
    params = library.calls[0][0]
    assert params.head_dim == 64 and out.shape == q.shape
    assert (params.q_row_stride, params.q_head_stride) == (4 * 64, 64) and params.q_batch_stride == 0
    q, k = q[..., :56].contiguous(), k[..., :56]
    out, *_ = run_varlen(q, k, k, cu, cu, 12, 12)
    params = library.calls[1][0]
    assert (params.q, params.out) == (q.data_ptr(), out.data_ptr()) and params.k != k.data_ptr()


def test_varlen_without_sequences(library):
    q, k, v = (x.flatten(0, 1) for x in make())
    cu = torch.tensor([0]).int()
    out, lse, _, _ = run_varlen(q, k, v, cu, cu, 0, 0)
    assert not library.calls and not out.any() and (lse == math.inf).all()


def test_varlen_without_a_single_query(library):
    q, k, v = (x.flatten(0, 1) for x in make())
    cu_q, cu_k = torch.zeros(2).int(), torch.tensor([0, len(k)]).int()
    out, lse, _, _ = run_varlen(q[:0], k, v, cu_q, cu_k, 128, len(k))
    assert not library.calls and out.shape == q[:0].shape and lse.shape[1] == 0


def test_forced_family(install):
    recorder = StandIn(family=86)
    install(recorder)
    run(*make())
    assert recorder.calls[0][0].family == 86


@pytest.mark.parametrize("status", [_abi.Status.NOT_BUILT, _abi.Status.UNSUPPORTED_DEVICE])
@pytest.mark.parametrize("family, arch", [(0, "90"), (86, "sm86:90")])
@pytest.mark.parametrize("head_dims", [(100, 100), (100, 40), (40, 100)], ids=str)
def test_missing_kernel_comes_with_its_build_command(install, status, family, arch, head_dims):
    install(StandIn(status, family))
    with pytest.raises(RuntimeError) as caught:
        run(*make(head_dim=head_dims[0], head_dim_v=head_dims[1]))
    command = f"FLASH_ATTN_ARCHS={arch} FLASH_ATTN_HEAD_DIMS=128 FLASH_ATTN_DTYPES=bf16 pip install ."
    assert "forward_sm90_bf16_d64_full is not built" in str(caught.value)
    assert f"`{command}`" in str(caught.value)


@pytest.mark.parametrize("status", [_abi.Status.CUDA_ERROR, _abi.Status.INVALID_ARGUMENT])
def test_other_errors_carry_the_library_text(install, status):
    install(StandIn(status=status))
    with pytest.raises(RuntimeError, match=r"is not built$"):
        run(*make())


@pytest.mark.parametrize("hopper", [False, True])
def test_a_tile_counter_is_given_on_hopper(install, hopper):
    recorder = StandIn(hopper=hopper)
    install(recorder)
    run(*make())
    run(*make(), dropout_p=0.5, return_softmax=True)
    assert [params.tile_counter > 0 for params, _ in recorder.calls] == [hopper] * 2


def test_empty_calls_ask_for_no_tile_counter(install, monkeypatch):
    install(StandIn(hopper=True))
    monkeypatch.setattr(gpu, "tile_counter", lambda *where: pytest.fail("asked"))
    run(*make(seqlen_k=0))


def test_the_factor_of_dropout_is_rounded_once(library):
    """From a dropout_p in fp32 it would be off by 1.3e-5 at 0.999."""
    run(*make(), dropout_p=0.999)
    rescale = library.calls[0][0].dropout_rescale
    assert rescale == torch.tensor(1.0 / (1.0 - 0.999), dtype=torch.float32).item()
