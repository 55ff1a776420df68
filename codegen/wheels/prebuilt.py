"""A published wheel instead of a build: found in FLASH_ATTN_WHEEL_INDEX, verified, copied, never compiled."""

import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path
from typing import Any

from packaging.tags import platform_tags
from packaging.utils import canonicalize_name

from codegen import PROJECT, ROOT, CodegenError, axes, version
from codegen.compilation import cuda_driver
from codegen.compilation.cuda_driver import Cuda
from codegen.compilation.selection import AXES, is_native
from codegen.targets import Selection, Target
from codegen.wheels.index import Listed, NoIndex, WheelError, download, list_files, replacing
from codegen.wheels.name import LIBRARY, MANIFEST, WheelName

DEFAULT_INDEX: str | None = None
"""No public index exists yet: without FLASH_ATTN_WHEEL_INDEX no wheel is looked for."""

DOWNLOADS = ROOT / "build" / "prebuilt"
"""Verified wheels, kept from the hook that asks for a build's requirements to the one that builds."""

SWITCH = {
    "1": True,
    "true": True,
    "yes": True,
    "on": True,
    "0": False,
    "false": False,
    "no": False,
    "off": False,
}

REFUSALS_SHOWN = 8


@dataclass(frozen=True)
class Candidate:
    """A wheel for this machine: the CUDA that built it, its platform's rank (0 fits best), its name."""

    file: Listed
    cuda: Cuda
    rank: int
    name: WheelName


def find(
    selection: Selection,
    environ: Mapping[str, str] | None = None,
    downloads: Path = DOWNLOADS,
    driver: Callable[[], Cuda | None] = cuda_driver.driver_cuda,
) -> Path | None:
    """A verified wheel with the kernels of the selection, in ``downloads``; None, and why, if none matches.

    Nothing is looked for without an index, with FLASH_ATTN_FORCE_BUILD, or with FLASH_ATTN_ARCHS=none.
    ``driver`` tells the CUDA of the driver. Raises CodegenError for a damaged wheel or index.
    """
    environ = os.environ if environ is None else environ
    index = environ.get("FLASH_ATTN_WHEEL_INDEX", "").strip() or DEFAULT_INDEX
    asked = bool(selection.targets) or is_native(environ)
    if forced(environ) or index is None or not asked:
        return None
    try:
        files = list_files(index)
    except NoIndex as error:
        print(f"flash-attn: no prebuilt wheel: {error}", flush=True)
        return None
    present = driver()
    candidates, refusals = choose(files, list(platform_tags()), present)
    for candidate in candidates:
        wheel = download(candidate.file, downloads)
        missing = shortfall(read_manifest(wheel, candidate), selection, environ)
        if not missing:
            print(f"flash-attn: taking the prebuilt wheel {wheel.name} of {index}", flush=True)
            return wheel
        refusals.append(f"{candidate.file.name}: {missing}")
    print(_nothing_found(index, selection, present, refusals), flush=True)
    return None


def forced(environ: Mapping[str, str]) -> bool:
    """Whether FLASH_ATTN_FORCE_BUILD is on; raises CodegenError for a value that is neither on nor off."""
    value = environ.get("FLASH_ATTN_FORCE_BUILD", "").strip().lower()
    if value and value not in SWITCH:
        raise CodegenError(f"FLASH_ATTN_FORCE_BUILD must be 1 or 0, not {value!r}")
    return SWITCH.get(value, False)


def place(wheel: Path, folder: Path) -> str:
    """Copy a wheel into a folder, which may be on another device, whole or not at all; returns its name.

    Raises CodegenError.
    """
    try:
        with replacing(folder / wheel.name) as partial:
            shutil.copyfile(wheel, partial)
    except OSError as error:
        raise CodegenError(f"cannot copy {wheel.name}: {error}") from None
    return wheel.name


def choose(
    files: Iterable[Listed], platforms: Sequence[str], present: Cuda | None
) -> tuple[list[Candidate], list[str]]:
    """The wheels for this machine, best first, and for each other one why not; raises WheelError if two tie.

    Best is the newest CUDA that the driver supports, without a driver the oldest; then the platform's rank.
    """
    found: dict[tuple[Cuda, int], Candidate] = {}
    refusals = []
    for file in files:
        if not file.name.endswith(".whl"):
            continue
        candidate = classify(file, platforms, present)
        if isinstance(candidate, str):
            refusals.append(f"{file.name}: {candidate}")
            continue
        other = found.setdefault((candidate.cuda, candidate.rank), candidate)
        if (other.file.name, other.file.sha256) != (file.name, file.sha256):
            raise WheelError(f"two wheels for one CUDA and platform: {other.file.url} and {file.url}")
    newest_first = -1 if present else 1
    return sorted(found.values(), key=lambda c: (newest_first * _number(c.cuda), c.rank)), refusals


