"""Rendering: a selection's files as text, written only where they changed, or compared with what is there."""

import dataclasses
import difflib
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import jinja2

from codegen import TEMPLATES, abi, axes, kernel_key, tiles
from codegen.targets import Selection, all_targets
from codegen.units import Unit, list_units


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["constant"] = abi.cpp_constant
    environment.filters["cpp"] = lambda value: str(value).lower()
    environment.filters["braces"] = _braces
    environment.filters["fields"] = dataclasses.asdict
    environment.filters["members"] = lambda tiles: {
        name: dataclasses.asdict(tile) for name, tile in tiles.items() if tile
    }
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    environment.filters["wrap"] = lambda text, prefix: "\n".join(
        textwrap.wrap(text, 105, initial_indent=prefix, subsequent_indent=prefix)
    )
    environment.filters["docstring"] = _docstring
    return environment


def _docstring(text: str) -> str:
    lines = textwrap.wrap(f'"""{text}', 105, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines) + ('"""' if len(lines) == 1 else '\n    """')


def _braces(value: object) -> str:
    """Nested lists of numbers as an initialiser of C++."""
    return f"{{{', '.join(map(_braces, value))}}}" if isinstance(value, list) else str(value)


def _render(template: str, **variables: object) -> str:
    return _environment().get_template(template).render(template=template, **variables)


def render_sources(selection: Selection, units: Sequence[Unit] | None = None) -> dict[str, str]:
    """Text of every generated source, by path relative to the folder of generated files.

    ``units`` are ``list_units(selection)``, of a caller that has them already.
    """
    units = list_units(selection) if units is None else units
    files = {unit.path: _render("unit.cu.j2", unit=unit) for unit in units}
    files["abi.h"] = _render("abi.h.j2", **_abi_variables())
    files["dispatch.cu"] = _render(
        "dispatch.cu.j2",
        units=units,
        targets=selection.targets,
        families=axes.built_families(),
        head_dims=axes.HEAD_DIMS,
        passes=axes.PASSES,
    )
    if "sm90" in selection.families:
        files["wgmma.cuh"] = _render("wgmma.cuh.j2", columns=tiles.wgmma_columns())
    files["manifest.json"] = _render(
        "manifest.json.j2", units=units, selection=selection, layout_hash=_hex(abi.layout_hash())
    )
    return files


def render_abi_module() -> str:
    """Text of ``flash_attn/_abi.py``: axes, limits, enums, ctypes mirror, packers, function signatures."""
    capabilities = tuple(sorted(target.capability for target in all_targets()))
    return _render(
        "abi.py.j2",
        head_dims=axes.HEAD_DIMS,
        capabilities=capabilities,
        **_abi_variables(),
    )


def render_modules() -> dict[str, str]:
    """Text of the generated modules of the package, which cannot import this one, by file name."""
    key = Path(kernel_key.__file__).read_text(encoding="utf-8")
    notice = "# Copied by `python -m codegen` from codegen/kernel_key.py. Do not edit.\n"
    return {"_abi.py": render_abi_module(), "_kernel_key.py": notice + key}


def _abi_variables() -> dict[str, object]:
    return {
        "limits": abi.LIMITS,
        "structs": abi.STRUCTS,
        "params": abi.PARAMS,
        "enums": abi.enums(),
        "functions": abi.FUNCTIONS,
        "layout_hash": _hex(abi.layout_hash()),
    }


def _hex(value: int) -> str:
    return f"0x{value:016X}"


def write_tree(files: Mapping[str, str], folder: Path) -> list[str]:
    """Make the folder hold exactly these files; returns the paths that were written or deleted.

    A file whose text is already right is not touched, so that its time stamp stays and nothing is rebuilt.
    """
    changed = [path for path, text in files.items() if write_file(folder / path, text)]
    for path in stale_files(files, folder):
        (folder / path).unlink()
        changed.append(path)
    return changed


def write_file(path: Path, text: str) -> bool:
    """Write the text unless the file already holds it; returns whether it wrote."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return True


def stale_files(files: Mapping[str, str], folder: Path) -> list[str]:
    """Paths under the folder that are not among the files."""
    present = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in present if path not in files]


def diff_tree(files: Mapping[str, str], folder: Path) -> str:
    """Unified diff from what the folder holds to what it should hold; empty if it is up to date."""
    expected = {**dict.fromkeys(stale_files(files, folder), ""), **files}
    return "".join(
        diff_file(folder / path, text, f"{folder.name}/{path}") for path, text in sorted(expected.items())
    )


def diff_file(path: Path, text: str, name: str) -> str:
    """Unified diff from a file (absent = empty) to the text that it should hold, under the given name."""
    present = path.read_text(encoding="utf-8") if path.is_file() else ""
    lines = difflib.unified_diff(
        present.splitlines(keepends=True), text.splitlines(keepends=True), f"a/{name}", f"b/{name}"
    )
    return "".join(lines)
