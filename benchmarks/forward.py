"""Forward speed of flash_attn beside torch's FlashAttention-2 and cuDNN: same tensors, same run."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.providers import CUDNN, OURS, TORCH_FA2, Call, forward_calls, runnable
from benchmarks.settings import HEAD_DIMS, MASKS, SEQLENS, Setting, forward_settings
from benchmarks.timing import device_medians

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
QUICK_SEQLENS = (512, 4096)
QUICK_BUDGET_S = 0.2
AGREEMENT = 1e-2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--head-dims", type=int, nargs="+", default=HEAD_DIMS)
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=MASKS)
    parser.add_argument("--seqlens", type=int, nargs="+", default=None)
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of device time per setting")
    parser.add_argument("--quick", action="store_true", help="two sequence lengths, short runs")
    parser.add_argument("--readme", type=Path, help="rewrite the benchmark table of this README")


def tensors(setting: Setting, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Standard normal q, k, v of shape `setting.shape` on the current GPU; the same ones on every run."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(setting.shape, device="cuda", dtype=dtype, generator=generator) for _ in range(3))
    return q, k, v


def check_agreement(calls: Mapping[str, Call]) -> None:
    """Compare our result with FA2's, or cuDNN's where that is missing, by the relative Frobenius norm."""
    peer = next((name for name in (TORCH_FA2, CUDNN) if name in calls), None)
    if peer is None:
        return
    ours, theirs = calls[OURS].result().float(), calls[peer].result().float()
    error = (torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs)).item()
    if not error < AGREEMENT:
        raise AssertionError(f"{OURS} and {peer} differ: relative error {error:.3g}, allowed {AGREEMENT}")


def measure(setting: Setting, dtype: torch.dtype, budget_seconds: float) -> report.Row:
    """TFLOP/s of every provider that runs here; AssertionError if our result disagrees with a peer's."""
    calls = runnable(forward_calls(*tensors(setting, dtype), setting.causal))
    check_agreement(calls)
    medians = device_medians(calls, budget_seconds)
    return report.Row(setting, {name: setting.tflops(ms) for name, ms in medians.items()})


def run(args: argparse.Namespace) -> int:
    seqlens = args.seqlens or (QUICK_SEQLENS if args.quick else SEQLENS)
    budget = min(args.budget, QUICK_BUDGET_S) if args.quick else args.budget
    names = [OURS, TORCH_FA2, CUDNN]
    rows = []
    print(report.aligned(report.titles(names)), flush=True)
    for setting in forward_settings(args.head_dims, args.masks, seqlens):
        rows.append(measure(setting, DTYPES[args.dtype], budget))
        print(report.aligned(report.cells(rows[-1], names)), flush=True)
    for text in report.summary(rows, names):
        print(text)
    facts = {**report.environment(), "dtype": args.dtype, "family": args.family or "chosen by the library"}
    report.write_json(args.output / "forward.json", facts, [row.as_record() for row in rows])
    report.plot_forward(args.output / "forward.png", rows, names, facts)
    if args.readme:
        table = report.markdown(rows, names, facts)
        args.readme.write_text(report.replace_between_markers(args.readme.read_text(), "forward", table))
    return 0
