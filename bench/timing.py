"""Timing one call many times, fairly: warm-up, hot and cold caches, rounds that take turns, spread.

On a CPU a sample is one call under ``time.perf_counter_ns``. On a GPU it is one replay of a captured graph
(or, where a call cannot be captured, one call) between two device events.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Call = Callable[[Any], Any]


@dataclass(frozen=True)
class Timing:
    """Seconds a call."""

    median: float
    q1: float
    q3: float
    minimum: float
    count: int
    rounds: tuple[float, ...]
    """The median of each round; the contestants took turns, so slow drifts show up here."""

    @property
    def noise(self) -> float:
        """Half the interquartile range or half the spread of the rounds, whichever is larger; seconds."""
        return noise(self.q1, self.q3, self.rounds)


def noise(q1: float, q3: float, rounds: Sequence[float]) -> float:
    """The half-width within which two medians are not called different, seconds."""
    return max(q3 - q1, max(rounds) - min(rounds)) / 2


@dataclass(frozen=True)
class Plan:
    """How long to measure; seconds are per contestant."""

    seconds: float = 0.5
    rounds: int = 5
    most: int = 200
    """Samples a round, at most."""
    limit: float = 5.0
    """A contestant whose single call takes longer is left out, and the report says so."""


class TooSlowError(Exception):
    """One call took longer than the plan allows."""


class Contest:
    """Contestants measured in turns on the same operands."""

    def __init__(self, operands: Sequence[Any], device: torch.device, plan: Plan) -> None:
        """``operands``: one entry for hot caches, or enough of them to outgrow the caches."""
        self.operands, self.device, self.plan = operands, device, plan
        self._entries: dict[str, tuple[list[Callable[[], Any]], int]] = {}
        self._next = 0

    def enter(self, name: str, call: Call, *, capture: bool = False) -> None:
        """Add a contestant: run it once, then time it once to plan the rounds.

        Raises:
            TooSlowError: with the time that one call took.
        """
        call(self.operands[0])  # compiles, allocates, loads
        calls = [lambda x=x: call(x) for x in self.operands]
        if capture and self.device.type == "cuda":
            calls = [_graph(c) for c in calls]
        self._sample(calls)
        once = min(self._sample(calls) for _ in range(2))
        if once > self.plan.limit:
            raise TooSlowError(f"one call takes {once:.1f} s, the limit is {self.plan.limit:g} s")
        share = self.plan.seconds / self.plan.rounds
        self._entries[name] = (calls, max(1, min(self.plan.most, int(share / once))))

    def run(self) -> dict[str, Timing]:
        """Name -> timing."""
        samples: dict[str, list[list[float]]] = {name: [] for name in self._entries}
        for _ in range(self.plan.rounds):
            for name, (calls, count) in self._entries.items():
                self._sample(calls)  # the caches hold what the previous contestant left
                samples[name].append([self._sample(calls) for _ in range(count)])
        return {name: summarize(rounds) for name, rounds in samples.items()}

    def _sample(self, calls: list[Callable[[], Any]]) -> float:
        call = calls[self._next % len(calls)]
        self._next += 1
        if self.device.type != "cuda":
            start = time.perf_counter_ns()
            call()
            return (time.perf_counter_ns() - start) * 1e-9
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3


def summarize(rounds: list[list[float]]) -> Timing:
    """Median, quartiles and minimum over all samples of all rounds."""
    values = sorted(x for part in rounds for x in part)
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return Timing(median, q1, q3, values[0], len(values), tuple(statistics.median(part) for part in rounds))


def _graph(call: Callable[[], Any]) -> Callable[[], Any]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # A view moves no data and launches nothing.
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def launches(call: Call, operand: Any, device: torch.device) -> int:
    """Kernels launched by one call: device kernels on a GPU, dispatched non-view operators on a CPU."""
    if device.type == "cuda":
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            call(operand)
            torch.cuda.synchronize()
        device_type = torch.autograd.DeviceType.CUDA
        return sum(event.device_type == device_type for event in profiler.events())
    with _Counter() as counter:
        call(operand)
    return counter.count
