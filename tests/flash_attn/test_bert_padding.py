"""Packing and unpacking of padded batches."""

from __future__ import annotations

import pytest
import torch
from oracle import Options, assert_gradients, assert_within, gradients, varlen_attention
from problems import BF16, qkv
from refusals import raises

from flash_attn import flash_attn_varlen_func
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


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_kinds_of_indices(dtype):
    """Transformers decodes with slices of cu_seqlens, which are int32, as indices."""
    x, indices = torch.randn(5, 3), torch.tensor([4, 0, 2], dtype=dtype)
    rows = index_first_axis(x, indices)
    assert torch.equal(rows, x[[4, 0, 2]])
    back = index_put_first_axis(rows, indices, 6)
    assert torch.equal(back[[4, 0, 2]], rows) and not back[[1, 3, 5]].any()


def test_gradients():
    x = torch.randn(4, 5, 3, requires_grad=True, dtype=torch.float64)
    indices = torch.tensor([2, 0, 1])
    lengths = torch.tensor([[2, 1, 0, 0, 0], [0] * 5, [5, 0, 0, 0, 0], [1, 0, 0, 0, 0]])
    for function in (
        lambda y: unpad_input(y, MASK)[0].square(),
        lambda y: unpad_input_for_concatenated_sequences(y, lengths)[0].square(),
        lambda y: pad_input(2 * unpad_input(y, MASK)[0], unpad_input(y, MASK)[1], 4, 5),
        lambda y: index_first_axis(y, indices),
        lambda y: index_put_first_axis(y, indices.new_tensor([6, 0, 2, 3]), 7),
    ):
        assert torch.autograd.gradcheck(function, x)


def test_concatenated_sequences():
    x = torch.randn(3, 6, 2)
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0], [1, 1, 2, 0, 0, 0]])
    hidden, indices, cu_seqlens, longest = unpad_input_for_concatenated_sequences(x, lengths)
    assert torch.equal(hidden, torch.cat([x[0, :5], x[1], x[2, :4]]))
    assert torch.equal(x.flatten(0, 1)[indices], hidden)
    assert cu_seqlens.tolist() == [0, 2, 5, 11, 12, 13, 15] and longest == 6


@pytest.mark.parametrize("layout", ["padded", "concatenated"])
def test_attention_of_a_batch(device, require_backward, layout):
    """From a padded batch to packed attention and back, with gradients, against each sequence by itself."""
    require_backward(device, BF16, 64)
    inputs = qkv(3, 40, 40, device=device)
    if layout == "padded":
        lengths = [17, 0, 40]
        described = torch.arange(40, device=device) < torch.tensor(lengths, device=device)[:, None]
        unpad = unpad_input
    else:
        lengths = [10, 7, 3, 40, 1]
        described = torch.zeros(3, 40, dtype=torch.int64, device=device)
        described[0, :3], described[1, 0], described[2, 0] = torch.tensor([10, 7, 3]), 40, 1
        unpad = unpad_input_for_concatenated_sequences

    def run(attend):
        def through(*padded):
            (q, indices, cu_seqlens, longest, *_), (k, *_), (v, *_) = (unpad(x, described) for x in padded)
            return pad_input(attend(q, k, v, cu_seqlens, longest), indices, 3, 40)

        return through

    def ours(q, k, v, cu_seqlens, longest):
        return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True)

    def oracle(*padded_and_dtype):
        *padded, dtype = padded_and_dtype
        named = {"options": Options(causal=True), "dtype": dtype}
        return run(lambda q, k, v, *_: varlen_attention(q, k, v, lengths, lengths, **named)[0])(*padded)

    dout = torch.randn_like(inputs[0])
    out = run(ours)(*inputs)
    assert not out[described.sum(-1) == 0].any()
    assert_within(out, oracle(*inputs, torch.float64), oracle(*inputs, BF16))
    assert_gradients(gradients(run(ours), inputs, dout, BF16), oracle, inputs, dout)


