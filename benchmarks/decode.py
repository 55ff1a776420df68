"""Decoding beside torch's FlashAttention-2 and cuDNN: one query token over a KV cache, as CUDA graph replays
with a cold L2. The table has our microseconds and KV bytes read per second, and the time of others over ours.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import report
from benchmarks.providers import CUDNN, OURS, TORCH_FA2, Call, check_agreement, ours_with_kvcache, runnable
from benchmarks.timing import cold_medians

HEAD_DIM = 128
HEADS = ((32, 8), (32, 32), (16, 1))
SIZES = ((1, 4096), (1, 65536), (8, 8192), (64, 4096), (128, 1024))
PAGE_SIZES = (16, 64, 256)


@dataclass(frozen=True)
class Problem:
    """`batch` sequences with `seqlen` keys each in the cache."""

    num_heads: int
    num_heads_k: int
    batch: int
    seqlen: int

    @property
    def cache_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.seqlen, self.num_heads_k, HEAD_DIM

    @property
    def cache_elements(self) -> int:
        return self.batch * self.seqlen * self.num_heads_k * HEAD_DIM

    @property
    def kv_bytes(self) -> int:
        return 2 * 2 * self.cache_elements


def problems() -> Iterator[Problem]:
    """The rows of the table."""
    for heads, size in product(HEADS, SIZES):
        yield Problem(*heads, *size)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--splits", type=int, nargs="*", default=[], help="also with these num_splits")
    parser.add_argument("--readme", type=Path, help="rewrite the table of this README")
    parser.add_argument("--no-pages", action="store_true", help="only the contiguous cache")


class Tensors:
    """q, a contiguous cache and its pages in random order, of standard normal numbers drawn once."""

    def __init__(self) -> None:
        largest = max(problem.cache_elements for problem in problems())
        generator = torch.Generator("cuda").manual_seed(0)
        self.numbers = torch.randn(2 * largest, device="cuda", dtype=torch.bfloat16, generator=generator)

    def of(self, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
        count = problem.cache_elements
        k, v = (self.numbers[i * count : (i + 1) * count].view(problem.cache_shape) for i in range(2))
        q = torch.randn(problem.batch, 1, problem.num_heads, HEAD_DIM, device="cuda", dtype=k.dtype)
        return q, k, v


def theirs(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Call:
    """One of torch's kernels on transposed views of the same tensors."""
    qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
    grouped = {"enable_gqa": True} if q.shape[2] != k.shape[2] else {}
    return Call(
        lambda: (F.scaled_dot_product_attention(qt, kt, vt, **grouped),),
        lambda: sdpa_kernel(backend),
        heads_first=True,
    )


def measure(problem: Problem, tensors: Tensors, splits: list[int], pages: bool) -> dict[str, float]:
    """Microseconds of every call."""
    q, k, v = tensors.of(problem)
    calls = runnable(
        {
            OURS: ours_with_kvcache(q, k, v),
            TORCH_FA2: theirs(q, k, v, SDPBackend.FLASH_ATTENTION),
            CUDNN: theirs(q, k, v, SDPBackend.CUDNN_ATTENTION),
        }
    )
    check_agreement(calls)
    calls |= {f"page {n}": ours_with_kvcache(q, k, v, page_size=n) for n in PAGE_SIZES if pages}
    calls |= {f"splits {n}": ours_with_kvcache(q, k, v, num_splits=n) for n in splits}
    return {name: 1e3 * ms for name, ms in cold_medians(calls).items()}


def cells(record: Mapping[str, Any]) -> report.Cells:
    """A row of the table: sizes, our time and bandwidth, the time of others over ours."""
    problem = Problem(*(record[field.name] for field in fields(Problem)))
    times = record["us"]
    return {
        "heads": f"{problem.num_heads}/{problem.num_heads_k}",
        "batch": str(problem.batch),
        "keys": str(problem.seqlen),
        f"{OURS}, us": f"{times[OURS]:.1f}",
        "TB/s": f"{problem.kv_bytes / times[OURS] * 1e-6:.2f}",
        **{name: f"{time / times[OURS]:.2f}" for name, time in times.items() if name != OURS},
    }


def markdown(records: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    """The table with its circumstances, for the README."""
    lines = [
        f"{facts['device']}, driver {facts['driver']}, torch {facts['torch']}, {facts['dtype']}, head dim "
        f"{HEAD_DIM}, {facts['date']}, commit {report.short_commit(facts['commit'])}. Microseconds of one "
        "call with one query token, KV bytes read per second, and the time of others over ours (pages: ours, "
        "of that many keys, in random order):",
        "",
        report.table([cells(record) for record in records], "github"),
    ]
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    tensors = Tensors()

    def record(problem: Problem) -> dict[str, Any]:
        times = measure(problem, tensors, args.splits, not args.no_pages)
        return {**asdict(problem), "us": {name: round(time, 2) for name, time in times.items()}}

    records = report.measured(problems(), record, cells)
    facts = report.circumstances(args.family, "bf16")
    report.write_json(args.output / "decode.json", facts, records)
    if args.readme:
        text = report.replace_between_markers(args.readme.read_text(), "decode", markdown(records, facts))
        args.readme.write_text(text)
    return 0
