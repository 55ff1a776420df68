"""A process of `python -m benchmarks compare`: our call in every setting, with flash_attn of a given folder.

It runs with the tree of these benchmarks on PYTHONPATH, and prints JSON in its last line.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks import decode, prefill, speed
from benchmarks.providers import OURS, Call, ours_with_kvcache, providers
from benchmarks.settings import Setting, all_settings
from benchmarks.timing import cold_medians, device_medians

COLD_ROUNDS = 50
PAGE_SIZES = (0, *decode.PAGE_SIZES)
"""0 is the contiguous cache."""
Timer = Callable[[Mapping[str, Call]], dict[str, float]]


@dataclass(frozen=True)
class Task:
    """A row of a table: `make` draws the tensors and binds our call to them."""

    table: str
    setting: str
    make: Callable[[], Call]

    @property
    def key(self) -> str:
        return f"{self.table} {self.setting}"


def tasks() -> Iterator[Task]:
    """The rows of `DEVICE_TABLES`, those of caches for each of PAGE_SIZES."""
    for direction in ("forward", "backward"):
        for setting in all_settings():
            name = f"d{setting.head_dim} {setting.mask} {setting.seqlen}"
            yield Task(direction, name, partial(_self_attention, setting, direction))
    for problem, page_size in product(decode.problems(), PAGE_SIZES):
        name = f"{problem.num_heads}/{problem.num_heads_k} batch {problem.batch} keys {problem.seqlen}"
        yield Task("decode", name + _pages(page_size), partial(_decode, problem, page_size))
    for chunk, page_size in product(prefill.chunks(), PAGE_SIZES):
        name = f"{chunk.num_heads}/{chunk.num_heads_k} queries {chunk.queries} keys {chunk.keys}"
        yield Task("prefill", name + _pages(page_size), partial(_prefill, chunk, page_size))


def _pages(page_size: int) -> str:
    return f" page {page_size}" if page_size else ""


def _self_attention(setting: Setting, direction: str) -> Call:
    problem = speed.make_problem(setting, torch.bfloat16)
    return getattr(providers()[OURS], direction)(problem)


@cache
def _cache_numbers() -> decode.Tensors:
    return decode.Tensors()


def _decode(problem: decode.Problem, page_size: int) -> Call:
    return ours_with_kvcache(*_cache_numbers().of(problem), page_size=page_size)


def _prefill(chunk: prefill.Chunk, page_size: int) -> Call:
    return ours_with_kvcache(*prefill.tensors(chunk), page_size=page_size, causal=True)


def timers(seconds: float) -> dict[str, Timer]:
    """How the calls of each table are timed, as the table's own command does."""
    warm = partial(device_medians, budget_seconds=seconds)
    cold = partial(cold_medians, rounds=COLD_ROUNDS)
    return {"forward": warm, "backward": warm, "decode": cold, "prefill": cold}


def projection(x: torch.Tensor) -> float:
    """Dot product of x / |x| with weights of variance 1 that are the same in every process; 0 for zeros."""
    generator = torch.Generator(x.device).manual_seed(0)
    weights = torch.randn(x.shape, generator=generator, device=x.device)
    values = x.double()
    return ((values * weights).sum() / (values.norm() + sys.float_info.min)).item()


def measure(task: Task, timer: Timer) -> tuple[float, float, list[float]]:
    """Microseconds of the task's call, the sum of the absolute values of its results, their projections."""
    torch.manual_seed(0)
    call = task.make()
    results = call.results()
    total = sum(x.double().abs().sum().item() for x in results)
    projections = [projection(x) for x in results]
    del results
    return 1e3 * timer({OURS: call})[OURS], total, projections


def import_package(folder: Path) -> ModuleType:
    """flash_attn of that folder, whatever else is on the path. ImportError if a part of it is another's."""
    sys.path.insert(0, str(folder))
    package = importlib.import_module("flash_attn")
    for name in ("flash_attn", "flash_attn_2_cuda"):
        found = getattr(sys.modules.get(name), "__file__", None)
        if found and not Path(found).resolve().is_relative_to(folder.resolve()):
            raise ImportError(f"{name} came from {found}, not from {folder}")
    return package


def main(argv: list[str] | None = None) -> int:
    """Measure the settings that match and print the package's commit, and what `measure` says of each.

    The exit status is 0; another package, or a call that fails, ends in an exception, which is status 1, and
    wrong arguments in status 2.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare_child", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--only", type=re.compile, action="append", default=[], help="regex that a setting must match"
    )
    parser.add_argument(
        "--seconds", type=float, required=True, help="device time of a setting of forward or backward"
    )
    args = parser.parse_args(argv)
    package = import_package(args.folder)
    known = timers(args.seconds)
    chosen = [task for task in tasks() if all(pattern.search(task.key) for pattern in args.only)]
    rows = {task.key: measure(task, known[task.table]) for task in chosen}
    answer: dict[str, Any] = {"commit": package.build_info()["commit"], "rows": rows}
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
