"""Checks of numbers, flags and windows: one conversion, one error."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from oracle import Options, visible
from problems import zeros
from refusals import raises

import flash_attn
from flash_attn import _arguments, _validation

Q, K = zeros(2, 10, 4, 32), zeros(2, 12, 2, 32)
NUMBERS = [5, np.int64(5), np.uint8(5), torch.tensor(5), torch.tensor([5])]
SETS = [5], {5}, {5: 5}, np.array([1, 2]), torch.ones(2)
NO_NUMBERS = ["5", b"5", bytearray(b"5"), None, object(), 1j, *SETS]


class TestNumbers:
    """Arguments that are numbers go through one conversion."""

    @pytest.mark.parametrize("x", [*NUMBERS, True, np.array(5)], ids=repr)
    def test_integers(self, x):
        assert type(_arguments.as_int(x, "x")) is int and _arguments.as_int(x, "x") == int(x)

    @pytest.mark.parametrize("x", [*NO_NUMBERS, 5.0, np.float32(5), torch.tensor(5.0)], ids=repr)
    def test_no_integers(self, x):
        raises(TypeError, "x", _arguments.as_int, x, "x")

    @pytest.mark.parametrize(
        "x", [*NUMBERS, 5.0, np.float32(5), torch.tensor(5.0), Fraction(5), Decimal(5)], ids=repr
    )
    def test_floats(self, x):
        assert _arguments.as_float(x, "x") == 5.0

    @pytest.mark.parametrize("x", NO_NUMBERS, ids=repr)
    def test_no_floats(self, x):
        raises(TypeError, "x", _arguments.as_float, x, "x")

    @pytest.mark.parametrize("x", [*NUMBERS, True, np.bool_(1), 1.0, torch.tensor(True)], ids=repr)
    def test_flags(self, x):
        assert _arguments.as_flag(x, "x") is True

    @pytest.mark.parametrize("x", [None, False, np.bool_(0), 0, 0.0, torch.tensor(False)], ids=repr)
    def test_flags_that_are_not_set(self, x):
        assert _arguments.as_flag(x, "x") is False

    @pytest.mark.parametrize("x", [x for x in NO_NUMBERS if x is not None] + ["False", ()], ids=repr)
    def test_no_flags(self, x):
        raises(TypeError, "x", _arguments.as_flag, x, "x")

    @pytest.mark.parametrize("name", ["causal", "rotary_interleaved"])
    def test_flags_of_calls(self, name):
        if name == "causal":
            raises(TypeError, name, flash_attn.flash_attn_func, Q, K, K, causal="False")
        tables = {"rotary_cos": zeros(40, 8), "rotary_sin": zeros(40, 8), "cache_seqlens": 1}
        cache = Q, zeros(2, 40, 2, 32), zeros(2, 40, 2, 32), K, K
        if name == "rotary_interleaved":
            raises(TypeError, name, flash_attn.flash_attn_with_kvcache, *cache, **tables, **{name: "False"})

    @pytest.mark.parametrize("kind", [tuple, list, torch.tensor, np.array], ids=lambda kind: kind.__name__)
    def test_windows(self, kind):
        assert _validation.as_window(kind([1, 2])) == (1, 2)

    def test_windows_of_any_size(self):
        assert _validation.as_window((2**70, -(2**70))) == (2**31 - 1, -1)

    @pytest.mark.parametrize("x", [{1, 2}, {1: 0, 2: 0}, "12", None, 3, (1,), (1, 2, 3), (1.0, 2)], ids=repr)
    def test_no_windows(self, x):
        raises(TypeError, "window_size", _validation.as_window, x)

    @pytest.mark.parametrize("scale", [1e38, -1e38, 2.0**101])
    def test_a_scale_whose_scores_overflow(self, scale):
        raises(ValueError, "softmax_scale", flash_attn.flash_attn_func, Q, K, K, softmax_scale=scale)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(1, 1), (1, 5), (5, 1), (4, 7), (7, 4), (5, 5)])
def test_a_window_is_unlimited_only_where_it_hides_no_key(causal, seqlen_q, seqlen_k):
    for left in range(-1, seqlen_k + 2):
        for right in range(-1, seqlen_q + 2):
            options = Options(causal=causal, window_size=(left, right))
            found = _validation.normalise_window(causal, left, right, seqlen_q, seqlen_k)
            normal = Options(window_size=found)
            seen, expected = (visible(seqlen_q, seqlen_k, x, torch.device("cpu")) for x in (normal, options))
            assert torch.equal(seen, expected), (left, right, found)
            assert (found[0] < 0) == (left < 0 or left >= seqlen_k - 1)
