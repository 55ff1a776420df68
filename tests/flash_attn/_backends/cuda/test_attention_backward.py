"""The backward's CUDA path without a GPU: what the library is given, and what comes back."""

from __future__ import annotations

import ctypes

import pytest
import torch
from standin import STREAM, StandIn, make, strides, unpack

from flash_attn import (
    _abi,
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
)
from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_varlen_backward, flash_attn_gpu

BF16 = torch.bfloat16
NAMES = ("dq", "dk", "dv")


@pytest.fixture
def library(install):
    recorder = StandIn()
    install(recorder)
    return recorder


def like(*tensors):
    return [torch.full_like(x, 7.0) for x in tensors]


def run(
    q, k, v, gradients, dout=None, lse=None, slopes=None, dropout_p=0.0, rng_state=None, deterministic=False
):  # fmt: skip
    """Run the backward, on an output of zeros; return softmax_d."""
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    lse = torch.zeros(q.shape[0], q.shape[2], q.shape[1]) if lse is None else lse
    return _flash_attn_backward(
        out if dout is None else dout, q, k, v, out, lse, *gradients, dropout_p, 0.125, True, -1, -1, 0.0,
        slopes, deterministic, rng_state,
    )  # fmt: skip


def run_varlen(q, k, v, gradients, cu_q, cu_k, max_q, max_k, deterministic=False):
    out, lse = q.new_zeros(*q.shape[:-1], v.shape[-1]), torch.zeros(q.shape[1], q.shape[0])
    return _flash_attn_varlen_backward(
        out, q, k, v, out, lse, *gradients, cu_q, cu_k, max_q, max_k, 0.0, 0.125, False, -1, -1, 0.0, None,
        deterministic,
    )  # fmt: skip


def test_packed_fields(library):
    q, k, v = make(seqlen_q=150)
    gradients, dout = like(q, k, v), torch.zeros_like(q)
    lse = torch.zeros(2, 150, 4).transpose(1, 2).contiguous()
    softmax_d = run(q, k, v, gradients, dout, lse)
    ((params, stream),) = library.backward_calls
    assert stream == STREAM
    assert params.dout == dout.data_ptr() and strides(params, "dout") == dout.stride()[:3]
    for name, x in zip(NAMES, gradients, strict=True):
        assert getattr(params, name) == x.data_ptr() and strides(params, name) == x.stride()[:3], name
    assert params.softmax_d == softmax_d.data_ptr() and params.rows == 256
    assert softmax_d.shape == (2, 4, 256) and softmax_d.dtype == torch.float32
    forward = params.forward
    assert (forward.q, forward.k, forward.v) == (q.data_ptr(), k.data_ptr(), v.data_ptr())
    assert forward.softmax_lse == lse.data_ptr()
    assert (forward.lse_batch_stride, forward.lse_head_stride) == lse.stride()[:2]
    for name, x in (("q", q), ("k", k), ("v", v)):
        assert strides(forward, name) == x.stride()[:3]
    assert (forward.batch, forward.num_heads, forward.num_heads_k) == (2, 4, 2)
    assert (forward.seqlen_q, forward.seqlen_k, forward.total_q) == (150, 12, 300)
    assert (forward.head_dim, forward.head_dim_v) == (64, 64)
    assert (forward.window_left, forward.window_right) == (-1, 0)
    assert forward.softmax_scale == 0.125 and forward.dtype == _abi.Dtype.BF16
    absent = "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "leftpad_k", "alibi_slopes", "rng_state", "probs"
    assert not any(getattr(forward, name) for name in (*absent, "tile_counter"))


