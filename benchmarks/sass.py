"""Compares the machine code of two builds function by function, without a GPU.

A build is a libflash_attn.so or a folder of objects. Two functions of one target and name are identical if
instructions, their schedule, registers, stack and shared memory are. The exit status is 0 if every function
has an identical partner: the one of its name, or else one of its own. It is 1 if one has none, 2 if the
builds cannot be compared.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from benchmarks import cubin, report
from ci import CiError, device_code

IDENTICAL, RENAMED, CHANGED = "identical", "renamed", "changed"
ONLY_OLD, ONLY_NEW = "only old", "only new"
KINDS = (IDENTICAL, RENAMED, CHANGED, ONLY_OLD, ONLY_NEW)
DIFF_LINES = 60


class SassError(Exception):
    """A build or a file of names that cannot be read."""


@dataclass(frozen=True)
class Usage:
    """What a function takes: registers of a thread, bytes of its stack, bytes of static shared memory."""

    registers: int
    stack: int
    shared: int


@dataclass(frozen=True)
class Function:
    """A function compiled for a target such as sm_90a; `symbol` is its mangled name in `file`."""

    arch: str
    name: str
    code: cubin.Code
    usage: Usage
    symbol: str
    file: Path

    @property
    def content(self) -> tuple[str, Usage]:
        return self.code.exact, self.usage


@dataclass(frozen=True)
class Pair:
    """A function of the old build and its partner of the new one; None where there is none."""

    old: Function | None
    new: Function | None

    @property
    def kind(self) -> str:
        if self.old is None or self.new is None:
            return ONLY_NEW if self.old is None else ONLY_OLD
        if self.old.content != self.new.content:
            return CHANGED
        return IDENTICAL if self.old.name == self.new.name else RENAMED

    @property
    def arch(self) -> str:
        return (self.new or self.old).arch  # type: ignore[union-attr]

    @property
    def name(self) -> str:
        return (self.new or self.old).name  # type: ignore[union-attr]


def parse_usage(text: str) -> dict[str, Usage]:
    """Usage by mangled name in the output of `cuobjdump -res-usage`."""
    pattern = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")
    return {name: Usage(*map(int, numbers)) for name, *numbers in pattern.findall(text)}


def parse_instructions(text: str) -> list[str]:
    """Instructions in the output of `cuobjdump -sass`, without addresses, encodings and branch targets."""
    lines = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", text, re.MULTILINE)
    branch = re.compile(r"(\b(?:BRA|BSSY|CALL|JMP)\b.*?)(?:0x[0-9a-f]+|`\(.*\))$")
    return [branch.sub(r"\1LABEL", re.sub(r"\s+", " ", line)) for line in lines]


def normal_name(demangled: str) -> str:
    """A demangled name without the type that it returns, its parameters and needless spaces."""
    name = re.sub(r"\s*\[clone [^]]*\]$", "", demangled.strip())
    if name.endswith(")"):
        depth = 0
        for start in range(len(name) - 1, -1, -1):
            depth += (name[start] == ")") - (name[start] == "(")
            if not depth:
                name = name[:start]
                break
    name = re.sub(r"\s*([<>,()])\s*", r"\1", name.removeprefix("void "))
    return re.sub(r"\s+", " ", name)


def parse_names(text: str) -> list[tuple[re.Pattern[str], str]]:
    """The lines `OLD_REGEX => NEW` of a file of names; `#` starts a comment. Raises SassError."""
    rules = []
    for number, line in enumerate(text.splitlines(), 1):
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        if not line:
            continue
        rule = re.fullmatch(r"(\S.*?)\s+=>(?:\s+(.*))?", line)
        if rule is None:
            raise SassError(f"line {number} of the names is not OLD_REGEX => NEW: {line!r}")
        old, new = rule[1], rule[2] or ""
        rules.append((_compiled(old, new, number), new))
    return rules


def _compiled(old: str, new: str, number: int) -> re.Pattern[str]:
    """The regex of a rule; SassError if it is none, or if the rule's name refers to a group that it lacks."""
    text = old
    try:
        pattern = re.compile(old)
        text = new
        pattern.sub(new, "")
    except (re.error, IndexError) as error:
        raise SassError(f"line {number} of the names: {error} in {text!r}") from error
    return pattern


