"""The command line: every command explains itself, and says when it needs a GPU."""

import subprocess
import sys

import pytest
import torch

from benchmarks.__main__ import SUMMARIES, WITHOUT_GPU, main
from codegen import ROOT


@pytest.mark.parametrize("command", SUMMARIES)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert ("--output" in capsys.readouterr().out) == (command != "sass")


def test_without_tabulate_it_says_how_to_get_it():
    script = (
        "import sys; sys.modules['tabulate'] = None; from benchmarks.__main__ import main; main(['build'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "tabulate" in done.stdout and done.stdout.endswith(": pip install torch tabulate tqdm\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
@pytest.mark.parametrize("command", sorted(set(SUMMARIES) - set(WITHOUT_GPU)))
def test_without_a_gpu_it_says_so(command, capsys):
    assert main([command, *(["old", "new"] if command == "compare" else [])]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().out
