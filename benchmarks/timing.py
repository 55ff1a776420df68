"""Timing: providers take turns inside one run, so that clocks and temperature are the same for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

from benchmarks.providers import Call

MIN_ROUNDS = 5
MAX_ROUNDS = 300


def rounds_within(budget_seconds: float, round_seconds: float) -> int:
    """How many rounds of `round_seconds` fit into the budget, between MIN_ROUNDS and MAX_ROUNDS."""
    return max(MIN_ROUNDS, min(MAX_ROUNDS, int(budget_seconds / max(round_seconds, 1e-9))))


def rotations(names: list[str], rounds: int) -> list[list[str]]:
    """The order of the providers in each round: each round starts one provider later than the one before."""
    return [names[i % len(names) :] + names[: i % len(names)] for i in range(rounds)]


def _enqueue_rounds(
    calls: Mapping[str, Call], rounds: int, flush: torch.Tensor | None = None
) -> dict[str, list[float]]:
    """Milliseconds of each call by CUDA events; the host only enqueues, and waits at the end.

    `flush`, larger than L2, is read before each call: nothing is left there, nor waits to be written back.
    """
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for order in rotations(list(calls), rounds):
        for name in order:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            with calls[name].context():
                if flush is not None:
                    flush.sum()
                start.record()
                calls[name].run()
                end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()}


def device_medians(calls: Mapping[str, Call], budget_seconds: float) -> dict[str, float]:
    """Median device time of each call in milliseconds, after one warming round and one that sizes the run."""
    _enqueue_rounds(calls, 2)
    round_ms = sum(median(times) for times in _enqueue_rounds(calls, 3).values())
    rounds = rounds_within(budget_seconds, round_ms * 1e-3)
    return {name: median(times) for name, times in _enqueue_rounds(calls, rounds).items()}


def batch_microseconds(call: Callable[[], object], calls_per_batch: int) -> float:
    """Host time of one call, in microseconds, averaged over a batch that the launch queue can hold."""
    torch.cuda.synchronize()
    start = time.perf_counter_ns()
    for _ in range(calls_per_batch):
        call()
    return (time.perf_counter_ns() - start) / calls_per_batch * 1e-3


def host_medians(calls: Mapping[str, Call], batches: int, calls_per_batch: int = 100) -> dict[str, float]:
    """Median host time of one call in microseconds: providers take turns, a batch each."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for order in rotations(list(calls), batches):
        for name in order:
            with calls[name].context():
                calls[name].run()
                samples[name].append(batch_microseconds(calls[name].run, calls_per_batch))
    return {name: median(times) for name, times in samples.items()}


def _graph(call: Call) -> torch.cuda.CUDAGraph:
    """Capture one call, so that its host time does not count."""
    with call.context():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                call.run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call.run()
    return graph


def cold_medians(calls: Mapping[str, Call], rounds: int = 25) -> dict[str, float]:
    """Median device time of each call in milliseconds, replayed as a CUDA graph with nothing of it in L2."""
    graphs = {name: _graph(call) for name, call in calls.items()}
    flush = torch.empty(torch.cuda.get_device_properties().L2_cache_size, dtype=torch.float32, device="cuda")

    replays = {name: Call(graph.replay) for name, graph in graphs.items()}
    _enqueue_rounds(replays, 2, flush)
    return {name: median(times) for name, times in _enqueue_rounds(replays, rounds, flush).items()}
