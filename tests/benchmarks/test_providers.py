"""Every provider computes the same things, in each direction, and peers that fail are left out."""

import pytest
import torch

from benchmarks import providers
from benchmarks.providers import CUDNN, DETERMINISTIC, OURS, STANDARD, TORCH_SDPA, Call, Problem

RESULTS = {"forward": 1, "backward": 3, "both": 4}
"""How many tensors each direction gives: out, or dq, dk and dv, or all of them."""


@pytest.fixture
def problem():
    return Problem(*(torch.randn(2, 7, 3, 16) for _ in range(4)), causal=True)


def truth(problem):
    """out, dq, dk and dv in fp64 by the formula."""
    q, k, v, dout = (x.double() for x in (problem.q, problem.k, problem.v, problem.dout))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 4
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    out = torch.einsum("bhij,bjhd->bihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


@pytest.mark.parametrize("name", [OURS, DETERMINISTIC, TORCH_SDPA, STANDARD])
@pytest.mark.parametrize("direction", RESULTS)
def test_results(problem, name, direction):
    call = getattr(providers.providers()[name], direction)(problem)
    expected = {"forward": slice(0, 1), "backward": slice(1, 4), "both": slice(0, 4)}[direction]
    for _ in range(2):  # a backward can be repeated
        made = call.results()
        assert len(made) == RESULTS[direction]
        for actual, wanted in zip(made, truth(problem)[expected], strict=True):
            torch.testing.assert_close(actual.double(), wanted, rtol=1e-4, atol=1e-5)
    assert not any(x.requires_grad for x in made)
    assert problem.q.grad is None


def test_a_backward_computes_no_forward(problem):
    attended = []

    def attend(q, k, v, causal):
        attended.append(causal)
        return q * k * v

    call = providers.Provider(attend).backward(problem)
    for _ in range(3):
        call.run()
    assert attended == [True]


def test_nobody_pays_for_a_copy(problem):
    seen = []

    def attend(q, k, v, causal):
        seen.extend((q, k, v))
        return q * k * v

    for direction in RESULTS:
        getattr(providers.Provider(attend, heads_first=True), direction)(problem).run()
    pointers = [x.data_ptr() for x in (problem.q, problem.k, problem.v)]
    assert [x.data_ptr() for x in seen] == pointers * len(RESULTS)
    assert all(x.shape == (2, 3, 7, 16) for x in seen)


def test_a_peer_that_fails_is_left_out_and_our_failure_is_not(capsys):
    def fail():
        raise RuntimeError("not on this GPU\nand more")

    works, fails = Call(lambda: (torch.empty(1),)), Call(fail)
    for _ in range(2):
        assert list(providers.runnable({OURS: works, CUDNN: fails})) == [OURS]
    assert capsys.readouterr().out == "cuDNN is left out: not on this GPU\n"
    for name in (OURS, DETERMINISTIC):
        with pytest.raises(RuntimeError, match="not on this GPU"):
            providers.runnable({name: fails})
