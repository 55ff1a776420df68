"""One library compiled by several machines: each compiles a shard's objects, one collects and links."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from codegen import CodegenError
from codegen.compilation.ninja import COMPILE_FLAGS
from codegen.compilation.toolchain import Toolchain
from codegen.targets import Target
from codegen.units import Unit, shard

STAMP = "shard.json"
SUFFIXES = (".o", ".json")


def fingerprint(
    files: Mapping[str, str], targets: Iterable[Target], tools: Toolchain, templates: Path
) -> str:
    """Hash of all that objects are made of: rendered sources ``files``, templates, compiler and flags."""
    digest = hashlib.sha256(" ".join([tools.release, *COMPILE_FLAGS, *map(str, targets)]).encode())
    for path, text in sorted(files.items()):
        digest.update(f"{path}\0{text}\0".encode())
    for file in sorted(templates.rglob("*")):
        if file.suffix in (".cu", ".cuh", ".h"):
            digest.update(f"{file.relative_to(templates)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def part(names: list[str], units: list[Unit], text: str) -> list[str]:
    """The names of shard ``i/n`` of the sources; the files that are no unit belong to the first one."""
    mine = {unit.key for unit in shard(units, text)}
    if text.startswith("1/"):
        mine |= set(names) - {unit.key for unit in units}
    return [name for name in names if name in mine]


def is_exported(out: Path, expected: str, names: list[str]) -> bool:
    """Whether the folder ``out`` holds exactly these objects, made of these sources."""
    stamp = out / STAMP
    if not stamp.is_file() or json.loads(stamp.read_text()) != _stamp(expected, names):
        return False
    return all((out / f"{name}{suffix}").is_file() for name in names for suffix in SUFFIXES)


def _stamp(fingerprint: str, names: list[str]) -> dict[str, Any]:
    return {"fingerprint": fingerprint, "names": names}


def export(build_dir: Path, names: list[str], fingerprint: str, out: Path) -> None:
    """Copy a shard's objects and records into the folder ``out``, with the stamp that ``adopt`` checks."""
    out.mkdir(parents=True, exist_ok=True)
    (out / STAMP).unlink(missing_ok=True)
    for name in names:
        for suffix in SUFFIXES:
            shutil.copy2(build_dir / "objects" / f"{name}{suffix}", out)
    (out / STAMP).write_text(json.dumps(_stamp(fingerprint, names), indent=1) + "\n")


def adopt(folder: Path, expected: str, names: list[str], build_dir: Path) -> None:
    """Copy the objects of all shards found under ``folder`` into a build folder, which then only links them.

    Raises CodegenError if they are of other sources or another compiler, or if one is missing or there twice.
    """
    found: dict[str, Path] = {}
    for stamp in sorted(folder.rglob(STAMP)):
        described = json.loads(stamp.read_text())
        if described["fingerprint"] != expected:
            raise CodegenError(
                f"the objects in {stamp.parent} were made of other sources or by another compiler"
            )
        for name in described["names"]:
            if name in found:
                raise CodegenError(f"{name} was compiled twice: in {found[name]} and {stamp.parent}")
            found[name] = stamp.parent
    if missing := [name for name in names if name not in found]:
        raise CodegenError(f"{folder} lacks the objects of {', '.join(missing)}")
    objects = build_dir / "objects"
    objects.mkdir(parents=True, exist_ok=True)
    for name in names:
        for suffix in SUFFIXES:
            shutil.copy2(found[name] / f"{name}{suffix}", objects)
    (build_dir / STAMP).write_text(json.dumps({"fingerprint": expected}) + "\n")


def adopted(build_dir: Path, expected: str) -> bool:
    """Whether the build folder holds adopted objects of exactly these sources."""
    stamp = build_dir / STAMP
    return stamp.is_file() and json.loads(stamp.read_text())["fingerprint"] == expected
