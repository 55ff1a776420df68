import json
import sys

import pytest

from codegen import CodegenError
from codegen.compilation import report


def record(name, wall, peak, size, kernels=(), dynamic_smem=0):
    rows = [dict(zip(("registers", "spills", "stack", "smem"), kernel, strict=True)) for kernel in kernels]
    return {
        "name": name,
        "wall_s": wall,
        "cpu_s": wall - 0.5,
        "peak_mb": peak,
        "object_bytes": size * 1024,
        "dynamic_smem": dynamic_smem,
        "kernels": rows,
    }


RECORDS = [
    record("dispatch", 1.0, 100, 10),
    record("forward_sm80_bf16_d64_full", 3.0, 300, 50, [(128, 0, 0, 0), (168, 4, 16, 512)], 1000),
    record("forward_sm80_bf16_d128_full", 5.0, 200, 40, [(255, 0, 0, 0)]),
    record("backward_sm80_bf16_d64_full", 4.0, 250, 30, [(240, 0, 0, 0)]),
    record("forward_sm86_bf16_d64_full", 2.0, 150, 60, [(90, 0, 0, 0)]),
]


def cells(name):
    line = next(line for line in report.table(RECORDS).splitlines() if line.startswith(name + " "))
    return line.removeprefix(name).split()


def test_units():
    assert cells("forward_sm80_bf16_d64_full") == ["3.0", "2.5", "300", "168", "4", "16", "1512", "50"]
    assert cells("dispatch") == ["1.0", "0.5", "100", "-", "-", "-", "-", "10"]


def test_totals_per_direction_and_family_and_for_all():
    assert cells("total forward sm80") == ["8.0", "7.0", "300", "255", "4", "16", "1512", "90"]
    assert cells("total backward sm80") == ["4.0", "3.5", "250", "240", "0", "0", "0", "30"]
    assert cells("total forward sm86")[0] == "2.0"
    assert cells("total host")[0] == "1.0"
    assert cells("total  ")[:3] == ["15.0", "12.5", "300"]


def test_sizes_per_family_and_head_dim():
    lines = [line.split() for line in report.size_table(RECORDS).splitlines()]
    assert [line for line in lines if not line[0].startswith("-")] == [
        ["object", "KB", "d64", "d128", "other", "total"],
        ["host", "0", "0", "10", "10"],
        ["sm80", "80", "40", "0", "120"],
        ["sm86", "60", "0", "0", "60"],
        ["total", "140", "40", "10", "190"],
    ]


def test_extremes():
    text = report.table(RECORDS)
    assert "slowest: forward_sm80_bf16_d128_full (5.0 s)" in text
    assert "most memory: forward_sm80_bf16_d64_full (300.0 MB)" in text
    assert "biggest: forward_sm86_bf16_d64_full (60.0 KB)" in text


def test_columns_line_up():
    lines = report.table(RECORDS).split("\n\n")[0].splitlines()
    assert len({len(line) for line in lines}) == 1


def test_without_tabulate_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tabulate", None)
    with pytest.raises(CodegenError, match=r"tabulate is missing: pip install tabulate$"):
        report.table(RECORDS)


def test_records_are_read_from_the_build_folder(tmp_path):
    with pytest.raises(CodegenError, match="no build log"):
        report.read_records(tmp_path)
    (tmp_path / "objects").mkdir()
    for one in RECORDS:
        (tmp_path / "objects" / f"{one['name']}.json").write_text(json.dumps(one))
    assert [r["name"] for r in report.read_records(tmp_path)] == sorted(r["name"] for r in RECORDS)
