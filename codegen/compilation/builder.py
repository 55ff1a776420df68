"""Building a selection: render, compile with ninja, link, and put the library into the package."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from codegen import ROOT, TEMPLATES, CodegenError, render, version
from codegen.compilation import ninja, shards, toolchain
from codegen.compilation.ninja import LIBRARY, Source
from codegen.compilation.selection import AXES
from codegen.targets import Selection
from codegen.units import Unit, list_units

BUILD_INFO = "_build.json"


class BuildError(CodegenError):
    """Compilation or linking failed; the compiler's own words have been printed."""


def default_build_dir(selection: Selection) -> Path:
    """Folder of objects and generated sources, the same for equal selections."""
    return ROOT / "build" / selection.slug


@dataclass(frozen=True)
class _Plan:
    """What a build is made of, worked out once for all of its steps; ``files`` are the rendered sources."""

    tools: toolchain.Toolchain
    units: list[Unit]
    files: dict[str, str]
    sources: list[Source]
    fingerprint: str
    build_dir: Path
    templates: Path

    @property
    def names(self) -> list[str]:
        """Names of the objects."""
        return [source.name for source in self.sources]


def _plan(selection: Selection, build_dir: Path, templates: Path) -> _Plan:
    """Raises CodegenError, also for a selection without targets."""
    if not selection.targets:
        raise BuildError("no kernels are selected: set FLASH_ATTN_ARCHS")
    tools = toolchain.find_toolchain()
    toolchain.check_targets(tools, selection)
    units = list_units(selection)
    files = render.render_sources(selection, units)
    sources = ninja.sources(selection, units, build_dir / "generated", templates)
    fingerprint = shards.fingerprint(files, selection.targets, tools, templates)
    return _Plan(tools, units, files, sources, fingerprint, build_dir, templates)


def build(selection: Selection, build_dir: Path, out: Path, templates: Path = TEMPLATES) -> None:
    """Compile the selection in ``build_dir`` and put the library and ``_build.json`` into the folder ``out``.

    Raises CodegenError, also for a selection without targets.
    """
    plan = _plan(selection, build_dir, templates)
    with _locked(build_dir):
        _prepare(plan)
        _run_ninja(build_dir)
        install(build_dir / LIBRARY, out)
    write_build_info(out, selection, plan.units, plan.tools.release)


def compile_shard(
    selection: Selection, text: str, build_dir: Path, out: Path, templates: Path = TEMPLATES
) -> None:
    """Compile shard ``text`` (``"i/n"``) of the selection and put its objects into the folder ``out``.

    Objects that are there already, of the same sources, compiler and flags, are left as they are.
    """
    plan = _plan(selection, build_dir, templates)
    names = shards.part(plan.names, plan.units, text)
    if shards.is_exported(out, plan.fingerprint, names):
        print(f"flash-attn: {out} holds shard {text} already")
        return
    with _locked(build_dir):
        (build_dir / shards.STAMP).unlink(missing_ok=True)
        _prepare(plan)
        if names:
            _run_ninja(build_dir, [str(build_dir / "objects" / f"{name}.o") for name in names])
        shards.export(build_dir, names, plan.fingerprint, out)


def adopt_objects(selection: Selection, folder: Path, build_dir: Path, templates: Path = TEMPLATES) -> None:
    """Take the objects that ``compile_shard`` left under ``folder``: the next ``build`` only links them."""
    plan = _plan(selection, build_dir, templates)
    with _locked(build_dir):
        shards.adopt(folder, plan.fingerprint, plan.names, build_dir)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes that build in the same folder waiting."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _prepare(plan: _Plan) -> None:
    """Bring sources and build.ninja up to date; objects that were adopted are linked as they are."""
    generated = plan.build_dir / "generated"
    compiled = shards.adopted(plan.build_dir, plan.fingerprint)
    includes = (plan.templates, generated)
    text = ninja.build_file(plan.sources, plan.tools, includes, plan.build_dir, compiled)
    render.write_tree(plan.files, generated)
    render.write_file(plan.build_dir / "exports.map", ninja.VERSION_SCRIPT)
    render.write_file(plan.build_dir / "build.ninja", text)
    _remove_stale(plan.build_dir / "objects", set(plan.names))


def install(library: Path, out: Path) -> None:
    """Copy the library unless it is there; by rename, since a process may have the old one mapped."""
    present = out / library.name
    if present.is_file() and present.stat().st_mtime_ns == library.stat().st_mtime_ns:
        return
    out.mkdir(parents=True, exist_ok=True)
    fresh = out / f".{library.name}.{os.getpid()}"
    shutil.copy2(library, fresh)
    fresh.replace(present)


def remove_library(out: Path) -> None:
    """Remove the library and its description from a package folder."""
    for name in (LIBRARY, BUILD_INFO):
        (out / name).unlink(missing_ok=True)


def _remove_stale(objects: Path, names: set[str]) -> None:
    """Remove objects and records of units that are no longer part of the selection."""
    for path in objects.glob("*"):
        if path.name.split(".")[0] not in names:
            path.unlink()


def _run_ninja(build_dir: Path, targets: Iterable[str] = ()) -> None:
    command = [
        sys.executable,
        "-m",
        "ninja",
        "-f",
        str(build_dir / "build.ninja"),
        "-j",
        str(ninja.jobs()),
        *targets,
    ]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {
        "NINJA_STATUS": "[%f/%t, %es] ",
        **os.environ,
        "CODEGEN_PYTHON": sys.executable,
        "PYTHONPATH": path,
    }
    if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
        raise BuildError(f"the build in {build_dir} failed, see above")


def write_build_info(
    out: Path, selection: Selection, units: Sequence[Unit] = (), nvcc: str | None = None
) -> None:
    """Write into the package folder what ``flash_attn.build_info()`` tells about a build."""
    chosen = {name: getattr(selection, name) for name in AXES}
    info = {
        "project_version": version("PROJECT_VERSION"),
        "commit": commit(),
        "archs": [target.arch for target in selection.targets],
        **{name: list(values) if selection.targets else [] for name, values in chosen.items()},
        "nvcc": nvcc,
        "kernels": [unit.key for unit in units],
        "targets": [str(target) for target in selection.targets],
    }
    render.write_file(out / BUILD_INFO, json.dumps(info, indent=1) + "\n")


def commit() -> str | None:
    """The commit of the source tree, with "-dirty" after local changes; None outside a checkout."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    answer = subprocess.run(describe, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None
