"""Host time of one call on tensors so small that the GPU is never the bottleneck."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

import torch

from benchmarks import report
from benchmarks.providers import (
    CUDNN,
    OURS,
    TORCH_FA2,
    TORCH_SDPA,
    Call,
    Problem,
    ours_with_kvcache,
    providers,
    runnable,
)
from benchmarks.timing import host_medians

SHAPE = (1, 16, 2, 64)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batches", type=int, default=100, help="batches of 100 calls per provider")


def make_problem() -> Problem:
    """Tensors of `SHAPE`."""
    q, k, v, dout = (torch.randn(SHAPE, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    return Problem(q, k, v, dout, causal=True)


def of_ours(problem: Problem) -> dict[str, Callable[[], Call]]:
    """Our calls by name, to be bound to the package that is imported then."""
    q, k, v = problem.q[:, :1], problem.k, problem.v
    return {
        "func": lambda: providers()[OURS].forward(problem),
        "func and backward": lambda: providers()[OURS].both(problem),
        "with_kvcache": lambda: ours_with_kvcache(q, k, v),
        "with_kvcache, k, v": lambda: ours_with_kvcache(q, k, v, new=True),
        "with_kvcache, pages": lambda: ours_with_kvcache(q, k, v, page_size=16),
    }


def our_calls() -> dict[str, Callable[[], Call]]:
    """Our calls on tensors of `SHAPE`, whose host time `python -m benchmarks compare` compares."""
    return of_ours(make_problem())


def calls() -> dict[str, Call]:
    """Every provider on the same q, k, v of `SHAPE`, without gradients; torch's allocations for scale."""
    problem, known = make_problem(), providers()
    names, q = (OURS, TORCH_SDPA, TORCH_FA2, CUDNN), problem.q
    return {
        **runnable({name: known[name].forward(problem) for name in names}),
        **{name: make() for name, make in of_ours(problem).items() if "kvcache" in name},
        "torch.empty": Call(lambda: (torch.empty(SHAPE, device="cuda", dtype=torch.bfloat16),)),
        "torch.empty_like": Call(lambda: (torch.empty_like(q),)),
    }


def cells(name: str, medians: Mapping[str, float]) -> report.Cells:
    """A row of the table: the call, its microseconds, and these over those of torch's own function."""
    us = medians[name]
    return {"call": name, "us": f"{us:.2f}", f"over {TORCH_SDPA}": f"{us / medians[TORCH_SDPA]:.2f}"}


def run(args: argparse.Namespace) -> int:
    medians = host_medians(calls(), args.batches)
    print(report.table([cells(name, medians) for name in medians]))
    records = [{"name": name, "microseconds": round(value, 2)} for name, value in medians.items()]
    report.write_json(args.output / "host.json", report.environment(), records)
    return 0
