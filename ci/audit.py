"""Auditing a wheel: tag, exported symbols, needed libraries, size, and the manifest against the library."""

import ctypes
import re
import tempfile
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from ci import CiError, device_code, elf
from ci.wheel import Wheel
from codegen import abi
from codegen.wheels.name import LIBRARY

MAX_BYTES = 100_000_000
"""PyPI's limit on a file."""

SYSTEM_LIBRARIES = re.compile(
    r"(lib(c|m|dl|pthread|rt|stdc\+\+)\.so\.\d+|libgcc_s\.so\.1|ld-linux-\w+([-.]\w+)*\.so\.\d)"
)


@dataclass(frozen=True)
class Facts:
    """What a wheel turned out to hold; ``glibc`` is the newest version that a needed symbol names.

    ``device_kernels`` are those of the device code, see ``device_code``; None if they could not be read.
    """

    platform: str
    build: str
    size: int
    nvcc: str
    exported: frozenset[str]
    needed: frozenset[str]
    glibc: tuple[int, int]
    manifest_kernels: tuple[str, ...]
    library_kernels: tuple[str, ...]
    manifest_targets: tuple[str, ...] = field(default=())
    library_targets: tuple[str, ...] = field(default=())
    device_kernels: frozenset[str] | None = None

    @property
    def summary(self) -> str:
        """One line for the log."""
        needs = " ".join(sorted(self.needed))
        read = self.device_kernels
        device = "device code not read (no cuobjdump)" if read is None else f"{len(read)} in device code"
        return (
            f"{len(self.library_kernels)} kernels as in the manifest, {device}, {len(self.exported)} symbols,"
            f" glibc {_dots(self.glibc)}, needs {needs}, {self.size / 1e6:.2f} MB"
        )


def audit(wheel: Wheel, policy: str | None = None) -> Facts:
    """What the wheel holds; raises CiError with all that is wrong with it.

    ``policy`` is the newest platform tag allowed, such as manylinux_2_28.
    """
    facts = examine(wheel)
    if found := problems(facts, policy):
        raise CiError(f"{wheel.name}: {'; '.join(found)}")
    return facts


def problems(facts: Facts, policy: str | None = None) -> list[str]:
    """Sentences on all that keeps a wheel from being published."""
    return [*_tag_problems(facts, policy), *_library_problems(facts), *_manifest_problems(facts)]


def _tag_problems(facts: Facts, policy: str | None) -> list[str]:
    found = []
    if not facts.build:
        found.append("its name has no build tag, which tells the CUDA that built it")
    elif "".join(facts.nvcc.split(".")[:2]) != facts.build:
        found.append(f"its build tag is {facts.build}, but nvcc {facts.nvcc} built it")
    promised = _glibc_of(facts.platform)
    if promised and facts.glibc > promised:
        found.append(f"its tag promises glibc {_dots(promised)}, but its library needs {_dots(facts.glibc)}")
    if policy:
        allowed = _glibc_of(policy)
        if allowed is None:
            raise CiError(f"policy {policy!r} is not of the form manylinux_2_28")
        if promised is None or promised > allowed:
            found.append(f"its platform {facts.platform} is not within {policy}")
    return found


def _library_problems(facts: Facts) -> list[str]:
    found = []
    abi_functions = {function.name for function in abi.FUNCTIONS}
    if foreign := set(facts.exported - abi_functions):
        found.append(f"its library exports {_some(foreign)}")
    if missing := set(abi_functions - facts.exported):
        found.append(f"its library lacks {_some(missing)}")
    if foreign := {name for name in facts.needed if not SYSTEM_LIBRARIES.fullmatch(name)}:
        found.append(f"its library needs {_some(foreign)}")
    if facts.size > MAX_BYTES:
        found.append(f"its size of {facts.size / 1e6:.1f} MB is above {MAX_BYTES / 1e6:.0f} MB")
    return found


def _manifest_problems(facts: Facts) -> list[str]:
    found = []
    promised = device_code.expected(facts.manifest_kernels, facts.manifest_targets)
    for what, manifest, library in (
        ("kernels", facts.manifest_kernels, facts.library_kernels),
        ("targets", facts.manifest_targets, facts.library_targets),
        ("device code", promised, promised if facts.device_kernels is None else facts.device_kernels),
    ):
        if missing := set(manifest) - set(library):
            found.append(f"its library lacks {what} of the manifest: {_some(missing)}")
        if foreign := set(library) - set(manifest):
            found.append(f"its manifest lacks {what} of the library: {_some(foreign)}")
    return found


def examine(wheel: Wheel) -> Facts:
    """The facts of a wheel, from its ELF file, by cuobjdump, and by loading its library; raises CiError."""
    manifest = wheel.manifest
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / Path(LIBRARY).name
        library.write_bytes(wheel.member(LIBRARY))
        kernels, targets = load(library)
        dynamics = elf.read(library)
        return Facts(
            platform=wheel.platform,
            build=wheel.build,
            size=wheel.size,
            nvcc=str(manifest.get("nvcc")),
            exported=dynamics.exported,
            needed=dynamics.needed,
            glibc=dynamics.glibc,
            manifest_kernels=tuple(manifest.get("kernels", ())),
            library_kernels=kernels,
            manifest_targets=tuple(manifest.get("targets", ())),
            library_targets=targets,
            device_kernels=device_code.read(library),
        )


def load(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The kernel keys and the targets that a loaded library names; raises CiError."""
    try:
        library = ctypes.CDLL(str(path), mode=ctypes.RTLD_LOCAL)
        library.flash_attn_kernel_key.restype = library.flash_attn_targets.restype = ctypes.c_char_p
        keys = tuple(
            library.flash_attn_kernel_key(i).decode() for i in range(library.flash_attn_kernel_count())
        )
        targets = library.flash_attn_targets().decode()
    except (OSError, AttributeError) as error:
        raise CiError(f"the library cannot be loaded here: {error}") from None
    return keys, tuple(filter(None, targets.split(",")))


def _glibc_of(platform: str) -> tuple[int, int] | None:
    """The oldest glibc that a manylinux tag, or the oldest of several, promises to run on."""
    versions = [
        (int(major), int(minor)) for major, minor in re.findall(r"manylinux_(\d+)_(\d+)(?:_|\b)", platform)
    ]
    return min(versions, default=None)


def _dots(version: Collection[int]) -> str:
    return ".".join(map(str, version))


def _some(names: Collection[str]) -> str:
    """A few of the names and how many more there are."""
    shown = ", ".join(sorted(names)[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
