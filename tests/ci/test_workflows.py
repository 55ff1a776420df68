import re
import shlex

import pytest

from ci import ROOT
from ci.__main__ import parser

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PINNED = re.compile(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")
SETUP = (
    [".ci/run"],
    ["pip", "install", "--group", "release"],
    ["echo", "/opt/python/cp312-cp312/bin"],  # where a manylinux container has a Python
)


def commands(text):
    """Every ``run`` of a workflow as one line."""
    folded = re.sub(r">-\n\s+(.+)\n\s+(.+)", r"\1 \2", text)
    return re.findall(r"\brun: (.+)", folded)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_and_the_same_everywhere(path):
    everything = "".join(workflow.read_text() for workflow in WORKFLOWS)
    for action in re.findall(r"uses: (.+)", path.read_text()):
        assert PINNED.fullmatch(action)
        assert len(set(re.findall(rf"uses: ({action.split('@')[0]}@.+)", everything))) == 1


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_each_step_is_one_call_that_parses(path):
    found = commands(path.read_text())
    assert found
    for command in found:
        words = shlex.split(re.sub(r"\$\{\{.+?\}\}", "value", command).partition(" >> ")[0])
        if words not in SETUP:
            assert words[:3] == ["python", "-m", "ci"]
            parser().parse_args(words[3:])
