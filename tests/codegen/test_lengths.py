"""Functions of at most 60 lines and files of at most 400: Python of the folders below, and all templates.

Docstrings of functions do not count: those of public ones list arguments.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from textwrap import dedent

import pytest

from codegen import ROOT, TEMPLATES

FUNCTION_LINES, FILE_LINES = 60, 400
FOLDERS = ("benchmarks", "ci", "codegen", "examples", "flash_attn", "tests")
PYTHON = [ROOT / "setup.py", *sorted(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))]
TEXTS = sorted(path for path in TEMPLATES.rglob("*") if path.is_file())
CPP = [path for path in TEXTS if path.suffix in (".cu", ".cuh", ".h")]


def python_functions(text: str) -> Iterator[tuple[str, int]]:
    """First line and number of lines of each function, without its decorators and its docstring."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            text = ast.get_docstring(node, clean=False)
            documented = 0 if text is None else text.count("\n") + 1
            yield lines[node.lineno - 1].strip(), node.end_lineno - node.lineno + 1 - documented


def cpp_functions(text: str) -> Iterator[tuple[str, int]]:
    """First line and number of lines of each function, without `template <..>`, and of each block in it.

    clang-format writes what is looked for: a line with nothing but a `}`, as types and namespaces never end,
    and before it the nearest line that is indented as much; preprocessor lines are not indented at all.
    """
    lines = text.splitlines()
    for end, line in enumerate(lines):
        if line.strip() != "}":
            continue
        inside = "#", line.replace("}", " ")
        start = end - 1
        while not lines[start] or lines[start].startswith(inside):
            start -= 1
        yield lines[start].strip(), end - start + 1


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_python_functions_are_short(path):
    assert [f for f in python_functions(path.read_text()) if f[1] > FUNCTION_LINES] == []


@pytest.mark.parametrize("path", CPP, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_cpp_functions_are_short(path):
    assert [f for f in cpp_functions(path.read_text()) if f[1] > FUNCTION_LINES] == []


@pytest.mark.parametrize("path", [*PYTHON, *TEXTS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= FILE_LINES


def test_what_counts_as_a_function_of_python():
    text = '''
    @decorator
    def f(
        x,
    ):
        """Doc.

        More of it.
        """

        async def g(): ...
    '''
    assert list(python_functions(dedent(text))) == [("def f(", 5), ("async def g(): ...", 1)]


def test_what_counts_as_a_function_of_cpp():
    text = """
    namespace n {
    constexpr int kTable[] = {
        1,
    };
    struct S {
      explicit S(int a)
          : a_(a), b_{a} {
        if (a) {
          g("{");
        }
      }
      int get() const { return a_; }

     private:
      int a_;
    };
    template <int kN>
    __global__ void __launch_bounds__(32)
        kernel(const Arguments arguments) {
      const auto f = [&](int i) {
        return i;
      };

    #pragma unroll
      for (int i = 0; i < 2; ++i) f(i);
    }
    }  // namespace n
    """
    assert list(cpp_functions(dedent(text))) == [
        ("if (a) {", 3),
        ("explicit S(int a)", 6),
        ("__global__ void __launch_bounds__(32)", 9),
    ]
