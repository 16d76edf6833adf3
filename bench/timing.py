"""Timing one call many times, fairly: warm-up, hot and cold caches, rounds that take turns, spread.

On a CPU a sample is one call under ``time.perf_counter_ns``. On a GPU it is one replay, between two device
events, of a captured graph of many calls, divided by their number (one call where it cannot be captured).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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
        """Half the interquartile range or the deviation between rounds, whichever is larger; seconds.

        Two medians are not called different when they differ by less than the noise of both. Fewer than
        three samples say nothing about it: then it is as large as the time itself.
        """
        if self.count < 3:
            return self.median
        middle = statistics.median(self.rounds)
        drift = 1.48 * statistics.median(abs(x - middle) for x in self.rounds)  # one sigma, if normal
        return max((self.q3 - self.q1) / 2, drift)


@dataclass(frozen=True)
class Plan:
    """How long to measure; seconds are per contestant."""

    seconds: float = 0.5
    rounds: int = 5
    most: int = 200
    fewest: int = 1
    """Samples a round, at most and at least."""
    limit: float = 5.0
    """A contestant whose single call takes longer is left out, and the report says so."""


class TooSlowError(Exception):
    """One call took longer than the plan allows."""


@dataclass(frozen=True)
class _Entry:
    calls: list[Callable[[], Any]]
    inner: int = 1
    """Calls of the contestant in each of ``calls``."""


class Contest:
    """Contestants measured in turns on the same operands."""

    def __init__(self, operands: Sequence[Any], device: torch.device, plan: Plan) -> None:
        """``operands``: one entry for hot caches, or enough of them to outgrow the caches."""
        self.operands, self.device, self.plan = operands, device, plan
        self._entries: dict[str, _Entry] = {}
        self._next = 0

    def enter(self, name: str, call: Call, *, capture: bool = False) -> None:
        """Add a contestant and warm it up.

        Raises:
            TooSlowError: with the time that one call took.
        """
        call(self.operands[0])  # compiles, allocates, loads
        entry = _Entry([partial(call, x) for x in self.operands])
        if capture and self.device.type == "cuda":
            entry = _captured(entry.calls)
        self._sample(entry)
        once = min(self._sample(entry) for _ in range(2))
        if once > self.plan.limit:
            raise TooSlowError(f"one call takes {once:.1f} s, the limit is {self.plan.limit:g} s")
        self._entries[name] = entry

    def run(self) -> dict[str, Timing]:
        """Name -> timing."""
        samples: dict[str, list[list[float]]] = {name: [] for name in self._entries}
        for _ in range(self.plan.rounds):
            for name, entry in self._entries.items():
                self._sample(entry)  # the caches hold what the previous contestant left
                samples[name].append(self._round(entry))
        return {name: summarize(rounds) for name, rounds in samples.items()}

    def _round(self, entry: _Entry) -> list[float]:
        end = time.perf_counter() + self.plan.seconds / self.plan.rounds
        taken: list[float] = []
        while len(taken) < self.plan.fewest or (len(taken) < self.plan.most and time.perf_counter() < end):
            taken.append(self._sample(entry))
        return taken

    def _sample(self, entry: _Entry) -> float:
        call = entry.calls[self._next % len(entry.calls)]
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
        return begin.elapsed_time(end) * 1e-3 / entry.inner


def summarize(rounds: list[list[float]]) -> Timing:
    """Median, quartiles and minimum over all samples of all rounds."""
    values = sorted(x for part in rounds for x in part)
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return Timing(median, q1, q3, values[0], len(values), tuple(statistics.median(part) for part in rounds))


def _captured(calls: list[Callable[[], Any]], least: int = 20) -> _Entry:
    """One graph that goes through all operands, often enough that its launch is no part of the time."""
    inner = len(calls) * -(-least // len(calls))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(inner):
            calls[index % len(calls)]()
    return _Entry([graph.replay], inner)


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
