"""Speed of two installed packages in the settings of the tables: processes of either take turns, and for host
times, batches of calls in one process with both.

OLD and NEW are folders that hold the package flash_attn with its library. Each process measures each setting;
a time is the median over the processes of their medians. Settings in which NEW falls below the bar are timed
again, in more rounds, and that counts. The exit status is 1 if one stays below it, or if a table's geometric
mean of OLD's time over NEW's is below 0.995 (of host time 0.971, in a setting and in the mean); 2 if the two
cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from benchmarks import report
from benchmarks.settings import TABLES

OLD, NEW = "old", "new"
MEAN_BAR = 0.995
HOST_BAR = 1 / 1.03
"""What host times, which vary more, must reach in each setting and in the mean."""
AGREEMENT = 1e-3
"""Relative difference by which the sums of absolute results of OLD and NEW may differ."""
PROJECTION_AGREEMENT = 0.05
"""Difference by which their projections may differ: rounding gives below 0.01, another order about 1."""
ROOT = Path(__file__).resolve().parents[1]


class CompareError(Exception):
    """Packages that cannot be compared, or whose results differ."""


@dataclass(frozen=True)
class Sample:
    """What a process says of a setting: microseconds, the sum of the absolute values of the results, and the
    projection of each result on random weights.
    """

    us: float
    total: float
    projections: Sequence[float]


Round = Mapping[str, Sample]
"""The samples of one process by setting, such as ``forward d64 causal 512``."""


@dataclass(frozen=True)
class Row:
    """A setting with the microseconds of both; `again` if they are those of the second measurement."""

    setting: str
    old_us: float
    new_us: float
    again: bool = False

    @property
    def table(self) -> str:
        return self.setting.partition(" ")[0]

    @property
    def ratio(self) -> float:
        """OLD's time over NEW's: from 1 on, NEW is at least as fast."""
        return self.old_us / self.new_us


def rows_of(rounds: Mapping[str, Sequence[Round]], again: bool = False) -> list[Row]:
    """A row per setting from the rounds of either side; CompareError where their results differ."""
    rows = []
    for setting in rounds[OLD][0]:
        samples = {side: [one[setting] for one in rounds[side]] for side in (OLD, NEW)}
        check_results(setting, samples[OLD][0], samples[NEW][0])
        old_us, new_us = (median(sample.us for sample in samples[side]) for side in (OLD, NEW))
        rows.append(Row(setting, old_us, new_us, again))
    return rows


def check_results(setting: str, old: Sample, new: Sample) -> None:
    """CompareError where the results of a setting differ by more than rounding."""
    if not math.isclose(old.total, new.total, rel_tol=AGREEMENT):
        sums = f"{OLD} {old.total:.6g}, {NEW} {new.total:.6g}"
        raise CompareError(f"{setting}: the sums of the absolute results differ: {sums}")
    pairs = zip(old.projections, new.projections, strict=False)
    same = len(old.projections) == len(new.projections)
    if not (same and all(abs(x - y) <= PROJECTION_AGREEMENT for x, y in pairs)):
        listed = [" ".join(f"{x:.4g}" for x in sample.projections) for sample in (old, new)]
        raise CompareError(
            f"{setting}: the projections of the results differ: {OLD} {listed[0]}, {NEW} {listed[1]}"
        )


def merged(rows: Iterable[Row], second: Iterable[Row]) -> list[Row]:
    """The rows, those that were measured again in place of the first."""
    replacing = {row.setting: row for row in second}
    return [replacing.get(row.setting, row) for row in rows]


def means(rows: Sequence[Row]) -> dict[str, float]:
    """The geometric mean of the ratios of each table, and of all device times."""
    tables = dict.fromkeys(row.table for row in rows)
    groups = {table: [row.ratio for row in rows if row.table == table] for table in tables}
    groups["all"] = [row.ratio for row in rows if row.table != "host"]
    groups = {table: ratios for table, ratios in groups.items() if ratios}
    return {table: report.geometric_mean(ratios) for table, ratios in groups.items()}


def bar_of(table: str, bar: float) -> float:
    """What a table must reach where `bar` is that of device times."""
    return HOST_BAR if table == "host" else bar


def complaints(rows: Sequence[Row], bar: float) -> list[str]:
    """What NEW is too slow in: settings below the bar, means below MEAN_BAR, host times below HOST_BAR."""
    reached = [(row.setting, row.ratio, bar_of(row.table, bar)) for row in rows]
    reached += [(f"mean of {table}", mean, bar_of(table, MEAN_BAR)) for table, mean in means(rows).items()]
    return [f"{name}: {ratio:.6f} is below {least:.4g}" for name, ratio, least in reached if ratio < least]


def cells(row: Row) -> report.Cells:
    """The row as text; a star marks what was measured again."""
    return {
        "setting": row.setting,
        f"us {OLD}": f"{row.old_us:.1f}",
        f"us {NEW}": f"{row.new_us:.1f}",
        f"{OLD}/{NEW}": f"{row.ratio:.3f}",
        "": "*" if row.again else "",
    }


def child_environment() -> dict[str, str]:
    """Variables of a process that imports the benchmarks of this tree, wherever its package comes from."""
    inherited = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *([inherited] if inherited else [])])}


def _answer(module: str, *arguments: str | Path) -> dict[str, Any]:
    """What a new process of that module of the benchmarks says. CompareError if it fails."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
    with tempfile.TemporaryDirectory() as neutral:  # `-m` puts the working folder first on the path
        done = subprocess.run(
            command, cwd=neutral, env=child_environment(), capture_output=True, text=True, check=False
        )
    if done.returncode:
        folders = " ".join(str(x) for x in arguments if isinstance(x, Path))
        raise CompareError(f"{folders}: {done.stderr.strip() or f'exit status {done.returncode}'}")
    return json.loads(done.stdout.splitlines()[-1])


