"""Releases: which wheels exist, how each is built, audited and tested, and the index of the proven ones."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class CiError(Exception):
    """A request or an input that is refused; one line, written for the person who asked."""
