"""What counts as a function's code: an ELF file made here, with instructions that are numbers."""

import struct

import pytest
from cubins import PROGBITS, REL, RELA, elf

from benchmarks import cubin
from ci import CiError

BRANCH, ADD, FILLING = 0x947, 0x210, cubin.NOP


def text(*instructions):
    return b"".join(word.to_bytes(16, "little") for word in instructions)


def code(*instructions, extra=()):
    sections = [(".text.f", PROGBITS, text(*instructions)), *extra]
    return cubin.functions(elf(*sections))["f"]


def test_padding_does_not_count():
    assert code(ADD, BRANCH) == code(ADD, BRANCH, FILLING, FILLING)
    assert code(ADD, FILLING, BRANCH).instructions == 3
    assert code(ADD, BRANCH) != code(ADD + (1 << 24), BRANCH)


def test_another_schedule_is_told_from_other_instructions():
    waits = ADD | 3 << 105 | 1 << 125
    assert code(waits).exact != code(ADD).exact
    assert code(waits).unscheduled == code(ADD).unscheduled
    assert code(ADD | 1 << 104).unscheduled != code(ADD).unscheduled


def test_what_a_function_refers_to_counts_but_not_its_name():
    def relocated(symbol, offset=0):
        return code(ADD, extra=[(".rel.text.f", REL, struct.pack("<QQ", offset, symbol << 32 | 56))])

    assert relocated(7) == relocated(8) != code(ADD)
    assert relocated(7, offset=32) != relocated(7)

    def added(addend, symbol=7):
        return code(ADD, extra=[(".rela.text.f", RELA, struct.pack("<QQq", 0, symbol << 32 | 56, addend))])

    assert added(4) == added(4, symbol=8) != added(-4)


def test_constants_count_but_not_the_room_for_arguments():
    def constants(bank, data):
        return code(ADD, extra=[(f".nv.constant{bank}.f", PROGBITS, data)])

    assert constants(0, b"1") == constants(0, b"22") == code(ADD)
    assert constants(2, b"1") != constants(2, b"2")


@pytest.mark.parametrize("content", [b"", b"no cubin", elf(("", 0, b""))[:80]])
def test_a_file_that_is_none(content):
    with pytest.raises(CiError, match="not a cubin"):
        cubin.functions(content)
