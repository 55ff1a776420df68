"""What other libraries import, inspect and call by position: every signature, in one table."""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap

import pytest

ABBREVIATIONS = {
    "<tail>": "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "alibi_slopes=None, deterministic=False, return_attn_probs=False",
    "<lengths>": "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k",
    "<gradients>": "dout, q, k, v, out, softmax_lse, dq, dk, dv",
    "<window>": "window_size_left, window_size_right",
}
TABLE = """
flash_attn
    flash_attn_func(q, k, v, <tail>, *, out=None, s_aux=None)
    flash_attn_qkvpacked_func(qkv, <tail>)
    flash_attn_kvpacked_func(q, kv, <tail>)
    flash_attn_varlen_func(
        q, k, v, <lengths>, <tail>, block_table=None, *, out=None, seqused_k=None, return_softmax_lse=False,
        s_aux=None)
    flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, <tail>)
    flash_attn_varlen_kvpacked_func(q, kv, <lengths>, <tail>)
    flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
        cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,
        window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,
        return_softmax_lse=False, *, out=None, s_aux=None)
    build_info()

flash_attn.flash_attn_interface
    _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, <window>, softcap, alibi_slopes, return_softmax,
        s_aux=None)
    _flash_attn_varlen_forward(
        q, k, v, <lengths>, dropout_p, softmax_scale, causal, window_size_left=-1, window_size_right=-1,
        softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None, leftpad_k=None,
        seqused_k=None, zero_tensors=False, num_splits=0, s_aux=None)
    _flash_attn_backward(
        <gradients>, dropout_p, softmax_scale, causal, <window>, softcap, alibi_slopes, deterministic,
        rng_state=None)
    _flash_attn_varlen_backward(
        <gradients>, <lengths>, dropout_p, softmax_scale, causal, <window>, softcap, alibi_slopes,
        deterministic, rng_state=None, zero_tensors=False)
    kvcache_num_splits(q, k_cache, block_table=None)
    _get_block_size_n(device, head_dim, is_dropout, is_causal)
    maybe_contiguous(x)
    round_multiple(x, m)

flash_attn_2_cuda
    fwd(
        q, k, v, out, alibi_slopes, p_dropout, softmax_scale, is_causal, <window>, softcap, return_softmax,
        gen)
    varlen_fwd(
        q, k, v, out, cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, block_table, alibi_slopes,
        max_seqlen_q, max_seqlen_k, p_dropout, softmax_scale, zero_tensors, is_causal, <window>, softcap,
        return_softmax, gen)
    bwd(
        <gradients>, alibi_slopes, p_dropout, softmax_scale, is_causal, <window>, softcap, deterministic, gen,
        rng_state)
    varlen_bwd(
        <gradients>, cu_seqlens_q, cu_seqlens_k, alibi_slopes, max_seqlen_q, max_seqlen_k, p_dropout,
        softmax_scale, zero_tensors, is_causal, <window>, softcap, deterministic, gen, rng_state)
    fwd_kvcache(
        q, kcache, vcache, k, v, seqlens_k, rotary_cos, rotary_sin, cache_batch_idx, leftpad_k, block_table,
        alibi_slopes, out, softmax_scale, is_causal, <window>, softcap, rotary_interleaved, num_splits)

flash_attn.bert_padding
    index_first_axis(input, indices)
    index_put_first_axis(values, indices, first_axis_dim)
    unpad_input(hidden_states, attention_mask, unused_mask=None)
    unpad_input_for_concatenated_sequences(hidden_states, attention_mask_in_length)
    pad_input(hidden_states, indices, batch, seqlen)

flash_attn.layers.rotary
    apply_rotary_emb(
        x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None)
    apply_rotary_emb_func(
        x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None)
    apply_rotary_emb_torch(x, cos, sin, interleaved=False)
    apply_rotary_emb_qkv_(
        qkv, cos, sin, cos_k=None, sin_k=None, interleaved=False, seqlen_offsets=0, num_heads_q=None)
    apply_rotary_emb_kv_(kv, cos, sin, interleaved=False, seqlen_offsets=0)
    RotaryEmbedding(dim, base=10000.0, interleaved=False, scale_base=None, device=None)
    RotaryEmbedding.forward(self, qkv, kv=None, seqlen_offset=0, max_seqlen=None, num_heads_q=None)

flash_attn.losses.cross_entropy
    CrossEntropyLoss(
        ignore_index=-100, reduction='mean', label_smoothing=0.0, logit_scale=1.0, lse_square_scale=0.0,
        inplace_backward=False, process_group=None, return_z_loss=False)
    CrossEntropyLoss.forward(self, input, target, precomputed_lse=None)

flash_attn.ops.triton.cross_entropy
    cross_entropy_loss(
        logits, labels, precomputed_lse=None, label_smoothing=0.0, logit_scale=1.0, lse_square_scale=0.0,
        ignore_index=-100, inplace_backward=False, process_group=None)

flash_attn.ops.triton.rotary
    apply_rotary(
        x, cos, sin, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None, interleaved=False, inplace=False,
        conjugate=False)
"""
POSITIONAL = {"fwd": 13, "varlen_fwd": 21, "bwd": 19, "varlen_bwd": 24, "fwd_kvcache": 20}
"""How many arguments the entry points of the extension module take, none with a default."""


