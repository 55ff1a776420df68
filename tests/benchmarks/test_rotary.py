"""The table of the rotary benchmark."""

from benchmarks import rotary
from benchmarks.providers import OURS


def test_a_row_has_both_bandwidths_and_their_ratio():
    speeds = {OURS: 3.0, rotary.COPY: 4.0}
    row = rotary.cells({"megabytes": 64, "pairs": "halves", "inplace": True, "tb_s": speeds})
    assert list(row.values()) == ["64", "halves", "yes", "3.00", "4.00", "0.75"]
