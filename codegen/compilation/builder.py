"""Building a selection: render, compile with ninja, link, and put the library into the package."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from codegen import ROOT, TEMPLATES, CodegenError, render, version
from codegen.compilation import ninja, shards, toolchain
from codegen.compilation.ninja import LIBRARY, Source
from codegen.targets import Selection
from codegen.units import Unit, list_units

BUILD_INFO = "_build.json"


class BuildError(CodegenError):
    """Compilation or linking failed; the compiler's own words have been printed."""


def default_build_dir(selection: Selection) -> Path:
    """Folder of objects and generated sources, the same for equal selections."""
    return ROOT / "build" / selection.slug


def build(selection: Selection, build_dir: Path, out: Path, templates: Path = TEMPLATES) -> None:
    """Compile the selection in ``build_dir`` and put the library and ``_build.json`` into the folder ``out``.

    Raises CodegenError, also for a selection without targets.
    """
    tools = _tools(selection)
    units = list_units(selection)
    with _locked(build_dir):
        _prepare(selection, units, tools, build_dir, templates)
        _run_ninja(build_dir)
        install(build_dir / LIBRARY, out)
    write_build_info(out, selection, units, tools.release)


def compile_shard(
    selection: Selection, text: str, build_dir: Path, out: Path, templates: Path = TEMPLATES
) -> None:
    """Compile shard ``text`` (``"i/n"``) of the selection and put its objects into the folder ``out``.

    Objects that are there already, of the same sources, compiler and flags, are left as they are.
    """
    tools = _tools(selection)
    units = list_units(selection)
    names = shards.part(_sources(selection, units, build_dir, templates), units, text)
    fingerprint = shards.fingerprint(selection, tools, templates)
    if shards.is_exported(out, fingerprint, names):
        print(f"flash-attn: {out} holds shard {text} already")
        return
    with _locked(build_dir):
        (build_dir / shards.STAMP).unlink(missing_ok=True)
        _prepare(selection, units, tools, build_dir, templates)
        if names:
            _run_ninja(build_dir, [str(build_dir / "objects" / f"{name}.o") for name in names])
        shards.export(build_dir, names, fingerprint, out)


def adopt_objects(selection: Selection, folder: Path, build_dir: Path, templates: Path = TEMPLATES) -> None:
    """Take the objects that ``compile_shard`` left under ``folder``: the next ``build`` only links them."""
    expected = shards.fingerprint(selection, _tools(selection), templates)
    names = [source.name for source in _sources(selection, list_units(selection), build_dir, templates)]
    with _locked(build_dir):
        shards.adopt(folder, expected, names, build_dir)


def _tools(selection: Selection) -> toolchain.Toolchain:
    """A toolchain that can compile the selection."""
    if not selection.targets:
        raise BuildError("no kernels are selected: set FLASH_ATTN_ARCHS")
    tools = toolchain.find_toolchain()
    toolchain.check_targets(tools, selection)
    return tools


def _sources(selection: Selection, units: list[Unit], build_dir: Path, templates: Path) -> list[Source]:
    return ninja.sources(selection, units, build_dir / "generated", templates)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes that build in the same folder waiting."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _prepare(
    selection: Selection, units: list[Unit], tools: toolchain.Toolchain, build_dir: Path, templates: Path
) -> None:
    """Bring sources and build.ninja up to date; objects that were adopted are linked as they are."""
    generated = build_dir / "generated"
    render.write_tree(render.render_sources(selection), generated)
    sources = _sources(selection, units, build_dir, templates)
    compiled = shards.adopted(build_dir, selection, tools, templates)
    text = ninja.build_file(sources, tools, (templates, generated), build_dir, compiled)
    render.write_file(build_dir / "exports.map", ninja.VERSION_SCRIPT)
    render.write_file(build_dir / "build.ninja", text)
    _remove_stale(build_dir / "objects", {source.name for source in sources})


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
    command = [*_ninja_command(), "-f", str(build_dir / "build.ninja"), "-j", str(ninja.jobs()), *targets]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {
        "NINJA_STATUS": "[%f/%t, %es] ",
        **os.environ,
        "CODEGEN_PYTHON": sys.executable,
        "PYTHONPATH": path,
    }
    if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
        raise BuildError(f"the build in {build_dir} failed, see above")


def _ninja_command() -> list[str]:
    if find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    found = shutil.which("ninja")
    if found is None:
        raise BuildError("no ninja: pip install ninja")
    return [found]


def write_build_info(
    out: Path, selection: Selection, units: Sequence[Unit] = (), nvcc: str | None = None
) -> None:
    """Write into the package folder what ``flash_attn.build_info()`` tells about a build."""
    chosen = {name: getattr(selection, name) for name in ("head_dims", "dtypes", "directions")}
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
