"""Names, signatures and entry points: what other libraries import, inspect and call positionally."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flash_attn
from flash_attn import flash_attn_interface as interface

ROOT = Path(__file__).parents[2]
TAIL = {
    "dropout_p": 0.0, "softmax_scale": None, "causal": False, "window_size": (-1, -1), "softcap": 0.0,
    "alibi_slopes": None, "deterministic": False, "return_attn_probs": False,
}  # fmt: skip
REQUIRED = inspect.Parameter.empty
SCORING = (
    "dropout_p",
    "softmax_scale",
    "causal",
    "window_size_left",
    "window_size_right",
    "softcap",
    "alibi_slopes",
)
LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
GRADIENTS = ("dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv")


def required(*names):
    return dict.fromkeys(names, REQUIRED)


SIGNATURES = {
    "flash_attn_func": required("q", "k", "v") | TAIL,
    "flash_attn_qkvpacked_func": required("qkv") | TAIL,
    "flash_attn_kvpacked_func": required("q", "kv") | TAIL,
    "flash_attn_varlen_func": required("q", "k", "v", *LENGTHS) | TAIL | {"block_table": None},
    "flash_attn_varlen_qkvpacked_func": required("qkv", "cu_seqlens", "max_seqlen") | TAIL,
    "flash_attn_varlen_kvpacked_func": required("q", "kv", *LENGTHS) | TAIL,
    "flash_attn_with_kvcache": required("q", "k_cache", "v_cache") | {
        "k": None, "v": None, "rotary_cos": None, "rotary_sin": None, "cache_seqlens": None,
        "cache_batch_idx": None, "cache_leftpad": None, "block_table": None, "softmax_scale": None,
        "causal": False, "window_size": (-1, -1), "softcap": 0.0, "rotary_interleaved": True,
        "alibi_slopes": None, "num_splits": 0, "return_softmax_lse": False,
    },
    "_flash_attn_forward": required("q", "k", "v", *SCORING, "return_softmax"),
    "_flash_attn_varlen_forward": required("q", "k", "v", *LENGTHS, *SCORING[:3]) | {
        "window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None,
        "return_softmax": False, "block_table": None, "leftpad_k": None, "seqused_k": None,
        "zero_tensors": False,
    },
    "_flash_attn_backward": required(*GRADIENTS, *SCORING, "deterministic") | {"rng_state": None},
    "_flash_attn_varlen_backward": required(*GRADIENTS, *LENGTHS, *SCORING, "deterministic")
    | {"rng_state": None, "zero_tensors": False},
}  # fmt: skip
MODULE_ARGUMENTS = {"fwd": 13, "varlen_fwd": 21, "bwd": 19, "varlen_bwd": 24, "fwd_kvcache": 20}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    parameters = inspect.signature(getattr(interface, name)).parameters
    assert list(parameters) == list(SIGNATURES[name])
    assert {n: p.default for n, p in parameters.items()} == SIGNATURES[name]


@pytest.mark.parametrize("name", [name for name in SIGNATURES if not name.startswith("_")])
def test_public_names(name):
    assert getattr(flash_attn, name) is getattr(interface, name)
    assert name in flash_attn.__all__
    assert getattr(flash_attn, name).__doc__


def test_version():
    assert flash_attn.__version__ == "2.8.3"


@pytest.mark.parametrize("name", MODULE_ARGUMENTS)
def test_extension_module_is_positional(name):
    import flash_attn_2_cuda

    assert interface.flash_attn_gpu is flash_attn_2_cuda
    parameters = inspect.signature(getattr(flash_attn_2_cuda, name)).parameters.values()
    assert len(parameters) == MODULE_ARGUMENTS[name]
    assert all(p.default is REQUIRED and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("first", ["flash_attn", "flash_attn_2_cuda", "flash_attn.flash_attn_interface"])
def test_import_is_light(first):
    code = (
        f"import sys, {first}, flash_attn, flash_attn_2_cuda\n"
        "from flash_attn import _library, _cuda\n"
        "assert 'einops' not in sys.modules\n"
        "assert _library.load.cache_info().currsize == 0 and not _cuda._devices\n"
        "maps = open('/proc/self/maps').read() if sys.platform == 'linux' else ''\n"
        "assert 'libflash_attn' not in maps\n"
        "assert not any(name in sys.modules for name in ('jinja2', 'codegen', 'triton', 'numpy.testing'))\n"
        "print('light')"
    )
    assert run_python(code).strip() == "light"


def make(*lengths, heads=(4, 2), head_dims=(32, 32)):
    q = torch.randn(2, lengths[0], heads[0], head_dims[0])
    return q, *(torch.randn(2, lengths[1], heads[1], dim) for dim in head_dims)


def test_helpers():
    assert interface.round_multiple(129, 128) == 256 and interface.round_multiple(128, 128) == 128
    x = torch.randn(3, 4)
    assert interface.maybe_contiguous(x) is x and interface.maybe_contiguous(None) is None
    assert interface.maybe_contiguous(x.T).stride(-1) == 1
    assert 128 % interface._get_block_size_n(torch.device("cpu"), 64, True, False) == 0


def test_forward_without_dropout_returns_four_tensors():
    q, k, v = make(10, 12)
    out, lse, s_dmask, rng_state = interface._flash_attn_forward(
        q, k, v, 0.0, 0.1, True, -1, -1, 0.0, None, False
    )
    assert out.shape == q.shape and lse.shape == (2, 4, 10) and s_dmask.shape == (0,)
    assert rng_state.shape == (2,) and rng_state.dtype == torch.int64


def test_extension_module_equals_public_functions():
    gpu = interface.flash_attn_gpu
    q, k, v = make(10, 12)
    given = torch.empty_like(q)
    out, lse, _, rng_state = gpu.fwd(q, k, v, given, None, 0.0, 0.1, True, -1, -1, 0.0, False, None)
    expected = flash_attn.flash_attn_func(q, k, v, softmax_scale=0.1, causal=True, return_attn_probs=True)
    assert out is given and torch.equal(out, expected[0]) and torch.equal(lse, expected[1])

    dout = torch.randn_like(q)
    gradients = gpu.bwd(
        dout, q, k, v, out, lse, None, None, None, None, 0.0, 0.1, True, -1, -1, 0.0, True, None, rng_state
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    truth = torch.autograd.grad(
        flash_attn.flash_attn_func(*leaves, softmax_scale=0.1, causal=True), leaves, dout
    )
    assert all(torch.equal(a, b) for a, b in zip(gradients, truth, strict=False))
    assert gradients[3].shape == (2, 4, 128)
    torch.testing.assert_close(gradients[3][..., :10], (dout * out).sum(-1).transpose(1, 2))


def test_extension_module_varlen_and_cache():
    gpu = interface.flash_attn_gpu
    q, k, v = (x.flatten(0, 1) for x in make(10, 12))
    cu_q, cu_k = torch.tensor([0, 10, 20]).int(), torch.tensor([0, 12, 24]).int()
    out, lse, _, rng_state = gpu.varlen_fwd(
        q,
        k,
        v,
        None,
        cu_q,
        cu_k,
        None,
        None,
        None,
        None,
        10,
        12,
        0.0,
        0.1,
        False,
        True,
        -1,
        -1,
        0.0,
        False,
        None,
    )
    expected = flash_attn.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 10, 12, softmax_scale=0.1, causal=True)
    assert torch.equal(out, expected)
    dq, dk, dv, softmax_d = gpu.varlen_bwd(
        out, q, k, v, out, lse, None, None, None, cu_q, cu_k, None, 10, 12, 0.0, 0.1, False, True, -1, -1,
        0.0, False, None, rng_state,
    )  # fmt: skip
    assert dq.shape == q.shape and dk.shape == k.shape and dv.shape == v.shape
    assert softmax_d.shape == (4, 20 + 2 * 128)
    q, k, v = make(1, 12)
    out, lse = gpu.fwd_kvcache(
        q, k, v, None, None, torch.tensor([3, 12]).int(), None, None, None, None, None, None, None, 0.1,
        False, -1, -1, 0.0, True, 0,
    )  # fmt: skip
    expected = flash_attn.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=torch.tensor([3, 12]).int(), softmax_scale=0.1, return_softmax_lse=True
    )
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


def test_generator_is_used():
    gpu = interface.flash_attn_gpu
    q, k, v = make(10, 12)
    runs = [
        gpu.fwd(q, k, v, None, None, 0.5, 0.1, False, -1, -1, 0.0, True, torch.Generator().manual_seed(5))
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_modes_and_subclasses_see_the_op():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    q, k, v = make(10, 12)
    with Spy():
        flash_attn.flash_attn_func(q, k, v)
    assert "flash_attn._flash_attn_forward.default" in seen
    with torch._subclasses.FakeTensorMode() as mode:
        out = flash_attn.flash_attn_func(*(mode.from_tensor(x) for x in (q, k, v)))
    assert out.shape == q.shape
    assert flash_attn.flash_attn_func(*(x.to("meta") for x in (q, k, v))).is_meta


def test_the_default_device_does_not_matter():
    """Models are built under `with torch.device("meta")`."""
    q, k, v = (x.requires_grad_() for x in make(10, 12))
    packed = [x.detach().flatten(0, 1).requires_grad_() for x in (q, k, v)]
    bounds = torch.tensor([0, 10, 20]).int(), torch.tensor([0, 12, 24]).int()
    new, tables = torch.randn(2, 2, *k.shape[2:]).to(k.dtype), torch.rand(40, 8).to(k.dtype)

    def run():
        torch.manual_seed(3)
        slopes = {"alibi_slopes": slope, "window_size": (4, 2)}
        fixed = flash_attn.flash_attn_func(q, k, v, dropout_p=0.3, return_attn_probs=True, **slopes)
        varlen = flash_attn.flash_attn_varlen_func(
            *packed, *bounds, 10, 12, 0.3, return_attn_probs=True, **slopes
        )
        caches = [x.detach().clone() for x in (k, v)]
        cached = flash_attn.flash_attn_with_kvcache(
            q.detach(), *caches, new, new, tables, tables, 5, causal=True, return_softmax_lse=True
        )
        grads = [torch.autograd.grad(fixed[0].sum(), (q, k, v)), torch.autograd.grad(varlen[0].sum(), packed)]
        return [*fixed, *varlen, *cached, *caches, *grads[0], *grads[1]]

    slope = torch.rand(q.shape[2])
    expected = run()
    with torch.device("meta"):
        actual = run()
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_build_info():
    info = flash_attn.build_info()
    assert info["version"] == "2.8.3" and info["project_version"]
    assert set(info) >= {"commit", "library", "kernels", "targets", "families", "toolchain"}
    assert (info["library"] is None) <= (info["kernels"] == [])


def test_build_info_without_a_build(monkeypatch, tmp_path):
    from flash_attn import _build_info, _library

    monkeypatch.setattr(_library, "library_path", lambda: tmp_path / "none.so")
    monkeypatch.setattr(_build_info, "_manifest", dict)
    info = flash_attn.build_info()
    assert info["library"] is None and info["kernels"] == info["targets"] == info["families"] == []
    assert info["commit"] is None and info["toolchain"] is None
