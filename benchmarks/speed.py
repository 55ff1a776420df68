"""Speed of flash_attn beside torch's FlashAttention-2 and cuDNN: same tensors, same run.

A backward is dq, dk and dv together, by autograd from an output made beforehand.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.providers import (
    CUDNN,
    DETERMINISTIC,
    OURS,
    TORCH_FA2,
    Call,
    Problem,
    check_agreement,
    providers,
    runnable,
)
from benchmarks.settings import HEAD_DIMS, MASKS, SEQLENS, Setting, all_settings
from benchmarks.timing import device_medians

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
QUICK_SEQLENS = (512, 4096)
QUICK_BUDGET_S = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--head-dims", type=int, nargs="+", default=HEAD_DIMS)
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=MASKS)
    parser.add_argument("--seqlens", type=int, nargs="+", default=None)
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of device time per setting")
    parser.add_argument("--quick", action="store_true", help="two sequence lengths, short runs")
    parser.add_argument("--readme", type=Path, help="rewrite the benchmark table of this README")
    parser.add_argument(
        "--deterministic", action="store_true", help="measure deterministic gradients too, as a ratio to ours"
    )


def make_problem(setting: Setting, dtype: torch.dtype) -> Problem:
    """Standard normal tensors of shape `setting.shape` on the current GPU; the same ones on every run."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, dout = (
        torch.randn(setting.shape, device="cuda", dtype=dtype, generator=generator) for _ in range(4)
    )
    return Problem(q, k, v, dout, setting.causal)


def measure(
    setting: Setting,
    dtype: torch.dtype,
    direction: str,
    names: list[str],
    budget_seconds: float,
    make: Callable[[Setting, torch.dtype], Problem] = make_problem,
    medians: Callable[[Mapping[str, Call], float], dict[str, float]] = device_medians,
) -> report.Row:
    """TFLOP/s of every provider that runs here; AssertionError if our result disagrees with a peer's."""
    problem, known = make(setting, dtype), providers()
    calls = runnable({name: getattr(known[name], direction)(problem) for name in names})
    check_agreement(calls)
    times = medians(calls, budget_seconds)
    return report.Row(setting, {name: setting.tflops(ms, direction) for name, ms in times.items()})


def run(
    args: argparse.Namespace,
    measure: Callable[..., report.Row] = measure,
    peers: Sequence[str] = (TORCH_FA2, CUDNN),
    circumstances: Callable[[str | None, str], dict[str, str]] = report.circumstances,
) -> int:
    """Measure our speed beside that of the peers, print and write the table."""
    direction = args.command
    seqlens = args.seqlens or (QUICK_SEQLENS if args.quick else SEQLENS)
    budget = min(args.budget, QUICK_BUDGET_S) if args.quick else args.budget
    names = [*([DETERMINISTIC] if args.deterministic else []), OURS, *peers]
    name = f"{direction}-{DETERMINISTIC}" if args.deterministic else direction
    if args.readme:
        report.replace_between_markers(args.readme.read_text(), name, "")  # fails before the measuring
    rows = report.measured(
        all_settings(args.head_dims, args.masks, seqlens),
        lambda setting: measure(setting, DTYPES[args.dtype], direction, names, budget),
        lambda row: report.cells(row, names),
    )
    for text in report.summary(rows, names):
        print(text)
    facts = {**circumstances(args.family, args.dtype), "direction": direction}
    report.write_json(args.output / f"{name}.json", facts, [row.as_record() for row in rows])
    report.plot_speed(args.output / f"{name}.png", rows, names, facts)
    if args.readme:
        table = report.markdown(rows, names, facts)
        args.readme.write_text(report.replace_between_markers(args.readme.read_text(), name, table))
    return 0
