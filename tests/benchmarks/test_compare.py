"""The comparison of two packages: what processes say is made up, but not which package they import."""

import argparse
import math
import re

import pytest
import torch

from benchmarks import compare, compare_child
from benchmarks.__main__ import parser
from benchmarks.compare import NEW, OLD, CompareError, Row, Sample
from benchmarks.providers import Call
from benchmarks.settings import DEVICE_TABLES


def said(us, total=1.0, setting="forward d64 full 512", projections=(0.5, -1.2)):
    return {setting: Sample(us, total, projections)}


def test_a_time_is_the_median_over_the_rounds():
    rounds = {OLD: [said(9.0), said(5.0), said(6.0)], NEW: [said(2.0), said(3.0), said(99.0)]}
    (row,) = compare.rows_of(rounds)
    assert (row.old_us, row.new_us, row.ratio, row.table) == (6.0, 3.0, 2.0, "forward")


@pytest.mark.parametrize("total", [1.01, math.nan])
def test_results_must_agree(total):
    assert compare.rows_of({OLD: [said(1.0)], NEW: [said(1.0, 1.0001)]})
    with pytest.raises(CompareError, match=r"forward d64 full 512: the sums .* differ: old 1, new"):
        compare.rows_of({OLD: [said(1.0)], NEW: [said(1.0, total)]})


@pytest.mark.parametrize("projections", [(0.5, 0.3), (-0.5, -1.2), (0.5, math.nan), (0.5,)])
def test_where_results_lie_must_agree(projections):
    assert compare.rows_of({OLD: [said(1.0)], NEW: [said(1.0, projections=(0.501, -1.201))]})
    with pytest.raises(CompareError, match=r"forward d64 full 512: the projections .* differ: old 0\.5"):
        compare.rows_of({OLD: [said(1.0)], NEW: [said(1.0, projections=projections)]})


def test_the_second_measurement_replaces_the_first():
    first = [Row("forward a", 90, 100), Row("decode b", 100, 100)]
    rows = compare.merged(first, [Row("forward a", 101, 100, again=True)])
    assert rows == [Row("forward a", 101, 100, again=True), first[1]]
    assert compare.complaints(first, 0.98) and not compare.complaints(rows, 0.98)


def test_means_are_of_each_table_and_must_not_be_low():
    rows = [Row("forward a", 100, 50), Row("forward b", 50, 100), Row("decode c", 99, 100)]
    assert compare.means(rows) == pytest.approx({"forward": 1, "decode": 0.99, "all": 0.99 ** (1 / 3)})
    assert compare.complaints(rows[::2], 0.98) == ["mean of decode: 0.990000 is below 0.995"]
    assert compare.complaints(rows[:2], 0.98) == ["forward b: 0.500000 is below 0.98"]
    barely = compare.complaints([Row("forward a", 97.996, 100), Row("forward b", 105, 100)], 0.98)
    assert barely == ["forward a: 0.979960 is below 0.98"]


def test_host_times_have_a_bar_of_their_own_and_are_not_in_the_mean_of_all():
    rows = [Row("host func", 98, 100), Row("forward a", 100, 100)]
    assert not compare.complaints(rows, 0.98) and compare.means(rows)["all"] == 1
    assert compare.means(rows[:1]).keys() == {"host"}
    rows[0] = Row("host func", 96, 100)
    assert compare.complaints(rows, 0.98) == [
        "host func: 0.960000 is below 0.9709",
        "mean of host: 0.960000 is below 0.9709",
    ]


def test_the_table():
    again, once = (
        compare.cells(row) for row in (Row("forward a", 90, 100, again=True), Row("decode b", 8, 4))
    )
    assert list(again) == ["setting", "us old", "us new", "old/new", ""]
    assert list(again.values()) == ["forward a", "90.0", "100.0", "0.900", "*"]
    assert list(once.values()) == ["decode b", "8.0", "4.0", "2.000", ""]


def test_settings_are_those_of_the_tables():
    keys = [task.key for task in compare_child.tasks()]
    assert len(keys) == len(set(keys))
    assert (
        {task.table for task in compare_child.tasks()} == set(DEVICE_TABLES) == set(compare_child.timers(1.0))
    )
    chosen = compare.exactly([Row(keys[0], 1, 1), Row(keys[-1], 1, 1)])
    assert [key for key in keys if re.search(chosen, key)] == [keys[0], keys[-1]]


def test_a_setting_is_timed_and_its_results_summed():
    results = torch.tensor([1.0, -2.0]), torch.tensor([3.0])
    task = compare_child.Task("backward", "d64", lambda: Call(lambda: results))
    us, total, projections = compare_child.measure(task, lambda calls: dict.fromkeys(calls, 0.25))
    assert (us, total, len(projections)) == (250.0, 6.0, 2)


def test_a_projection_tells_orders_apart_but_not_roundings():
    torch.manual_seed(0)
    x = torch.randn(64, 128)
    here = compare_child.projection(x)
    assert compare_child.projection(x.bfloat16()) == pytest.approx(here, abs=0.01)
    assert compare_child.projection(3 * x) == pytest.approx(here)
    others = (x.flip(0), x.roll(1, 1), -x)
    assert all(abs(compare_child.projection(other) - here) > compare.PROJECTION_AGREEMENT for other in others)
    assert compare_child.projection(torch.zeros(3)) == 0
    assert math.isnan(compare_child.projection(torch.tensor([math.nan, 1.0])))