def rows():
    """Yield (module, name, signature as `inspect` prints it) for every entry of the table."""
    text = TABLE
    for short, long in ABBREVIATIONS.items():
        text = text.replace(short, long)
    for block in text.strip().split("\n\n"):
        module, _, body = block.partition("\n")
        for entry in re.split(r"\n(?=\w)", textwrap.dedent(body)):
            name, _, arguments = " ".join(entry.split()).partition("(")
            yield module, name, f"({arguments.strip()}"


ROWS = list(rows())


def find(module, name):
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def signature(function):
    """The signature without annotations."""
    full = inspect.signature(function)
    plain = [p.replace(annotation=p.empty) for p in full.parameters.values()]
    return full.replace(parameters=plain, return_annotation=full.empty)


@pytest.mark.parametrize(("module", "name", "expected"), ROWS, ids=[f"{m}.{n}" for m, n, _ in ROWS])
def test_signature(module, name, expected):
    assert str(signature(find(module, name))) == expected
    if not name.startswith("_"):
        assert find(module, name).__doc__


@pytest.mark.parametrize("module", sorted({module for module, *_ in ROWS}))
def test_the_table_has_every_public_function(module):
    exported = getattr(importlib.import_module(module), "__all__", [])
    functions = {n for n in exported if inspect.isfunction(find(module, n))}
    assert functions <= {"rearrange"} | {name for m, name, _ in ROWS if m in (module, "flash_attn")}


@pytest.mark.parametrize("name", [name for module, name, _ in ROWS if module == "flash_attn"])
def test_public_names(name):
    import flash_attn
    from flash_attn import flash_attn_interface

    assert name in flash_attn.__all__
    if name != "build_info":
        assert getattr(flash_attn_interface, name) is getattr(flash_attn, name)


@pytest.mark.parametrize("name", POSITIONAL)
def test_extension_module_is_positional(name):
    import flash_attn_2_cuda
    from flash_attn import flash_attn_interface

    assert flash_attn_interface.flash_attn_gpu is flash_attn_2_cuda
    parameters = inspect.signature(getattr(flash_attn_2_cuda, name)).parameters.values()
    assert len(parameters) == POSITIONAL[name]
    assert all(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


@pytest.mark.parametrize(
    "name",
    [
        "_flash_attn_forward",
        "_flash_attn_varlen_forward",
        "_flash_attn_backward",
        "_flash_attn_varlen_backward",
    ],
)
def test_custom_op_takes_what_its_function_takes(name):
    import torch

    from flash_attn import flash_attn_interface

    wrapped = getattr(flash_attn_interface, f"_wrapped{name}")
    assert wrapped is getattr(torch.ops.flash_attn, name)
    given = {
        argument.name: argument.default_value if argument.has_default_value() else inspect.Parameter.empty
        for argument in wrapped.default._schema.arguments
    }
    parameters = inspect.signature(getattr(flash_attn_interface, name)).parameters
    assert list(given.items()) == [(n, p.default) for n, p in parameters.items()]
