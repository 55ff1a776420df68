"""Chunked prefill beside torch's FlashAttention-2: the queries of a chunk of a prompt over all keys so far,
in a KV cache, contiguous and in pages, as CUDA graph replays with a cold L2. The table has our microseconds
and TFLOP/s, and the time of others over ours.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.decode import HEAD_DIM, PAGE_SIZES
from benchmarks.providers import OURS, TORCH_FA2, Call, check_agreement, ours_with_kvcache, runnable
from benchmarks.timing import cold_medians

HEADS = ((32, 8), (32, 32), (16, 1))
SIZES = ((128, 4096), (512, 4096), (512, 32768), (2048, 32768))


@dataclass(frozen=True)
class Chunk:
    """The last `queries` of a sequence of `keys`, causal: the chunk's own keys are in the cache already."""

    num_heads: int
    num_heads_k: int
    queries: int
    keys: int

    @property
    def flops(self) -> int:
        """Of Q K^T and P V for the keys that each query sees."""
        seen = self.queries * (self.keys - self.queries) + self.queries * (self.queries + 1) // 2
        return 4 * self.num_heads * HEAD_DIM * seen


def chunks() -> Iterator[Chunk]:
    """The rows of the table."""
    for heads, size in product(HEADS, SIZES):
        yield Chunk(*heads, *size)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-pages", action="store_true", help="only the contiguous cache")


def tensors(chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
    """q, and a cache of k and v, of standard normal numbers."""
    shapes = (chunk.queries, chunk.num_heads), *[(chunk.keys, chunk.num_heads_k)] * 2
    q, k, v = (torch.randn(1, *shape, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    return q, k, v


def _torch_fa2(q: Tensor, k: Tensor, v: Tensor) -> Call:
    """torch's kernel by its own name: `scaled_dot_product_attention` aligns the mask with the first key."""
    views = [x.transpose(1, 2) for x in (q, k, v)]
    attend = torch.ops.aten._scaled_dot_product_flash_attention
    return Call(lambda: (attend(*views, 0.0, True)[0],), heads_first=True)


def measure(chunk: Chunk, pages: bool) -> dict[str, float]:
    """Microseconds of every call."""
    q, k, v = tensors(chunk)
    calls = runnable({OURS: ours_with_kvcache(q, k, v, causal=True), TORCH_FA2: _torch_fa2(q, k, v)})
    check_agreement(calls)
    calls |= {f"page {n}": ours_with_kvcache(q, k, v, page_size=n, causal=True) for n in PAGE_SIZES if pages}
    return {name: 1e3 * ms for name, ms in cold_medians(calls).items()}


def cells(record: Mapping[str, Any]) -> report.Cells:
    """A row of the table: sizes, our time and speed, the time of others over ours."""
    chunk = Chunk(*(record[field.name] for field in fields(Chunk)))
    times = record["us"]
    return {
        "heads": f"{chunk.num_heads}/{chunk.num_heads_k}",
        "queries": str(chunk.queries),
        "keys": str(chunk.keys),
        f"{OURS}, us": f"{times[OURS]:.1f}",
        "TFLOP/s": f"{chunk.flops / times[OURS] * 1e-6:.0f}",
        **{name: f"{time / times[OURS]:.2f}" for name, time in times.items() if name != OURS},
    }


def run(args: argparse.Namespace) -> int:
    def record(chunk: Chunk) -> dict[str, Any]:
        times = measure(chunk, not args.no_pages)
        return {**asdict(chunk), "us": {name: round(time, 2) for name, time in times.items()}}

    records = report.measured(chunks(), record, cells)
    facts = report.circumstances(args.family, "bf16")
    report.write_json(args.output / "prefill.json", facts, records)
    return 0
