"""The build log as tables: what each translation unit cost, what the compiler made of it, and what is big."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from codegen import CodegenError
from codegen.compilation.nvcc_step import Record, worst
from codegen.kernel_key import KernelKey

COLUMNS = ("unit", "wall s", "CPU s", "peak MB", "regs", "spill B", "stack B", "smem B", "object KB")


def read_records(build_dir: Path) -> list[Record]:
    """The records beside the objects of a build, by name; raises CodegenError if there are none."""
    records = [json.loads(path.read_text()) for path in sorted((build_dir / "objects").glob("*.json"))]
    if not records:
        raise CodegenError(f"no build log in {build_dir}: run python -m codegen --build first")
    return records


def table(records: Sequence[Record]) -> str:
    """Units in order of name, totals per direction and family and for all, and the extremes."""
    groups = sorted({group_of(record) for record in records})
    totals = [_total(f"total {name}", [r for r in records if group_of(r) == name]) for name in groups]
    rows = [*(_row(record) for record in records), *totals, _total("total", records)]
    return "\n".join([_aligned(COLUMNS, rows), "", *_extremes(records)]) + "\n"


def size_table(records: Sequence[Record]) -> str:
    """Size of the objects in KB: a row per family, a column per head dim."""
    families = sorted({family_of(record) for record in records})
    dims = sorted({head_dim_of(record) for record in records} - {None}, key=lambda dim: dim or 0)
    rows = []
    for family in [*families, None]:
        chosen = [r for r in records if family in (None, family_of(r))]
        rows.append(
            (
                family or "total",
                *(_kilobytes([r for r in chosen if head_dim_of(r) == dim]) for dim in (*dims, None)),
                _kilobytes(chosen),
            )
        )
    return _aligned(("object KB", *(f"d{dim}" for dim in dims), "other", "total"), rows) + "\n"


def _kilobytes(records: Iterable[Record]) -> str:
    return f"{sum(r['object_bytes'] for r in records) / 1024:.0f}"


def _aligned(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The rows as text: the first column to the left, the others to the right. Raises CodegenError."""
    try:
        from tabulate import tabulate  # no requirement of a build, which prints no table
    except ImportError:
        raise CodegenError("the Python package tabulate is missing: pip install tabulate") from None
    text: str = tabulate(rows, columns, stralign="right", colalign=["left"], disable_numparse=True)
    return text


def _key(record: Record) -> KernelKey | None:
    return KernelKey.parse(record["name"])


def head_dim_of(record: Record) -> int | None:
    """The head dim in the unit's key; None for files that hold no kernel."""
    key = _key(record)
    return key.head_dim if key else None


def family_of(record: Record) -> str:
    """The family in the unit's key; "host" for files that hold no kernel."""
    key = _key(record)
    return key.family if key else "host"


def group_of(record: Record) -> str:
    """Direction and family in the unit's key, "backward sm80"; "host" for files that hold no kernel."""
    key = _key(record)
    return f"{key.direction} {key.family}" if key else "host"


def _row(record: Record) -> tuple[str, ...]:
    return (record["name"], *_cells([record]))


def _total(name: str, records: Sequence[Record]) -> tuple[str, ...]:
    return (name, *_cells(records))


def _cells(records: Sequence[Record]) -> tuple[str, ...]:
    """Sums of time and size; maxima of memory, registers, spills, stack and shared memory."""
    return (
        f"{sum(r['wall_s'] for r in records):.1f}",
        f"{sum(r['cpu_s'] for r in records):.1f}",
        f"{max(r['peak_mb'] for r in records):.0f}",
        *(_worst(records, field) for field in ("registers", "spills", "stack", "smem")),
        _kilobytes(records),
    )


def _worst(records: Iterable[Record], field: str) -> str:
    values = [worst(record, field) for record in records if record["kernels"]]
    return str(max(values)) if values else "-"


def _extremes(records: Sequence[Record]) -> list[str]:
    def top(label: str, value: Callable[[Record], float], unit: str) -> str:
        record = max(records, key=value)
        return f"{label}: {record['name']} ({value(record):.1f} {unit})"

    return [
        top("slowest", lambda r: r["wall_s"], "s"),
        top("most memory", lambda r: r["peak_mb"], "MB"),
        top("biggest", lambda r: r["object_bytes"] / 1024, "KB"),
    ]
