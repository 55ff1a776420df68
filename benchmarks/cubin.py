"""Functions in a cubin, the ELF file that holds a GPU's machine code: their code without names.

Data of a whole module, such as tables of constants and the initial values of globals, is not compared.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile
from elftools.elf.relocation import RelocationSection
from elftools.elf.sections import Section

from ci import CiError

INSTRUCTION_BYTES = 16
NOP = 0x918
"""Opcode of the instruction that fills a function up to its alignment."""
SCHEDULE = ((1 << 21) - 1) << 105
"""The bits of an instruction that say when it is issued and what it waits for (Volta and newer)."""


@dataclass(frozen=True)
class Code:
    """Digests of a function's code, as it is and without the schedule, and its number of instructions."""

    exact: str
    unscheduled: str
    instructions: int


def functions(cubin: bytes) -> dict[str, Code]:
    """The code of each function by its mangled name.

    Names of what it refers to do not count: where and how it does, and the constants beside it, do. Raises
    CiError.
    """
    try:
        found = {section.name: section for section in ELFFile(io.BytesIO(cubin)).iter_sections()}
        names = [name.removeprefix(".text.") for name in found if name.startswith(".text.")]
        return {name: _code(found[f".text.{name}"].data(), _beside(found, name)) for name in names}
    except ELFError as error:
        raise CiError(f"not a cubin: {error}") from error


def _beside(found: Mapping[str, Section], name: str) -> bytes:
    """Relocations of a function without their symbols, and its constants but the arguments (bank 0)."""
    parts = []
    for section in (found.get(f".{kind}.text.{name}") for kind in ("rel", "rela")):
        if isinstance(section, RelocationSection):
            for entry in (relocation.entry for relocation in section.iter_relocations()):
                parts.append(repr((entry.r_offset, entry.r_info_type, entry.get("r_addend"))).encode())
    banks = ((bank, found.get(f".nv.constant{bank}.{name}")) for bank in range(1, 8))
    return b"".join([*parts, *(b"%d:%b" % (bank, section.data()) for bank, section in banks if section)])


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
