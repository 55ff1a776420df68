"""transformers with attn_implementation="flash_attention_2" against its own "eager", small random models.

In bf16 both differ from eager attention in fp32 by rounding; ours may differ by three times as much as eager.
transformers takes flash attention on CUDA only; on the CPU it is told that there is a GPU, and its code and
ours then run on CPU tensors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from importlib import metadata

import pytest
import torch
import torch.nn.functional as F
from problems import cu_seqlens
from torch import Tensor

import flash_attn
from flash_attn import bert_padding

pytest.importorskip("transformers", reason='transformers is not installed: pip install -e ".[clients]"')

from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    modeling_flash_attention_utils,
)
from transformers.utils import import_utils

try:
    metadata.version("flash-attn")
except metadata.PackageNotFoundError:
    pytest.skip("transformers looks for the installed distribution flash-attn", allow_module_level=True)

Losses = Callable[[PreTrainedModel], Tensor]
FLASH, EAGER = "flash_attention_2", "eager"
IGNORED = -100
VOCABULARY = 97
LENGTHS = (40, 7, 64)
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 128,
    "initializer_range": 0.15, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False,
}  # fmt: skip
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=20)),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config(**SIZES, sliding_window=20, attn_logit_softcapping=5.0, query_pre_attn_scalar=40),
    ),
}
"""Grouped queries; then a window as well; then a softcap and a scale of its own as well."""


@pytest.fixture
def where(device, require_backward, monkeypatch) -> Iterator[str]:
    """A device that transformers accepts, with nothing left of what it decided before."""
    require_backward(device, torch.bfloat16, SIZES["head_dim"])
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    import_utils.is_flash_attn_2_available.cache_clear()
    if device == "cpu":
        monkeypatch.setattr(import_utils, "is_torch_cuda_available", lambda: True)
    yield device
    import_utils.is_flash_attn_2_available.cache_clear()


def build(name: str, attention: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """The same weights for every attention and dtype: numbers that bf16 can hold."""
    kind, config = MODELS[name]
    torch.manual_seed(0)
    model = kind._from_config(config, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    return model.to(torch.bfloat16).to(device, dtype).train()


def tokens(batch: int, length: int, device: str) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), device=device)


def padding_mask(side: str, device: str) -> Tensor:
    """(3, 64), 1 where sequences of `LENGTHS` have a token."""
    places = torch.arange(max(LENGTHS), device=device)
    used = places < torch.tensor(LENGTHS, device=device)[:, None]
    return (used if side == "right" else used.flip(1)).long()


def labels_of(ids: Tensor, mask: Tensor) -> Tensor:
    """The ids where a token follows a token; what is predicted at padding means nothing."""
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[:, 1:].masked_fill_(mask[:, :-1] == 0, IGNORED)
    return labels


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of every token that has a label, for the token before it."""
    each = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    return each[labels[:, 1:].flatten() != IGNORED]


def relative(actual: Tensor, truth: Tensor) -> float:
    return ((actual.float() - truth).norm() / truth.norm()).item()


def assert_as_close_as_eager(ours: dict[str, Tensor], eager: dict[str, Tensor], truth: dict[str, Tensor]):
    for name, expected in truth.items():
        allowed = 3 * relative(eager[name], expected) + 1e-5
        error = relative(ours[name], expected)
        assert error <= allowed, f"{name}: {error:.3g}, allowed {allowed:.3g}"
        assert allowed < 0.3, f"{name}: so large an error allows anything"


def compare(name: str, device: str, run: Losses, reference: Losses | None = None) -> None:
    """Compare losses and the gradients of all weights; `run` and `reference` map a model to its losses."""
    results = []
    for attention, dtype in ((FLASH, torch.bfloat16), (EAGER, torch.bfloat16), (EAGER, torch.float32)):
        model = build(name, attention, dtype, device)
        of_tokens = (run if attention == FLASH else reference or run)(model)
        of_tokens.mean().backward()
        gradients = {key: weight.grad for key, weight in model.named_parameters()}
        results.append({"losses": of_tokens.detach(), **gradients})
    assert_as_close_as_eager(*results)


