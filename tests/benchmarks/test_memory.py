"""What the memory benchmark counts as needed, and on a GPU what it finds."""

import pytest
import torch
from conftest import cuda_problem

from benchmarks import memory


def test_needed_bytes():
    out, lse = 16 * 512 * 128 * 2, 16 * 512 * 4
    assert memory.needed_bytes(512, "forward") == out + lse
    assert memory.needed_bytes(512, "both") == 4 * out + lse


@pytest.mark.parametrize("direction", memory.DIRECTIONS)
def test_needed_memory_is_linear(direction):
    assert memory.needed_bytes(4096, direction) == 8 * memory.needed_bytes(512, direction)


def test_a_row_has_mib_and_says_where_there_was_no_room():
    sizes = {memory.NEEDED: memory.MIB, memory.OURS: memory.MIB * 3 // 2, memory.STANDARD: None}
    row = memory.cells({"seqlen": 512, "forward": sizes, "both": sizes})
    assert list(row.values()) == ["512", *["1.00", "1.50", "no room"] * 2]


@pytest.mark.gpu
def test_our_memory_is_linear_and_the_standard_is_not(require_backward):
    if cuda_problem():
        pytest.skip(cuda_problem())
    require_backward("cuda", torch.bfloat16, memory.HEAD_DIM)
    short, long = memory.measure(1024), memory.measure(4096)
    for direction in memory.DIRECTIONS:
        assert long[direction][memory.OURS] < 4.5 * short[direction][memory.OURS]
        assert long[direction][memory.STANDARD] > 8 * short[direction][memory.STANDARD]
