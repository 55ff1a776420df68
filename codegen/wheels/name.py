"""What the file name of one of this project's wheels says, and where things are inside it."""

import re
from dataclasses import dataclass

from codegen import CodegenError

PROJECT = "flash-attn"
LIBRARY = "flash_attn/libflash_attn.so"
MANIFEST = "flash_attn/_build.json"

NAME = re.compile(
    r"(?P<project>[\w.]+)-(?P<version>[\w.!+]+)(-(?P<build>\d\w*))?-(?P<python>[\w.]+-[\w.]+)-(?P<platforms>[\w.]+)\.whl",
    re.ASCII,
)
PYTHON = "py3-none"
"""Any Python and any ABI will do."""


@dataclass(frozen=True)
class WheelName:
    """Version, build tag ("130" for CUDA 13.0, "" without one) and platform tags of a wheel."""

    version: str
    build: str
    platforms: tuple[str, ...]

    @property
    def cuda(self) -> tuple[int, int] | None:
        """The CUDA that the build tag names; None if it names none."""
        if not re.fullmatch(r"[1-9]\d\d", self.build):
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


def parse(name: str) -> WheelName:
    """The file name taken apart; raises CodegenError, which says why it is none of this project's."""
    match = NAME.fullmatch(name)
    if match is None:
        raise CodegenError("not the name of a wheel")
    if re.sub(r"[_.]+", "-", match["project"]).lower() != PROJECT:
        raise CodegenError("another project")
    if match["python"] != PYTHON:
        raise CodegenError(f"for {match['python']}, not {PYTHON}")
    return WheelName(match["version"], match["build"] or "", tuple(match["platforms"].split(".")))
