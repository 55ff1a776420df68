"""The release matrix: reading ``matrix.toml``, checking it, and the pairs that follow from it."""

import re
import sys
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ci import CiError
from codegen import axes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = Path(__file__).with_name("matrix.toml")
PLATFORM = re.compile(r"linux_(x86_64|aarch64)")
PINNED = re.compile(r".@sha256:[0-9a-f]{64}$")
ARCH = re.compile(r"(\d+)(\+ptx)?")


class Version(NamedTuple):
    """Two numbers: a CUDA, a torch series or a Python."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"

    @property
    def digits(self) -> str:
        """``130`` for 13.0: what wheels' build tags and torch's names of CUDA versions are made of."""
        return f"{self.major}{self.minor}"


@dataclass(frozen=True)
class Platform:
    """Where a platform's wheels are made: the hosted runner, and the image of the container on it."""

    runner: str
    image: str


@dataclass(frozen=True)
class Build:
    """One compilation of the library per platform; ``pypi`` marks the one that is uploaded there.

    ``prepare`` is the command that puts its compiler under ``cuda_home`` in the manylinux container; without
    it the compiler comes from PyPI with the build requirements.
    """

    cuda: Version
    archs: tuple[str, ...]
    pypi: bool = False
    prepare: str = ""
    cuda_home: str = ""


@dataclass(frozen=True)
class Torch:
    """A torch series, the CUDA versions that it was published for, its oldest and newest Python."""

    series: Version
    cudas: tuple[Version, ...]
    pythons: tuple[Version, Version]


@dataclass(frozen=True)
class Pair:
    """A torch series with a CUDA: what a user has, and the CUDA of the build that serves it."""

    torch: Version
    cuda: Version
    build: Version
    pythons: tuple[Version, ...]

    @property
    def folder(self) -> str:
        """The pair's sub-index, ``cu130/torch2.13``."""
        return f"cu{self.cuda.digits}/torch{self.torch}"


