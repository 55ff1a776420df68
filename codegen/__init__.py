"""The generator: what can be built, with which tiles, and the sources, tables and library made from that."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = ROOT / "templates"
GENERATED = ROOT / "generated"
PACKAGE = ROOT / "flash_attn"


class CodegenError(Exception):
    """A request that the generator or the build refuses; the text is written for the person who asked."""
