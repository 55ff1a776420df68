"""Functions in a cubin, the ELF file that holds a GPU's machine code: their code without names."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass

INSTRUCTION_BYTES = 16
NOP = 0x918
"""Opcode of the instruction that fills a function up to its alignment."""
SCHEDULE = ((1 << 21) - 1) << 105
"""The bits of an instruction that say when it is issued and what it waits for (Volta and newer)."""

NO_BITS = 8
"""Kind of a section that has a size but no data."""


@dataclass(frozen=True)
class Code:
    """Digests of a function's code, as it is and without the schedule, and its number of instructions."""

    exact: str
    unscheduled: str
    instructions: int


@dataclass(frozen=True)
class Section:
    """A part of an ELF file."""

    name: str
    data: bytes


def sections(cubin: bytes) -> Iterator[Section]:
    """The sections of a 64-bit little-endian ELF file, with what of them lies in the file."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry, count, names_index = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + i * entry) for i in range(count)]
    names = headers[names_index][4]
    for name, kind, _, _, offset, size, *_ in headers:
        end = cubin.index(b"\0", names + name)
        data = b"" if kind == NO_BITS else cubin[offset : offset + size]
        yield Section(cubin[names + name : end].decode(), data)


def functions(cubin: bytes) -> dict[str, Code]:
    """The code of each function by its mangled name.

    Names of what it refers to do not count: where and how it does, and the constants beside it, do.
    """
    found = {section.name: section for section in sections(cubin)}
    return {
        name.removeprefix(".text."): _code(section.data, _beside(found, name.removeprefix(".text.")))
        for name, section in found.items()
        if name.startswith(".text.")
    }


def _beside(found: dict[str, Section], name: str) -> bytes:
    """Relocations of a function without their symbols, and its constants but the arguments (bank 0)."""
    parts = []
    for kind, layout in (("rel", "<QQ"), ("rela", "<QQq")):
        section = found.get(f".{kind}.text.{name}")
        for offset, info, *addend in struct.iter_unpack(layout, section.data if section else b""):
            parts.append(repr((offset, info & 0xFFFFFFFF, addend)).encode())
    banks = ((bank, found.get(f".nv.constant{bank}.{name}")) for bank in range(1, 8))
    return b"".join([*parts, *(b"%d:%b" % (bank, section.data) for bank, section in banks if section)])


def _code(text: bytes, beside: bytes) -> Code:
    starts = range(0, len(text), INSTRUCTION_BYTES)
    words = [int.from_bytes(text[i : i + INSTRUCTION_BYTES], "little") for i in starts]
    while words and words[-1] & 0xFFF == NOP:
        words.pop()
    bare = b"".join((word & ~SCHEDULE).to_bytes(INSTRUCTION_BYTES, "little") for word in words)
    exact = text[: len(words) * INSTRUCTION_BYTES]
    return Code(_digest(exact + beside), _digest(bare + beside), len(words))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
