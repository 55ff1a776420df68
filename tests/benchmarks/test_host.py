"""The table of the host's times."""

from benchmarks import host
from benchmarks.providers import OURS, TORCH_SDPA


def test_a_row_has_the_time_and_its_ratio_to_torch():
    medians = {OURS: 12.0, TORCH_SDPA: 8.0}
    assert list(host.cells(OURS, medians).values()) == [OURS, "12.00", "1.50"]
