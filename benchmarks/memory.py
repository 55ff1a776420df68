"""Peak GPU memory of one forward pass by sequence length, beside its outputs and standard attention."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.providers import ours, standard_attention
from benchmarks.settings import SEQLENS

NUM_HEADS = 16
HEAD_DIM = 128
MIB = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seqlens", type=int, nargs="+", default=SEQLENS)


def peak_bytes(run: Callable[[], Tensor]) -> int | None:
    """Peak of what `run` allocates on the current GPU beyond what was there; None if it does not fit."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        run()
    except torch.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated() - before


def output_bytes(seqlen: int) -> int:
    """Size of out (bf16) and softmax_lse (fp32), for one sequence."""
    return NUM_HEADS * seqlen * (HEAD_DIM * 2 + 4)


def measure(seqlen: int) -> dict[str, int | None]:
    """Bytes for batch 1, causal, bf16."""
    q, k, v = (
        torch.randn(1, seqlen, NUM_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(3)
    )
    return {
        "seqlen": seqlen,
        "outputs": output_bytes(seqlen),
        "flash_attn": peak_bytes(ours(q, k, v, causal=True).run),
        "standard": peak_bytes(lambda: standard_attention(q, k, v, causal=True)),
    }


def run(args: argparse.Namespace) -> int:
    records = []
    print(report.aligned(["seqlen", "out + lse", "flash_attn", "standard", "MiB"]))
    for seqlen in args.seqlens:
        record = measure(seqlen)
        records.append(record)
        sizes = [record[name] for name in ("outputs", "flash_attn", "standard")]
        print(report.aligned([str(seqlen), *("no room" if n is None else f"{n / MIB:.2f}" for n in sizes)]))
    report.write_json(args.output / "memory.json", report.environment(), records)
    return 0
