"""docs/kernels/words.md: its words and new names are those of the tree, its old paths are gone."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs/kernels/words.md").read_text(encoding="utf-8")
SOURCES = ("benchmarks", "ci", "codegen", "flash_attn", "generated", "templates", "tests")
SUFFIXES = {".cu", ".cuh", ".h", ".j2", ".py"}


def tables(section: str) -> dict[str, list[list[list[str]]]]:
    """The rows of a section's tables by heading: for each cell what stands in backticks."""
    (body,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE)
    found = {}
    for part in re.split(r"^### ", body, flags=re.MULTILINE)[1:]:
        heading, *lines = part.splitlines()
        rows = [line.strip("|").split("|") for line in lines if line.startswith("|")]
        found[heading.replace("`", "")] = [
            [re.findall(r"`([^`]+)`", cell) for cell in row] for row in rows[2:]
        ]
    return found


@cache
def words() -> frozenset[str]:
    """Every word of the sources but this one."""
    files = [path for folder in SOURCES for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    texts = (path.read_text(encoding="utf-8") for path in files if path != Path(__file__))
    return frozenset(word for text in texts for word in re.findall(r"\w+", text))


def is_path(text: str) -> bool:
    return "/" in text or Path(text).suffix in SUFFIXES


def unknown(texts: list[str]) -> list[str]:
    """Paths that do not exist, and words that no source has; `store_*` stands for several."""
    names = [text for text in texts if not is_path(text) and "*" not in text]
    missing = {word for text in names for word in re.findall(r"\w+", text)} - words()
    paths = [text for text in texts if is_path(text)]
    return sorted(missing) + [
        text for text in paths if not any((ROOT / folder / text).exists() for folder in ("", "templates"))
    ]


MOVED = [(folder, *row) for folder, rows in tables("Old paths").items() for row in rows]
NAMES = {heading: [text for row in rows for text in row[1]] for heading, rows in tables("Old names").items()}
TERMS = {
    heading: [text for row in rows for cell in row for text in cell]
    for heading, rows in tables("Words").items()
}


@pytest.mark.parametrize(("folder", "old", "new", "more"), MOVED, ids=[row[1][0] for row in MOVED])
def test_a_file_has_moved_to_where_the_table_says(folder, old, new, more):
    at = ROOT / folder
    assert [path for path in old if (at / path).exists()] == []
    assert [path for path in new + more if not (at / path).exists()] == []


@pytest.mark.parametrize("heading", NAMES)
def test_new_names_are_in_the_sources(heading):
    assert unknown(NAMES[heading]) == []


@pytest.mark.parametrize("heading", TERMS)
def test_words_are_those_of_the_sources(heading):
    assert unknown(TERMS[heading]) == []
