from ci import report
from ci.proof import Outcome


def test_every_pair_has_a_row(small_matrix, make_wheel, make_record):
    wheel = make_wheel()
    records = [
        make_record(
            wheel, tests=(Outcome("import", True), Outcome("a|b <c>", False)), date="2026-11-22T00:00:00"
        ),
        make_record(wheel, torch="2.13.0+cpu", torch_cuda=None),
    ]
    rows = report.rows(small_matrix, records)
    assert [row[:2] + row[-1:] for row in rows] == [
        ("2.12", "12.6", "not proven"),
        ("2.12", "13.2", "not proven"),
        ("2.13", "13.0", "1 of 1 passed"),
        ("2.13", "13.0", "1 of 2 passed, failed: a|b <c>"),
    ]
    assert rows[2][2] == "2.13.0+cpu (CPU build)"
    assert all(len(row) == len(report.COLUMNS) for row in rows)
    markdown = report.markdown(rows).splitlines()
    assert len(markdown) == 6
    assert "a\\|b" in markdown[-1]
    assert "failed: a|b &lt;c&gt;</td>" in report.html(rows)
