"""`RotaryEmbedding`: its tables, its buffers, and what they survive."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from refusals import raises

from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb_torch


def formula(x, frequencies, offset=0):
    """Rotate x (b, s, h, d) in fp64."""
    angles = torch.outer(torch.arange(offset, offset + x.shape[1], dtype=torch.float64), frequencies.double())
    return apply_rotary_emb_torch(x.double(), angles.cos(), angles.sin()).to(x.dtype)


def frequencies(dim=8, base=10000.0):
    return base ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def check(module, expected=None, seqlen=12):
    """`module` rotates by the frequencies expected, those of the formula if not given."""
    qkv = torch.randn(1, seqlen, 3, 2, 10)
    rotated = formula(qkv[:, :, 1], frequencies() if expected is None else expected)
    torch.testing.assert_close(module(qkv.clone())[:, :, 1], rotated, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scale_base", [None, 512.0])
def test_module(scale_base):
    module = RotaryEmbedding(8, base=100.0, scale_base=scale_base)
    qkv = torch.randn(2, 6, 3, 4, 16)
    out = module(qkv.clone(), seqlen_offset=2)
    q, kv = module(qkv[:, :, 0].clone(), qkv[:, :, 1:].clone(), seqlen_offset=2)
    torch.testing.assert_close(q, out[:, :, 0])
    torch.testing.assert_close(kv, out[:, :, 1:])
    if scale_base is None:
        for i in range(2):
            expected = formula(qkv[:, :, i], frequencies(base=100.0), 2)
            torch.testing.assert_close(out[:, :, i], expected, atol=1e-5, rtol=1e-4)
        return
    scores = torch.einsum("bihd,bjhd->bhij", out[:, :, 0, :, :8], out[:, :, 1, :, :8])
    shifted = module(qkv.clone(), seqlen_offset=0, max_seqlen=8)
    torch.testing.assert_close(
        scores,
        torch.einsum("bihd,bjhd->bhij", shifted[:, :, 0, :, :8], shifted[:, :, 1, :, :8]),
        atol=1e-4,
        rtol=1e-4,
    )


def test_changed_frequencies_count():
    """Models rescale `inv_freq`; rounded to half precision it would be too coarse."""
    module, qkv = RotaryEmbedding(8), torch.randn(1, 900, 3, 1, 8)
    original = module(qkv.clone())
    module.inv_freq /= 4
    scaled = module(qkv.clone(), seqlen_offset=torch.zeros(1, dtype=torch.int64), max_seqlen=901)
    expected = formula(qkv[:, :, 0], frequencies() / 4)
    torch.testing.assert_close(scaled[:, :, 0], expected, atol=1e-4, rtol=1e-4)
    module = RotaryEmbedding(8).bfloat16()
    assert torch.equal(module(qkv.clone()), original)
    assert module._seq_len_cached == 900


def poison(monkeypatch):
    """Let fresh memory hold something, as it may."""
    like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **named: like(*a, **named).fill_(7.7))


@pytest.mark.parametrize("scale_base", [None, 512.0])
def test_materialised_from_meta(monkeypatch, scale_base):
    with torch.device("meta"):
        module = RotaryEmbedding(8, scale_base=scale_base)
    assert module.inv_freq.is_meta
    expected = RotaryEmbedding(8, scale_base=scale_base)
    qkv = torch.randn(2, 7, 3, 2, 10)
    assert torch.equal(copy.deepcopy(module)(qkv.clone()), expected(qkv.clone()))
    poison(monkeypatch)
    torch.nn.Sequential(module).to_empty(device="cpu")
    assert torch.equal(module(qkv.clone()), expected(qkv.clone()))
    assert torch.equal(module.inv_freq, expected.inv_freq)
    assert scale_base is None or torch.equal(module.scale, expected.scale)


def test_memory_put_in_the_place_of_meta():
    """As loaders do with buffers that are in no checkpoint."""
    for unset in (torch.zeros(4), torch.full((4,), torch.nan), torch.tensor([1e-30, 3.0, 0.1, 0.0])):
        module = RotaryEmbedding(8, device="meta")
        module.inv_freq = unset
        check(module)
    scaled = RotaryEmbedding(8).inv_freq / 4
    module = RotaryEmbedding(8, device="meta")
    module.inv_freq = scaled.clone()
    check(module, scaled)
    module = RotaryEmbedding(8)
    module.inv_freq = torch.tensor([3.0, 0.0, 2.0, 0.1])  # instead of values, any are meant
    check(module, module.inv_freq)


def test_changed_frequencies_survive_moves(monkeypatch):
    module = RotaryEmbedding(8)
    module.inv_freq *= 0.5
    expected = module.inv_freq.clone()
    poison(monkeypatch)
    module.to_empty(device="cpu")
    assert torch.equal(module.inv_freq, expected)
    assert torch.equal(module.double().inv_freq, expected.double())
    check(module.float(), expected)
    assert module.to("meta").inv_freq.is_meta


def test_tables_made_without_gradients_do_not_serve_a_backward():
    module = RotaryEmbedding(8).eval()
    with torch.inference_mode():
        module(torch.randn(2, 7, 3, 2, 8))
    qkv = torch.randn(2, 7, 3, 2, 8, requires_grad=True)
    module(qkv * 1).square().sum().backward()
    torch.testing.assert_close(qkv.grad, 2 * qkv.detach())
    with torch.inference_mode():
        module = RotaryEmbedding(8, scale_base=512.0)
    module(qkv * 1).sum().backward()


def test_an_error_while_tables_are_made_changes_nothing(monkeypatch):
    module = RotaryEmbedding(8)
    check(module)
    outer = torch.outer

    def fail(*unused):
        raise MemoryError("no room")

    monkeypatch.setattr(torch, "outer", fail)
    with pytest.raises(MemoryError):
        check(module, seqlen=100)
    assert module._seq_len_cached == 12 and module._cos_cached.shape == (12, 4)
    monkeypatch.setattr(torch, "outer", outer)
    check(module, seqlen=100)


def test_threads():
    module = RotaryEmbedding(8, scale_base=512.0)
    lengths = [3 * i % 91 + 1 for i in range(600)]

    def rotate(seqlen):
        dtype = torch.float32 if seqlen % 2 else torch.float64
        return module(torch.ones(1, seqlen, 3, 1, 8, dtype=dtype)).isfinite().all()

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(rotate, lengths))


def test_attributes_that_other_libraries_use():
    module = RotaryEmbedding(8)
    assert module._seq_len_cached == 0 and module._cos_cached is None and module._sin_k_cached is None
    module._update_cos_sin_cache(20, device=torch.device("cpu"), dtype=torch.float32)
    assert module._cos_cached.shape == module._sin_cached.shape == (20, 4) and module._cos_k_cached is None
    module.inv_freq /= 4
    module._seq_len_cached = 0  # makes new tables
    check(module, module.inv_freq)
    assert "inv_freq" in dict(module.named_buffers()) and not module.state_dict()
    assert copy.deepcopy(module)._seq_len_cached == 12

    class Reversed(RotaryEmbedding):
        def _update_cos_sin_cache(self, seqlen, device=None, dtype=None):
            angles = torch.outer(torch.arange(seqlen), -self.inv_freq)
            self._seq_len_cached, self._cos_cached, self._sin_cached = seqlen, angles.cos(), angles.sin()

    check(Reversed(8), -frequencies())


def test_keys_longer_than_queries():
    q, kv = torch.randn(1, 2, 3, 8), torch.randn(1, 9, 2, 3, 8)
    expected = formula(kv[:, :, 0], frequencies())
    q, kv = RotaryEmbedding(8)(q, kv=kv)
    torch.testing.assert_close(kv[:, :, 0], expected, atol=1e-5, rtol=1e-4)


def test_bad_input():
    qkv, many = torch.zeros(1, 5, 3, 2, 8), torch.zeros(2, 5, 3, 2, 8)
    raises(ValueError, "dim ", RotaryEmbedding, 7)
    raises(ValueError, "dim ", RotaryEmbedding, 0)
    raises(ValueError, "base ", RotaryEmbedding, 8, -1.0)
    raises(ValueError, "scale_base ", RotaryEmbedding, 8, scale_base=0)
    raises(ValueError, "max_seqlen ", RotaryEmbedding(8), qkv, seqlen_offset=3, max_seqlen=7)
    raises(ValueError, "seqlen_offsets ", RotaryEmbedding(8), qkv, seqlen_offset=-1)
    raises(ValueError, "seqlen_offsets ", RotaryEmbedding(8), many, seqlen_offset=torch.tensor([0, -1]))
    raises(ValueError, "seqlen_offsets ", RotaryEmbedding(8), qkv, None, torch.tensor([9]), 10)
    assert RotaryEmbedding(8)(qkv[:0], seqlen_offset=torch.zeros(0, dtype=torch.int64)).numel() == 0
