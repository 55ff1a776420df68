"""The calls of libraries that are written against flash-attn 2.8.3, with the positions and names they use.

None of them is installed for this; test_transformers.py runs a real one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import metadata

import pytest
import torch
import torch.nn.functional as F
from oracle import Options
from packaging.version import Version
from problems import (
    BF16,
    check,
    check_gradients,
    check_sequences,
    check_varlen,
    check_varlen_gradients,
    cu_seqlens,
    int32,
    packed_qkv,
    qkv,
)
from torch import Tensor

import flash_attn

SCALE = 0.1
LENGTHS = (40, 0, 57)
LONGEST = max(LENGTHS)


@dataclass
class Problem:
    """q, k, v and dout, of (2, 57, heads, 64) or packed (97, heads, 64): 4 query heads, 2 of keys."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @property
    def cu_seqlens(self) -> Tensor:
        return cu_seqlens(LENGTHS, self.q.device)

    def check(self, out: Tensor, lse: Tensor | None = None, grads: tuple = (), **options) -> None:
        """Compare with the oracle: causal, scaled by `SCALE` unless `options` say otherwise."""
        chosen = Options(**{"causal": True, "softmax_scale": SCALE, **options})
        lengths = (list(LENGTHS), list(LENGTHS))
        if self.q.dim() == 4:
            check(out, lse, *self.inputs, chosen)
        else:
            check_varlen(out, lse, *self.inputs, lengths, chosen)
        if grads and self.q.dim() == 4:
            check_gradients(grads, self.inputs, self.dout, chosen)
        elif grads:
            check_varlen_gradients(grads, self.inputs, self.dout, lengths, chosen)


@pytest.fixture
def batch(device, require_backward) -> Problem:
    require_backward(device, BF16, 64)
    inputs = qkv(2, LONGEST, LONGEST, device=device)
    return Problem(*inputs, torch.randn_like(inputs[0]))


@pytest.fixture
def packed(device, require_backward) -> Problem:
    require_backward(device, BF16, 64)
    inputs = packed_qkv((list(LENGTHS), list(LENGTHS)), device=device)
    return Problem(*inputs, torch.randn_like(inputs[0]))


@pytest.mark.parametrize(
    ("client", "lowest", "highest"),
    [
        ("transformers", "2.3.3", "3"),
        ("TransformerEngine", "2.1.1", "2.8.3"),
        ("xformers", "2.7.1", "2.8.4"),
        ("verl and axolotl", "2.8.3", "2.8.3"),
    ],
)
def test_version_is_one_that_the_client_takes(client, lowest, highest):
    """A local or a post-release version would be above the highest."""
    assert Version(lowest) <= Version(flash_attn.__version__) <= Version(highest)


def test_the_distribution_is_found_by_name():
    try:
        version = metadata.version("flash-attn")
    except metadata.PackageNotFoundError:
        pytest.skip("flash-attn is not installed here, only on the path")
    assert version == flash_attn.__version__
    assert {name.replace("_", "-") for name in metadata.packages_distributions()["flash_attn"]} == {
        "flash-attn"
    }


def test_transformers(batch):
    leaves = [x.requires_grad_() for x in batch.inputs]
    out = flash_attn.flash_attn_func(
        *leaves, causal=True, softmax_scale=SCALE, dropout_p=0.0, window_size=(29, 29), deterministic=False
    )
    batch.check(out, grads=torch.autograd.grad(out, leaves, batch.dout), window_size=(29, 0))


def test_transformers_packed(packed):
    """It finds the longest sequence on the device and passes that as it is, a 0-d tensor."""
    leaves, cu_seqlens = [x.requires_grad_() for x in packed.inputs], packed.cu_seqlens
    longest = cu_seqlens.diff().max()
    out = flash_attn.flash_attn_varlen_func(
        *leaves, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, causal=True, softmax_scale=SCALE,
        dropout_p=0.0, deterministic=True, max_seqlen_q=longest, max_seqlen_k=longest,
    )  # fmt: skip
    packed.check(out, grads=torch.autograd.grad(out, leaves, packed.dout))


def transformer_engine_arguments(extra):
    shared = {"softmax_scale": SCALE, "dropout_p": 0.0, "causal": True, "softcap": 0.0, "alibi_slopes": None}
    return shared | {"window_size_left": -1, "window_size_right": 0} | extra


