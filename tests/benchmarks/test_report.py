"""Tables, statistics, JSON, the plot and the README's table, from made-up measurements."""

import json
import sys

import pytest
import torch

from benchmarks import report
from benchmarks.report import Row
from benchmarks.settings import WORK, Setting

NAMES = ["ours", "peer", "absent"]
FACTS = {
    "device": "GPU",
    "driver": "1.2",
    "torch": "2.13",
    "direction": "backward",
    "dtype": "bf16",
    "family": "sm80",
    "date": "2026-01-01",
    "commit": "0123456789abcdef",
}


@pytest.fixture
def rows():
    return [
        Row(Setting(64, "full", 512), {"ours": 200.0, "peer": 100.0}),
        Row(Setting(64, "causal", 512), {"ours": 50.0, "peer": 100.0}),
        Row(Setting(128, "full", 1024), {"ours": 300.0}),
    ]


def test_geometric_mean():
    assert report.geometric_mean([2.0, 0.5]) == pytest.approx(1.0)
    assert report.geometric_mean([1.0, 2.0, 4.0]) == pytest.approx(2.0)


@pytest.mark.parametrize("values", [[], [1.0, 0.0], [-1.0]])
def test_geometric_mean_refuses(values):
    with pytest.raises(ValueError, match="geometric mean"):
        report.geometric_mean(values)


def test_ratios_skip_rows_without_the_peer(rows):
    assert report.ratios(rows, "ours", "peer") == [2.0, 0.5]
    assert rows[2].ratio("ours", "peer") is None


def test_cells_show_what_is_missing(rows):
    cells = report.cells(rows[0], NAMES)
    assert list(cells) == ["d", "mask", "s", "ours", "peer", "absent", "vs peer", "vs absent"]
    assert list(cells.values()) == ["64", "full", "512", "200", "100", "-", "2.00", "-"]


def test_a_table_has_every_column_and_text_as_it_is():
    rows = [{"name": "a", "us": "1.50"}, {"name": "b", "peer": "007"}]
    head, _, first, second = report.table(rows).splitlines()
    assert [line.split() for line in (head, first, second)] == [
        ["name", "us", "peer"],
        ["a", "1.50", "-"],
        ["b", "-", "007"],
    ]
    assert len(head) == len(first) == len(second)
    assert report.table(rows, "github").splitlines()[2].replace(" ", "") == "|a|1.50|-|"
    assert report.table([]) == ""


def test_measuring_is_quiet_without_a_terminal(capsys):
    assert report.measured([1, 2], lambda case: 10 * case, lambda result: {"ms": str(result)}) == [10, 20]
    out, err = capsys.readouterr()
    assert (out.split(), err) == (["ms", "----", "10", "20"], "")


def test_on_a_terminal_a_bar_shows_the_newest_row(terminal):
    with terminal as shown:
        report.measured([1, 2], lambda case: 10 * case, lambda result: {"ms": str(result)})
    assert "2/2" in shown.getvalue() and "ms=20" in shown.getvalue()


def test_what_was_measured_is_shown_after_an_error(capsys):
    with pytest.raises(ZeroDivisionError):
        report.measured([1, 0], lambda case: 10 // case, lambda result: {"ms": str(result)})
    assert capsys.readouterr().out.split() == ["ms", "----", "10"]


def test_summary(rows):
    ours, absent = report.summary(rows, NAMES)
    assert "geometric mean 1.000" in ours
    assert "worst 0.500" in ours
    assert "1 of 2 settings" in ours
    assert absent == "absent: does not run here"


def test_markdown_is_a_table_with_its_circumstances(rows):
    text = report.markdown(rows, NAMES, FACTS)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len({(row.setting.head_dim, row.setting.mask) for row in rows})
    assert all(f"{row.tflops[NAMES[0]]:.0f} (" in text for row in rows if NAMES[0] in row.tflops)
    assert len({line.count("|") for line in table}) == 1
    for fact in (
        "Backward, TFLOP/s",
        "GPU",
        "driver 1.2",
        "torch 2.13",
        "bf16",
        "sm80",
        "2026-01-01",
        "commit 0123456789",
    ):
        assert fact in text


def test_replace_between_markers():
    text = "a\n<!-- benchmark:forward -->\nold\n<!-- /benchmark:forward -->\nb\n"
    replaced = report.replace_between_markers(text, "forward", r"new \1")
    assert replaced == "a\n<!-- benchmark:forward -->\nnew \\1\n<!-- /benchmark:forward -->\nb\n"
    assert report.replace_between_markers(replaced, "forward", r"new \1") == replaced


@pytest.mark.parametrize(
    "text", ["", "<!-- benchmark:forward -->", "<!-- /benchmark:forward --> <!-- benchmark:forward -->"]
)
def test_replace_between_markers_needs_the_pair(text):
    with pytest.raises(ValueError, match="exactly once"):
        report.replace_between_markers(text, "forward", "new")


@pytest.mark.parametrize("name", ["forward", "backward", "decode"])
def test_the_readme_has_the_markers(pytestconfig, name):
    readme = (pytestconfig.rootpath / "README.md").read_text()
    assert "new table" in report.replace_between_markers(readme, name, "new table")


def test_json(tmp_path, rows, capsys):
    path = tmp_path / "new" / "forward.json"
    report.write_json(path, FACTS, [row.as_record() for row in rows])
    written = json.loads(path.read_text())
    assert written["device"] == "GPU"
    assert written["rows"][0] == {
        "head_dim": 64,
        "mask": "full",
        "seqlen": 512,
        "tflops": {"ours": 200.0, "peer": 100.0},
    }
    assert str(path) in capsys.readouterr().out


@pytest.mark.parametrize("direction", WORK)
def test_plot_of_speeds(tmp_path, rows, direction):
    pytest.importorskip("matplotlib")
    report.plot_speed(tmp_path / "speed.png", rows, NAMES, {**FACTS, "direction": direction})
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_plot_of_memory(tmp_path):
    pytest.importorskip("matplotlib")
    records = [
        {
            "seqlen": n,
            "forward": {"needed": n, "ours": n, "standard": n**2},
            "both": {"needed": 4 * n, "ours": 5 * n},
        }
        for n in (512, 1024)
    ]
    records[1]["forward"]["standard"] = None
    report.plot_memory(tmp_path / "memory.png", records, FACTS)
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_the_machine_is_described_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    monkeypatch.setenv("PATH", str(tmp_path))
    facts = report.machine()
    assert set(facts) == {"device", "driver", "torch", "cudnn", "date"}
    assert (facts["device"], facts["driver"]) == ("GPU", "unknown")


def test_the_version_of_the_driver(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf '580.1\\n580.1\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert report.driver_version() == "580.1"
    program.write_text("#!/bin/sh\nexit 9\n")
    assert report.driver_version() == "unknown"
