"""Entry points: imports, the extension module, dispatch modes. Signatures: test_signatures.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import BF16, cu_seqlens, int32, qkv

import flash_attn
from flash_attn import flash_attn_interface as interface
from flash_attn._build_info import describe

ROOT = Path(__file__).parents[2]


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("first", ["flash_attn", "flash_attn_2_cuda", "flash_attn.flash_attn_interface"])
def test_import_is_light(first):
    code = (
        f"import sys, {first}, flash_attn, flash_attn_2_cuda\n"
        "from flash_attn._backends.cuda import gpu, library\n"
        "assert 'einops' not in sys.modules\n"
        "assert library.load.cache_info().currsize == 0 and not gpu.gpus.found\n"
        "maps = open('/proc/self/maps').read() if sys.platform == 'linux' else ''\n"
        "assert 'libflash_attn' not in maps\n"
        "assert not any(name in sys.modules for name in ('jinja2', 'codegen', 'triton', 'numpy.testing'))\n"
        "print('light')"
    )
    assert run_python(code).strip() == "light"


def test_helpers():
    assert interface.round_multiple(129, 128) == 256 and interface.round_multiple(128, 128) == 128
    x = torch.randn(3, 4)
    assert interface.maybe_contiguous(x) is x and interface.maybe_contiguous(None) is None
    assert interface.maybe_contiguous(x.T).stride(-1) == 1
    assert 128 % interface._get_block_size_n(torch.device("cpu"), 64, True, False) == 0


def test_forward_without_dropout_returns_four_tensors(device, require_kernel):
    require_kernel(device, BF16, 32)
    q, k, v = qkv(2, 10, 12, head_dims=32, device=device)
    out, lse, s_dmask, rng_state = interface._flash_attn_forward(
        q, k, v, 0.0, 0.1, True, -1, -1, 0.0, None, False
    )
    assert out.shape == q.shape and lse.shape == (2, 4, 10) and s_dmask.shape == (0,)
    assert rng_state.shape == (2,) and rng_state.dtype == torch.int64


def test_extension_module_equals_public_functions(device, require_backward):
    require_backward(device, BF16, 32)
    gpu = interface.flash_attn_gpu
    q, k, v = qkv(2, 10, 12, head_dims=32, device=device, grad=True)
    named = {"softmax_scale": 0.1, "causal": True}
    expected = flash_attn.flash_attn_func(q, k, v, **named, deterministic=True, return_attn_probs=True)
    dout = torch.randn_like(q)
    truth = torch.autograd.grad(expected[0], (q, k, v), dout)
    q, k, v = (x.detach() for x in (q, k, v))
    given = torch.empty_like(q)
    out, lse, _, rng_state = gpu.fwd(q, k, v, given, None, 0.0, 0.1, True, -1, -1, 0.0, False, None)
    assert out is given and torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    *gradients, softmax_d = gpu.bwd(
        dout, q, k, v, out, lse, None, None, None, None, 0.0, 0.1, True, -1, -1, 0.0, True, None, rng_state
    )
    assert all(torch.equal(a, b) for a, b in zip(gradients, truth, strict=True))
    assert softmax_d.shape == (2, 4, 128)
    right = (dout.double() * out.double()).sum(-1).transpose(1, 2)
    torch.testing.assert_close(softmax_d[..., :10].double(), right, atol=1e-4, rtol=1e-4)


def test_extension_module_varlen(device, require_backward):
    require_backward(device, BF16, 32)
    gpu = interface.flash_attn_gpu
    q, k, v = (x.flatten(0, 1) for x in qkv(2, 10, 12, head_dims=32, device=device))
    cu = cu_seqlens([10, 10], device), cu_seqlens([12, 12], device)
    tail = 10, 12, 0.0, 0.1, False, True, -1, -1, 0.0, False, None
    out, lse, _, rng_state = gpu.varlen_fwd(q, k, v, None, *cu, None, None, None, None, *tail)
    expected = flash_attn.flash_attn_varlen_func(q, k, v, *cu, 10, 12, softmax_scale=0.1, causal=True)
    assert torch.equal(out, expected)
    inputs = out, q, k, v, out, lse, None, None, None
    *gradients, softmax_d = gpu.varlen_bwd(*inputs, *cu, None, *tail, rng_state)
    assert [x.shape for x in gradients] == [x.shape for x in (q, k, v)]
    assert softmax_d.shape == (4, 20 + 2 * 128)


def test_extension_module_cache(device, require_split):
    require_split(device, BF16, 32)
    q, k, v = qkv(2, 1, 12, head_dims=32, device=device)
    used = int32(3, 12, device=device)
    out, lse = interface.flash_attn_gpu.fwd_kvcache(
        q, k, v, None, None, used, None, None, None, None, None, None, None, 0.1, False, -1, -1, 0.0, True, 0
    )
    expected = flash_attn.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=used, softmax_scale=0.1, return_softmax_lse=True
    )
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


def test_modes_and_subclasses_see_the_op():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    q, k, v = qkv(2, 10, 12, head_dims=32)
    with Spy():
        flash_attn.flash_attn_func(q, k, v)
    assert "flash_attn._flash_attn_forward.default" in seen
    with torch._subclasses.FakeTensorMode() as mode:
        out = flash_attn.flash_attn_func(*(mode.from_tensor(x) for x in (q, k, v)))
    assert out.shape == q.shape
    assert flash_attn.flash_attn_func(*(x.to("meta") for x in (q, k, v))).is_meta


def test_the_default_device_does_not_matter():
    """Models are built under `with torch.device("meta")`."""
    q, k, v = qkv(2, 10, 12, head_dims=32, dtype=torch.float32, grad=True)
    packed = [x.detach().flatten(0, 1).requires_grad_() for x in (q, k, v)]
    bounds = cu_seqlens([10, 10]), cu_seqlens([12, 12])
    new, tables = torch.randn(2, 2, 2, 32), torch.rand(40, 8)

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


def test_build_info_without_a_build():
    info = describe({}, None)
    assert info.keys() == flash_attn.build_info().keys()
    assert info["library"] is None and info["kernels"] == info["targets"] == info["families"] == []
    assert info["commit"] is None and info["toolchain"] is None
