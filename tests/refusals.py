"""Helpers of the tests of bad input."""

from __future__ import annotations

import pytest
import torch


def zeros(*shape, dtype=torch.bfloat16, **extra):
    return torch.zeros(*shape, dtype=dtype, **extra)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def raises(kind, name, function, *arguments, **named):
    """Assert that the call raises exactly `kind`, with a message that starts with `name`."""
    with pytest.raises(kind) as caught:
        function(*arguments, **named)
    assert type(caught.value) is kind
    assert str(caught.value).startswith(name), caught.value
    assert ", got " in str(caught.value)
