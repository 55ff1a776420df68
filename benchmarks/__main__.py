"""Command line of the benchmarks: one sub-command per measurement."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

from benchmarks.settings import WORK

SUMMARIES = {
    "forward": "speed beside torch's FlashAttention-2 and cuDNN",
    "backward": "the same of dq, dk and dv",
    "both": "the same of forward and backward",
    "decode": "one query token over a KV cache",
    "prefill": "a chunk of a prompt over a KV cache",
    "rotary": "rotary embedding beside a copy",
    "host": "host time of one call",
    "memory": "peak GPU memory by sequence length",
    "build": "CPU seconds, memory and size of the last build",
    "compare": "speed of two installed packages",
    "sass": "the machine code of two builds, function by function",
}
WITHOUT_GPU = ("build", "sass")


def parser(chosen: str) -> argparse.ArgumentParser:
    """The commands, of which only the chosen one has its arguments: no other needs to be imported."""
    top = argparse.ArgumentParser(prog="python -m benchmarks", description="Benchmarks of flash_attn.")
    commands = top.add_subparsers(dest="command", required=True)
    for name, summary in SUMMARIES.items():
        command = commands.add_parser(name, help=summary)
        if name != chosen:
            continue
        module = importlib.import_module(f"benchmarks.{'speed' if name in WORK else name}")
        command.description = module.__doc__
        if name != "sass":
            command.add_argument(
                "--output", type=Path, default=Path("benchmarks/results"), help="folder for JSON, PNG"
            )
        if name not in WITHOUT_GPU:
            command.add_argument("--family", help="force a kernel family, such as sm80")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return top


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = parser(argv[0] if argv else "").parse_args(argv)
    except ModuleNotFoundError as error:
        print(f"{error}: pip install torch tabulate tqdm")
        return 2
    if args.command not in WITHOUT_GPU:
        import torch

        if not torch.cuda.is_available():
            print(f"`python -m benchmarks {args.command}` needs an NVIDIA GPU, and torch sees none.")
            return 2
        if args.family:
            os.environ["FLASH_ATTN_FORCE_FAMILY"] = args.family
    return args.run(args)


if __name__ == "__main__":
    raise SystemExit(main())
