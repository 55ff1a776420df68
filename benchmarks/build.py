"""What the kernels of a build cost: CPU seconds, memory and size per family, from the build log."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from codegen import CodegenError
from codegen.compilation import builder, ninja, selection
from codegen.compilation.report import family_of, read_records

COLUMNS = ("family", "units", "CPU s", "slowest s", "peak MB", "spill B", "objects KB")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--build-dir", type=Path, help="default: the folder of the selection of FLASH_ATTN_*")


def family_costs(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry per family, then one for all: sums of CPU seconds and sizes, maxima of the rest."""
    families = sorted({family_of(record) for record in records})
    groups = {name: [record for record in records if family_of(record) == name] for name in families}
    return [_cost(name, group) for name, group in [*groups.items(), ("all", list(records))]]


def _cost(name: str, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    spills = [kernel["spills"] for record in records for kernel in record["kernels"]]
    return {
        "family": name,
        "units": len(records),
        "cpu_s": round(sum(record["cpu_s"] for record in records), 1),
        "slowest_s": max(record["wall_s"] for record in records),
        "peak_mb": max(record["peak_mb"] for record in records),
        "spill_bytes": max(spills, default=0),
        "object_kb": round(sum(record["object_bytes"] for record in records) / 1024),
    }


def run(args: argparse.Namespace) -> int:
    try:
        folder = args.build_dir or builder.default_build_dir(selection.from_environment())
        costs = family_costs(read_records(folder))
    except CodegenError as error:
        print(error)
        return 2
    print(report.table([dict(zip(COLUMNS, map(str, cost.values()), strict=True)) for cost in costs]))
    library = folder / ninja.LIBRARY
    size = library.stat().st_size if library.is_file() else 0
    print(f"{library.name}: {size / 2**20:.2f} MiB")
    report.write_json(args.output / "build.json", {"library_bytes": size, "build": folder.name}, costs)
    return 0
