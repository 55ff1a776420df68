"""Who computes attention: flash_attn, and what torch brings along (FlashAttention-2, cuDNN, its default)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

OURS = "flash_attn"
DETERMINISTIC = "deterministic"
TORCH_FA2 = "torch FA2"
CUDNN = "cuDNN"
TORCH_SDPA = "torch SDPA"
STANDARD = "standard"

AGREEMENT = 1e-2
"""Relative error by which results of ours and a peer may differ."""

Context = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Problem:
    """q, k, v and the gradient of the output, all (batch, seqlen, num_heads, head_dim)."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    causal: bool


@dataclass(frozen=True)
class Call:
    """One attention problem bound to one provider.

    `run()` launches it once; `context()` picks torch's backend and is entered around it, untimed.
    """

    run: Callable[[], tuple[Tensor, ...]]
    context: Context = field(default=nullcontext)
    heads_first: bool = False

    def results(self) -> tuple[Tensor, ...]:
        """Launch once; return out, dq, dk, dv or those of them that `run` makes, heads after seqlen."""
        with self.context():
            made = self.run()
        return tuple(x.transpose(1, 2) if self.heads_first else x for x in made)


@dataclass(frozen=True)
class Provider:
    """`attend(q, k, v, causal)`, and its calls of one problem by what they compute.

    Where `heads_first`, it takes transposed views of the problem's tensors, so that nobody pays for a copy.
    """

    attend: Callable[[Tensor, Tensor, Tensor, bool], Tensor]
    context: Context = field(default=nullcontext)
    heads_first: bool = False

    def _view(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2) if self.heads_first else x

    def _leaves(self, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (self._view(x).detach().requires_grad_() for x in (problem.q, problem.k, problem.v))
        return q, k, v

    def _call(self, run: Callable[[], tuple[Tensor, ...]]) -> Call:
        return Call(run, self.context, self.heads_first)

    def forward(self, problem: Problem) -> Call:
        """The output, recording nothing for a backward."""
        q, k, v = (self._view(x) for x in (problem.q, problem.k, problem.v))
        return self._call(lambda: (self.attend(q, k, v, problem.causal),))

    def backward(self, problem: Problem) -> Call:
        """dq, dk and dv by autograd, from an output that the first run makes and all runs share."""
        leaves, dout = self._leaves(problem), self._view(problem.dout)
        output = cache(lambda: self.attend(*leaves, problem.causal))
        return self._call(lambda: torch.autograd.grad(output(), leaves, dout, retain_graph=True))

    def both(self, problem: Problem) -> Call:
        """The output, then dq, dk and dv by autograd."""
        leaves, dout = self._leaves(problem), self._view(problem.dout)

        def run() -> tuple[Tensor, ...]:
            out = self.attend(*leaves, problem.causal)
            return out.detach(), *torch.autograd.grad(out, leaves, dout)

        return self._call(run)


def _ours(deterministic: bool) -> Provider:
    from flash_attn import flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return flash_attn_func(q, k, v, causal=causal, deterministic=deterministic)

    return Provider(attend)


def ours_with_kvcache(
    q: Tensor, k: Tensor, v: Tensor, num_splits: int = 0, page_size: int = 0, new: bool = False,
    causal: bool = False,
) -> Call:  # fmt: skip
    """Our call over the cache k, v; with `new`, one key is overwritten by appending it.

    With `page_size`, the same numbers count as pages in random order.
    """
    from flash_attn import flash_attn_with_kvcache

    batch, seqlen = k.shape[:2]
    appended = (k[:, :1].clone(), v[:, :1].clone()) if new else (None, None)
    lengths = torch.full((batch,), seqlen - new, dtype=torch.int32, device=q.device)
    table = None
    if page_size:
        k, v = (x.view(-1, page_size, *x.shape[2:]) for x in (k, v))
        table = torch.randperm(k.shape[0], device=q.device).int().view(batch, -1)

    def run() -> tuple[Tensor]:
        out = flash_attn_with_kvcache(
            q, k, v, *appended, cache_seqlens=lengths, block_table=table, causal=causal, num_splits=num_splits
        )
        return (out,)

    return Call(run)


def _sdpa(backend: SDPBackend | None = None) -> Provider:
    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    context = nullcontext if backend is None else lambda: sdpa_kernel(backend)
    return Provider(attend, context, heads_first=True)


def standard_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v in the inputs' dtype, with the whole score matrix in memory."""
    qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
    scores = qt @ kt.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores.masked_fill_(hidden, float("-inf"))
    return (scores.softmax(-1) @ vt).transpose(1, 2)


def providers() -> dict[str, Provider]:
    """Every provider by its name."""
    return {
        OURS: _ours(deterministic=False),
        DETERMINISTIC: _ours(deterministic=True),
        TORCH_FA2: _sdpa(SDPBackend.FLASH_ATTENTION),
        CUDNN: _sdpa(SDPBackend.CUDNN_ATTENTION),
        TORCH_SDPA: _sdpa(),
        STANDARD: Provider(standard_attention),
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
            if name in (OURS, DETERMINISTIC):
                raise
            _report_dropped(name, str(error).strip().partition("\n")[0])
        else:
            kept[name] = call
    return kept


def check_agreement(calls: Mapping[str, Call]) -> None:
    """Compare our results with FA2's, or cuDNN's where that is missing, by the relative Frobenius norm."""
    peer = next((name for name in (TORCH_FA2, CUDNN) if name in calls), None)
    if peer is None:
        return
    theirs = calls[peer].results()
    for name in (name for name in (OURS, DETERMINISTIC) if name in calls):
        for ours, other in zip(calls[name].results(), theirs, strict=True):
            difference = torch.linalg.vector_norm(ours.float() - other.float())
            error = (difference / torch.linalg.vector_norm(other.float())).item()
            if not error < AGREEMENT:
                raise AssertionError(
                    f"{name} and {peer} differ: relative error {error:.3g}, allowed {AGREEMENT}"
                )