def test_transformer_engine(batch):
    from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_forward

    arguments = transformer_engine_arguments({"return_softmax": False})
    out, lse, _, rng_state = _flash_attn_forward(*batch.inputs, **arguments)
    grads = tuple(torch.empty_like(x) for x in batch.inputs)
    arguments = transformer_engine_arguments({"deterministic": True, "rng_state": rng_state})
    _flash_attn_backward(batch.dout, *batch.inputs, out, lse, *grads, **arguments)
    batch.check(out, lse, grads)


def test_transformer_engine_packed(packed):
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward, _flash_attn_varlen_forward
    from flash_attn_2_cuda import varlen_bwd  # noqa: F401 - imported, and with 2.8.3 not called

    lengths = (packed.cu_seqlens, packed.cu_seqlens, LONGEST, LONGEST)
    arguments = transformer_engine_arguments({"return_softmax": False, "block_table": None})
    out, lse, _, rng_state = _flash_attn_varlen_forward(*packed.inputs, *lengths, **arguments)
    grads = tuple(torch.empty_like(x) for x in packed.inputs)
    arguments = transformer_engine_arguments({"deterministic": False, "rng_state": rng_state})
    _flash_attn_varlen_backward(packed.dout, *packed.inputs, out, lse, *grads, *lengths, **arguments)
    packed.check(out, lse, grads)


def gradients_of_shared_storage(q, k):
    """Uninitialised dq, dk, dv, where dk and dv are views of one tensor."""
    dkv = torch.full((*k.shape[:-2], 2, *k.shape[-2:]), torch.nan, dtype=k.dtype, device=k.device)
    return torch.empty_like(q), *dkv.unbind(-3)


def test_xformers(batch):
    from flash_attn.flash_attn_interface import flash_attn_gpu

    out, lse, _, rng_state = flash_attn_gpu.fwd(
        *batch.inputs, None, None, 0.0, SCALE, True, -1, -1, 0.0, False, None
    )
    grads = gradients_of_shared_storage(batch.q, batch.k)
    flash_attn_gpu.bwd(
        batch.dout, *batch.inputs, out, lse, *grads, None, 0.0, SCALE, True, -1, -1, 0.0, False, None,
        rng_state,
    )  # fmt: skip
    batch.check(out, lse, grads)


def test_xformers_packed(packed):
    from flash_attn.flash_attn_interface import flash_attn_gpu

    cu_seqlens = packed.cu_seqlens
    out, lse, _, rng_state = flash_attn_gpu.varlen_fwd(
        *packed.inputs, None, cu_seqlens, cu_seqlens, None, None, None, None, LONGEST, LONGEST, 0.0, SCALE,
        False, True, -1, -1, 0.0, False, None,
    )  # fmt: skip
    grads = gradients_of_shared_storage(packed.q, packed.k)
    flash_attn_gpu.varlen_bwd(
        packed.dout, *packed.inputs, out, lse, *grads, cu_seqlens, cu_seqlens, None, LONGEST, LONGEST, 0.0,
        SCALE, False, True, -1, -1, 0.0, False, None, rng_state,
    )  # fmt: skip
    packed.check(out, lse, grads)


def test_xformers_keys_in_use(packed):
    """`seqused_k` limits the keys of each sequence; the causal mask is aligned at the last one used."""
    from flash_attn.flash_attn_interface import flash_attn_gpu

    cu_seqlens, used = packed.cu_seqlens, [31, 0, 57]
    out, lse, _, _ = flash_attn_gpu.varlen_fwd(
        *packed.inputs, None, cu_seqlens, cu_seqlens, int32(*used, device=packed.q.device), None,
        None, None, LONGEST, LONGEST, 0.0, SCALE, False, True, -1, -1, 0.0, False, None,
    )  # fmt: skip
    options, lengths = Options(causal=True, softmax_scale=SCALE), list(LENGTHS)
    check_varlen(out, lse, *packed.inputs, (lengths, lengths), options, used=used)


