"""Building one wheel of the matrix: the library whole or in shards, then the wheel around it."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ci import ROOT, CiError
from ci.matrix import Build, Platform, Version
from ci.wheel import Wheel, open_wheel
from codegen import CodegenError, axes
from codegen.compilation import builder, selection, toolchain
from codegen.targets import Selection


def archs_of(build: Build) -> tuple[list[str], list[str]]:
    """The build's archs whose family has kernels, and those whose family has none yet."""
    built = {family.name for family in axes.built_families()}
    ready = [arch for arch in build.archs if axes.ARCHS[int(arch.removesuffix("+ptx"))].family in built]
    return ready, [arch for arch in build.archs if arch not in ready]


def variables(build: Build, environ: Mapping[str, str]) -> dict[str, str]:
    """The ``FLASH_ATTN_*`` variables of the build; those that are set trim it."""
    ready, _ = archs_of(build)
    chosen = {"FLASH_ATTN_ARCHS": ";".join(ready)}
    for name in ("FLASH_ATTN_ARCHS", *selection.AXES.values()):
        if environ.get(name, "").strip():
            chosen[name] = environ[name]
    return {**chosen, "FLASH_ATTN_FORCE_BUILD": "1"}


def select(build: Build) -> Selection:
    """What to compile for the build; says what is left out because its family has no kernels yet."""
    _, skipped = archs_of(build)
    if skipped and not os.environ.get("FLASH_ATTN_ARCHS", "").strip():
        print(f"ci: no kernels yet for {', '.join(skipped)}: left out", file=sys.stderr)
    return selection.from_environment(variables(build, os.environ))


def compile_shard(build: Build, shard: str, out: Path) -> None:
    """Compile a part of the library, a checked ``i/n``, into object files in ``out``."""
    check_compiler(build)
    chosen = select(build)
    builder.compile_shard(chosen, shard, builder.default_build_dir(chosen), out)


def build_wheel(build: Build, objects: Path | None, out: Path, repair: bool, isolation: bool) -> Wheel:
    """Build the wheel into ``out``, from the objects of all shards if given; raises CiError."""
    check_compiler(build)
    chosen = select(build)
    if objects:
        builder.adopt_objects(chosen, objects, builder.default_build_dir(chosen))
    with tempfile.TemporaryDirectory() as folder:
        made = _pip_wheel(build, Path(folder) / "built", isolation)
        if repair:
            made = _repair(made, Path(folder) / "repaired")
        out.mkdir(parents=True, exist_ok=True)
        shutil.copy2(made, out)
    return open_wheel(out / made.name)


def build_in_container(build: Build, platforms: Mapping[str, Platform], out: Path) -> Wheel:
    """Build and repair the wheel in its platform's container, by cibuildwheel; raises CiError."""
    select(build)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "cibuildwheel", "--platform", "linux", "--output-dir", folder]
        _run([*command, str(ROOT)], container_variables(build, platforms, os.environ))
        made = _only_wheel(Path(folder))
        out.mkdir(parents=True, exist_ok=True)
        shutil.copy2(made, out)
    return open_wheel(out / made.name)


def container_variables(
    build: Build, platforms: Mapping[str, Platform], environ: Mapping[str, str]
) -> dict[str, str]:
    """What cibuildwheel is told about a build, beside its table in pyproject.toml."""
    inside = {**variables(build, environ), **({"CUDA_HOME": build.cuda_home} if build.cuda_home else {})}
    told = {
        f"CIBW_MANYLINUX_{name.removeprefix('linux_').upper()}_IMAGE": platform.image
        for name, platform in platforms.items()
    }
    told |= {
        "CIBW_ENVIRONMENT": " ".join(f"{name}={shlex.quote(value)}" for name, value in inside.items()),
        "CIBW_CONFIG_SETTINGS": f"--build-option=--build-number={build.cuda.digits}",
    }
    return {**told, "CIBW_BEFORE_ALL": build.prepare} if build.prepare else told


def check_shard(text: str) -> None:
    """Raise CiError unless ``text`` is i/n with i from 1 to n."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise CiError(f"--shard {text}: must be i/n with i from 1 to n, such as 1/4")


def check_compiler(build: Build) -> None:
    """Raise CiError unless the nvcc that will be used is of the build's CUDA."""
    try:
        found = toolchain.find_toolchain()
    except CodegenError as error:
        raise CiError(str(error)) from None
    if found.cuda != build.cuda:
        raise CiError(
            f"the build is for CUDA {build.cuda}, but nvcc is {Version(*found.cuda)} ({found.nvcc})"
        )


def _pip_wheel(build: Build, folder: Path, isolation: bool) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(folder), "--verbose"]
    command += [f"--config-settings=--build-option=--build-number={build.cuda.digits}"]
    command += [] if isolation else ["--no-build-isolation"]
    _run([*command, str(ROOT)], variables(build, os.environ))
    return _only_wheel(folder)


def _repair(wheel: Path, folder: Path) -> Path:
    """The wheel with the manylinux tag that its library allows."""
    command = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", str(folder), str(wheel)]
    _run(command, {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])})
    return _only_wheel(folder)


def _run(command: list[str], variables: Mapping[str, str]) -> None:
    if subprocess.run(command, env={**os.environ, **variables}, check=False).returncode:
        raise CiError(f"{' '.join(command[1:4])} failed, see above")


def _only_wheel(folder: Path) -> Path:
    found = list(folder.glob("*.whl"))
    if len(found) != 1:
        raise CiError(f"expected one wheel, got {', '.join(path.name for path in found) or 'none'}")
    return found[0]
