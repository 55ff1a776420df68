"""Rotary embedding beside a device copy of the same tensor: bytes read and written per second."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.providers import OURS, Call
from benchmarks.timing import cold_medians

HEADS, HEAD_DIM = 16, 128
SEQLENS = (16384, 65536, 262144)
COPY = "copy"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seqlens", type=int, nargs="+", default=SEQLENS)


def measure(seqlen: int, interleaved: bool, inplace: bool) -> dict[str, float]:
    """TB/s of ours, and of a copy, for x (1, seqlen, 16, 128) in bf16 with tables of the same type."""
    from flash_attn.layers.rotary import apply_rotary_emb

    x = torch.randn(1, seqlen, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(x)
    angles = torch.rand(seqlen, HEAD_DIM // 2, device="cuda")
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()

    def rotate() -> tuple[Tensor]:
        return (apply_rotary_emb(x, cos, sin, interleaved, inplace),)

    medians = cold_medians({OURS: Call(rotate), COPY: Call(lambda: (out.copy_(x),))})
    return {name: 2 * x.nbytes / ms * 1e-9 for name, ms in medians.items()}


def record(seqlen: int, interleaved: bool, inplace: bool) -> dict[str, Any]:
    """What was measured, and of what."""
    return {
        "megabytes": seqlen * HEADS * HEAD_DIM * 2 >> 20,
        "pairs": "adjacent" if interleaved else "halves",
        "inplace": inplace,
        "tb_s": measure(seqlen, interleaved, inplace),
    }


def cells(record: Mapping[str, Any]) -> report.Cells:
    """A row of the table."""
    ours, copy = (record["tb_s"][name] for name in (OURS, COPY))
    return {
        "MB": str(record["megabytes"]),
        "pairs": record["pairs"],
        "in place": "yes" if record["inplace"] else "no",
        "TB/s": f"{ours:.2f}",
        COPY: f"{copy:.2f}",
        "ratio": f"{ours / copy:.2f}",
    }


def run(args: argparse.Namespace) -> int:
    cases = product(args.seqlens, (False, True), (False, True))
    records = report.measured(cases, lambda case: record(*case), cells)
    report.write_json(args.output / "rotary.json", report.environment(), records)
    return 0
