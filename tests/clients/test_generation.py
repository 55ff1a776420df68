"""transformers generates text with "flash_attention_2": with caches of its own, and in continuous batches.

Every token must be one that eager attention in fp32, given the same tokens before it, prefers to others, or
likes less than them by as little as bf16 can tell.
"""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from clients.test_transformers import EAGER, FLASH, VOCABULARY, build, where  # noqa: F401
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

import flash_attn

NEW = 24
PROMPTS = (33, 5, 60)


@pytest.fixture(autouse=True)
def cached_keys_kernel(device, require_split):
    require_split(device, torch.bfloat16, 64)


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """Return what `call` does, which waits for a thread of its own; fail where that takes so long."""
    answer: queue.Queue[Any] = queue.Queue()
    threading.Thread(target=lambda: answer.put(call()), daemon=True).start()
    try:
        return answer.get(timeout=seconds)
    except queue.Empty:
        pytest.fail(f"no answer within {seconds} s")


def logits(name: str, dtype: torch.dtype, device: str, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return build(name, EAGER, dtype, device).eval()(ids).logits.float()


def assert_preferred(name: str, device: str, ids: Tensor, generated: int) -> None:
    """`generated` tokens at the end of ids (b, s) are what the logits of the token before prefer."""
    truth = logits(name, torch.float32, device, ids)
    rounding = (logits(name, torch.bfloat16, device, ids) - truth).abs().max().item()
    before, chosen = truth[:, -generated - 1 : -1], ids[:, -generated:]
    behind = before.amax(-1) - before.gather(-1, chosen[..., None])[..., 0]
    assert behind.max().item() <= 2 * rounding
    assert (behind == 0).float().mean().item() > 0.9
    assert rounding < 0.2 * (before.amax(-1) - before.mean(-1)).mean().item()


def model_for_generation(name: str, device: str, attention: str = FLASH) -> PreTrainedModel:
    model = build(name, attention, torch.bfloat16, device).eval()
    model.generation_config = GenerationConfig(
        max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, use_cache=True, pad_token_id=0
    )
    return model


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_one_batch(where, name, cache):  # noqa: F811
    torch.manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, 33), device=where)
    made = model_for_generation(name, where).generate(ids, cache_implementation=cache)
    assert made.shape == (2, 33 + NEW) and torch.equal(made[:, :33], ids)
    assert_preferred(name, where, made, NEW)


def test_continuous_batching(where, monkeypatch):  # noqa: F811
    if where == "cpu":
        pytest.skip("transformers' continuous batching asks CUDA for its memory")
    calls = []
    real = flash_attn.flash_attn_with_kvcache

    def counted(*arguments, **named):
        calls.append(named["block_table"].shape)
        return real(*arguments, **named)

    functools.update_wrapper(counted, real)
    monkeypatch.setattr(flash_attn, "flash_attn_with_kvcache", counted)
    model = model_for_generation("llama", where, f"paged|{FLASH}")
    torch.manual_seed(1)
    prompts = [torch.randint(3, VOCABULARY, (n,)).tolist() for n in PROMPTS]
    results = within(
        120, functools.partial(model.generate_batch, prompts, generation_config=model.generation_config)
    )
    assert len(results) == len(prompts)
    for result in results.values():
        made = torch.tensor([result.prompt_ids + result.generated_tokens], device=where)
        assert len(result.generated_tokens) == NEW and result.prompt_ids in prompts
        assert_preferred("llama", where, made, NEW)
