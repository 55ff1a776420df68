"""The settings of the speed benchmarks and their cost."""

import pytest

from benchmarks.report import DIRECTIONS
from benchmarks.settings import MODEL_DIM, TOTAL_TOKENS, WORK, Setting, all_settings


def test_there_are_36_settings_all_of_the_same_size():
    settings = list(all_settings())
    assert len(settings) == len(set(settings)) == 36
    for setting in settings:
        batch, seqlen, num_heads, head_dim = setting.shape
        assert batch * seqlen == TOTAL_TOKENS
        assert num_heads * head_dim == MODEL_DIM


def test_settings_are_in_the_order_of_the_table():
    first, *_, last = all_settings()
    assert first == Setting(64, "full", 512)
    assert last == Setting(256, "causal", 16384)
    assert [s.seqlen for s in all_settings(head_dims=[128], masks=["causal"], seqlens=[1024, 512])] == [
        1024,
        512,
    ]


@pytest.mark.parametrize("seqlen", [512, 16384])
def test_forward_flops(seqlen):
    full, causal = Setting(128, "full", seqlen), Setting(128, "causal", seqlen)
    assert full.forward_flops == 4 * 16384 * seqlen * 2048
    assert causal.forward_flops * 2 == full.forward_flops


@pytest.mark.parametrize(("direction", "factor"), [("forward", 1), ("backward", 2.5), ("both", 3.5)])
def test_tflops_of_one_millisecond(direction, factor):
    setting = Setting(128, "full", 1024)
    assert setting.tflops(1.0, direction) == pytest.approx(factor * setting.forward_flops / 1e9)
    assert setting.tflops(2.0, direction) == pytest.approx(setting.tflops(1.0, direction) / 2)


def test_every_direction_has_a_cost():
    assert set(WORK) == set(DIRECTIONS)


def test_a_sequence_longer_than_all_tokens_is_one_sequence():
    assert Setting(64, "full", 2 * TOTAL_TOKENS).batch == 1
