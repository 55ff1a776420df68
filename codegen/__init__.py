"""The generator: what can be built, with which tiles, and the sources and tables made from that."""

import re
from pathlib import Path

PROJECT = "flash-attn"
ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = ROOT / "templates"
GENERATED = ROOT / "generated"
PACKAGE = ROOT / "flash_attn"


class CodegenError(Exception):
    """A request that the generator or the build refuses; the text is written for the person who asked."""


def version(name: str) -> str | None:
    """``__version__`` or ``PROJECT_VERSION`` of ``flash_attn/_version.py``, which is not imported."""
    file = PACKAGE / "_version.py"
    match = re.search(f'^{name} = "(.+)"$', file.read_text(), re.MULTILINE) if file.is_file() else None
    return match[1] if match else None
