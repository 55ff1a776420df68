"""Two packages in one process: each call is made by the package that it was bound to, in turns."""

import sys

import pytest

from benchmarks import compare_host
from benchmarks.providers import Call

PACKAGE = """
calls = []

def build_info():
    return {{"commit": {name!r}}}

def operator():
    import flash_attn
    flash_attn.calls.append({name!r})
"""


def load(folder, name):
    package = folder / name / "flash_attn"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(PACKAGE.format(name=name))

    def make():
        import flash_attn

        return Call(flash_attn.operator)

    return compare_host.load(folder / name, {"func": make})


@pytest.fixture
def sides(tmp_path):
    """Two packages whose call goes by what `sys.modules` has, as operators do."""
    before = compare_host.modules()
    yield load(tmp_path, "old"), load(tmp_path, "new")
    for name in compare_host.modules():
        del sys.modules[name]
    sys.modules.update(before)


def test_each_package_makes_its_own_calls(sides):
    assert [side.commit for side in sides] == ["old", "new"]
    compare_host.compare(sides, lambda run, calls: run() or 1.0, batches=4)
    for side in sides:
        assert side.modules["flash_attn"].calls == [side.commit] * 7  # one as it is loaded, two to warm up


def test_times_are_medians_without_the_first_batches(sides):
    times = iter([99.0, 98.0, 97.0, 96.0, 1.0, 4.0, 5.0, 2.0, 3.0, 6.0])
    found = compare_host.compare(sides, lambda run, calls: next(times), batches=3)
    assert found == {"func": (2.0, 5.0)}
