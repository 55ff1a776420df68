"""Packing and unpacking of padded batches."""

from __future__ import annotations

import torch

from flash_attn import flash_attn_func, flash_attn_varlen_func
from flash_attn.bert_padding import (
    index_first_axis,
    index_put_first_axis,
    pad_input,
    rearrange,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

MASK = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 1, 0, 1, 0]])


def test_unpad():
    x = torch.randn(4, 5, 3, 2)
    hidden, indices, cu_seqlens, longest, used = unpad_input(x, MASK)
    assert torch.equal(hidden, x[MASK.bool()])
    assert torch.equal(indices, MASK.flatten().nonzero().flatten())
    assert cu_seqlens.tolist() == [0, 3, 3, 8, 10] and cu_seqlens.dtype == torch.int32
    assert longest == 5 and type(longest) is int
    assert used.tolist() == [3, 0, 5, 2] and used.dtype == torch.int32


def test_unpad_bool_mask_and_unused_tokens():
    x = torch.randn(4, 5, 3)
    unused = torch.zeros_like(MASK)
    unused[0, 4] = unused[1, 0] = 1
    hidden, _, cu_seqlens, longest, used = unpad_input(x, MASK, unused)
    assert torch.equal(hidden, x[(MASK + unused).bool()])
    assert cu_seqlens.tolist() == [0, 4, 5, 10, 12] and longest == 5 and used.tolist() == [3, 0, 5, 2]
    assert torch.equal(unpad_input(x, MASK.bool())[0], unpad_input(x, MASK)[0])


def test_pad_undoes_unpad():
    x = torch.randn(4, 5, 3, 2)
    hidden, indices, *_ = unpad_input(x, MASK)
    assert torch.equal(pad_input(hidden, indices, 4, 5), x * MASK[..., None, None])


def test_gradients():
    x = torch.randn(4, 5, 3, requires_grad=True, dtype=torch.float64)
    torch.autograd.gradcheck(
        lambda y: pad_input(2 * unpad_input(y, MASK)[0], unpad_input(y, MASK)[1], 4, 5), x
    )
    indices = torch.tensor([2, 0, 1])
    torch.autograd.gradcheck(lambda y: index_first_axis(y, indices), x.detach()[:, 0].requires_grad_())
    torch.autograd.gradcheck(
        lambda y: index_put_first_axis(y, indices, 7), x.detach()[:3, 0].requires_grad_()
    )


def test_concatenated_sequences():
    x = torch.randn(3, 6, 2)
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0], [1, 1, 2, 0, 0, 0]])
    hidden, indices, cu_seqlens, longest = unpad_input_for_concatenated_sequences(x, lengths)
    assert torch.equal(hidden, torch.cat([x[0, :5], x[1], x[2, :4]]))
    assert torch.equal(x.flatten(0, 1)[indices], hidden)
    assert cu_seqlens.tolist() == [0, 2, 5, 11, 12, 13, 15] and longest == 6


def test_attention_of_a_padded_batch():
    q = torch.randn(4, 5, 2, 8)
    hidden, indices, cu_seqlens, longest, _ = unpad_input(q, MASK)
    packed = flash_attn_varlen_func(hidden, hidden, hidden, cu_seqlens, cu_seqlens, longest, longest)
    out = pad_input(packed, indices, 4, 5)
    torch.testing.assert_close(out[0, :3], flash_attn_func(*(q[:1, :3],) * 3)[0])
    assert not out[1].any()


def test_rearrange_is_einops():
    assert rearrange(torch.zeros(2, 3), "a b -> (a b)").shape == (6,)
