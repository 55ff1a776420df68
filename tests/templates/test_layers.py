"""The layers of templates: which file may include which, and that each includes what it uses.

From the lowest: ptx (instructions) and problem (what is asked; plain C++), warp (what a warp holds and does),
then ops, and the kernel designs mma and wgmma. host is the C ABI; of kernels only launches know it.
"""

from __future__ import annotations

import re
import subprocess
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from checker import compile_cpp, write_abi

from codegen import TEMPLATES, render, targets
from codegen.compilation.toolchain import find_nvcc

KERNEL_PARTS = "abi.h|(ptx|problem|warp)/.*"
LAUNCH_PARTS = r"host/launch\.h|ops/.*\.h"
ALLOWED = {
    r"abi\.h": "",
    r"wgmma\.cuh": "abi.h",
    "ptx/": "abi.h|ptx/.*",
    "problem/": "abi.h|problem/.*",
    "warp/": KERNEL_PARTS,
    "ops/": rf"{KERNEL_PARTS}|ops/.*|host/.*\.h",
    r"host/library\.cu": r"abi.h|host/.*|ops/.*\.h",
    r"host/plan\.(h|cu)": "abi.h|host/plan.h|problem/.*",
    "host/": "abi.h|host/.*",
    "mma/[^/]*$": rf"{KERNEL_PARTS}|mma/[^/]*",
    "mma/(?P<kernel>[^/]*)/": rf"{KERNEL_PARTS}|{LAUNCH_PARTS}|mma/[^/]*|mma/<kernel>/.*",
    # The parts of wgmma beside its folders serve its one kernel, forward's, which cache launches, too.
    "wgmma/[^/]*$": rf"{KERNEL_PARTS}|wgmma\.cuh|wgmma/[^/]*|wgmma/forward/config\.cuh",
    "wgmma/(?P<kernel>forward|cache)/": (
        rf"{KERNEL_PARTS}|{LAUNCH_PARTS}|wgmma\.cuh|host/tensor_map\.h|wgmma/[^/]*|wgmma/(forward|<kernel>)/.*"
    ),
}
"""What a file, by the first pattern that its name starts with, may include."""

KERNELS = ("mma/forward", "mma/cache", "mma/backward", "wgmma/forward", "wgmma/cache")
WITHOUT_KERNEL = ("wgmma/cache",)
"""Launches wgmma/forward's kernel, with another source of keys: has launch.cuh only."""

MOST_INCLUDED = {"wgmma/forward": 24}
"""Files that a kernel's launch.cuh includes in all; others may include 32."""


@cache
def rendered() -> dict[str, str]:
    """Return the rendered headers that templates include."""
    sources = render.render_sources(targets.full_selection())
    return {name: sources[name] for name in ("abi.h", "wgmma.cuh")}


@cache
def includes() -> dict[str, tuple[str, ...]]:
    """Return what every file of templates, and every rendered header, includes of them."""
    texts = {
        path.relative_to(TEMPLATES).as_posix(): path.read_text()
        for path in TEMPLATES.rglob("*")
        if path.suffix in (".h", ".cuh", ".cu")
    }
    texts |= rendered()
    pattern = re.compile(r'^\s*#\s*include "([^"]*)"', re.MULTILINE)
    return {name: tuple(pattern.findall(text)) for name, text in texts.items()}


def closure(name: str) -> set[str]:
    """Return all files that a file includes, directly or by others."""
    found: set[str] = set()
    left = [name]
    while left:
        new = set(includes()[left.pop()]) - found
        found |= new
        left += new
    return found


def allowed(name: str) -> str:
    """Return the pattern of what a file may include."""
    for pattern, others in ALLOWED.items():
        if match := re.match(pattern, name):
            return others.replace("<kernel>", match.groupdict().get("kernel", ""))
    raise AssertionError(f"{name} is in no layer")


def test_there_are_files() -> None:
    assert {folder.name for folder in TEMPLATES.iterdir() if folder.is_dir()} == {
        name.split("/")[0] for name in includes() if "/" in name
    }
    assert len(includes()) > 50


@pytest.mark.parametrize("name", sorted(includes()))
def test_a_file_includes_only_what_its_layer_allows(name: str) -> None:
    assert [other for other in includes()[name] if not re.fullmatch(allowed(name), other)] == []


def test_every_included_file_exists() -> None:
    assert {other for others in includes().values() for other in others} <= set(includes())


def test_no_file_includes_itself() -> None:
    TopologicalSorter(includes()).prepare()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_knows_nothing_of_the_host(kernel: str) -> None:
    """What is decided at run time is decided in launch.cuh."""
    for name in includes():
        if name.startswith(f"{kernel}/") and not name.endswith("/launch.cuh"):
            assert [other for other in closure(name) if other.startswith(("host/", "ops/"))] == [], name


def test_files_of_a_kernel() -> None:
    folders = {name.rpartition("/")[0] for name in includes() if name.startswith(("mma/", "wgmma/"))}
    assert folders - {"mma", "wgmma"} == set(KERNELS)
    for kernel in KERNELS:
        parts = {part for part in ("kernel", "launch", "config") if f"{kernel}/{part}.cuh" in includes()}
        assert parts == ({"launch"} if kernel in WITHOUT_KERNEL else {"kernel", "launch", "config"})


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_can_be_read(kernel: str) -> None:
    """The files to read before one knows a kernel are few."""
    assert len(closure(f"{kernel}/launch.cuh")) <= MOST_INCLUDED.get(kernel, 32)


@pytest.mark.parametrize("name", sorted(name for name in includes() if name.startswith("problem/")))
def test_problem_is_plain_cpp(name: str, tmp_path: Path) -> None:
    """Each file compiles by itself, without anything of CUDA."""
    assert re.findall(r"#\s*include <cu.*>", (TEMPLATES / name).read_text()) == []
    write_abi(tmp_path)
    source = tmp_path / "file.cpp"
    source.write_text(f'#include "{name}"\n')
    flags = "-fsyntax-only", "-Wno-unknown-pragmas", f"-I{TEMPLATES}", f"-I{tmp_path}"
    compile_cpp(source, tmp_path / "nothing", *flags)


def test_headers_compile_in_any_order(tmp_path: Path) -> None:
    """Forwards and backwards: a header that lacks what those before it include fails in one of them."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc")
    for name, text in rendered().items():
        (tmp_path / name).write_text(text)
    headers = sorted(name for name in includes() if not name.endswith(".cu"))
    for order, names in (("forwards", headers), ("backwards", headers[::-1])):
        text = "".join(f'#include "{name}"\n' for name in names)
        (tmp_path / f"{order}.cu").write_text(text)
    flags = "-std=c++17", "-arch=sm_90a", "--expt-relaxed-constexpr", f"-I{TEMPLATES}", f"-I{tmp_path}"
    subprocess.run([nvcc, *flags, "-ptx", "-t0", *tmp_path.glob("*.cu")], check=True, cwd=tmp_path)
