"""One run of the suite: bandwidth, micro part, end-to-end part, one results dictionary."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from svdk.bench import cases, end_to_end, logits, machine, micro, models, timing
from svdk.bench.results import FORMAT, Results


@dataclass(frozen=True)
class Options:
    """What to measure, and within which budget."""

    blocks: tuple[micro.Block, ...] = micro.GRIDS["default"]
    backends: tuple[str, ...] | None = None
    """None: all that run on the device, but the reference."""
    device: str = "cpu"
    with_baselines: bool = True
    with_compile: bool = True
    plan: timing.Plan = field(default_factory=timing.Plan)
    models: tuple[str, ...] = (models.REAL,)
    """For the end-to-end part; none: it is left out."""
    batches: tuple[int, ...] = (1, 4)
    new_tokens: int = 24
    rounds: int = 5
    minutes: float = 15.0
    memory: float | None = None
    """GB that one measurement may hold; None: half of what is free."""
    bandwidth_seconds: float = 0.5
    busy: int = 0
    """Busy loops to measure the micro part beside, too."""


def quick(device: str) -> Options:
    """The options of ``--quick``: under a minute on two cores."""
    return Options(
        blocks=micro.GRIDS["quick"],
        device=device,
        plan=timing.Plan(seconds=0.15, rounds=3, most=100),
        with_compile=False,
        batches=(1,),
        new_tokens=6,
        rounds=3,
        minutes=0.7,
        bandwidth_seconds=0.1,
    )


def run(options: Options, say: Callable[[str], None] = print) -> Results:
    """Measure; progress goes to ``say``, line by line.

    Raises:
        InputError, BackendError: an unusable option, found before anything is measured.
    """
    start = time.monotonic()
    device = torch.device(options.device)
    backends = cases.available_backends(device, options.backends)
    deadline = start + 60 * options.minutes
    room = machine.free_memory(device) // 2 if options.memory is None else int(options.memory * 1e9)
    results: Results = {
        "format": FORMAT,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.describe(device),
        "natural_logits": logits.natural_source(),
    }
    say("measuring the memory bandwidth")
    results["bandwidth"] = machine.bandwidth(device, seconds=options.bandwidth_seconds)
    runner = micro.Runner(
        device,
        machine.last_cache(device),
        options.plan,
        room,
        deadline,
        backends,
        options.with_baselines,
        options.with_compile,
        options.busy,
        say,
    )
    # Three quarters for the micro part, so that a slow machine still gets to the end-to-end part.
    if options.models:
        runner.deadline = start + 45 * options.minutes
    runner.run(micro.points(options.blocks))
    again = machine.bandwidth(device, seconds=options.bandwidth_seconds)
    results["bandwidth"] = machine.better(results["bandwidth"], again)
    results["micro"], results["skipped"] = runner.rows, runner.skipped
    results["end_to_end"] = []
    for name in options.models:
        rows, skipped = end_to_end.measure(
            name, options.batches, options.new_tokens, options.rounds, device, deadline, say
        )
        results["end_to_end"] += rows
        results["skipped"] += skipped
    results["seconds"] = round(time.monotonic() - start, 1)
    return results
