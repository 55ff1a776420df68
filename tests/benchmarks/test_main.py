"""The command line: every command explains itself, and says when it needs a GPU."""

import pytest
import torch

from benchmarks.__main__ import SUMMARIES, WITHOUT_GPU, main


@pytest.mark.parametrize("command", SUMMARIES)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert ("--output" in capsys.readouterr().out) == (command != "sass")


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
@pytest.mark.parametrize("command", sorted(set(SUMMARIES) - set(WITHOUT_GPU)))
def test_without_a_gpu_it_says_so(command, capsys):
    assert main([command, *(["old", "new"] if command == "compare" else [])]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().out
