"""Calls without a gradient: they run, and their backward raises; nothing is silently left out of a graph."""

from __future__ import annotations

import pytest
import torch

from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.flash_attn_interface import (
    _flash_attn_forward,
    _wrapped_flash_attn_forward,
    flash_attn_gpu,
)


def make(seqlen=6, **options):
    return [torch.randn(1, seqlen, 2, 16, **options) for _ in range(3)]


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


SCORES = (0.0, None, True, -1, -1, 0.0, None, False)


@pytest.mark.parametrize("function", [_flash_attn_forward, _wrapped_flash_attn_forward])
@pytest.mark.parametrize("needs", range(3))
def test_private_functions(function, needs):
    q, k, v = make()
    expected = function(q, k, v, *SCORES)[0]
    inputs = [x.requires_grad_(i == needs) for i, x in enumerate((q, k, v))]
    out, lse, _, _ = function(*inputs, *SCORES)
    assert torch.equal(out, expected)
    for x in (out, lse):
        with pytest.raises(NotImplementedError, match="no gradient"):
            x.sum().backward()
    with torch.no_grad():
        assert not function(*inputs, *SCORES)[0].requires_grad


@pytest.mark.parametrize("given", [{"block_table": int32(0).view(1, 1)}, {"seqused_k": int32(5)}], ids=str)
def test_varlen(given):
    q, k, v = make(16)
    cu = int32(0, 16)
    keys = (k[0], v[0]) if "seqused_k" in given else (k, v)
    expected = flash_attn_varlen_func(q[0], *keys, cu, cu, 16, 16, **given)
    out = flash_attn_varlen_func(q[0].requires_grad_(), *keys, cu, cu, 16, 16, **given)
    assert torch.equal(out, expected)
    with pytest.raises(NotImplementedError, match="block_table or seqused_k"):
        out.sum().backward()


@pytest.mark.parametrize("name", ["alibi_slopes", "softmax_scale", "softcap", "dropout_p"])
def test_arguments_without_a_gradient_are_refused(name):
    q, k, v = make()
    value = torch.rand(2) if name == "alibi_slopes" else torch.tensor(0.5)
    with pytest.raises(NotImplementedError, match=f"^{name} must not require grad"):
        flash_attn_func(q, k, v, **{name: value.requires_grad_()})
    with torch.no_grad():
        flash_attn_func(q, k, v, **{name: value})


@pytest.mark.parametrize("name", ["rotary_cos", "rotary_sin", "alibi_slopes"])
def test_tables_without_a_gradient_are_refused(name):
    q, k, v = make(1)
    cache = [torch.randn(1, 32, 2, 16) for _ in range(2)]
    given = {"rotary_cos": torch.rand(32, 8), "rotary_sin": torch.rand(32, 8), "alibi_slopes": torch.rand(2)}
    given[name].requires_grad_()
    with pytest.raises(NotImplementedError, match=f"^{name} must not require grad"):
        flash_attn_with_kvcache(q, *cache, k, v, cache_seqlens=3, **given)


def test_out_may_not_require_grad():
    q, k, v = make()
    with pytest.raises(NotImplementedError, match=r"^out must not require grad"):
        flash_attn_func(q, k, v, out=torch.empty_like(q, requires_grad=True))
    with torch.no_grad():
        flash_attn_func(q, k, v, out=torch.empty_like(q, requires_grad=True))


def test_the_extension_module_takes_a_generator_or_refuses_it():
    q, k, v = make()
    draw = (None, None, 0.5, 0.25, False, -1, -1, 0.0, True)
    generator = torch.Generator().manual_seed(7)
    first = flash_attn_gpu.fwd(q, k, v, *draw, generator)
    generator.manual_seed(7)
    second = flash_attn_gpu.fwd(q, k, v, *draw, generator)
    assert torch.equal(first[2], second[2]) and torch.equal(first[3], second[3])
    tail = (None, 0.5, 0.25, False, -1, -1, 0.0, False)
    with pytest.raises(ValueError, match=r"^gen must be None"):
        flash_attn_gpu.bwd(q, q, k, v, *first[:2], None, None, None, *tail, generator, first[3])
