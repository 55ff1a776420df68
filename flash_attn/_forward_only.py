"""What autograd sees of calls that have no gradient: results whose backward raises."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


class _ForwardOnly(torch.autograd.Function):
    """`run()`, whose results depend on `inputs` by a derivative that nobody computes."""

    @staticmethod
    def forward(ctx: Any, refusal: str, run: Callable[[], Any], *inputs: Tensor) -> Any:
        ctx.refusal = refusal
        return run()

    @staticmethod
    def backward(ctx: Any, *unused: Any) -> Any:
        raise NotImplementedError(ctx.refusal)


def forward_only(what: str, run: Callable[[], Any], *inputs: Any) -> Any:
    """Return `run()`; where autograd records and an input requires grad, a backward through it raises.

    Raises (the backward):
        NotImplementedError: always, naming `what`.
    """
    return _refusing(f"{what} has no gradient: forward only", run, inputs)


def _refusing(refusal: str, run: Callable[[], Any], inputs: Iterable[Any]) -> Any:
    if not torch.is_grad_enabled():
        return run()
    recorded = [x for x in inputs if x is not None and isinstance(x, Tensor) and x.requires_grad]
    return _ForwardOnly.apply(refusal, run, *recorded) if recorded else run()


def differentiable_once(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate the backward of an autograd function: to differentiate its gradients raises, always.

    torch's `once_differentiable` raises only where the incoming gradient requires grad; the saved tensors
    count as much.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(backward)
        def wrapper(ctx: Any, *gradients: Any) -> Any:
            if not torch.is_grad_enabled():
                return backward(ctx, *gradients)
            refusal = f"trying to differentiate twice {what}, which has no second derivative"
            return _refusing(refusal, lambda: backward(ctx, *gradients), (*gradients, *ctx.saved_tensors))

        return wrapper

    return decorate