def test_it_takes_our_functions(where):
    build("llama", FLASH, torch.bfloat16, where)
    taken = modeling_flash_attention_utils
    assert taken._flash_fn is flash_attn.flash_attn_func
    assert taken._flash_varlen_fn is flash_attn.flash_attn_varlen_func
    # newer releases keep the compiler away from this one
    assert inspect.unwrap(taken._flash_with_kvcache_fn) is flash_attn.flash_attn_with_kvcache
    assert taken._pad_fn is bert_padding.pad_input and taken._unpad_fn is bert_padding.unpad_input
    wanted = {"dropout_p", "window_size", "softcap", "deterministic", "max_seqlen_q", "max_seqlen_k"}
    known = taken._process_flash_kwargs_fn.keywords["supports_mapping"]
    assert wanted <= {key for key, supported in known.items() if supported}


@pytest.mark.parametrize("name", MODELS)
def test_a_full_batch(where, name):
    ids = tokens(2, 64, where)
    compare(name, where, lambda model: losses(model(ids).logits, ids))


def test_a_wrong_attention_would_be_seen(where, monkeypatch):
    real = flash_attn.flash_attn_func
    monkeypatch.setattr(flash_attn, "flash_attn_func", lambda q, *kv, **named: real(1.2 * q, *kv, **named))
    with pytest.raises(AssertionError, match="allowed"):
        test_a_full_batch(where, "llama")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch(where, name, side):
    mask = padding_mask(side, where)
    ids = tokens(*mask.shape, where)
    labels = labels_of(ids, mask)
    compare(name, where, lambda model: losses(model(ids, attention_mask=mask).logits, labels))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("told_by", ["position_ids", "cu_seqlens"])
def test_packed_sequences(where, name, told_by):
    """Sequences end to end in one row, against eager attention on each sequence by itself."""
    parts = [tokens(1, length, where) for length in LENGTHS]
    ids = torch.cat(parts, 1)
    labels = ids.clone()
    bounds = cu_seqlens(LENGTHS, where)
    labels[0, bounds[:-1].long()] = IGNORED
    described = {"position_ids": torch.cat([torch.arange(n, device=where) for n in LENGTHS])[None]}
    if told_by == "cu_seqlens":
        described |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        described |= {"max_length_q": max(LENGTHS), "max_length_k": max(LENGTHS)}

    def separately(model):
        return torch.cat([losses(model(part).logits, part) for part in parts])

    compare(name, where, lambda model: losses(model(ids, **described).logits, labels), separately)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padded", [False, True])
def test_decoding(where, name, padded):
    """A prompt, then a few tokens at once, then one: keys from the cache, with padding on the left."""
    mask = padding_mask("left", where) if padded else torch.ones(3, max(LENGTHS), device=where).long()
    ids = tokens(*mask.shape, where)
    results = []
    for attention, dtype in ((FLASH, torch.bfloat16), (EAGER, torch.bfloat16), (EAGER, torch.float32)):
        model, cache, logits, start = build(name, attention, dtype, where).eval(), None, {}, 0
        for end in (58, 63, 64):
            with torch.no_grad():
                output = model(
                    ids[:, start:end], attention_mask=mask[:, :end] if padded else None,
                    position_ids=(mask[:, :end].cumsum(-1) - 1).clamp(min=0)[:, start:],
                    past_key_values=cache, use_cache=True,
                )  # fmt: skip
            logits[f"logits from {start} to {end}"] = output.logits[mask[:, start:end].bool()]
            cache, start = output.past_key_values, end
        results.append(logits)
    assert_as_close_as_eager(*results)


def test_training(where):
    """Some steps of AdamW under autocast on one padded batch: the loss falls as it does with eager."""
    mask = padding_mask("right", where)
    ids = tokens(*mask.shape, where)
    labels = labels_of(ids, mask)

    def curve(attention: str, autocast: bool) -> Tensor:
        model = build("llama", attention, torch.float32, where)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        steps = []
        for _ in range(12):
            with torch.autocast(where, torch.bfloat16, enabled=autocast):
                loss = losses(model(ids, attention_mask=mask).logits, labels).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps.append(loss.detach())
        return torch.stack(steps)

    ours, eager, truth = curve(FLASH, True), curve(EAGER, True), curve(EAGER, False)
    assert ours[-1] < ours[0] - 1
    assert_as_close_as_eager({"losses": ours}, {"losses": eager}, {"losses": truth})
