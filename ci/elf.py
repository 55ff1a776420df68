"""What a library's ELF file says: the symbols that it exports, the libraries and the glibc that it needs."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elftools.common.exceptions import ELFError
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection
from elftools.elf.sections import SymbolTableSection

from ci import CiError


@dataclass(frozen=True)
class Dynamics:
    """What the dynamic linker sees; ``glibc`` is the newest version needed, (0, 0) without one."""

    exported: frozenset[str]
    needed: frozenset[str]
    glibc: tuple[int, int]


def read(path: Path) -> Dynamics:
    """The dynamics of a library; raises CiError."""
    try:
        with path.open("rb") as file:
            library = ELFFile(file)
            return Dynamics(_exported(library), _needed(library), _glibc(library))
    except (ELFError, OSError) as error:
        raise CiError(f"{path.name} cannot be read: {error}") from None


def _exported(library: ELFFile) -> frozenset[str]:
    symbols = library.get_section_by_name(".dynsym")
    if not isinstance(symbols, SymbolTableSection):
        return frozenset()
    return frozenset(
        symbol.name
        for symbol in symbols.iter_symbols()
        if symbol["st_shndx"] != "SHN_UNDEF" and symbol["st_info"]["bind"] != "STB_LOCAL"
    )


def _needed(library: ELFFile) -> frozenset[str]:
    dynamic = library.get_section_by_name(".dynamic")
    if not isinstance(dynamic, DynamicSection):
        return frozenset()
    tags: Iterable[Any] = dynamic.iter_tags("DT_NEEDED")
    return frozenset(tag.needed for tag in tags)


def _glibc(library: ELFFile) -> tuple[int, int]:
    section = library.get_section_by_name(".gnu.version_r")
    if not isinstance(section, GNUVerNeedSection):
        return 0, 0
    return newest_glibc(version.name for _, versions in section.iter_versions() for version in versions)


def newest_glibc(names: Iterable[str]) -> tuple[int, int]:
    """The newest glibc among names of versions such as GLIBC_2.17; (0, 0) if none is glibc's."""
    found = [re.fullmatch(r"GLIBC_(\d+)\.(\d+)(?:\.\d+)?", name) for name in names]
    return max(((int(match[1]), int(match[2])) for match in found if match), default=(0, 0))
