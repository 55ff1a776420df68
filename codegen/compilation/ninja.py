"""The ninja file of a build: one edge per translation unit, one link."""

import io
import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codegen import TEMPLATES, CodegenError
from codegen.compilation.toolchain import Toolchain
from codegen.targets import Selection, Target
from codegen.units import Unit

LIBRARY = "libflash_attn.so"

MEMORY_PER_JOB = 1.5 * 2**30
"""Bytes that a compilation may take: no unit is allowed above it."""

COMPILE_FLAGS = (
    "-std=c++17",
    "-O3",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fvisibility=hidden,-fPIC,-Wall,-Wno-unknown-pragmas",
    "--threads=1",
)

COMPRESS_FLAG = "--compress-mode=size"
"""Objects a quarter of their size, the library half, for no measurable time."""

COMPILE_COMMAND = (
    '"$$CODEGEN_PYTHON" -m codegen.compilation.nvcc_step --name $name --smem $smem --object $out'
    " --nvcc $nvcc --release $release -- $flags $gencode -c $in"
)
LINK_COMMAND = "$nvcc -shared -cudart static -Xlinker $exports $library_dirs -o $out $in"

VERSION_SCRIPT = "{ global: flash_attn_*; local: *; };\n"


@dataclass(frozen=True)
class Source:
    """A file to compile: name in the build log, path, targets, and its kernel's dynamic shared memory."""

    name: str
    path: Path
    gencode: tuple[str, ...]
    smem_bytes: int = 0


def sources(
    selection: Selection, units: Iterable[Unit], generated: Path, templates: Path = TEMPLATES
) -> list[Source]:
    """The units, those that take longest first, then the dispatch table and the hand-written files."""
    everything = gencode_flags(selection.targets)
    by_family = {
        family: gencode_flags(target for target in selection.targets if target.family == family)
        for family in selection.families
    }
    costliest_first = sorted(units, key=lambda unit: unit.cost_rank, reverse=True)
    kernels = [
        Source(unit.key, generated / unit.path, by_family[unit.family], unit.smem_bytes)
        for unit in costliest_first
    ]
    shared = [generated / "dispatch.cu", *sorted(templates.glob("*/*.cu"))]
    return kernels + [Source(path.stem, path, everything) for path in shared]


def gencode_flags(targets: Iterable[Target]) -> tuple[str, ...]:
    """One ``-gencode`` per code, in order of capability; PTX only where asked for."""
    codes: dict[str, bool] = {}
    for target in sorted(targets, key=lambda target: target.capability):
        codes[target.code] = codes.get(target.code, False) or target.ptx
    return tuple(
        f"-gencode=arch=compute_{code},code=[sm_{code}{f',compute_{code}' if ptx else ''}]"
        for code, ptx in codes.items()
    )


def build_file(
    sources: Iterable[Source],
    toolchain: Toolchain,
    includes: Iterable[Path],
    build_dir: Path,
    compiled: bool = False,
) -> str:
    """Text of ``build.ninja``; paths are absolute so that it can run from any folder. Raises CodegenError.

    With ``compiled`` the objects are there already and the only step is to link them.
    """
    compress = [COMPRESS_FLAG] if toolchain.compresses else []
    library_dirs = [f"-L{toolchain.library_dir}"] if toolchain.library_dir else []
    exports, library = build_dir / "exports.map", _path(build_dir / LIBRARY)
    text = io.StringIO()
    writer = _writer(text)
    writer.variable("ninja_required_version", "1.5")
    writer.variable("builddir", str(build_dir).replace("$", "$$"))
    writer.variable("nvcc", _words(toolchain.nvcc))
    writer.variable("release", toolchain.release)
    writer.variable("flags", _words(*COMPILE_FLAGS, *compress, *(f"-I{path}" for path in includes)))
    writer.variable("exports", _words(f"--version-script={exports}"))
    writer.variable("library_dirs", _words(*library_dirs))
    writer.rule("compile", COMPILE_COMMAND, description="nvcc $name", depfile="$out.d", deps="gcc")
    writer.rule("link", LINK_COMMAND, description="link $out")
    objects = []
    for source in sources:
        objects.append(_path(build_dir / "objects" / f"{source.name}.o"))
        if not compiled:
            described = {"name": source.name, "smem": str(source.smem_bytes)}
            described["gencode"] = _words(*source.gencode)
            writer.build(objects[-1], "compile", _path(source.path), variables=described)
    writer.build(library, "link", objects, implicit=_path(exports))
    return text.getvalue()


def _writer(output: io.StringIO) -> Any:
    """ninja's own writer of its files, with lines never wrapped, since wrapping would merge double spaces
    in a path.
    """
    try:
        from ninja import ninja_syntax
    except ImportError:
        raise CodegenError("the Python package ninja is missing: pip install ninja") from None
    untyped: Any = ninja_syntax.Writer  # its stub has it write to a str
    return untyped(output, width=sys.maxsize)


def _path(path: Path) -> str:
    """The path as the writer expects it: it escapes spaces, colons and a dollar before a space; other
    dollars are doubled here.
    """
    return re.sub(r"\$(?! )", "$$", str(path))


def _words(*words: object) -> str:
    """Words of a command line as a variable's value."""
    return shlex.join(str(word) for word in words).replace("$", "$$")


def jobs(environ: Mapping[str, str] | None = None, available: float | None = None) -> int:
    """Parallel compilations: MAX_JOBS, or what cores and available memory (bytes) allow, at least 1."""
    environ = os.environ if environ is None else environ
    asked = environ.get("MAX_JOBS", "").strip()
    if asked:
        if not asked.isdigit() or int(asked) < 1:
            raise CodegenError(f"MAX_JOBS must be a positive number, not {asked!r}")
        return int(asked)
    available = available_memory() if available is None else available
    return max(1, min(available_cores(), int(available // MEMORY_PER_JOB)))


def available_cores() -> int:
    """Cores that this process may use, by its affinity and the control group's quota."""
    cores = len(os.sched_getaffinity(0))
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    return min(cores, max(1, int(quota) // int(period))) if quota.isdigit() else cores


def available_memory() -> float:
    """Bytes that this process may still take, by the kernel's estimate and the control group's limit."""
    available = float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            available = float(line.split()[1]) * 1024
    limit, used = _read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory.current")
    if limit.isdigit() and used.isdigit():
        caches = re.search(r"^inactive_file (\d+)", _read("/sys/fs/cgroup/memory.stat"), re.MULTILINE)
        available = min(available, float(limit) - float(used) + (float(caches[1]) if caches else 0.0))
    return available


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
