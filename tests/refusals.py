"""Helpers of the tests of bad input."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch


def raises(
    kind: type[Exception], name: str, function: Callable[..., object], *arguments: Any, **named: Any
) -> None:
    """Assert that the call raises exactly `kind`, with a message that starts with `name`."""
    with pytest.raises(kind) as caught:
        function(*arguments, **named)
    assert type(caught.value) is kind
    assert str(caught.value).startswith(name), caught.value
    assert ", got " in str(caught.value)


def needing_gradients(arguments: Iterable[Any]) -> list[Any]:
    """Return the arguments, copies of the floating-point tensors among them, which require grad."""
    return [
        x.clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in arguments
    ]
