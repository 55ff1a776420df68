import shutil
import subprocess

import pytest

from ci import CiError, elf

SOURCE = """
#include <stdio.h>
static int hidden(void) { return 1; }
int shown(void) { return hidden() + printf("shown"); }
__attribute__((weak)) int weak(void) { return 2; }
__attribute__((visibility("hidden"))) int inner(void) { return 3; }
int value = 4;
"""


@pytest.fixture
def library(tmp_path):
    """Compiles a library with the given arguments of the linker."""
    if shutil.which("gcc") is None:
        pytest.skip("no C compiler")

    def make(*arguments):
        (tmp_path / "source.c").write_text(SOURCE)
        made = tmp_path / "library.so"
        command = ["gcc", "-shared", "-fPIC", "-o", made, tmp_path / "source.c", *arguments]
        subprocess.run(command, check=True)
        return made

    return make


def test_symbols_and_needed_libraries(library):
    found = elf.read(library("-Wl,--no-as-needed", "-lm"))
    assert found.exported == {"shown", "weak", "value"}
    assert found.needed == {"libc.so.6", "libm.so.6"}
    assert (2, 0) < found.glibc < (3, 0)


def test_versions_of_symbols_are_not_part_of_their_names(library, tmp_path):
    (tmp_path / "exports.map").write_text("V1 { global: shown; local: *; };\n")
    assert elf.read(library(f"-Wl,--version-script={tmp_path}/exports.map")).exported == {"shown", "V1"}


@pytest.mark.parametrize(
    ("names", "newest"),
    [
        (["GLIBC_2.2.5", "GLIBC_2.17", "GLIBCXX_3.4.30", "GLIBC_2.4"], (2, 17)),
        (["GLIBCXX_3.4.30", "CXXABI_1.3", "GCC_3.0", "GLIBC_PRIVATE"], (0, 0)),
    ],
)
def test_the_newest_glibc_that_is_named(names, newest):
    assert elf.newest_glibc(names) == newest


def test_a_library_that_needs_nothing(library):
    found = elf.read(library("-nostdlib", "-Wl,-z,undefs"))
    assert (found.needed, found.glibc) == (frozenset(), (0, 0))


@pytest.mark.parametrize("content", [b"", b"no library", b"\x7fELF" + b"\2\1\1" + b"\xff" * 20])
def test_a_file_that_is_none(tmp_path, content):
    (tmp_path / "library.so").write_bytes(content)
    with pytest.raises(CiError, match=r"library.so cannot be read"):
        elf.read(tmp_path / "library.so")
