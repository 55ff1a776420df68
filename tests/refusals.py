"""A helper of the tests of bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def raises(
    kind: type[Exception], name: str, function: Callable[..., object], *arguments: Any, **named: Any
) -> None:
    """Assert that the call raises exactly `kind`, with a message that starts with `name`."""
    with pytest.raises(kind) as caught:
        function(*arguments, **named)
    assert type(caught.value) is kind
    assert str(caught.value).startswith(name), caught.value
    assert ", got " in str(caught.value)
