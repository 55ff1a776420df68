"""Cost per family from the records of a build."""

import json

from benchmarks.__main__ import main
from benchmarks.build import COLUMNS, family_costs


def record(name, cpu_s, wall_s, peak_mb, spills):
    kernels = [{"spills": spills}] if spills is not None else []
    return {
        "name": name,
        "cpu_s": cpu_s,
        "wall_s": wall_s,
        "peak_mb": peak_mb,
        "object_bytes": 2048,
        "kernels": kernels,
    }


def test_sums_and_maxima_per_family():
    records = [
        record("forward_sm80_bf16_d64_full", 2.0, 2.5, 300, 0),
        record("forward_sm80_bf16_d128_full", 3.0, 3.5, 200, 8),
        record("forward_sm86_bf16_d64_full", 1.0, 1.5, 100, 0),
        record("library", 0.5, 0.6, 50, None),
    ]
    host, sm80, sm86, everything = family_costs(records)
    assert [host["family"], sm80["family"], sm86["family"], everything["family"]] == [
        "host",
        "sm80",
        "sm86",
        "all",
    ]
    assert list(sm80.values()) == ["sm80", 2, 5.0, 3.5, 300, 8, 4]
    assert (everything["units"], everything["cpu_s"], everything["object_kb"]) == (4, 6.5, 8)
    assert host["spill_bytes"] == 0
    assert len(sm86) == len(COLUMNS)


def test_the_table(tmp_path, capsys):
    (tmp_path / "objects").mkdir()
    for name in ("forward_sm80_bf16_d64_full", "library"):
        text = json.dumps(record(name, 2.0, 2.5, 300, 8))
        (tmp_path / "objects" / f"{name}.json").write_text(text)
    assert main(["build", "--build-dir", str(tmp_path), "--output", str(tmp_path)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["sm80", "1", "2.0", "2.5", "300", "8", "2"] in rows
    assert ["all", "2", "4.0", "2.5", "300", "8", "4"] in rows


def test_without_a_build_it_says_how_to_make_one(tmp_path, capsys):
    assert main(["build", "--build-dir", str(tmp_path), "--output", str(tmp_path)]) == 2
    assert "python -m codegen --build" in capsys.readouterr().out