def classify(file: Listed, platforms: Sequence[str], present: Cuda | None) -> Candidate | str:
    """The wheel as a candidate, or why it is none."""
    try:
        name = WheelName.parse(file.name)
    except CodegenError as error:
        return str(error)
    ranks = [platforms.index(platform) for platform in name.platforms if platform in platforms]
    if name.version != version("__version__"):
        return f"version {name.version}"
    if not ranks:
        return "another platform"
    if name.cuda is None:
        return "no build tag that names a CUDA, such as 130"
    if present and present < cuda_driver.needed_cuda(name.cuda):
        return f"needs {cuda_driver.needed_driver(name.cuda)}"
    return Candidate(file, name.cuda, min(ranks), name)


def _number(cuda: Cuda) -> int:
    return cuda[0] * 10 + cuda[1]


def read_manifest(wheel: Path, candidate: Candidate) -> dict[str, Any]:
    """The wheel's _build.json; raises WheelError unless the wheel is whole and what its name says."""
    folder = candidate.name.dist_info
    try:
        with zipfile.ZipFile(wheel) as archive:
            if damaged := archive.testzip():
                raise WheelError(f"{wheel.name} is damaged: {damaged}")
            archive.getinfo(LIBRARY)
            metadata = Parser().parsestr(archive.read(f"{folder}/METADATA").decode(), headersonly=True)
            tags = Parser().parsestr(archive.read(f"{folder}/WHEEL").decode(), headersonly=True)
            manifest: dict[str, Any] = json.loads(archive.read(MANIFEST))
    except KeyError as error:
        raise WheelError(f"{wheel.name} is no wheel of this project: {error.args[0]}") from None
    except (OSError, zipfile.BadZipFile, zlib.error, ValueError, EOFError, RuntimeError) as error:
        raise WheelError(f"{wheel.name} is damaged: {error}") from None
    said = (canonicalize_name(str(metadata["Name"])), metadata["Version"])
    if said != (PROJECT, version("__version__")):
        raise WheelError(f"{wheel.name} holds {said[0]} {said[1]}")
    if set(tags.get_all("Tag", [])) != candidate.name.tags:
        raise WheelError(f"{wheel.name} says inside that it is for {', '.join(tags.get_all('Tag', []))}")
    fields = ("targets", *AXES)
    if not isinstance(manifest, dict) or not all(isinstance(manifest.get(f), list) for f in fields):
        raise WheelError(f"{wheel.name}: its _build.json is no manifest of this project")
    return manifest


def shortfall(manifest: Mapping[str, Any], selection: Selection, environ: Mapping[str, str]) -> str:
    """What a wheel lacks of the selection, "" if nothing: targets, and the axes that the environment sets."""
    project = version("PROJECT_VERSION")
    if manifest.get("project_version") != project:
        return f"project version {manifest.get('project_version')}, this is {project}"
    held = [_parse_target(text) for text in manifest["targets"]]
    missing: list[Any] = [target for target in selection.targets if not _covered(target, held)]
    for axis, variable in AXES.items():
        if environ.get(variable, "").strip():
            missing += [value for value in getattr(selection, axis) if value not in manifest[axis]]
    return f"no kernels for {', '.join(map(str, missing))}" if missing else ""


def _parse_target(text: str) -> Target:
    target = Target.parse(str(text))
    if target is None:
        raise WheelError(f"unknown target {text!r} in the wheel's _build.json")
    return target


def _covered(target: Target, held: Iterable[Target]) -> bool:
    """Whether a cubin of the same family runs on the target, and PTX is there if it was asked for."""
    older = [h for h in held if h.family == target.family and h.capability <= target.capability]
    cubin = any(
        h.capability == target.capability
        or (h.capability // 10 == target.capability // 10 and h.capability not in axes.EMBEDDED)
        for h in older
    )
    return cubin and (not target.ptx or any(h.ptx for h in older))


def _nothing_found(index: str, selection: Selection, present: Cuda | None, refusals: Sequence[str]) -> str:
    supported = f"CUDA {present[0]}.{present[1]} of the driver" if present else "any CUDA (no driver found)"
    targets = ", ".join(map(str, selection.targets)) or "any GPU"
    platforms = list(platform_tags())
    newest = next((tag for tag in platforms if tag.startswith("manylinux_")), platforms[0])
    lines = [
        f"flash-attn: no prebuilt wheel: looked in {index} for {PROJECT} {version('__version__')},"
        f" {newest} or older, {supported}, kernels for {targets}",
        *(f"flash-attn:   {refusal}" for refusal in refusals[:REFUSALS_SHOWN]),
    ]
    if len(refusals) > REFUSALS_SHOWN:
        lines.append(f"flash-attn:   and {len(refusals) - REFUSALS_SHOWN} more wheels that do not fit")
    return "\n".join(lines)
