"""CONTRIBUTING.md: the way from a public call to the kernel is the one that it describes."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "flash_attn/_backends/cuda/library.py"


def hops() -> list[tuple[str, str]]:
    """The functions that the section names, each with its file."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (section,) = re.findall(
        r"^## From a public call to the kernel\n(.*?)^## ", text, re.DOTALL | re.MULTILINE
    )
    items = re.findall(r"^\d+\. `([^`]+)`, ((?:`\w+`(?: → )?)+):", section, re.MULTILINE)
    return [(file, function) for file, functions in items for function in re.findall(r"\w+", functions)]


def python_body(text: str, function: str) -> str:
    (found,) = (x for x in ast.walk(ast.parse(text)) if isinstance(x, ast.FunctionDef) and x.name == function)
    documented = ast.get_docstring(found) is not None
    return "\n".join(map(ast.unparse, found.body[documented:]))


def cpp_body(text: str, function: str) -> str:
    """What is between the braces of all functions, and methods, of that name, without comments."""
    text = re.sub(r"//.*", "", text)
    bodies = []
    for match in re.finditer(rf"\b{function}\([^;{{}}]*\)[^;{{}}()]*{{", text):
        depth, end = 1, match.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        bodies.append(text[match.end() : end])
    return "\n".join(bodies)


def body(file: str, function: str) -> str:
    text = (ROOT / file).read_text(encoding="utf-8")
    if file == "generated/dispatch.cu":
        return text[text.index("forward_kernels[]") :]
    return python_body(text, function) if file.endswith(".py") else cpp_body(text, function)


def test_each_function_calls_the_next():
    chain = hops()
    assert (chain[0][1], chain[-1]) == ("flash_attn_func", ("templates/wgmma/forward/kernel.cuh", "attend"))
    assert len(dict(chain)) <= 12
    caller = chain[0]
    for called in chain[1:]:
        name, text = called[1], body(*caller)
        if name == "flash_attn_forward":  # of the C ABI, by the name that Python gives it
            assert "forward=library.flash_attn_forward" in body(LIBRARY, "bind")
            name = "library.forward"
        if called[0] == "generated/dispatch.cu":  # a table, of which its reader knows no entry
            name = "table.kernels"
        assert re.search(rf"\b{re.escape(name)}\b", text), f"{caller} does not call {called}"
        if name != "pack_forward":  # which returns to its caller
            caller = called