def read_names(file: Path) -> list[tuple[re.Pattern[str], str]]:
    """The rules of a file of names. Raises SassError."""
    try:
        return parse_names(file.read_text())
    except (OSError, UnicodeError) as error:
        raise SassError(f"{file} cannot be read: {error}") from error


def renamed(functions: Iterable[Function], rules: Sequence[tuple[re.Pattern[str], str]]) -> list[Function]:
    """The functions under the names that the rules give them, each rule after the one before it."""
    result = []
    for function in functions:
        name = function.name
        for pattern, new in rules:
            name = pattern.sub(new, name)
        result.append(replace(function, name=name))
    return result


def _by_name(functions: Iterable[Function]) -> dict[tuple[str, str], Function]:
    """One function per target and name; another one of that name with other content is numbered."""
    found: dict[tuple[str, str], Function] = {}
    for function in sorted(functions, key=lambda f: (f.arch, f.name, f.code.exact)):
        key, number = (function.arch, function.name), 1
        while key in found and found[key].content != function.content:
            number += 1
            key = function.arch, f"{function.name} #{number}"
        found.setdefault(key, replace(function, name=key[1]))
    return found


def compare(old: Iterable[Function], new: Iterable[Function]) -> list[Pair]:
    """Partners by target and name, then by target and content; the rest has none."""
    olds, news = _by_name(old), _by_name(new)
    pairs = [Pair(olds.pop(key), news.pop(key)) for key in sorted(olds.keys() & news.keys())]
    for key, function in sorted(olds.items()):
        same = (k for k, f in sorted(news.items()) if k[0] == key[0] and f.content == function.content)
        pairs.append(Pair(function, news.pop(next(same, ("", "")), None)))
    pairs += [Pair(None, function) for function in news.values()]
    return sorted(pairs, key=lambda pair: (pair.arch, pair.name))


def summary(pairs: Sequence[Pair]) -> list[report.Cells]:
    """The rows of the table: how many functions of each target, then of all, are of each kind."""
    groups = {arch: [pair for pair in pairs if pair.arch == arch] for arch in sorted({p.arch for p in pairs})}
    rows = []
    for target, group in [*groups.items(), ("all", list(pairs))]:
        counts = Counter(pair.kind for pair in group)
        rows.append({"target": target, **{kind: str(counts[kind]) for kind in KINDS}})
    return rows


def difference(pair: Pair) -> str:
    """One line about a changed function: instructions and what else is not the same on both sides."""
    assert pair.old and pair.new
    old, new = pair.old, pair.new
    parts = [f"instructions {old.code.instructions} -> {new.code.instructions}"]
    if old.code.exact == new.code.exact:
        parts = ["the same instructions"]
    elif old.code.unscheduled == new.code.unscheduled:
        parts = ["the same instructions in another schedule"]
    for what in ("registers", "stack", "shared"):
        parts.append(f"{what} {getattr(old.usage, what)} -> {getattr(new.usage, what)}")
    return f"{pair.arch} {pair.name}: {', '.join(parts)}"