def spaces(monkeypatch):
    """Record the workspaces that are allocated, as (address, number of elements)."""
    found = []

    def allocate(*arguments, **named):
        found.append(empty(*arguments, **named))
        return found[-1]

    empty = torch.empty_strided
    monkeypatch.setattr(torch, "empty_strided", allocate)
    return found


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("with_dq", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "head_dims, kernel", [((64, 64), 64), ((40, 40), 64), ((64, 96), 96), ((256, 32), 256)]
)
def test_the_parts_of_the_workspace_lie_apart(
    library, monkeypatch, deterministic, with_dq, dtype, head_dims, kernel
):  # fmt: skip
    q, k, v = make(seqlen_q=150, heads_k=4, head_dim=head_dims[0], head_dim_v=head_dims[1], dtype=dtype)
    dq, dk, dv = like(q, k, v)
    found = spaces(monkeypatch)
    run(q, k, v, (dq if with_dq else None, dk, dv), deterministic=deterministic)
    ((params, _),) = library.backward_calls
    (memory,) = found
    rows = 2 * 4 * 256
    parts = [(params.softmax_lse_log2, rows)]
    if dtype == torch.float16:
        parts.append((params.row_sums, rows))
    else:
        assert params.row_sums == params.softmax_d
    if with_dq:
        parts.append((params.dq_accumulator, rows * kernel))
    else:
        assert params.dq_accumulator == params.dq == 0
    if with_dq and deterministic:
        parts.append((params.semaphores, rows))
    else:
        assert params.semaphores == 0
    end = memory.data_ptr()
    for address, elements in sorted(parts):
        assert address == end and address % 16 == memory.data_ptr() % 16
        end += 4 * elements
    assert end == memory.data_ptr() + 4 * memory.numel()


