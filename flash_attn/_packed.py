"""Arguments that pack q, k and v, or k and v, in one tensor: their checks, under the packed tensor's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from flash_attn import _validation as check
from flash_attn._arguments import check_tensor, fail

Result = TypeVar("Result")
REFUSALS = (TypeError, ValueError, NotImplementedError)


def check_packed(x: Tensor, name: str, rank: int, count: int) -> None:
    """Check that x of that rank packs `count` tensors (..., heads, d) as (..., count, heads, d)."""
    check_tensor(x, name)
    if x.dim() != rank or x.shape[-3] != count:
        fail(ValueError, name, f"{rank}-dimensional with {count} in the last but two", tuple(x.shape))


def check_parts(x: Tensor, name: str, q: Tensor | None = None) -> None:
    """Check the parts of a packed tensor, alone or against q, under the packed tensor's name."""
    part = x.select(-3, 0)
    labels = ("q" if q is not None else name, name, name)
    q = part if q is None else q
    check.check_qkv(q, part, part, part.dim(), part.dim(), labels)
    if part.dim() == 4:
        check.check_batch(part, q.shape[0], name)


def blame_parts(
    run: Callable[[], Result], packed: Tensor, name: str, q: Tensor | None = None,
    lengths: tuple[Any, Any] | None = None,
) -> Result:  # fmt: skip
    """Return `run()`, a call with the parts of a packed tensor: what it refuses of them is said of that one.

    `q` is a tensor beside it; `lengths` is (cu_seqlens, max_seqlen) where these count for all parts. It is no
    context manager, since compilers before torch 2.5 trace none that holds a tensor.
    """
    try:
        return run()
    except REFUSALS as error:
        refusal = error
    check_parts(packed, name, q)
    if lengths is not None:
        cu_seqlens, max_seqlen = lengths
        check.check_cu_seqlens(cu_seqlens, "cu_seqlens", packed)
        max_seqlen = check.check_max_seqlen(max_seqlen, "max_seqlen")
        if packed.is_cpu:
            check.check_lengths(cu_seqlens, "cu_seqlens", packed.shape[0], max_seqlen, "max_seqlen")
    raise refusal
