"""The proofs as tables: every record of every pair of the matrix, and for users what goes with what."""

from collections.abc import Iterable, Sequence

from tabulate import tabulate

from ci.matrix import Matrix, Pair, Version
from ci.proof import Record

COMPATIBILITY = """\
# Compatibility

Written by `python -m ci report --compatibility --records ci/records > docs/compatibility.md`, from
`ci/matrix.toml` and the records of tests in `ci/records`. The library contains neither torch nor Python, so
one wheel serves all of a CUDA major version; an index offers it for a torch and CUDA once it was tested
beside them. "cpu" means that no GPU was there.

"""

COLUMNS = ("torch", "CUDA", "tested with", "Python", "on", "wheel", "sha256", "date", "tests")


def rows(matrix: Matrix, records: Iterable[Record]) -> list[tuple[str, ...]]:
    """A row per record, by pair and date; one that says so for a pair without any."""
    records = sorted(records, key=lambda record: record.date)
    table: list[tuple[str, ...]] = []
    for pair in matrix.pairs:
        mine = [r for r in records if (r.series, r.cuda) == (str(pair.torch), str(pair.cuda))]
        table += [_row(pair, record) for record in mine] or [
            (str(pair.torch), str(pair.cuda), *["-"] * 6, "not proven")
        ]
    return table


def _row(pair: Pair, record: Record) -> tuple[str, ...]:
    passed = sum(test.passed for test in record.tests)
    verdict = f"{passed} of {len(record.tests)} passed"
    failed = ", ".join(test.name for test in record.tests if not test.passed)
    torch = f"{record.torch} ({'CUDA ' + record.torch_cuda if record.torch_cuda else 'CPU build'})"
    return (
        str(pair.torch),
        str(pair.cuda),
        torch,
        record.python,
        f"{record.platform}: {', '.join(record.devices) or 'nothing'}",
        record.wheel,
        record.sha256[:12],
        record.date[:10],
        verdict + (f", failed: {failed}" if failed else ""),
    )


def compatibility(matrix: Matrix, records: Iterable[Record]) -> str:
    """The page for users: torch series, newest first, what serves them, what they were tested with."""
    records = sorted((r for r in records if r.passed), key=lambda record: (record.torch, record.python))
    columns = ("torch", "CUDA", "wheel built by CUDA", "Python", "tested")
    groups: dict[tuple[Version, Version], list[Pair]] = {}
    for pair in matrix.pairs:
        groups.setdefault((pair.torch, pair.build), []).append(pair)
    table = []
    for (torch, build), pairs in sorted(groups.items(), reverse=True):
        cudas = [str(pair.cuda) for pair in pairs]
        mine = [r for r in records if r.series == str(torch) and r.cuda in cudas]
        tested = [f"{r.torch} on Python {r.python}, {' and '.join(r.devices)}, {r.date[:10]}" for r in mine]
        pythons = f"{pairs[0].pythons[0]} to {pairs[0].pythons[-1]}"
        table.append((str(torch), ", ".join(cudas), str(build), pythons, "; ".join(tested) or "not yet"))
    return COMPATIBILITY + markdown(table, columns)


def outcomes(record: Record) -> str:
    """The tests of a record, one a line, for the terminal."""
    rows = [("passed" if test.passed else "FAILED", test.name, test.detail) for test in record.tests]
    return str(tabulate(rows, tablefmt="plain", disable_numparse=True))


def markdown(table: Iterable[Sequence[str]], columns: Sequence[str] = COLUMNS) -> str:
    """The rows as a Markdown table."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in table]
    return f"{tabulate(rows, columns, tablefmt='github', disable_numparse=True)}\n"


def html(table: Iterable[Sequence[str]]) -> str:
    """The rows as an HTML table."""
    return f"{tabulate(table, COLUMNS, tablefmt='html', disable_numparse=True)}\n"