@pytest.fixture
def package(tmp_path):
    """Makes a folder with a package flash_attn of that commit, beside modules that nobody may import."""

    def make(name):
        for module in ("flash_attn", "benchmarks"):
            (tmp_path / name / module).mkdir(parents=True)
        text = f"def build_info():\n    return {{'commit': {name!r}}}\n"
        (tmp_path / name / "flash_attn" / "__init__.py").write_text(text)
        (tmp_path / name / "benchmarks" / "__init__.py").write_text(
            "raise ImportError('the wrong benchmarks')"
        )
        return tmp_path / name

    return make


def test_a_process_imports_the_package_of_its_folder(package, tmp_path, monkeypatch):
    old, new = package("first"), package("second")
    monkeypatch.setenv("PYTHONPATH", str(new))
    monkeypatch.chdir(new)
    nothing = {"only": ["^$"], "seconds": 0.1}
    assert compare.ask(old, **nothing) == {"commit": "first", "rows": {}}
    with pytest.raises(CompareError, match=r"flash_attn came from .*, not from"):
        compare.ask(tmp_path, **nothing)


@pytest.fixture
def answers(package, tmp_path):
    """Runs the command on two packages; processes say what the test makes of the side and their number."""
    old, new = package("old"), package("new")
    asked = []

    def start(say, *options, host=None):
        def ask(folder, only, seconds):
            asked.append((folder.name, only))
            return {"commit": folder.name, "rows": say(folder.name, len(asked))}

        def ask_host(old, new, only):
            return {"commits": [old.name, new.name], "us": host or {}}

        words = ["compare", str(old), str(new), "--output", str(tmp_path), *options]
        args: argparse.Namespace = parser("compare").parse_args(words)
        return compare.run(args, ask, ask_host, lambda: {"device": "GPU"}), asked

    return start


def test_packages_take_turns_and_slow_settings_are_measured_again(answers, tmp_path, capsys):
    first = 2 * 3

    def say(side, number):
        slow = 1.1 if side == NEW and number <= first else 1.0
        again = {} if number > first else {"decode b": (7.0, 3.0, [])}
        return {"forward a": (slow, 2.0, [0.1]), **again}

    status, asked = answers(say, "--rounds", "3", "--repeat-rounds", "2", "--only", "a|b")
    assert status == 0
    assert [side for side, _ in asked[:first]] == [OLD, NEW, NEW, OLD, OLD, NEW]
    assert asked[0][1] == [f"^({'|'.join(DEVICE_TABLES)}) ", "a|b"]
    assert [only for _, only in asked[first:]] == [[r"^(?:forward\ a)$"]] * 4
    out, err = capsys.readouterr()
    assert re.search(r"^forward a .* 1\.000 +\*$", out, re.M) and "geometric mean, forward: 1.0000" in out
    assert err == ""
    assert '"again": true' in (tmp_path / "compare.json").read_text()


def test_on_a_terminal_a_bar_counts_the_processes(answers, terminal):
    with terminal as shown:
        answers(lambda *_: {"decode b": (1.0, 1.0, [])}, "--rounds", "2")
    assert "4/4" in shown.getvalue() and ", old]" in shown.getvalue()


def test_what_stays_slow_fails(answers, capsys):
    status, _ = answers(lambda side, _: {"decode b": (1.0 + (side == NEW), 1.0, [])}, "--rounds", "1")
    assert status == 1
    assert "decode b: 0.500000 is below 0.98" in capsys.readouterr().out


def test_host_times_come_from_one_process_with_both(answers, tmp_path, capsys):
    status, asked = answers(
        None, "--tables", "host", host={"func": (10.0, 10.2), "with_kvcache": (10.0, 9.0)}
    )
    assert status == 0 and asked == []
    out = capsys.readouterr().out
    assert re.search(r"^host func +10\.0 +10\.2 +0\.980", out, re.M) and "geometric mean, host: 1.04" in out
    assert '"new": "new"' in (tmp_path / "compare.json").read_text()
    assert answers(None, "--tables", "host", host={"func": (10.0, 10.4)})[0] == 1
    assert answers(None, "--tables", "host", host={})[0] == 2


def test_what_cannot_be_compared(answers, capsys, tmp_path):
    assert answers(lambda *_: {}, "--only", "nothing")[0] == 2
    assert "no setting has such a name" in capsys.readouterr().out
    with pytest.raises(CompareError, match="does not hold the package flash_attn"):
        compare.Comparison(tmp_path, tmp_path, 0.1)


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--tables", "forward,both", "both: not of forward"),
        ("--rounds", "0", "must be a whole number from 1 on, not '0'"),
        ("--rounds", "-1", "must be a whole number from 1 on, not '-1'"),
        ("--rounds", "1.5", "must be a whole number from 1 on, not '1.5'"),
        ("--repeat-rounds", "-1", "must be a whole number from 0 on, not '-1'"),
    ],
)
def test_wrong_options(option, value, says, capsys):
    with pytest.raises(SystemExit):
        parser("compare").parse_args(["compare", "old", "new", f"{option}={value}"])
    assert says in capsys.readouterr().err


def test_no_second_measurement(answers):
    status, asked = answers(
        lambda side, _: {"decode b": (1.0 + (side == NEW), 1.0, [])}, "--rounds=1", "--repeat-rounds=0"
    )
    assert (status, len(asked)) == (1, 2)
