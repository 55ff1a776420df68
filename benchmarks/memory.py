"""Peak GPU memory by sequence length, beside standard attention and what must exist.

Forward, then forward and backward, of one causal sequence in bf16. What is there before the call (q, k, v and
the gradient of the output) is not counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks import report
from benchmarks.providers import OURS, STANDARD, Call, Problem, providers
from benchmarks.settings import SEQLENS

NUM_HEADS = 16
HEAD_DIM = 128
BYTES = 2
MIB = 2**20
NEEDED = "needed"
NAMES = (NEEDED, OURS, STANDARD)
DIRECTIONS = ("forward", "both")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seqlens", type=int, nargs="+", default=SEQLENS)


def peak_bytes(call: Call) -> int | None:
    """Peak of what a call allocates on the current GPU beyond what was there; None if it does not fit."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        call.run()
    except torch.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated() - before


def needed_bytes(seqlen: int, direction: str) -> int:
    """Size of out and softmax_lse (fp32), and with a backward of dq, dk and dv as well."""
    tensors = 1 if direction == "forward" else 4
    return NUM_HEADS * seqlen * (HEAD_DIM * BYTES * tensors + 4)


def measure(seqlen: int) -> dict[str, Any]:
    """Bytes by direction, then by what is measured."""
    shape = 1, seqlen, NUM_HEADS, HEAD_DIM
    tensors = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    problem, known = Problem(*tensors, causal=True), providers()
    record: dict[str, Any] = {"seqlen": seqlen}
    for direction in DIRECTIONS:
        peaks = {name: peak_bytes(getattr(known[name], direction)(problem)) for name in (OURS, STANDARD)}
        record[direction] = {NEEDED: needed_bytes(seqlen, direction), **peaks}
    return record


def cells(record: Mapping[str, Any]) -> report.Cells:
    """A row of the table: MiB by direction, then by what is measured."""
    sizes = {f"{direction}, {name}": record[direction][name] for direction in DIRECTIONS for name in NAMES}
    texts = {key: "no room" if size is None else f"{size / MIB:.2f}" for key, size in sizes.items()}
    return {"MiB by seqlen": str(record["seqlen"]), **texts}


def run(args: argparse.Namespace) -> int:
    records = report.measured(args.seqlens, measure, cells)
    facts = report.environment()
    report.write_json(args.output / "memory.json", facts, records)
    report.plot_memory(args.output / "memory.png", records, facts)
    return 0
