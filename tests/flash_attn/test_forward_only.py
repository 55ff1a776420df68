"""Calls without a gradient: they run, and their backward raises; nothing is silently left out of a graph."""

from __future__ import annotations

import pytest
import torch
from problems import BF16, int32, packed_qkv, qkv, rotary_tables

from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.flash_attn_interface import (
    _flash_attn_forward,
    _wrapped_flash_attn_forward,
    flash_attn_gpu,
)


def make(device, seqlen=6):
    return qkv(1, seqlen, seqlen, (2, 2), 16, device=device)


SCORES = (0.0, None, True, -1, -1, 0.0, None, False)


@pytest.mark.parametrize("function", [_flash_attn_forward, _wrapped_flash_attn_forward])
@pytest.mark.parametrize("needs", range(3))
def test_private_functions(device, require_kernel, function, needs):
    require_kernel(device, BF16, 16)
    q, k, v = make(device)
    expected = function(q, k, v, *SCORES)[0]
    inputs = [x.requires_grad_(i == needs) for i, x in enumerate((q, k, v))]
    out, lse, _, _ = function(*inputs, *SCORES)
    assert torch.equal(out, expected)
    for x in (out, lse):
        with pytest.raises(NotImplementedError, match="no gradient"):
            x.sum().backward()
    with torch.no_grad():
        assert not function(*inputs, *SCORES)[0].requires_grad


@pytest.mark.parametrize("name", ["block_table", "seqused_k"])
def test_varlen(device, require_split, require_backward, name):
    require_split(device, BF16, 16)
    require_backward(device, BF16, 16)
    q, k, v = packed_qkv(([16], [16]), (2, 2), 16, device=device)
    given, bounds = {name: int32(16, device=device)}, int32(0, 16, device=device)
    if name == "block_table":
        given, k, v = {name: int32(0, device=device)[None]}, k[None], v[None]
    expected = flash_attn_varlen_func(q, k, v, bounds, bounds, 16, 16, **given)
    out = flash_attn_varlen_func(q.requires_grad_(), k, v, bounds, bounds, 16, 16, **given)
    assert torch.equal(out, expected)
    with pytest.raises(NotImplementedError, match="block_table or seqused_k"):
        out.sum().backward()


@pytest.mark.parametrize("name", ["alibi_slopes", "softmax_scale", "softcap", "dropout_p"])
def test_arguments_without_a_gradient_are_refused(device, require_kernel, name):
    require_kernel(device, BF16, 16)
    q, k, v = make(device)
    value = torch.rand(2, device=device) if name == "alibi_slopes" else torch.tensor(0.5)
    with pytest.raises(NotImplementedError, match=f"^{name} must not require grad"):
        flash_attn_func(q, k, v, **{name: value.requires_grad_()})
    with torch.no_grad():
        flash_attn_func(q, k, v, **{name: value})


@pytest.mark.parametrize("name", ["rotary_cos", "rotary_sin", "alibi_slopes"])
def test_tables_without_a_gradient_are_refused(default_device, require_split, name):
    require_split(default_device, BF16, 16)
    (q, k, v), (_, *cache) = make(default_device, 1), make(default_device, 32)
    cos, sin = rotary_tables(32, 16)
    given = {"rotary_cos": cos, "rotary_sin": sin, "alibi_slopes": torch.rand(2)}
    given[name].requires_grad_()
    with pytest.raises(NotImplementedError, match=f"^{name} must not require grad"):
        flash_attn_with_kvcache(q, *cache, k, v, cache_seqlens=3, **given)


def test_out_may_not_require_grad(device, require_kernel):
    require_kernel(device, BF16, 16)
    q, k, v = make(device)
    with pytest.raises(NotImplementedError, match=r"^out must not require grad"):
        flash_attn_func(q, k, v, out=torch.empty_like(q, requires_grad=True))
    with torch.no_grad():
        flash_attn_func(q, k, v, out=torch.empty_like(q, requires_grad=True))


def test_the_extension_module_takes_a_generator_or_refuses_it(device, require_backward):
    require_backward(device, BF16, 16)
    q, k, v = make(device)
    generator = torch.Generator(device)
    draw = None, None, 0.5, 0.25, False, -1, -1, 0.0, True
    first, second = (flash_attn_gpu.fwd(q, k, v, *draw, generator.manual_seed(7)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    tail = (None, 0.5, 0.25, False, -1, -1, 0.0, False)
    with pytest.raises(ValueError, match=r"^gen must be None"):
        flash_attn_gpu.bwd(q, q, k, v, *first[:2], None, None, None, *tail, generator, first[3])
