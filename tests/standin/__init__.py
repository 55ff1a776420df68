"""The library's stand-in for tests without a GPU, installed below the CUDA backend by the fixture `install`.

It has the functions of `library.Library` and records their unpacked parameters. Unless told not to, it also
computes what the kernels compute, in fp64 by the oracle's formulas, from the packed parameters alone, and
refuses what a kernel would fault on or read wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch

from flash_attn import _abi

from . import attention, cache, rotary
from .memory import Memory, Refused
from .params import FIELDS, check_forward, unpack

__all__ = ["FIELDS", "STREAM", "StandIn", "make", "strides", "unpack"]

STREAM = 4242


class StandIn:
    """Stands in for the loaded library, on CPU memory.

    With a `status` other than 0, or without `computes`, it only records. `calls` and the like are lists of
    (parameters, stream). With `hopper` it plans as if it had kernels of the wgmma design.
    """

    kernels = targets = ()

    def __init__(self, status: int = 0, family: int = 0, computes: bool = True, hopper: bool = False) -> None:
        self.calls, self.probs_calls, self.backward_calls = [], [], []
        self.cache_calls, self.rotary_calls = [], []
        self.status, self.family, self.computes, self.hopper = status, family, computes, hopper
        self.text = b"kernel forward_sm90_bf16_d64_full is not built"
        self.last_error: Callable[[], bytes] = lambda: self.text

    def _run(
        self, kind: str, calls: list, compute: Callable[[Memory, SimpleNamespace], None], packed: bytes,
        stream: int,
    ) -> int:  # fmt: skip
        params = unpack(kind, packed)
        calls.append((params, stream))
        if self.status or not self.computes:
            return self.status
        try:
            with torch.no_grad():
                compute(Memory(), params)
        except Refused as error:
            self.text = f"the stand-in refuses {kind}: {error}".encode()
            return int(_abi.Status.INVALID_ARGUMENT)
        return int(_abi.Status.OK)

    def forward(self, packed: bytes, stream: int) -> int:
        return self._run("forward", self.calls, attention.forward, packed, stream)

    def dropout_probs(self, packed: bytes, stream: int) -> int:
        return self._run("forward", self.probs_calls, attention.dropout_probs, packed, stream)

    def backward(self, packed: bytes, stream: int) -> int:
        return self._run("backward", self.backward_calls, attention.backward, packed, stream)

    def cache(self, packed: bytes, stream: int) -> int:
        return self._run("cache", self.cache_calls, cache.attend, packed, stream)

    def rotary(self, packed: bytes, stream: int) -> int:
        return self._run("rotary", self.rotary_calls, rotary.rotate_rows, packed, stream)

    def draws_tiles(self, device: int, family: int) -> int:
        return self.hopper

    def plan_cache(self, packed: bytes, plan: _abi.CachePlan) -> int:
        """Split keys that fill more than one block, and leave many rows of an aligned cache to wgmma."""
        params = unpack("cache", packed)
        p = params.forward
        check_forward(p)
        rows = p.seqlen_q * (p.num_heads // p.num_heads_k)
        plan.num_splits = params.num_splits or max(1, min(3, p.seqlen_k // 64))
        plan.design = int(self.hopper and rows > 64 and p.k_row_stride % 8 == 0)
        return int(_abi.Status.OK)

    def plan_backward(self, packed: bytes, plan: _abi.BackwardPlan) -> int:
        """Give each of the heads that share keys a part, unless nobody wants the gradients of keys."""
        params = unpack("backward", packed)
        p = params.forward
        check_forward(p)
        plan.key_parts = p.num_heads // p.num_heads_k if params.dk else 1
        plan.head_dim = next(d for d in _abi.HEAD_DIMS if d >= max(p.head_dim, p.head_dim_v))
        return int(_abi.Status.OK)

    def forward_kernel(self, packed: bytes) -> bytes | None:
        return b"stand-in"

    backward_kernel = cache_kernel = forward_kernel


def make(
    batch=2, seqlen_q=10, seqlen_k=12, heads=4, heads_k=2, head_dim=64, dtype=torch.bfloat16, head_dim_v=None
):  # fmt: skip
    """Return random q (b, sq, h, d), k (b, sk, hk, d) and v (b, sk, hk, dv)."""
    q = torch.randn(batch, seqlen_q, heads, head_dim).to(dtype)
    dims = head_dim, head_dim if head_dim_v is None else head_dim_v
    return q, *(torch.randn(batch, seqlen_k, heads_k, dim).to(dtype) for dim in dims)


def strides(params: SimpleNamespace, name: str) -> tuple[int, ...]:
    """Return the strides of batch, row and head that parameters have for a tensor."""
    return tuple(getattr(params, f"{name}_{axis}_stride") for axis in ("batch", "row", "head"))