def test_rearrange_is_einops():
    assert rearrange(torch.zeros(2, 3), "a b -> (a b)").shape == (6,)


HIDDEN = torch.zeros(3, 4, 2)
ONES = torch.ones(3, 4, dtype=torch.int64)
TWO = ONES.clone()
TWO[1, 2] = 2


@pytest.mark.parametrize("unpad", [unpad_input, unpad_input_for_concatenated_sequences])
def test_bad_masks_of_any_layout(unpad):
    name = "attention_mask"
    for mask in (ONES[:, :3], ONES.view(2, 6), ONES[:2], ONES[None], ONES.to("meta")):
        raises(ValueError, name, unpad, HIDDEN, mask)
    raises(ValueError, name, unpad, HIDDEN, -ONES)
    raises(ValueError, name, unpad, HIDDEN, ONES * 0.5)
    raises(ValueError, name, unpad, HIDDEN, ONES * torch.nan)
    raises(TypeError, name, unpad, HIDDEN, ONES.tolist())
    raises(TypeError, name, unpad, HIDDEN, ONES * 1j)
    raises(TypeError, "hidden_states", unpad, None, ONES)
    raises(ValueError, "hidden_states", unpad, HIDDEN[0, 0], ONES)


def test_bad_entries_of_masks():
    raises(ValueError, "attention_mask", unpad_input, HIDDEN, TWO)
    raises(ValueError, "unused_mask", unpad_input, HIDDEN, 0 * ONES, TWO)
    raises(ValueError, "unused_mask", unpad_input, HIDDEN, ONES, ONES)
    raises(ValueError, "unused_mask", unpad_input, HIDDEN, ONES, ONES[:2])
    too_long = 0 * ONES
    too_long[2, :2] = torch.tensor([4, 1])
    name = "attention_mask_in_length"
    raises(ValueError, name, unpad_input_for_concatenated_sequences, HIDDEN, too_long)
    assert unpad_input(HIDDEN, ONES.float())[3] == 4


@pytest.mark.parametrize(
    "kind, indices",
    [
        (ValueError, torch.tensor([0, 12])),
        (ValueError, torch.tensor([-1, 3])),
        (ValueError, torch.tensor([[0, 1]])),
        (ValueError, torch.tensor(1)),
        (ValueError, torch.tensor([0, 1], device="meta")),
        (TypeError, torch.tensor([0.0, 1.7])),
        (TypeError, torch.tensor([True, False])),
        (TypeError, [0, 1]),
    ],
    ids=str,
)
def test_bad_indices(kind, indices):
    values = torch.zeros(2, 5)
    raises(kind, "indices", index_first_axis, torch.zeros(12, 5), indices)
    raises(kind, "indices", index_put_first_axis, values, indices, 12)
    raises(kind, "indices", pad_input, values, indices, 3, 4)


def test_bad_sizes():
    values, indices = torch.zeros(2, 5), torch.tensor([0, 11])
    raises(ValueError, "indices", pad_input, values, indices, 2, 4)
    raises(ValueError, "indices", pad_input, torch.zeros(3, 5), indices, 3, 4)
    raises(ValueError, "batch", pad_input, values, indices, -3, -4)
    raises(TypeError, "seqlen", pad_input, values, indices, 3, 4.0)
    raises(TypeError, "first_axis_dim", index_put_first_axis, values, indices, None)
    raises(TypeError, "values", index_put_first_axis, [1, 2], indices, 12)
    raises(TypeError, "hidden_states", pad_input, [1, 2], indices, 3, 4)
    raises(ValueError, "input", index_first_axis, torch.tensor(1.0), indices)
    assert pad_input(values, indices, torch.tensor(3), True * 4).shape == (3, 4, 5)


def test_padding_under_a_compiler():
    x = torch.randn(4, 5, 3)

    def through(x, mask):
        hidden, indices, *_ = unpad_input(x, mask)
        return pad_input(hidden * 2, indices, 4, 5)

    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(through, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x, MASK), through(x, MASK))
