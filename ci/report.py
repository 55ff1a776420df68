"""The proofs as a table: every pair of the matrix with the record of each wheel that was tested for it."""

from collections.abc import Iterable, Sequence
from html import escape

from ci.matrix import Matrix, Pair
from ci.proof import Record

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


def markdown(table: Iterable[Sequence[str]]) -> str:
    """The rows as a Markdown table."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *table]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def html(table: Iterable[Sequence[str]]) -> str:
    """The rows as an HTML table."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in COLUMNS)
    body = "".join(f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in line)}</tr>\n" for line in table)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n"
