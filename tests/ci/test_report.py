from ci import ROOT, matrix, report
from ci.proof import Outcome, read_records


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


def test_outcomes_are_one_a_line(make_wheel, make_record):
    tests = (Outcome("import", True, "flash_attn 2.8.3"), Outcome("causal on cpu", False, "error 0.10"))
    lines = report.outcomes(make_record(make_wheel(), tests=tests)).splitlines()
    assert lines[0].split() == ["passed", "import", "flash_attn", "2.8.3"]
    assert lines[1].split() == ["FAILED", "causal", "on", "cpu", "error", "0.10"]
    assert lines[0].index("flash_attn") == lines[1].index("error")


def test_compatibility_tells_what_was_tested(small_matrix, make_wheel, make_record):
    wheel = make_wheel()
    failed = make_record(wheel, torch="2.13.9", tests=(Outcome("import", False),))
    page = report.compatibility(small_matrix, [make_record(wheel), failed])
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()[-3:]] == [
        ["2.13", "13.0", "13.0", "3.11 to 3.14", "2.13.0+cu130 on Python 3.11.7, cpu, 2026-11-21"],
        ["2.12", "13.2", "13.0", "3.10 to 3.14", "not yet"],
        ["2.12", "12.6", "12.9", "3.10 to 3.14", "not yet"],
    ]


def test_the_page_of_compatibility_is_current():
    page = report.compatibility(matrix.read(), read_records(ROOT / "ci" / "records"))
    assert (ROOT / "docs" / "compatibility.md").read_text() == page