@pytest.mark.parametrize("heads, batch, parts", [((4, 2), 2, 2), ((4, 4), 2, 1), ((9, 3), 1, 3)])
@pytest.mark.parametrize("varlen", [False, True])
def test_heads_that_share_keys_are_split_as_planned(library, monkeypatch, heads, batch, parts, varlen):
    q, k, v = make(batch, heads=heads[0], heads_k=heads[1])
    found = spaces(monkeypatch)
    rows, key_rows, batches = 128, 128, batch
    if varlen:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        cu_q, cu_k = (torch.arange(batch + 1, dtype=torch.int32) * n for n in (10, 12))
        rows, key_rows = (-(-n * batch // 128) * 128 + 128 * batch for n in (10, 12))
        batches = 1
    gradients = like(q, k, v)
    if varlen:
        run_varlen(q, k, v, gradients, cu_q, cu_k, 10, 12)
    else:
        run(q, k, v, gradients)
    ((params, _),) = library.backward_calls
    assert params.key_parts == parts and params.key_rows == key_rows and params.rows == rows
    memory = found[-1]
    before = rows * heads[0] * batches * (1 + 64)
    assert params.key_partials == (memory.data_ptr() + 4 * before if parts > 1 else 0)
    partials = 2 * parts * heads[1] * batches * key_rows * 64 if parts > 1 else 0
    assert memory.numel() == before + partials


@pytest.mark.parametrize("wanted", [(0,), (1, 2), (1,), (2,), ()], ids=str)
def test_gradients_that_are_not_wanted(library, wanted):
    """dk and dv come from one kernel: if one of them is wanted, both are computed."""
    q, k, v = make()
    given = [x if i in wanted else None for i, x in enumerate(like(q, k, v))]
    run(q, k, v, given)
    ((params, _),) = library.backward_calls
    for name, x in zip(NAMES, given, strict=True):
        assert x is None or getattr(params, name) == x.data_ptr()
    assert bool(params.dq) == (0 in wanted) == bool(params.dq_accumulator)
    assert bool(params.dk) == bool(params.dv) == (1 in wanted or 2 in wanted)


@pytest.mark.parametrize("head_dim, padded", [(1, 8), (59, 64), (111, 112), (40, 40)])
def test_head_dims_are_padded(library, head_dim, padded):
    q, k, v = make(head_dim=head_dim, head_dim_v=24)
    gradients = like(q, k, v)
    run(q, k, v, gradients)
    ((params, _),) = library.backward_calls
    assert (params.forward.head_dim, params.forward.head_dim_v) == (padded, 24)
    for name, x in zip(NAMES, gradients, strict=True):
        columns = 24 if name == "dv" else padded
        assert strides(params, name)[1:] == (x.shape[-2] * columns, columns)
        assert (getattr(params, name) == x.data_ptr()) == (x.shape[-1] == columns), name
    for name in ("q", "k", "v", "out"):
        assert getattr(params.forward, name) % 16 == 0


def odd_layouts(x):
    """Zeros of the shape of x that kernels cannot read or write where they are."""
    batch, rows, heads, dim = x.shape
    storage = torch.zeros(x.numel() + 4, dtype=BF16)
    return {
        "last stride": torch.zeros(batch, rows, dim, heads, dtype=BF16).transpose(2, 3),
        "row stride": torch.zeros(batch, rows, heads, dim + 3, dtype=BF16)[..., :dim],
        "base": storage[4:].view(x.shape),
    }


@pytest.mark.parametrize("layout", ["last stride", "row stride", "base"])
@pytest.mark.parametrize("name", ["dout", *NAMES])
def test_unaligned_tensors_are_copied(library, layout, name):
    tensors = dict(zip(("q", "k", "v"), make(), strict=True))
    given = {"dout": torch.zeros_like(tensors["q"]), **dict(zip(NAMES, like(*tensors.values()), strict=True))}
    given[name] = odd_layouts(given[name])[layout]
    run(*tensors.values(), [given[n] for n in NAMES], given["dout"])
    ((params, _),) = library.backward_calls
    for other, x in given.items():
        assert (getattr(params, other) == x.data_ptr()) == (other != name), other
        assert getattr(params, other) % 16 == 0 and all(s % 8 == 0 for s in strides(params, other)), other


def test_an_expanded_gradient_of_the_output(library):
    """As `out.sum().backward()` gives: no two elements apart."""
    q, k, v = make()
    run(q, k, v, like(q, k, v), torch.ones((), dtype=BF16).expand(q.shape))
    ((params, _),) = library.backward_calls
    assert strides(params, "dout") == torch.empty(q.shape).stride()[:3]


@pytest.mark.parametrize("head_dim", [59, 64])
@pytest.mark.parametrize("layout", ["last stride", "row stride", "base"])
@pytest.mark.parametrize("only", [None, 0, 1, 2])
def test_what_the_kernel_writes_comes_back(library, monkeypatch, head_dim, layout, only):
    def write(packed, stream):
        params = unpack("backward", packed)
        for name in NAMES:
            if getattr(params, name):
                batch_stride = getattr(params, f"{name}_batch_stride")
                ctypes.memset(getattr(params, name), 0x3F, 2 * params.forward.batch * batch_stride)
        return 0

    monkeypatch.setattr(library, "backward", write)
    q, k, v = make(head_dim=head_dim, head_dim_v=24)
    gradients = [odd_layouts(x)[layout] for x in (q, k, v)]
    run(q, k, v, [x if only in (None, i) else None for i, x in enumerate(gradients)])
    for i, x in enumerate(gradients):
        expected = 0x3F3F if only in (None, i) else 0
        assert (x.contiguous().view(torch.int16) == expected).all()


@pytest.mark.parametrize("step", [1, 2])
def test_the_lse_may_be_strided(library, step):
    q, k, v = make()
    wide = torch.zeros(2, 6, 10 * step)
    lse = wide[:, 1:5, ::step]
    run(q, k, v, like(q, k, v), lse=lse)
    forward = library.backward_calls[0][0].forward
    assert (forward.softmax_lse == lse.data_ptr()) == (step == 1)
    assert (forward.lse_batch_stride, forward.lse_head_stride) == ((60, 10) if step == 1 else (40, 10))


def test_dropout_and_slopes(library):
    q, k, v = make()
    state, slopes = torch.tensor([3, 0, 4, 0])[::2], torch.rand(2, 8)[:, ::2]
    run(q, k, v, like(q, k, v), dropout_p=0.25, rng_state=torch.tensor([3, 4]))
    forward = library.backward_calls[0][0].forward
    assert forward.dropout_p == 0.25 and forward.rng_state
    run(q, k, v, like(q, k, v), dropout_p=0.25, rng_state=state, slopes=slopes)
    forward = library.backward_calls[1][0].forward
    assert forward.rng_state and forward.rng_state != state.data_ptr()
    assert forward.alibi_slopes and forward.alibi_slopes != slopes.data_ptr()
    assert forward.alibi_batch_stride == 4
    run(q, k, v, like(q, k, v), rng_state=torch.tensor([3, 4]))
    assert library.backward_calls[2][0].forward.rng_state == 0


@pytest.mark.parametrize("shape", [{"batch": 0}, {"seqlen_q": 0}, {"seqlen_k": 0}], ids=str)
@pytest.mark.parametrize("wanted", [(0, 1, 2), (1,)], ids=str)
def test_nothing_is_launched_for_empty_tensors(library, shape, wanted):
    q, k, v = make(**shape)
    gradients = [x if i in wanted else None for i, x in enumerate(like(q, k, v))]
    softmax_d = run(q, k, v, gradients)
    assert not library.backward_calls
    assert not any(x.any() for x in gradients if x is not None) and not softmax_d.any()


def test_varlen_fields(library):
    q, k, v = (x.flatten(0, 1) for x in make())
    cu_q, cu_k = torch.tensor([0, 3, 20]).int(), torch.tensor([0, 4, 24]).int()
    gradients = like(q, k, v)
    softmax_d = run_varlen(q, k, v, gradients, cu_q, cu_k, 17, 20)
    ((params, _),) = library.backward_calls
    forward = params.forward
    assert (forward.cu_seqlens_q, forward.cu_seqlens_k) == (cu_q.data_ptr(), cu_k.data_ptr())
    assert (forward.batch, forward.seqlen_q, forward.seqlen_k) == (2, 17, 20)
    assert (forward.total_q, forward.total_k) == (20, 24)
    assert (forward.lse_batch_stride, forward.lse_head_stride) == (0, 20)
    for name, x in zip(NAMES, gradients, strict=True):
        assert getattr(params, name) == x.data_ptr() and strides(params, name) == (0, *x.stride()[:2])
    assert softmax_d.shape == (4, 20 + 2 * 128) and params.rows == softmax_d.stride(0) == 384


@pytest.mark.parametrize("deterministic", [False, True])
def test_varlen_workspace(library, monkeypatch, deterministic):
    q, k, v = (x.flatten(0, 1) for x in make(heads_k=4))
    cu = torch.tensor([0, 20]).int()
    found = spaces(monkeypatch)
    run_varlen(q, k, v, like(q, k, v), cu, cu, 20, 20, deterministic)
    assert [x.numel() for x in found] == [4 * 256 * (1 + 64 + deterministic)]


@pytest.mark.parametrize("bounds", [[0], [0, 0, 0]], ids=str)
def test_varlen_without_a_query(library, bounds):
    q, k, v = (x.flatten(0, 1) for x in make())
    cu = torch.tensor(bounds).int()
    gradients = like(q, k, v)
    softmax_d = run_varlen(q, k, v, gradients, cu, cu, 0, 0)
    assert not library.backward_calls and not any(x.any() for x in (*gradients, softmax_d))


def test_extension_module_allocates_what_is_not_given(library):
    q, k, v = make()
    dout, dq = torch.zeros_like(q), torch.zeros_like(q)
    found = flash_attn_gpu.bwd(
        dout, q, k, v, q, torch.zeros(2, 4, 10), dq, None, None, None, 0.0, 0.125, False, -1, -1, 0.0, True,
        None, None,
    )  # fmt: skip
    ((params, _),) = library.backward_calls
    assert found[0] is dq and params.semaphores
    assert [params.dq, params.dk, params.dv, params.softmax_d] == [x.data_ptr() for x in found]


class TestAutograd:
    """From the public functions to the library."""

    @pytest.mark.parametrize("needed", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)], ids=str)
    @pytest.mark.parametrize("deterministic", [False, True])
    def test_needed_gradients(self, library, needed, deterministic):
        tensors = [x.requires_grad_(bool(need)) for x, need in zip(make(), needed, strict=True)]
        flash_attn_func(*tensors, deterministic=deterministic).sum().backward()
        ((params, _),) = library.backward_calls
        assert bool(params.dq) == bool(needed[0])
        assert bool(params.dk) == bool(params.dv) == bool(needed[1] or needed[2])
        assert bool(params.semaphores) == (deterministic and bool(needed[0]))
        assert params.forward.q == tensors[0].data_ptr()
        for name, x, need in zip(NAMES, tensors, needed, strict=True):
            assert (x.grad is not None) == bool(need)
            assert not need or getattr(params, name) == x.grad.data_ptr()

    def test_packed_gradients_are_written_in_place(self, library):
        qkv = torch.randn(2, 10, 3, 4, 64).to(BF16).requires_grad_()
        flash_attn_qkvpacked_func(qkv).sum().backward()
        ((params, _),) = library.backward_calls
        assert qkv.grad.shape == qkv.shape
        for name, part, of_input in zip(NAMES, qkv.grad.unbind(2), qkv.unbind(2), strict=True):
            assert getattr(params, name) == part.data_ptr() and strides(params, name) == part.stride()[:3]
            assert getattr(params.forward, name[1]) == of_input.data_ptr()

    @pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)], ids=str)
    def test_varlen_kvpacked(self, library, needed):
        q = torch.randn(20, 4, 64).to(BF16).requires_grad_(needed[0])
        kv = torch.randn(24, 2, 2, 64).to(BF16).requires_grad_(needed[1])
        cu_q, cu_k = torch.tensor([0, 3, 20]).int(), torch.tensor([0, 4, 24]).int()
        flash_attn_varlen_kvpacked_func(q, kv, cu_q, cu_k, 17, 20).sum().backward()
        ((params, _),) = library.backward_calls
        assert params.dq == (q.grad.data_ptr() if needed[0] else 0)
        assert (params.dk, params.dv) == (
            tuple(x.data_ptr() for x in kv.grad.unbind(1)) if needed[1] else (0, 0)
        )  # fmt: skip

    def test_what_is_saved(self, library):
        """The inputs themselves, the output, the LSE, the random state: no copies, no parts."""
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            qkv = torch.randn(2, 10, 3, 4, 64).to(BF16).requires_grad_()
            out, lse, _ = flash_attn_qkvpacked_func(qkv, dropout_p=0.5, return_attn_probs=True)
        assert len(saved) == 4 and saved[2].shape == (2,) and saved[2].dtype == torch.int64
        assert [x.data_ptr() for x in (saved[0], saved[1], saved[3])] == [
            x.data_ptr() for x in (out, lse, qkv)
        ]  # fmt: skip


def test_forced_family(install):
    recorder = StandIn(family=86)
    install(recorder)
    q, k, v = make()
    run(q, k, v, like(q, k, v))
    assert recorder.backward_calls[0][0].forward.family == 86


@pytest.mark.parametrize("status", [_abi.Status.NOT_BUILT, _abi.Status.UNSUPPORTED_DEVICE])
def test_a_build_without_backward_says_how_to_build_it(install, status):
    recorder = StandIn(status)
    install(recorder)
    recorder.last_error = lambda: b"this build holds no backward kernel for bf16, head dim 100"
    q, k, v = make(head_dim=40, head_dim_v=104)
    with pytest.raises(RuntimeError) as caught:
        run(q, k, v, like(q, k, v))
    command = (
        "FLASH_ATTN_ARCHS=90 FLASH_ATTN_HEAD_DIMS=128 FLASH_ATTN_DTYPES=bf16 "
        "FLASH_ATTN_DIRECTIONS=forward,backward pip install ."
    )
    assert "this build holds no backward kernel" in str(caught.value) and f"`{command}`" in str(caught.value)