def ask(folder: Path, only: Sequence[str], seconds: float) -> dict[str, Any]:
    """The answer of a new process with the package of that folder."""
    patterns = [f"--only={pattern}" for pattern in only]
    return _answer("compare_child", folder.resolve(), "--seconds", str(seconds), *patterns)


def ask_host(old: Path, new: Path, only: Sequence[str]) -> dict[str, Any]:
    """The answer of a new process with both packages."""
    return _answer("compare_host", old.resolve(), new.resolve(), *(f"--only={pattern}" for pattern in only))


Ask = Callable[[Path, Sequence[str], float], dict[str, Any]]
AskHost = Callable[[Path, Path, Sequence[str]], dict[str, Any]]


class Comparison:
    """The two packages, how their processes are asked, and what these said of themselves."""

    def __init__(
        self, old: Path, new: Path, seconds: float, ask: Ask = ask, ask_host: AskHost = ask_host
    ) -> None:
        self.folders, self.seconds, self.ask, self.ask_host = {OLD: old, NEW: new}, seconds, ask, ask_host
        self.commits: dict[str, str | None] = {}
        for folder in (old, new):
            if not (folder / "flash_attn" / "__init__.py").is_file():
                raise CompareError(f"{folder} does not hold the package flash_attn")

    def measure(self, rounds: int, only: Sequence[str], again: bool = False) -> list[Row]:
        """Rows of device times from that many processes of either package, which start in turn."""
        said: dict[str, list[Round]] = {OLD: [], NEW: []}
        turns = [*(OLD, NEW, NEW, OLD) * (rounds // 2), *(OLD, NEW) * (rounds % 2)]
        with tqdm(turns, desc="again" if again else "compare", unit="process", disable=None) as bar:
            for side in bar:
                bar.set_postfix_str(side)
                answer = self.ask(self.folders[side], only, self.seconds)
                if not answer["rows"]:
                    return []
                self.commits[side] = answer["commit"]
                said[side].append({setting: Sample(*told) for setting, told in answer["rows"].items()})
        return rows_of(said, again)

    def measure_host(self, only: Sequence[str]) -> list[Row]:
        """Rows of host times, from one process with both packages."""
        answer = self.ask_host(self.folders[OLD], self.folders[NEW], only)
        self.commits.update(zip((OLD, NEW), answer["commits"], strict=True))
        return [Row(f"host {name}", *times) for name, times in answer["us"].items()]


def exactly(rows: Iterable[Row]) -> str:
    """The regex of the settings of these rows."""
    return f"^(?:{'|'.join(re.escape(row.setting) for row in rows)})$"


def _tables(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(TABLES):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not of {', '.join(TABLES)}")
    return names


def _from(least: int) -> Callable[[str], int]:
    """An argument's type: whole numbers from the least on."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} on, not {text!r}")
        return int(text)

    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python -m benchmarks compare`, but for those of all commands."""
    parser.add_argument("old", type=Path, help="folder that holds a package flash_attn")
    parser.add_argument("new", type=Path, help="the same of the package that is compared with it")
    parser.add_argument("--rounds", type=_from(1), default=5, help="processes of either package")
    parser.add_argument(
        "--repeat-rounds", type=_from(0), default=20, help="the same for settings below the bar; 0: no repeat"
    )
    parser.add_argument("--tables", type=_tables, default=list(TABLES), help="some of " + ",".join(TABLES))
    parser.add_argument("--only", default="", help="regex: only settings such as `forward d64 causal 512`")
    parser.add_argument("--bar", type=float, default=0.98, help="what device times of NEW must reach")
    parser.add_argument(
        "--seconds",
        type=float,
        default=0.1,
        help="device time of a setting in a process, of forward and backward; "
        "over a cache there are 50 replays",
    )


def measure(comparison: Comparison, args: argparse.Namespace) -> list[Row]:
    """The rows of the tables that are asked for. CompareError if there are none."""
    rows: list[Row] = []
    if tables := [table for table in args.tables if table != "host"]:
        rows = comparison.measure(args.rounds, [f"^({'|'.join(tables)}) ", args.only])
        below = [row for row in rows if row.ratio < args.bar]
        if below and args.repeat_rounds:
            rows = merged(rows, comparison.measure(args.repeat_rounds, [exactly(below)], again=True))
    if "host" in args.tables:
        rows += comparison.measure_host([args.only])
    if not rows:
        raise CompareError("no setting has such a name")
    return rows


def run(
    args: argparse.Namespace,
    ask: Ask = ask,
    ask_host: AskHost = ask_host,
    machine: Callable[[], dict[str, str]] = report.machine,
) -> int:
    """Measure, print and write the table.

    The exit status is 0 if NEW is fast enough, 1 if it is not, 2 if the two cannot be compared.
    """
    facts: dict[str, Any] = {**machine(), **report.choices(args.family, "bf16")}
    try:
        comparison = Comparison(args.old, args.new, args.seconds, ask, ask_host)
        rows = measure(comparison, args)
    except CompareError as error:
        print(error)
        return 2
    found, averages = complaints(rows, args.bar), means(rows)
    print(report.table([cells(row) for row in rows]))
    names = {"all": "all device times"}
    listed = (f"geometric mean, {names.get(name, name)}: {mean:.4f}" for name, mean in averages.items())
    print("\n".join([*listed, *found]))
    facts |= {"commits": comparison.commits, "means": averages}
    records = [{**asdict(row), "ratio": round(row.ratio, 4)} for row in rows]
    report.write_json(args.output / "compare.json", facts, records)
    return int(bool(found))
