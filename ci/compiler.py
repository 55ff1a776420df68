"""The compiler of a build, fetched: by the build's own command, or NVIDIA's compiler wheels from PyPI."""

import shutil
import subprocess
import sys
from pathlib import Path

from ci import ROOT, CiError
from ci.matrix import Build, Version
from codegen.compilation import toolchain

FETCHED = ROOT / "build" / "compiler"
COMPLETE_SINCE = Version(13, 0)
"""Before it the wheels on PyPI hold parts of a compiler only."""


def fetch(build: Build, folder: Path = FETCHED) -> Path:
    """Put the build's compiler there unless it is; returns its CUDA_HOME. Raises CiError.

    A build with ``prepare`` runs that, which is written for a manylinux container and its root user.
    """
    if build.prepare:
        if not Path(build.cuda_home, "bin", "nvcc").is_file():
            _run("/bin/sh", "-c", build.prepare)
        return Path(build.cuda_home)
    return fetch_wheels(build.cuda, folder / str(build.cuda))


def fetch_wheels(cuda: Version, folder: Path) -> Path:
    """NVIDIA's compiler wheels of a CUDA, unpacked in ``folder``; returns their CUDA_HOME."""
    if cuda < COMPLETE_SINCE:
        raise CiError(f"CUDA {cuda}: PyPI has complete compilers from {COMPLETE_SINCE} on")
    home = folder / "nvidia" / f"cu{cuda.major}"
    if not (home / "bin" / "nvcc").is_file():
        partial = folder.with_name(f".{folder.name}")
        shutil.rmtree(partial, ignore_errors=True)
        pip = (sys.executable, "-m", "pip", "install", "--disable-pip-version-check")
        quiet = () if sys.stdout.isatty() else ("--quiet",)  # pip's own bars, for a person
        _run(*pip, *quiet, "--target", str(partial), toolchain.wheel_requirement(f"{cuda}.*"))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    return home


def _run(*command: str) -> None:
    if subprocess.run(command, check=False).returncode:
        raise CiError(f"the compiler cannot be fetched: {' '.join(command[:4])} failed, see above")
