"""The comparison of machine code: made-up functions, and cuobjdump's answers to what it is asked."""

import sys
from pathlib import Path
from typing import ClassVar

import pytest
from cubins import PROGBITS, elf

from benchmarks import sass
from benchmarks.__main__ import main, parser
from benchmarks.cubin import Code
from benchmarks.sass import Function, Pair, Usage

USAGE = """\

Fatbin elf code:
================
arch = sm_90
host = linux

Resource usage:
 Common:
  GLOBAL:0
 Function _Z5firstv:
  REG:51 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:872 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z6secondv:
  REG:168 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:896 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """\
	code for sm_80
		Function : _Z5firstv
	.headerflags	@"EF_CUDA_SM80 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM80)"
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;        /* 0x00000a00ff017624 */
                                                                                  /* 0x000fe400078e00ff */
        /*0010*/              @!P0 BRA 0x3d0 ;                                    /* 0x0000009000008947 */
                                                                                  /* 0x000fea0003800000 */
        /*0020*/                   LOP3.LUT R2, R11, 0x60, RZ, 0x3c, !PT ;        /* 0x000000600b027812 */
                                                                                  /* 0x000fca00078e3cff */
        /*0030*/                   BSSY B0, 0x1590 ;                              /* 0x0000040000007945 */
                                                                                  /* 0x000fe20003800000 */
        /*0040*/                   BRA 0x40;                                      /* 0xfffffff000007947 */
                                                                                  /* 0x000fc0000383ffff */
		..........
