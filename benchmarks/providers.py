"""Who computes attention: flash_attn, and what torch brings along (FlashAttention-2, cuDNN, its default)."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

OURS = "flash_attn"
TORCH_FA2 = "torch FA2"
CUDNN = "cuDNN"
TORCH_SDPA = "torch SDPA"


@dataclass(frozen=True)
class Call:
    """One attention problem bound to one provider.

    `run()` launches it once; `context()` picks torch's backend and is entered around it, untimed.
    """

    run: Callable[[], Tensor]
    context: Callable[[], AbstractContextManager[None]] = field(default=nullcontext)
    heads_first: bool = False

    def result(self) -> Tensor:
        """Launch once; return (batch, seqlen, num_heads, head_dim)."""
        with self.context():
            out = self.run()
        return out.transpose(1, 2) if self.heads_first else out


def ours(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Call:
    """This project. q, k, v: (batch, seqlen, num_heads, head_dim), as for every provider here."""
    from flash_attn import flash_attn_func

    return Call(lambda: flash_attn_func(q, k, v, causal=causal))


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, backend: SDPBackend | None = None) -> Call:
    """torch's attention on transposed views of the same tensors, so that nobody pays for a copy."""
    qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))

    grouped = {"enable_gqa": True} if q.shape[2] != k.shape[2] else {}

    def run() -> Tensor:
        return F.scaled_dot_product_attention(qt, kt, vt, is_causal=causal, **grouped)

    context = nullcontext if backend is None else lambda: sdpa_kernel(backend)
    return Call(run, context, heads_first=True)


def forward_calls(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> dict[str, Call]:
    """The providers of the forward benchmark, ours first, all on the same tensors."""
    return {
        OURS: ours(q, k, v, causal),
        TORCH_FA2: sdpa(q, k, v, causal, SDPBackend.FLASH_ATTENTION),
        CUDNN: sdpa(q, k, v, causal, SDPBackend.CUDNN_ATTENTION),
    }


@cache
def _report_dropped(name: str, why: str) -> None:
    print(f"{name} is left out: {why}", flush=True)


def runnable(calls: dict[str, Call]) -> dict[str, Call]:
    """The calls that torch can run here: a backend that this GPU or this build of torch lacks is left out,
    and why is printed once.

    A failure of ours is a failure of the benchmark, so it is not caught.
    """
    kept = {}
    for name, call in calls.items():
        try:
            with call.context():
                call.run()
        except RuntimeError as error:
            if name == OURS:
                raise
            _report_dropped(name, str(error).strip().partition("\n")[0])
        else:
            kept[name] = call
    return kept


def standard_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v in the inputs' dtype, with the whole score matrix in memory."""
    qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
    scores = qt @ kt.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores.masked_fill_(hidden, float("-inf"))
    return (scores.softmax(-1) @ vt).transpose(1, 2)
