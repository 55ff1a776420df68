"""A process of `python -m benchmarks compare`: host time of our calls, with flash_attn of two folders.

Both packages live in this process and take turns, so that what slows the host slows both: between two
processes the same call differs by a third at times. It runs with the tree of these benchmarks on PYTHONPATH,
and prints JSON in its last line: by call, the microseconds of both.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import ModuleType

from benchmarks import host
from benchmarks.compare_child import import_package
from benchmarks.providers import Call
from benchmarks.timing import batch_microseconds

BATCHES = 300
CALLS = 20
PACKAGES = ("flash_attn", "flash_attn_2_cuda")


@dataclass(frozen=True)
class Side:
    """A package of the two: its commit, its modules by name, and our calls bound to it."""

    commit: str | None
    modules: Mapping[str, ModuleType]
    calls: Mapping[str, Call]


def modules() -> dict[str, ModuleType]:
    """Those of the package that is imported."""
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in PACKAGES}


def load(folder: Path, calls: Mapping[str, Callable[[], Call]]) -> Side:
    """Import the package of that folder, beside another one that may be imported already."""
    for name in modules():
        del sys.modules[name]
    package = import_package(folder)
    sys.path.remove(str(folder))
    bound = {name: make() for name, make in calls.items()}
    for call in bound.values():
        call.run()
    return Side(package.build_info()["commit"], modules(), bound)


def compare(
    sides: tuple[Side, Side], time: Callable[[Callable[[], object], int], float], batches: int = BATCHES
) -> dict[str, tuple[float, float]]:
    """Median microseconds of each call on both sides; `time` measures a batch of calls."""
    found = {}
    for name in sides[0].calls:
        samples: tuple[list[float], list[float]] = [], []
        for batch in range(batches + 2):  # two to warm up
            for i in (1, 0) if batch % 2 else (0, 1):
                sys.modules.update(sides[i].modules)  # where operators look for what they call
                samples[i].append(time(sides[i].calls[name].run, CALLS))
        found[name] = median(samples[0][2:]), median(samples[1][2:])
    return found


def main(argv: list[str] | None = None) -> int:
    """Measure the calls whose setting (``host func``) matches, and print what `compare` finds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare_host", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument(
        "--only", type=re.compile, action="append", default=[], help="regex that a setting must match"
    )
    args = parser.parse_args(argv)
    chosen = {
        name: make
        for name, make in host.our_calls().items()
        if all(pattern.search(f"host {name}") for pattern in args.only)
    }
    sides = load(args.old, chosen), load(args.new, chosen)
    print(json.dumps({"commits": [side.commit for side in sides], "us": compare(sides, batch_microseconds)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