def test_diffusers(batch):
    from flash_attn.flash_attn_interface import _wrapped_flash_attn_backward, _wrapped_flash_attn_forward

    out, lse, _, rng_state = _wrapped_flash_attn_forward(
        *batch.inputs, 0.0, SCALE, False, -1, -1, 0.0, None, True
    )
    grads = tuple(torch.empty_like(x) for x in batch.inputs)
    softmax_d = _wrapped_flash_attn_backward(
        batch.dout, *batch.inputs, out, lse, *grads, 0.0, SCALE, False, -1, -1, 0.0, None, False, rng_state
    )
    assert lse.permute(0, 2, 1).shape == out.shape[:3]
    assert softmax_d.shape[:2] == (2, 4)
    batch.check(out, lse, grads, causal=False)


def test_megatron(packed):
    cu_seqlens = packed.cu_seqlens
    out = flash_attn.flash_attn_varlen_func(
        *packed.inputs, cu_seqlens, cu_seqlens, LONGEST, LONGEST, softmax_scale=SCALE, causal=True,
        window_size=(-1, -1),
    )  # fmt: skip
    packed.check(out)


def test_megatron_decodes_with_pages(device, require_split):
    require_split(device, BF16, 64)
    q, *pages = qkv(5, 1, 256, device=device)
    q, used = q[:2], int32(300, 17, device=device)
    table = torch.tensor([[3, 1], [0, 4]], dtype=torch.int32, device=device)
    out, lse = flash_attn.flash_attn_with_kvcache(
        q=q, k_cache=pages[0], v_cache=pages[1], cache_seqlens=used, causal=True, block_table=table,
        return_softmax_lse=True,
    )  # fmt: skip
    sequences = [tuple(x[table[b].long()].flatten(0, 1)[:n] for x in pages) for b, n in enumerate((300, 17))]
    check_sequences(out, lse, q, sequences, Options(causal=True))


def test_megatron_rotates(device):
    from flash_attn.layers.rotary import apply_rotary_emb

    with torch.device(device):
        x, angles = torch.randn(2, 9, 4, 16), torch.rand(9, 4)
    turned = apply_rotary_emb(x, angles.cos(), angles.sin(), True)
    even, odd = x[..., :8:2], x[..., 1:8:2]
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    expected = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
    torch.testing.assert_close(turned, torch.cat([expected, x[..., 8:]], -1))


def test_verl_removes_padding(device):
    """Token ids and positions are packed as integers, and log-probabilities are padded again."""
    from flash_attn.bert_padding import index_first_axis, pad_input, rearrange, unpad_input

    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]], device=device)
    ids = torch.arange(8, device=device).view(2, 4)
    packed_ids, indices, cu_seqlens, *_ = unpad_input(ids.unsqueeze(-1), mask)
    positions = index_first_axis(rearrange(ids.unsqueeze(-1), "b s ... -> (b s) ..."), indices)
    assert packed_ids.flatten().tolist() == positions.flatten().tolist() == [1, 2, 3, 4, 5]
    assert cu_seqlens.tolist() == [0, 3, 5]
    padded = pad_input(hidden_states=packed_ids.float(), indices=indices, batch=2, seqlen=4)
    assert torch.equal(padded.squeeze(-1), (ids * mask).float())


@pytest.mark.parametrize("inplace_backward", [False, True])
def test_verl_log_probabilities(device, inplace_backward):
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    logits = torch.randn(6, 50, device=device, requires_grad=True)
    labels = torch.randint(50, (6,), device=device)
    expected = logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    (expected_grad,) = torch.autograd.grad(expected.sum(), logits)
    output = cross_entropy_loss(logits, labels, inplace_backward=inplace_backward)
    assert isinstance(output, tuple)
    torch.testing.assert_close(-output[0], expected)
    torch.testing.assert_close(torch.autograd.grad(-output[0].sum(), logits)[0], expected_grad)


def test_axolotl_replaces_the_loss(device):
    from flash_attn.losses.cross_entropy import CrossEntropyLoss

    loss = functools.partial(CrossEntropyLoss, inplace_backward=True)()
    logits = torch.randn(6, 50, device=device, requires_grad=True)
    labels = torch.tensor([3, -100, 0, 49, -100, 7], device=device)
    expected = F.cross_entropy(logits, labels)
    (expected_grad,) = torch.autograd.grad(expected, logits)
    actual = loss(logits, labels)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, logits)[0], expected_grad)
