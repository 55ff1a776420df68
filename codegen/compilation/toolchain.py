"""Finding nvcc: CUDA_HOME, PATH, then NVIDIA's compiler wheels from PyPI."""

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from codegen import CodegenError, axes
from codegen.compilation import cuda_driver
from codegen.targets import Selection

MINIMUM_CUDA = (12, 0)

WHEEL_RELEASE = "13.0.*"
"""CUDA release of the compiler wheels; 13.0 is the first complete one."""


class ToolchainError(CodegenError):
    """No nvcc, or one that cannot compile the selection."""


@dataclass(frozen=True)
class Toolchain:
    """An nvcc with its release, such as "13.0.88", and the library folder that it does not find by itself."""

    nvcc: Path
    release: str
    library_dir: Path | None = None

    @property
    def compresses(self) -> bool:
        """Whether this nvcc can compress the code that it embeds."""
        return self.cuda >= cuda_driver.COMPRESSED_SINCE

    @property
    def cuda(self) -> tuple[int, int]:
        major, minor, *_ = self.release.split(".")
        return int(major), int(minor)


def wheel_requirement(release: str = WHEEL_RELEASE) -> str:
    """What puts a complete nvcc of a CUDA release into an environment: NVIDIA's own list of its parts."""
    return f"cuda-toolkit[nvcc,cccl]=={release}"


def check_driver(present: cuda_driver.Cuda | None) -> None:
    """Raise ToolchainError if a driver is too old to run what the compiler wheels build."""
    major, minor, *_ = WHEEL_RELEASE.split(".")
    release = (int(major), int(minor))
    if present and present < cuda_driver.needed_cuda(release):
        raise ToolchainError(
            f"no nvcc here, and programs of NVIDIA's compiler wheels (CUDA {major}.{minor}) need"
            f" {cuda_driver.needed_driver(release)}, but this one supports CUDA {present[0]}.{present[1]}:"
            " update it, set CUDA_HOME to a CUDA 12 toolkit, or set FLASH_ATTN_ARCHS=none"
        )


def find_toolchain() -> Toolchain:
    """The first nvcc of CUDA_HOME, PATH and the compiler wheels; raises ToolchainError."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise ToolchainError(
            f"no nvcc: set CUDA_HOME, put nvcc on PATH, or run pip install '{wheel_requirement()}'"
        )
    return Toolchain(nvcc, _release(nvcc), _library_dir(nvcc.parent.parent))


def find_nvcc(
    environ: Mapping[str, str] | None = None, nvidia_folders: Iterable[Path] | None = None
) -> Path | None:
    """Path of nvcc, or None; raises ToolchainError if CUDA_HOME names a folder without one.

    ``nvidia_folders`` are the folders of the ``nvidia`` namespace package, where the compiler wheels unpack.
    """
    environ = os.environ if environ is None else environ
    home = environ.get("CUDA_HOME")
    if home:
        nvcc = Path(home) / "bin" / "nvcc"
        if not nvcc.is_file():
            raise ToolchainError(f"CUDA_HOME is {home}, but there is no {nvcc}")
        return nvcc
    found = shutil.which("nvcc", path=environ.get("PATH", ""))
    if found:
        return Path(found)
    return newest_of_wheels("nvcc", nvidia_folders)


def newest_of_wheels(program: str, nvidia_folders: Iterable[Path] | None = None) -> Path | None:
    """A program of NVIDIA's wheels in this environment, of the newest CUDA; None if it is not there."""
    folders = _nvidia_folders() if nvidia_folders is None else nvidia_folders
    found = [path for folder in folders for path in folder.glob(f"cu*/bin/{program}")]
    return max(found, key=lambda path: int(path.parent.parent.name.removeprefix("cu") or 0), default=None)


def _library_dir(root: Path) -> Path | None:
    """``lib`` of a toolkit from wheels: nvcc's own profile looks in ``lib64``, which those do not have."""
    library_dir = root / "lib"
    return (
        library_dir
        if (library_dir / "libcudart_static.a").exists() and not (root / "lib64").exists()
        else None
    )


def _nvidia_folders() -> list[Path]:
    spec = importlib.util.find_spec("nvidia")
    return [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]


def _release(nvcc: Path) -> str:
    try:
        answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ToolchainError(f"{nvcc} --version failed: {error}") from error
    match = re.search(r"\bV(\d+\.\d+\.\d+)", answer)
    if match is None:
        raise ToolchainError(f"{nvcc} --version does not tell a release: {answer!r}")
    return match[1]


def check_targets(toolchain: Toolchain, selection: Selection) -> None:
    """Raise ToolchainError if nvcc is too old for the project or for one of the targets."""
    needed = {"this project": MINIMUM_CUDA}
    for target in selection.targets:
        needed[f"target {target}"] = axes.ARCHS[target.capability].min_cuda
    for what, minimum in needed.items():
        if toolchain.cuda < minimum:
            raise ToolchainError(
                f"{what} needs CUDA {minimum[0]}.{minimum[1]} or newer;"
                f" {toolchain.nvcc} is {toolchain.release}"
            )
