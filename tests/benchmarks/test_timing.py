"""The parts of timing and of the providers that need no GPU."""

import pytest
import torch

from benchmarks import forward, providers, timing
from benchmarks.__main__ import main, parser


def test_rounds_fit_the_budget_within_limits():
    assert timing.rounds_within(1.0, 0.02) == 50
    assert timing.rounds_within(1.0, 10.0) == timing.MIN_ROUNDS
    assert timing.rounds_within(1.0, 0.0) == timing.MAX_ROUNDS


def test_every_provider_takes_every_position():
    orders = timing.rotations(["a", "b", "c"], 4)
    assert orders == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


def test_standard_attention_is_sdpa():
    q, k, v = (torch.randn(2, 7, 3, 16) for _ in range(3))
    for causal in (False, True):
        expected = providers.sdpa(q, k, v, causal).result()
        torch.testing.assert_close(providers.standard_attention(q, k, v, causal), expected)


def test_a_peer_that_fails_is_left_out_and_our_failure_is_not(capsys):
    def fail():
        raise RuntimeError("not on this GPU\nand more")

    works, fails = providers.Call(lambda: torch.empty(1)), providers.Call(fail)
    for _ in range(2):
        assert list(providers.runnable({providers.OURS: works, providers.CUDNN: fails})) == [providers.OURS]
    assert capsys.readouterr().out == "cuDNN is left out: not on this GPU\n"
    with pytest.raises(RuntimeError, match="not on this GPU"):
        providers.runnable({providers.OURS: fails})


@pytest.mark.parametrize("peer", [providers.TORCH_FA2, providers.CUDNN])
def test_results_must_agree(peer):
    right = torch.randn(2, 30, 4, 16)
    calls = {providers.OURS: providers.Call(lambda: right), peer: providers.Call(lambda: right * 1.009)}
    forward.check_agreement(calls)
    one_head_wrong = right.clone()
    one_head_wrong[0, :, 0] *= 1.1
    calls[peer] = providers.Call(lambda: one_head_wrong)
    with pytest.raises(AssertionError, match=f"flash_attn and {peer} differ"):
        forward.check_agreement(calls)
    calls[peer] = providers.Call(lambda: right * float("nan"))
    with pytest.raises(AssertionError, match="differ"):
        forward.check_agreement(calls)


@pytest.mark.parametrize("command", ["forward", "host", "memory", "build"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        parser().parse_args([command, "--help"])
    assert "--output" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert main(["forward"]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().out
