"""Arguments that only torch's dispatcher understands: tensors without memory of their own, tracers, modes."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from problems import int32
from standin import StandIn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import flash_attn
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_varlen_forward, flash_attn_gpu


class Wrapper(torch.Tensor):
    """A tensor of another one's shape whose memory only its dispatch finds, as that of DTensor."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device, strides=inner.stride()
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = torch.utils._pytree.tree_map_only(Wrapper, lambda x: x.inner, (args, kwargs or {}))
        return function(*args, **kwargs)


def randn(*shape):
    return torch.randn(shape).bfloat16()


def calls():
    """Functions with all tensors that they take, in a valid call."""
    q, k, v = randn(2, 8, 4, 32), randn(2, 32, 2, 32), randn(2, 32, 2, 32)
    bias = {"alibi_slopes": torch.rand(4), "s_aux": torch.randn(4)}
    packed = {"q": q.flatten(0, 1), "k": k.flatten(0, 1), "v": v.flatten(0, 1)}
    lengths = {"cu_seqlens_q": int32(0, 8, 16), "cu_seqlens_k": int32(0, 20, 64)}
    longest = {"max_seqlen_q": 8, "max_seqlen_k": 44}
    new = {"k": randn(2, 3, 2, 32), "v": randn(2, 3, 2, 32), "cache_seqlens": int32(5, 20)}
    tables = {"rotary_cos": randn(40, 8), "rotary_sin": randn(40, 8)}
    cache = {"q": q, "k_cache": k, "v_cache": v, **new, **tables, **bias}
    paged = {"block_table": int32(0, 1, 2, 3).view(2, 2), "cu_seqlens_k": int32(0, 9, 20)}
    pages = {"k": k.view(4, 16, 2, 32), "v": v.view(4, 16, 2, 32)}
    table = paged["block_table"]
    lse, gradients = torch.zeros(2, 4, 8), {"dq": q.clone(), "dk": k.clone(), "dv": v.clone()}
    scoring = {"dropout_p": 0.0, "softmax_scale": None, "causal": True, "softcap": 0.0}
    window = {"window_size_left": -1, "window_size_right": -1}
    return {
        "func": (flash_attn_func, {"q": q, "k": k, "v": v, **bias}),
        "out": (flash_attn_func, {"q": q, "k": k, "v": v, "out": q.clone()}),
        "varlen": (flash_attn_varlen_func, {
            **packed, **lengths, **longest, **bias, "seqused_k": int32(7, 9)}),
        "paged": (flash_attn_varlen_func, {**packed, **lengths, **longest, **pages, **paged}),
        "cache": (flash_attn_with_kvcache, {
            **cache, "cache_batch_idx": int32(1, 0), "cache_leftpad": int32(1, 2)}),
        "cache in pages": (flash_attn_with_kvcache, {
            **cache, "k_cache": pages["k"], "v_cache": pages["v"], "block_table": table}),
        "private": (_flash_attn_varlen_forward, {
            **packed, **lengths, **longest, **scoring, "leftpad_k": int32(1, 2)}),
        "backward": (_flash_attn_backward, {
            "dout": q, "q": q, "k": k, "v": v, "out": q, "softmax_lse": lse, **gradients, **scoring, **window,
            "alibi_slopes": bias["alibi_slopes"], "deterministic": False}),
    }  # fmt: skip


TENSORS = [(call, name) for call, (_, given) in calls().items() for name, x in given.items()
           if isinstance(x, torch.Tensor)]  # fmt: skip


@pytest.mark.parametrize("call, name", TENSORS)
@pytest.mark.parametrize("kind", ["wrapper", "fake", "functional"])
@pytest.mark.parametrize("simulated", [False, True])
def test_a_tensor_without_memory_is_unwrapped_or_refused(install, call, name, kind, simulated):
    """It never becomes a null pointer, nor counts as None."""
    function, given = calls()[call]
    x = given[name]
    if kind == "functional":
        given[name] = torch._to_functional_tensor(x)
    else:
        given[name] = Wrapper(x) if kind == "wrapper" else FakeTensorMode().from_tensor(x)
    recorder = StandIn(computes=False)
    if simulated:
        install(recorder)
    try:
        function(**given)
    except (TypeError, ValueError, NotImplementedError) as error:
        assert not isinstance(error, TypeError) or name in str(error) or kind != "wrapper"
        refused = True
    except Exception as error:  # torch's own, of a fake tensor among others
        assert kind != "wrapper", error
        refused = True
    else:
        refused = False
    recorded = recorder.calls + recorder.cache_calls + recorder.backward_calls
    assert not (refused and recorded) or name == "out"  # torch copies to it what the op has made
    if not refused:
        for params, _ in recorded:
            for field in POINTERS.get(name, ()):
                parts = [params, getattr(params, "forward", None)]
                assert any(getattr(part, field, 0) for part in parts), f"{field} is null"


