"""What the file name of one of this project's wheels says, and where things are inside it."""

import re
from dataclasses import dataclass

from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from codegen import PROJECT, CodegenError

LIBRARY = "flash_attn/libflash_attn.so"
MANIFEST = "flash_attn/_build.json"

PYTHON = "py3-none"
"""Any Python and any ABI will do."""

BUILD = re.compile(r"\d\w*", re.ASCII)
VERSION = re.compile(r"[\w.!+]+", re.ASCII)
PLATFORMS = re.compile(r"\w+(\.\w+)*", re.ASCII)


@dataclass(frozen=True)
class WheelName:
    """Version, build tag ("130" for CUDA 13.0, "" without one) and platform tags of a wheel, as written."""

    version: str
    build: str
    platforms: tuple[str, ...]

    @classmethod
    def parse(cls, name: str) -> "WheelName":
        """The file name taken apart; raises CodegenError, which says why it is none of this project's."""
        try:
            parse_wheel_filename(name)
        except InvalidWheelFilename:
            raise CodegenError("not the name of a wheel") from None
        # Taken from the text: packaging normalises versions, drops a build tag's leading zeros and the order
        # of the platforms, and lets through characters that belong in neither.
        project, version, *build, python, abi, platforms = name.removesuffix(".whl").split("-")
        parts = (VERSION, version), (PLATFORMS, platforms), *((BUILD, tag) for tag in build)
        if not all(pattern.fullmatch(part) for pattern, part in parts):
            raise CodegenError("not the name of a wheel")
        if project != PROJECT.replace("-", "_"):
            raise CodegenError("another project")
        if f"{python}-{abi}" != PYTHON:
            raise CodegenError(f"for {python}-{abi}, not {PYTHON}")
        return cls(version, "".join(build), tuple(platforms.split(".")))

    @property
    def cuda(self) -> tuple[int, int] | None:
        """The CUDA that the build tag names; None if it names none."""
        if not re.fullmatch("[1-9][0-9]{2}", self.build):
            return None
        return int(self.build[:-1]), int(self.build[-1])

    @property
    def tags(self) -> frozenset[str]:
        """The tags as the wheel's file WHEEL has them."""
        return frozenset(f"{PYTHON}-{platform}" for platform in self.platforms)

    @property
    def dist_info(self) -> str:
        """The folder of the wheel's metadata."""
        return f"flash_attn-{self.version}.dist-info"