@dataclass(frozen=True)
class Matrix:
    """All that is released, for which platforms."""

    platforms: Mapping[str, Platform]
    builds: tuple[Build, ...]
    torches: tuple[Torch, ...]

    def build_for(self, cuda: Version) -> Build | None:
        """The newest build of the same CUDA major version."""
        same = [build for build in self.builds if build.cuda.major == cuda.major]
        return max(same, key=lambda build: build.cuda, default=None)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Every pair, by torch, then by CUDA."""
        return tuple(
            Pair(torch.series, cuda, build.cuda, _range(*torch.pythons))
            for torch in self.torches
            for cuda in torch.cudas
            if (build := self.build_for(cuda))
        )

    def build(self, cuda: str) -> Build:
        """The build of this CUDA; raises CiError."""
        for build in self.builds:
            if str(build.cuda) == cuda:
                return build
        known = ", ".join(str(build.cuda) for build in self.builds)
        raise CiError(f"unknown CUDA {cuda!r}: the matrix has builds for {known}")

    def pair(self, torch: str, cuda: str) -> Pair:
        """The pair of a torch version such as 2.13.0 and a CUDA; raises CiError."""
        series = ".".join(torch.split(".")[:2])
        for pair in self.pairs:
            if (str(pair.torch), str(pair.cuda)) == (series, cuda):
                return pair
        cudas = ", ".join(str(pair.cuda) for pair in self.pairs if str(pair.torch) == series)
        known = f"torch {series} has CUDA {cudas}" if cudas else f"it has no torch {series}"
        raise CiError(f"torch {torch} with CUDA {cuda} is not a pair of the matrix: {known}")


def read(path: Path = FILE) -> Matrix:
    """The matrix in a TOML file; raises CiError with one line."""
    try:
        return parse(tomllib.loads(path.read_text()))
    except OSError as error:
        raise CiError(f"{path}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise CiError(f"{path.name}: {' '.join(str(error).split())}") from None
    except CiError as error:
        raise CiError(f"{path.name}: {error}") from None


def parse(table: Mapping[str, Any]) -> Matrix:
    """The matrix in a TOML document; raises CiError for anything that cannot be released."""
    _only(table, "the file", {"platforms", "build", "torch"})
    platforms = {name: _platform(name, row) for name, row in _table(table["platforms"], "platforms").items()}
    if not isinstance(table["build"], list):
        raise CiError("build must be a list of tables")
    builds = tuple(_build(row) for row in table["build"])
    _distinct([str(build.cuda) for build in builds], "duplicate build of CUDA {}")
    if sum(build.pypi for build in builds) != 1:
        raise CiError("exactly one build must have pypi = true")
    torches = tuple(_torch(series, row) for series, row in _table(table["torch"], "torch").items())
    matrix = Matrix(platforms, builds, torches)
    _check_pairs(matrix)
    return matrix


def _check_pairs(matrix: Matrix) -> None:
    known = ", ".join(str(build.cuda) for build in matrix.builds)
    for torch in matrix.torches:
        _distinct(
            [str(cuda) for cuda in torch.cudas], f"duplicate pair of torch {torch.series} and CUDA {{}}"
        )
        for cuda in torch.cudas:
            if matrix.build_for(cuda) is None:
                raise CiError(f"torch {torch.series}: unknown CUDA {cuda}: no build among {known} serves it")


def _platform(name: str, row: object) -> Platform:
    if not PLATFORM.fullmatch(name):
        raise CiError(f"unknown platform {name!r}: known are linux_x86_64 and linux_aarch64")
    fields = _table(row, f"platform {name}")
    _only(fields, f"platform {name}", {"runner", "image"})
    if not all(isinstance(value, str) and value for value in fields.values()):
        raise CiError(f"platform {name}: runner and image are two strings")
    if not PINNED.search(fields["image"]):
        raise CiError(f"platform {name}: image must end in its digest, @sha256:..., not {fields['image']!r}")
    return Platform(**fields)


def _build(row: object) -> Build:
    fields = _table(row, "build")
    _only(fields, "build", {"cuda", "archs"}, {"pypi", "prepare", "cuda_home"})
    cuda = _version(fields["cuda"], "build: cuda")
    archs = _strings(fields["archs"], f"build {cuda}: archs")
    for arch in archs:
        match = ARCH.fullmatch(arch)
        known = axes.ARCHS.get(int(match[1])) if match else None
        if known is None:
            raise CiError(f"build {cuda}: unknown arch {arch!r}: known are {', '.join(map(str, axes.ARCHS))}")
        if cuda < known.min_cuda:
            first = Version(*known.min_cuda)
            raise CiError(f"build {cuda}: arch {arch} needs CUDA {first} or newer")
    if not isinstance(fields.get("pypi", False), bool):
        raise CiError(f"build {cuda}: pypi must be true or false")
    container = {name: fields.get(name, "") for name in ("prepare", "cuda_home")}
    if not all(isinstance(value, str) for value in container.values()) or bool(container["prepare"]) != bool(
        container["cuda_home"]
    ):
        raise CiError(f"build {cuda}: prepare and cuda_home are two strings, or both left out")
    return Build(cuda, archs, fields.get("pypi", False), **container)


def _torch(series: str, row: object) -> Torch:
    where = f"torch {series}"
    fields = _table(row, where)
    _only(fields, where, {"cuda", "python"})
    cudas = tuple(
        _version(cuda, f"{where}: cuda") for cuda in _strings(fields["cuda"], f"{where}: cuda, its variants")
    )
    pythons = tuple(
        _version(text, f"{where}: python") for text in _strings(fields["python"], f"{where}: python")
    )
    if len(pythons) != 2 or pythons[0] > pythons[1] or pythons[0].major != pythons[1].major:
        raise CiError(f"{where}: python must be [oldest, newest]")
    return Torch(_version(series, "torch"), cudas, (pythons[0], pythons[1]))


def _range(oldest: Version, newest: Version) -> tuple[Version, ...]:
    return tuple(Version(oldest.major, minor) for minor in range(oldest.minor, newest.minor + 1))


def _version(text: object, where: str) -> Version:
    if not isinstance(text, str) or not re.fullmatch(r"\d+\.\d+", text):
        raise CiError(f'{where} must look like "13.0", not {text!r}')
    major, minor = text.split(".")
    return Version(int(major), int(minor))


def _strings(value: object, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise CiError(f"{where} must be a list of at least one string, not {value!r}")
    return tuple(value)


def _table(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise CiError(f"{where} must be a table with at least one entry")
    return value


def _only(table: Mapping[str, Any], where: str, required: Set[str], optional: Set[str] = frozenset()) -> None:
    if missing := sorted(required - set(table)):
        raise CiError(f"{where} lacks {', '.join(missing)}")
    if unknown := sorted(set(table) - required - optional):
        raise CiError(f"{where} has an unknown entry {', '.join(unknown)}")


def _distinct(names: list[str], message: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise CiError(message.format(name))