class Reader:
    """Reads builds with cuobjdump, one process per core at a time; keeps their cubins in `folder`."""

    def __init__(self, folder: Path) -> None:
        program = device_code.find_cuobjdump()
        if program is None:
            raise SassError("no cuobjdump: set CUDA_HOME or install nvidia-cuda-cuobjdump")
        self.program, self.folder = program, folder

    def read(self, build: Path) -> list[Function]:
        """All functions of a library, or of the objects in a folder or its subfolder `objects`."""
        files = [build] if build.is_file() else sorted(build.glob("*.o")) or sorted(build.glob("objects/*.o"))
        if not files:
            raise SassError(f"{build} is neither a library nor a folder with objects (*.o)")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            groups = pool.map(self._functions, files)
            bar = tqdm(groups, desc=build.name, total=len(files), unit="file", disable=None)
            found = [function for group in bar for function in group]
        if not found:
            raise SassError(f"{build} holds no device code")
        names = demangled([function.name for function in found])
        return [replace(function, name=normal_name(names[function.name])) for function in found]

    def _functions(self, file: Path) -> list[Function]:
        """The functions of one file, under their mangled names."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        device_code.run(self.program, file, "-xelf", "all", folder=folder)
        found = []
        for path in sorted(folder.glob("*.cubin")):
            arch = path.suffixes[-2].removeprefix(".")
            usage = parse_usage(device_code.run(self.program, path, "-res-usage"))
            for symbol, code in cubin.functions(path.read_bytes()).items():
                if symbol not in usage:
                    raise SassError(f"cuobjdump says nothing about {symbol} in {path.name} of {file}")
                found.append(Function(arch, symbol, code, usage[symbol], symbol, path))
        return found

    def instructions(self, function: Function) -> list[str]:
        """The text of a function's instructions."""
        text = device_code.run(self.program, function.file, "-sass", "-fun", function.symbol)
        return parse_instructions(text)


def demangled(symbols: Sequence[str]) -> dict[str, str]:
    """Readable names by symbol; the symbols themselves where no c++filt is installed."""
    program = shutil.which("c++filt") or shutil.which("cu++filt")
    if program is None:
        return {symbol: symbol for symbol in symbols}
    done = subprocess.run([program], input="\n".join(symbols), capture_output=True, text=True, check=True)
    return dict(zip(symbols, done.stdout.splitlines(), strict=True))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python -m benchmarks sass`."""
    parser.add_argument("old", type=Path, help="a libflash_attn.so, or a folder of a build or of its objects")
    parser.add_argument("new", type=Path, help="the same of the build that is compared with it")
    parser.add_argument(
        "--names", type=Path, help="file of lines OLD_REGEX => NEW, applied in order to OLD's names"
    )
    parser.add_argument("--only", type=re.compile, default="", help="regex: only functions with such a name")
    parser.add_argument("--verbose", action="store_true", help="list renamed functions; diff changed ones")


def run(args: argparse.Namespace, make_reader: Callable[[Path], Reader] = Reader) -> int:
    """Compare and print.

    The exit status is 0 if every function has an identical partner, 1 if one has none, 2 if the builds cannot
    be compared.
    """
    try:
        rules = read_names(args.names) if args.names else []
        with tempfile.TemporaryDirectory() as folder:
            reader = make_reader(Path(folder))
            pairs = compare(renamed(reader.read(args.old), rules), reader.read(args.new))
            pairs = [pair for pair in pairs if re.search(args.only, pair.name)]
            if not pairs:
                raise SassError("no function has such a name")
            _print(pairs, reader if args.verbose else None)
    except (SassError, CiError) as error:
        print(error)
        return 2
    return int(any(pair.kind not in (IDENTICAL, RENAMED) for pair in pairs))


def _print(pairs: Sequence[Pair], reader: Reader | None) -> None:
    """The table, then what is not identical; with a reader, the changed instructions as well."""
    print(report.table(summary(pairs)))
    for pair in (pair for pair in pairs if pair.kind == CHANGED):
        print(difference(pair))
        if reader and pair.old and pair.new:
            old, new = reader.instructions(pair.old), reader.instructions(pair.new)
            lines = list(difflib.unified_diff(old, new, lineterm="", n=1))[2:]
            print("\n".join(f"    {line}" for line in lines[:DIFF_LINES]))
            if len(lines) > DIFF_LINES:
                print(f"    and {len(lines) - DIFF_LINES} lines more")
    for kind in (ONLY_OLD, ONLY_NEW):
        for pair in (pair for pair in pairs if pair.kind == kind):
            print(f"{kind}: {pair.arch} {pair.name}")
    if reader:
        for pair in (pair for pair in pairs if pair.kind == RENAMED and pair.old):
            print(f"renamed: {pair.arch} {pair.old.name} => {pair.name}")  # type: ignore[union-attr]
