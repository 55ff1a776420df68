"""The kernels in a library's device code, which no table can hide, read with NVIDIA's cuobjdump."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from ci import CiError
from codegen import axes, units
from codegen.compilation import toolchain
from codegen.kernel_key import KernelKey
from codegen.targets import Target, full_selection


def find_cuobjdump() -> Path | None:
    """cuobjdump of CUDA_HOME, PATH or the package nvidia-cuda-cuobjdump; None if there is none."""
    home = os.environ.get("CUDA_HOME")
    path = os.pathsep.join([*([f"{home}/bin"] if home else []), os.environ.get("PATH", "")])
    found = shutil.which("cuobjdump", path=path)
    return Path(found).resolve() if found else toolchain.newest_of_wheels("cuobjdump")


def read(library: Path) -> frozenset[str] | None:
    """What ``expected`` says, of a library as it is; None without a cuobjdump. Raises CiError."""
    program = find_cuobjdump()
    if program is None:
        return None
    return parse(run(program, library, "--dump-elf-symbols"))


def run(program: Path, binary: Path, *options: str, folder: Path | None = None) -> str:
    """What cuobjdump, run in ``folder``, prints about a library or an object.

    It is empty if it holds no device code. Raises CiError.
    """
    command = [str(program), *options, str(binary.resolve())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    except OSError as error:
        raise CiError(f"cuobjdump failed: {error}") from error
    if not done.returncode:
        return done.stdout
    if "does not contain device code" in done.stdout + done.stderr:
        return ""
    raise CiError(f"cuobjdump failed: {done.stderr.strip() or done.stdout.strip()}")


def expected(kernels: Iterable[str], targets: Iterable[str]) -> frozenset[str]:
    """Each kernel for each target of its family: ``forward_sm80_bf16_d128_full sm_90``; raises CiError."""
    codes = [_code(target) for target in targets]
    keys = [_key(kernel) for kernel in kernels]
    return frozenset(f"{key} {code}" for key in keys for family, code in codes if family == key.family)


def _key(kernel: str) -> KernelKey:
    key = KernelKey.parse(kernel)
    if key is None:
        raise CiError(f"unknown kernel {kernel!r} in its manifest")
    return key


def _code(target: str) -> tuple[str, str]:
    """Family and code of a target: sm80 and sm_90 of ``sm80:90+ptx``."""
    parsed = Target.parse(target)
    if parsed is None or parsed.family not in axes.FAMILIES or parsed.capability not in axes.ARCHS:
        raise CiError(f"unknown target {target!r} in its manifest")
    return parsed.family, f"sm_{parsed.code}"


def parse(text: str) -> frozenset[str]:
    """The same in the output of ``cuobjdump --dump-elf-symbols``: a symbol holds its unit's config."""
    all_units = units.list_units(full_selection())
    keys = {unit.config: unit.key for unit in all_units}
    found = set()
    arch = ""
    for line in text.splitlines():
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ").strip()
        elif " ENTRY " in line:
            found |= {f"{keys[name]} {arch}" for name in _identifiers(line.split()[-1]) if name in keys}
    return frozenset(found)


def _identifiers(mangled: str) -> list[str]:
    """The names in a mangled symbol, each of which follows its length."""
    return [mangled[m.end() : m.end() + int(m[0])] for m in re.finditer(r"\d+", mangled)]
