"""`python -m flash_attn`: what this machine has, what this build holds, one checked attention on a text."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

from flash_attn import _doctor

LABEL_WIDTH = 13
BUILD_INFO = "_build.json"


def main(argv: list[str] | None = None) -> int:
    """Print the report. Returns 0, 1 if the result is wrong, 2 if the device asked for cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m flash_attn", description=__doc__)
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run attention"
    )
    parser.add_argument("--seqlen", type=int, help="bytes of text, one token each")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    args = parser.parse_args(argv)
    if args.seqlen is not None and args.seqlen < 1:
        parser.error(f"--seqlen must be at least 1, got {args.seqlen}")
    report = _doctor.examine(args.device, args.seqlen)
    print(json.dumps(report, indent=1) if args.json else render(report))
    if report["attention"] is None:
        return 2
    return 0 if report["attention"]["right"] else 1


def installed_copy() -> Path | None:
    """Where an installed copy lies, if this one is a source tree that was never built; else None.

    `python -m` looks into the current folder first, so after `pip install .` it finds the source tree.
    """
    if (Path(__file__).parent / BUILD_INFO).exists():
        return None
    for distribution in importlib.metadata.distributions(name="flash-attn"):
        built = Path(str(distribution.locate_file(f"flash_attn/{BUILD_INFO}")))
        if built.exists():
            return built.parent.parent
    return None


def render(report: dict[str, Any]) -> str:
    """The report of `_doctor.examine` as aligned text."""
    parts = [_render_machine(report), _render_kernels(report), _render_attention(report)]
    return "\n\n".join("\n".join(lines) for lines in parts)


def _line(label: str, value: object) -> str:
    return f"  {label:<{LABEL_WIDTH}}{value}"


def _table(rows: list[list[str]]) -> list[str]:
    """Left-aligned columns, as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = (zip(row, widths, strict=True) for row in rows)
    return [("  " + "  ".join(cell.ljust(width) for cell, width in row)).rstrip() for row in padded]


def _render_machine(report: dict[str, Any]) -> list[str]:
    build, machine = report["build"], report["machine"]
    gpus = [f"{gpu['name']}, compute capability {gpu['compute_cap']}" for gpu in machine["gpus"]] or ["none"]
    if machine["gpus_usable"] == 0 and machine["gpus"]:
        gpus.append("this torch cannot use it")
    return [
        f"flash-attn {build['version']} (API level), project {build['project_version']}, "
        f"commit {build['commit'] or 'unknown'}",
        *(_line("GPU", gpu) for gpu in gpus),
        _line("driver", machine["driver"] or "none"),
        _line("torch", f"{machine['torch']}, CUDA {machine['torch_cuda'] or 'none'}"),
        _line("Python", f"{machine['python']}, {machine['platform']}"),
        _line("library", build["library"] or "none"),
    ]


def _render_kernels(report: dict[str, Any]) -> list[str]:
    families = report["families"]
    lines = ["kernels in this build"]
    if families:
        titles = ["family", "pass", "dtypes", "head dims", "masks", "compiled for", "kernels"]
        rows = [
            [
                entry["family"],
                entry["direction"],
                *(" ".join(map(str, entry[axis])) for axis in ("dtypes", "head_dims", "masks", "targets")),
                str(entry["count"]),
            ]
            for entry in families
        ]
        lines += _table([titles, *rows])
    else:
        lines.append("  none")
    return lines + [f"  {note}" for note in report["notes"]]


def _render_attention(report: dict[str, Any]) -> list[str]:
    result = report["attention"]
    if result is None:
        return ["attention", "  not run"]
    rows = [[" " * (LABEL_WIDTH - 2), "worst error", "time"]]
    for name, label in (("flash_attn", "flash_attn"), ("torch_sdpa", "torch SDPA")):
        rows.append([label, f"{result[name]['error']:.2e}", f"{result[name]['milliseconds']:.3f} ms"])
    rows.append(["allowed", f"{result['allowed']:.2e}", "2 x the formula's error in this dtype + 1e-5"])
    speedup = result["torch_sdpa"]["milliseconds"] / result["flash_attn"]["milliseconds"]
    verdict = "right" if result["right"] else "WRONG: the error is above what is allowed"
    return [
        "attention on a text, against fp64",
        _line("text", f"{result['text']!r} and so on, {result['seqlen']} bytes, one token each"),
        _line("problem", f"causal, {result['num_heads']} heads of {result['head_dim']}, {result['dtype']}"),
        _line("device", result["device"]),
        *_table(rows),
        _line("result", f"{verdict}; {speedup:.2f} times the speed of torch SDPA"),
    ]


if __name__ == "__main__":
    if site := installed_copy():
        os.chdir(site)
        os.execv(sys.executable, [sys.executable, "-m", "flash_attn", *sys.argv[1:]])
    raise SystemExit(main())