"""


def function(name, code="c0de", arch="sm_90", registers=128, unscheduled="bare", instructions=100):
    usage = Usage(registers, stack=0, shared=1024)
    return Function(arch, name, Code(code, unscheduled, instructions), usage, f"_Z{name}", Path("a.o"))


def test_what_a_function_takes():
    assert sass.parse_usage(USAGE) == {"_Z5firstv": Usage(51, 8, 0), "_Z6secondv": Usage(168, 0, 1024)}


def test_instructions_without_addresses():
    assert sass.parse_instructions(SASS) == [
        "IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28]",
        "@!P0 BRA LABEL",
        "LOP3.LUT R2, R11, 0x60, RZ, 0x3c, !PT",
        "BSSY B0, LABEL",
        "BRA LABEL",
    ]


@pytest.mark.parametrize(
    ("demangled", "name"),
    [
        ("void n::kernel<n::A, (n::V)2, n::B<n::C> >(n::D<(n::V)1>)", "n::kernel<n::A,(n::V)2,n::B<n::C>>"),
        ("n::plain(n::Arguments) [clone .1]", "n::plain"),
        ("void (anonymous namespace)::kernel<true>(int)", "(anonymous namespace)::kernel<true>"),
        ("_Z5firstv", "_Z5firstv"),
    ],
)
def test_a_name_keeps_its_template_arguments(demangled, name):
    assert sass.normal_name(demangled) == name


def test_rules_apply_in_order():
    rules = sass.parse_names("# namespaces\nsm(8|9)0:: => s\\1::   # short\n\ns8:: => mma::\n,true> =>\n")
    names = [f.name for f in sass.renamed([function("sm80::k<A,true>"), function("sm90::k")], rules)]
    assert names == ["mma::k<A", "s9::k"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("sm80", "not OLD_REGEX => NEW"),
        ("A=>B", "not OLD_REGEX => NEW"),
        ("A =>B", "not OLD_REGEX => NEW"),
        ("=> new", "not OLD_REGEX => NEW"),
        ("=>", "not OLD_REGEX => NEW"),
        ("( => b", "in '\\('"),
        (r"foo => \3", r"invalid group reference 3 .* in '\\\\3'"),
        (r"foo => \g<bar>", "unknown group name 'bar' in "),
    ],
)
def test_a_line_that_is_no_rule(line, says):
    with pytest.raises(sass.SassError, match=f"line 2 of the names.*{says}"):
        sass.parse_names(f"a => b\n{line}\n")


def kinds(old, new):
    return {(pair.arch, pair.name): pair.kind for pair in sass.compare(old, new)}


def test_partners_have_the_same_name_or_else_the_same_code():
    old = [function("same"), function("changed", "x"), function("before", "y"), function("gone", "z")]
    new = [function("same"), function("changed", "w"), function("after", "y"), function("added", "v")]
    assert kinds(old, new) == {
        ("sm_90", "same"): sass.IDENTICAL,
        ("sm_90", "changed"): sass.CHANGED,
        ("sm_90", "after"): sass.RENAMED,
        ("sm_90", "gone"): sass.ONLY_OLD,
        ("sm_90", "added"): sass.ONLY_NEW,
    }


def test_no_partner_on_another_target_and_each_has_one():
    assert set(kinds([function("f")], [function("f", arch="sm_80")]).values()) == {
        sass.ONLY_OLD,
        sass.ONLY_NEW,
    }
    assert sorted(kinds([function("a"), function("b")], [function("c")]).values()) == [
        sass.ONLY_OLD,
        sass.RENAMED,
    ]


def test_registers_count_too():
    assert kinds([function("f")], [function("f", registers=96)]) == {("sm_90", "f"): sass.CHANGED}


def test_a_function_in_two_objects_is_one_unless_its_code_differs():
    twice = [function("f"), function("f")]
    assert kinds(twice, [function("f")]) == {("sm_90", "f"): sass.IDENTICAL}
    other = function("f", "other")
    assert kinds([*twice, other], [other, function("f")]) == {
        ("sm_90", "f"): sass.IDENTICAL,
        ("sm_90", "f #2"): sass.IDENTICAL,
    }


def test_what_is_printed():
    pairs = sass.compare([function("f"), function("g", arch="sm_80")], [function("f"), function("h", "x")])
    sm80, sm90, everything = ([*row.values()] for row in sass.summary(pairs))
    assert list(sass.summary(pairs)[0])[1:] == list(sass.KINDS)
    assert (sm80, sm90) == (["sm_80", *"00010"], ["sm_90", *"10001"])
    assert everything == ["all", *"10011"]
    shorter = function("f", "x", unscheduled="other", instructions=90)
    usual = "registers 128 -> 128, stack 0 -> 0, shared 1024 -> 1024"
    assert sass.difference(Pair(function("f"), shorter)) == f"sm_90 f: instructions 100 -> 90, {usual}"
    assert "the same instructions in another schedule" in sass.difference(
        Pair(function("f"), function("f", "x"))
    )
    fewer = Pair(function("f"), function("f", registers=96))
    assert "the same instructions, registers 128 -> 96" in sass.difference(fewer)


class MadeUp:
    """Stands in for a Reader: a build, named by its path, holds the functions that a test gives."""

    held: ClassVar = {
        "old": [function("sm80::f")],
        "new": [function("mma::f"), function("other", "x")],
    }

    def __init__(self, folder):
        pass

    def read(self, build):
        return self.held[build.name]


def run(*arguments):
    return sass.run(parser("sass").parse_args(["sass", *map(str, arguments)]), MadeUp)


def test_the_command(tmp_path, capsys):
    assert run("old", "new") == 1
    assert "only new: sm_90 other" in capsys.readouterr().out
    assert run("old", "new", "--only", "::f", "--verbose") == 0
    assert "renamed: sm_90 sm80::f => mma::f" in capsys.readouterr().out
    names = tmp_path / "names"
    names.write_text("sm80 => mma")
    assert run("old", "new", "--only", "::f", "--verbose", "--names", names) == 0
    assert "renamed:" not in capsys.readouterr().out
    assert run("old", "new", "--only", "typo") == 2
    assert "no function has such a name" in capsys.readouterr().out
    assert run("old", "new", "--names", tmp_path / "missing") == 2
    assert "missing cannot be read: " in capsys.readouterr().out


@pytest.fixture
def read(cuobjdump, tmp_path):
    """Reads a folder of one object, in which cuobjdump finds a function of that name and says USAGE of it."""

    def read(symbol):
        cubin = elf((f".text.{symbol}", PROGBITS, bytes(16)))
        (tmp_path / "cubin").write_bytes(cubin)
        (tmp_path / "usage").write_text(USAGE)
        cuobjdump(f"test $1 = -xelf && cp {tmp_path}/cubin unit.sm_90.cubin || cat {tmp_path}/usage")
        (tmp_path / "a.o").touch()
        return sass.Reader(tmp_path).read(tmp_path)

    return read


def test_a_build_is_read_quietly(read, capfd):
    (found,) = read("_Z6secondv")
    assert (found.arch, found.symbol, found.usage) == ("sm_90", "_Z6secondv", Usage(168, 0, 1024))
    assert capfd.readouterr() == ("", "")


def test_on_a_terminal_a_bar_counts_the_files(read, terminal):
    with terminal as shown:
        read("_Z6secondv")
    assert "1/1" in shown.getvalue()


def test_a_function_whose_usage_nobody_tells(read):
    with pytest.raises(sass.SassError, match=r"nothing about _Z5otherv in .*a\.o"):
        read("_Z5otherv")


def test_what_cannot_be_compared(cuobjdump, monkeypatch, tmp_path, capsys):
    cuobjdump()
    assert main(["sass", str(tmp_path), str(tmp_path)]) == 2
    assert "neither a library nor a folder with objects" in capsys.readouterr().out
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "nvidia", None)
    assert main(["sass", str(tmp_path), str(tmp_path)]) == 2
    assert "no cuobjdump" in capsys.readouterr().out
