"""The parts of timing that need no GPU."""

from benchmarks import timing


def test_rounds_fit_the_budget_within_limits():
    assert timing.rounds_within(1.0, 0.02) == 50
    assert timing.rounds_within(1.0, 10.0) == timing.MIN_ROUNDS
    assert timing.rounds_within(1.0, 0.0) == timing.MAX_ROUNDS


def test_every_provider_takes_every_position():
    orders = timing.rotations(["a", "b", "c"], 4)
    assert orders == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]
