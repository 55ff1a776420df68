"""The step that ninja runs per translation unit: nvcc, and a record of its cost and its result."""

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

FORBIDDEN = re.compile(r"^.*\bC75(?:0[89]|1[0-9]|20)\b.*$", re.MULTILINE)
"""ptxas warnings C7508 to C7520: wgmma serialised, registers not reallocated: right but slow code."""

Record = dict[str, Any]

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SMEM = re.compile(r"(\d+) bytes smem")


def parse_ptxas(text: str) -> list[Record]:
    """The kernels that ``ptxas -v`` reports: name, target, registers; stack, spill, static smem bytes."""
    kernels: list[Record] = []
    for line in text.splitlines():
        if entry := _ENTRY.search(line):
            kernels.append(
                {"name": entry[1], "target": entry[2], "stack": 0, "spills": 0, "registers": 0, "smem": 0}
            )
        elif not kernels:
            continue
        elif stack := _STACK.search(line):
            kernels[-1].update(stack=int(stack[1]), spills=int(stack[2]) + int(stack[3]))
        elif used := _USED.search(line):
            smem = _SMEM.search(line)
            kernels[-1].update(registers=int(used[1]), smem=int(smem[1]) if smem else 0)
    return kernels


def messages(text: str) -> str:
    """The compiler's output without ptxas' resource report."""
    report = re.compile(r"^ptxas info|^\s*\d+ bytes stack frame")
    return "\n".join(line for line in text.splitlines() if line.strip() and not report.match(line))


def run(
    name: str, object_file: Path, nvcc: str, release: str, flags: list[str], dynamic_smem: int = 0
) -> int:
    """Compile; write the record beside the object; print one line, or the errors. Returns the exit status."""
    start = time.monotonic()
    outputs = ["-Xptxas=-v", "-MD", "-MF", f"{object_file}.d", "-o", str(object_file)]
    done = subprocess.run(
        [nvcc, *flags, *outputs],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    seconds = time.monotonic() - start
    forbidden = FORBIDDEN.findall(done.stdout)
    if done.returncode or forbidden:
        object_file.unlink(missing_ok=True)
        print("\n".join([f"{name}: this warning fails the build:", *forbidden]) if forbidden else done.stdout)
        return done.returncode or 1
    if text := messages(done.stdout):
        print(text)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    record: Record = {
        "name": name,
        "nvcc": release,
        "wall_s": round(seconds, 2),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_mb": round(usage.ru_maxrss / 1024),
        "object_bytes": object_file.stat().st_size,
        "dynamic_smem": dynamic_smem,
        "kernels": parse_ptxas(done.stdout),
    }
    object_file.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(summary(record))
    return 0


def summary(record: Record) -> str:
    """One line: seconds, memory, and the kernels' worst registers, spills and shared memory."""
    line = f"{record['name']}: {record['wall_s']:.1f} s, {record['peak_mb']} MB"
    if not record["kernels"]:
        return line
    registers, spills, smem = (worst(record, field) for field in ("registers", "spills", "smem"))
    return f"{line}, {registers} registers, {spills} bytes spilled, {smem} bytes shared"


def worst(record: Record, field: str) -> int:
    """The largest value among the unit's kernels; for "smem", static and dynamic together."""
    value: int = max(kernel[field] for kernel in record["kernels"])
    return value + record["dynamic_smem"] if field == "smem" else value


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and compile; everything after ``--`` goes to nvcc."""
    parser = argparse.ArgumentParser(prog="python -m codegen.compilation.nvcc_step", description=__doc__)
    parser.add_argument("--name", required=True, help="the unit's name in the build log")
    parser.add_argument(
        "--object", type=Path, required=True, help="output; the record and depfile go beside it"
    )
    parser.add_argument("--nvcc", required=True)
    parser.add_argument("--release", required=True, help="nvcc's release: another one means another command")
    parser.add_argument("--smem", type=int, default=0, help="the kernel's dynamic shared memory in bytes")
    parser.add_argument("flags", nargs="+")
    options = parser.parse_args(arguments)
    return run(options.name, options.object, options.nvcc, options.release, options.flags, options.smem)


if __name__ == "__main__":
    sys.exit(main())
