"""What the memory benchmark counts as needed."""

import pytest

from benchmarks import memory


def test_needed_bytes():
    out, lse = 16 * 512 * 128 * 2, 16 * 512 * 4
    assert memory.needed_bytes(512, "forward") == out + lse
    assert memory.needed_bytes(512, "both") == 4 * out + lse


@pytest.mark.parametrize("direction", memory.DIRECTIONS)
def test_needed_memory_is_linear(direction):
    assert memory.needed_bytes(4096, direction) == 8 * memory.needed_bytes(512, direction)