POINTERS = {
    "q": ("q",), "k_cache": ("k",), "v_cache": ("v",), "alibi_slopes": ("alibi_slopes",), "s_aux": ("sinks",),
    "cu_seqlens_q": ("cu_seqlens_q",), "cu_seqlens_k": ("cu_seqlens_k",), "block_table": ("block_table",),
    "cache_batch_idx": ("cache_batch_idx",), "cache_leftpad": ("leftpad_k",), "leftpad_k": ("leftpad_k",),
    "dout": ("dout",), "dq": ("dq",), "dk": ("dk",), "dv": ("dv",), "softmax_lse": ("softmax_lse",),
    "cache_seqlens": ("cache_seqlens",), "rotary_cos": ("rotary_cos",), "rotary_sin": ("rotary_sin",),
}  # fmt: skip
"""The fields of the library's parameters that say where an argument lies."""


def test_extension_module_refuses_a_tensor_without_memory(install):
    recorder = StandIn(computes=False)
    install(recorder)
    q = randn(1, 8, 2, 32)
    tail = (0.0, 0.1, False, -1, -1, 0.0, False, None)
    with pytest.raises(TypeError, match=r"^k must be a tensor with memory of its own, got Wrapper"):
        flash_attn_gpu.fwd(q, Wrapper(q), q, None, None, *tail)
    assert not recorder.calls


@pytest.mark.parametrize("grad", [False, True])
def test_a_trace_runs_at_other_shapes(grad):
    def attend(q, k, v):
        return flash_attn_func(q, k, v, causal=True)

    def make(n):
        return [torch.randn(2, n, 4, 32, requires_grad=grad) for _ in range(3)]

    traced = torch.jit.trace(attend, make(16), check_trace=False)
    inputs = make(40)
    out, expected = traced(*inputs), attend(*inputs)
    torch.testing.assert_close(out, expected)
    if grad:
        found, right = (torch.autograd.grad(x.sum(), inputs) for x in (out, expected))
        torch.testing.assert_close(found, right)


def test_a_cache_is_not_traced():
    q, k = torch.randn(1, 1, 2, 32), torch.randn(1, 16, 2, 32)
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace"):
        torch.jit.trace(lambda q, k: flash_attn_with_kvcache(q, k, k), (q, k), check_trace=False)


class TestOps:
    """The custom ops, and what their fake implementations check."""

    @pytest.mark.parametrize("name", ["q", "k", "v", "alibi_slopes"])
    def test_one_meta_tensor_is_refused(self, name):
        x = {n: torch.randn(1, 4, 2, 32) for n in "qkv"} | {"alibi_slopes": torch.rand(2)}
        x[name] = x[name].to("meta")
        scores = 0.0, None, False, -1, -1, 0.0, x["alibi_slopes"], False
        with pytest.raises(ValueError, match="on the device of q"):
            torch.ops.flash_attn._flash_attn_forward(x["q"], x["k"], x["v"], *scores)

    def test_fake_implementations_check_shapes(self):
        q, k = torch.randn(1, 4, 2, 32, device="meta"), torch.randn(1, 4, 3, 32, device="meta")
        with pytest.raises(ValueError, match=r"^k must be of a number of heads"):
            torch.ops.flash_attn._flash_attn_forward(q, k, k, 0.0, None, False, -1, -1, 0.0, None, False)
        with pytest.raises(ValueError, match=r"^cu_seqlens_k must be"):
            lengths = int32(0, 4).to("meta"), int32(0, 2, 4).to("meta")
            flash_attn_varlen_func(q[0], q[0], q[0], *lengths, 4, 4)

    def test_numbers_of_any_size_under_a_mode(self):
        q = torch.randn(1, 4, 2, 32)
        with FlopCounterMode(display=False):
            found = flash_attn_func(q, q, q, window_size=(2**70, 2**70))
        torch.testing.assert_close(found, flash_attn_func(q, q, q))

    def test_a_second_import(self):
        importlib.reload(sys.modules["flash_attn._custom_ops"])
        kept = {n: sys.modules.pop(n) for n in list(sys.modules) if n.split(".")[0] == "flash_attn"}
        try:
            again = importlib.import_module("flash_attn")
            q = torch.randn(1, 4, 2, 32)
            assert again is not flash_attn
            with FlopCounterMode(display=False):
                found = again.flash_attn_func(q, q, q)
            torch.testing.assert_close(found, flash_attn_func(q, q, q))
        finally:
            sys.modules.update(kept)
