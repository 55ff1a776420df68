"""Cubins made by tests: ELF files with sections that a test gives."""

import struct

PROGBITS, RELA, REL, CUDA = 1, 4, 9, 190
ENTRY_BYTES = {REL: 16, RELA: 24}


def elf(*sections):
    """A cubin with these sections (name, kind, data), after the empty one and before that of their names."""
    sections = [("", 0, b""), *sections, (".shstrtab", 3, b"")]
    names = b"".join(name.encode() + b"\0" for name, _, _ in sections)
    sections[-1] = (".shstrtab", 3, names)
    body, headers, at = b"", b"", 0
    for name, kind, data in sections:
        headers += struct.pack(
            "<IIQQQQIIQQ", at, kind, 0, 0, 64 + len(body), len(data), 0, 0, 1, ENTRY_BYTES.get(kind, 0)
        )
        body, at = body + data, at + len(name) + 1
    count = len(sections)
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    table = 64 + len(body)
    header = ident + struct.pack("<HHIQQQIHHHHHH", 2, CUDA, 1, 0, 0, table, 0, 64, 0, 0, 64, count, count - 1)
    return header + body + headers
