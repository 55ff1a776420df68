"""A wheel of this project as a file: its name taken apart, its hash, metadata, library and manifest."""

import hashlib
import json
import re
import zipfile
from dataclasses import dataclass
from email.parser import HeaderParser
from functools import cached_property
from pathlib import Path
from typing import Any

from ci import CiError
from ci.matrix import Version
from codegen import PROJECT, CodegenError
from codegen.wheels.index import sha256_of
from codegen.wheels.name import MANIFEST, WheelName

PLATFORM_TAG = re.compile(r"(?:linux|manylinux\w*?)_(x86_64|aarch64)")


@dataclass(frozen=True)
class Wheel:
    """A wheel file that is what its name says."""

    path: Path
    parsed: WheelName

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def version(self) -> str:
        return self.parsed.version

    @property
    def build(self) -> str:
        """The build tag, ``130`` for CUDA 13.0; "" without one."""
        return self.parsed.build

    @property
    def platform(self) -> str:
        """The platform tags, dotted as in the name."""
        return ".".join(self.parsed.platforms)

    @property
    def arch(self) -> str:
        """The machine's architecture, ``x86_64``."""
        return "x86_64" if self.platform.endswith("x86_64") else "aarch64"

    @cached_property
    def sha256(self) -> str:
        return sha256_of(self.path)

    @cached_property
    def size(self) -> int:
        """Bytes of the file."""
        return self.path.stat().st_size

    @cached_property
    def metadata(self) -> bytes:
        """The file METADATA."""
        return self.member(f"{self.parsed.dist_info}/METADATA")

    @property
    def metadata_sha256(self) -> str:
        return hashlib.sha256(self.metadata).hexdigest()

    @property
    def requires_python(self) -> str:
        return HeaderParser().parsestr(self.metadata.decode())["Requires-Python"] or ""

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What the build wrote down about itself."""
        try:
            manifest: dict[str, Any] = json.loads(self.member(MANIFEST))
        except ValueError as error:
            raise CiError(f"{self.name}: {MANIFEST} is not JSON: {error}") from None
        return manifest

    def member(self, name: str) -> bytes:
        """The content of a file in the wheel; raises CiError."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                return archive.read(name)
        except (zipfile.BadZipFile, EOFError, OSError) as error:
            raise CiError(f"{self.name}: cannot be read: {error}") from None
        except KeyError:
            raise CiError(f"{self.name}: holds no {name}") from None


def open_wheel(path: Path) -> Wheel:
    """A wheel of this project that is what its name says; raises CiError."""
    if not path.is_file():
        raise CiError(f"{path}: no such file")
    try:
        wheel = Wheel(path, WheelName.parse(path.name))
    except CodegenError as error:
        raise CiError(f"{path.name}: not a wheel of {PROJECT}: {error}") from None
    matches = [PLATFORM_TAG.fullmatch(tag) for tag in wheel.parsed.platforms]
    if len({match and match[1] for match in matches}) > 1 or None in matches:
        raise CiError(f"{path.name}: platform {wheel.platform!r} is not one of linux x86_64 or aarch64")
    header = HeaderParser().parsestr(wheel.member(f"{wheel.parsed.dist_info}/WHEEL").decode())
    if set(header.get_all("Tag", [])) != wheel.parsed.tags or header.get("Build", "") != wheel.build:
        raise CiError(f"{path.name}: its WHEEL file disagrees with its name on tags or build")
    return wheel


def open_folder(folder: Path) -> list[Wheel]:
    """The wheels in a folder by name; raises CiError, also for two wheels of one build and architecture."""
    if not folder.is_dir():
        raise CiError(f"{folder}: no such folder")
    wheels = [open_wheel(path) for path in sorted(folder.glob("*.whl"))]
    if not wheels:
        raise CiError(f"{folder}: holds no wheel")
    return distinct(wheels)


def distinct(wheels: list[Wheel]) -> list[Wheel]:
    """The wheels, unless two are for one CUDA and architecture: then an index could offer either."""
    seen: dict[tuple[str, str, str], Wheel] = {}
    for wheel in wheels:
        other = seen.setdefault((wheel.version, wheel.build, wheel.arch), wheel)
        if other is not wheel:
            raise CiError(
                f"two wheels for build {wheel.build} on {wheel.arch}: {other.name} and {wheel.name}"
            )
    return wheels


def serves(wheel: Wheel, build: Version) -> bool:
    """Whether the wheel is of the build for this CUDA."""
    return wheel.build == build.digits
