"""Modules of the package import one another in one direction."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def name_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.Module, modules: set[str]) -> Iterator[str]:
    """The modules that are imported wherever it is written, in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules else str(node.module)


def imports(root: Path, package: str) -> dict[str, set[str]]:
    """For each module of the package, the modules of it that it imports."""
    trees = {name_of(path, root): ast.parse(path.read_text()) for path in (root / package).rglob("*.py")}
    return {
        name: {other for other in imported(tree, set(trees)) if other in trees} - {name}
        for name, tree in trees.items()
    }


def check_for_circles(found: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(found).prepare()
    except CycleError as error:
        pytest.fail(f"modules import one another in a circle: {' <- '.join(error.args[1])}")


def test_there_is_no_circle():
    found = imports(ROOT, "flash_attn")
    assert "flash_attn._backends" in found["flash_attn._operations"]
    check_for_circles(found)


def test_a_circle_is_found(tmp_path):
    (tmp_path / "package").mkdir()
    texts = {"__init__": "from package.a import f", "a": "import package.b"}
    for name, text in {**texts, "b": "def f():\n    from package import a"}.items():
        (tmp_path / "package" / f"{name}.py").write_text(text)
    with pytest.raises(pytest.fail.Exception, match=r"package\.(a|b) <- package\.(a|b) <- package\.(a|b)"):
        check_for_circles(imports(tmp_path, "package"))


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_both_backends_have_the_functions_of_the_protocol(backend):
    import flash_attn._backends as backends

    names = {name for name in vars(backends.Backend) if not name.startswith("_")}
    found = vars(getattr(backends, backend))
    assert set(found["__all__"]) == names and all(callable(found[name]) for name in names)
