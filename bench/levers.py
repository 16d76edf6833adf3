"""Levers on three tasks and several seeds of the warm start: what each gains on test examples.

    python -m svdk.bench.levers --data DIR --output bench/results/levers-MACHINE.json
    python -m svdk.bench.levers --output FILE --table

``DIR`` holds the sentiment files of :func:`svdk.bench.tasks.make`. Every lever is fitted on the calibration
examples alone; test examples are the same for all seeds. Runs that ``--output`` already has
are not made again.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdk.bench.machine import describe
from svdk.bench.tasks import BATCH, Data, make, warm_started
from svdk.calibration import levers
from svdk.calibration.alone import SCALES, WarmRuns
from svdk.calibration.calibrate import calibrate
from svdk.calibration.choices import ChoiceStatistics, choice_statistics, choices_of
from svdk.calibration.kept_statistics import Statistics
from svdk.calibration.levers import Fitted, Judge
from svdk.calibration.sweep import Sweep, extract_steering
from svdk.demo.evaluate import System, answer
from svdk.models.loading import SMOLLM2, load_model
from svdk.models.pair import ModelPair
from svdk.utils.bootstrap import bootstrap
from svdk.utils.files import write_json
from svdk.warmstart.data import Example, encode_all

TASKS = ("dates", "records", "sentiment")
SEEDS = (0, 1, 2)
STEPS, RATE, SCHEDULE = 8, 5e-4, "linear"
"""Where SmolLM2-135M has half understood the tasks; ``svdk.bench.schedules`` has other rates."""
ANSWERED = 96
"""Test examples that are answered, not only scored: answers cost more."""


def statistics_of(pair: ModelPair, tokenizer: Any, examples: list[Example], vector: Tensor | None) -> Any:
    """Of test examples, for every lever; ``vector``: the static one of the calibration."""
    choices = choices_of(examples, tokenizer) if examples[0].options else None
    if choices is not None:
        return choice_statistics(pair, tokenizer, choices, Sweep.of("auto", 0.1, "auto"), scales=SCALES)
    found = extract_steering(pair, examples, tokenizer=tokenizer, direction="auto", scales=SCALES)
    if vector is None:
        return found
    encoded, _ = encode_all(tokenizer, examples, 512, "error")
    runs = WarmRuns(pair, encoded, 8)
    return runs.with_vectors(found, [vector, vector], torch.zeros(len(encoded), dtype=torch.int64))


def judged(statistics: Statistics | ChoiceStatistics, fitted: list[Fitted]) -> dict[str, Any]:
    """Nats and hits gained on each test example by lever: lists of numbers, for pooling over seeds."""
    views = {setting: statistics.view(*setting) for setting in statistics.settings()}
    judge = Judge(statistics, views, "nll", 5, 0, 1)
    example = statistics.examples_of_tokens()
    found: dict[str, Any] = {"tokens": statistics.tokens.tolist()}
    for one in fitted:
        sums = [
            torch.zeros(statistics.examples, dtype=torch.float64).index_add_(0, example, x)
            for x in judge.gains(one)
        ]
        found[one.lever] = {"nats": sums[0].tolist(), "hits": sums[1].tolist()}
    return found


def run(base: Any, tokenizer: Any, data: Data, seed: int) -> dict[str, Any]:
    """One warm start, its calibration with every lever, and each lever on the test examples."""
    settings = {"learning_rate": RATE, "lr_scheduler": SCHEDULE}
    with warm_started(base, tokenizer, data, STEPS, seed, **settings) as (model, folder, _):
        start = time.perf_counter()
        auto = calibrate(
            model,
            folder,
            tokenizer=tokenizer,
            direction="auto",
            objective="auto",
            lever="auto",
            seed=seed,
        )
        seconds = time.perf_counter() - start
        report = auto.report()
        fitted = [row.fitted for row in report.levers]
        assert report.auto is not None
        found: dict[str, Any] = {
            "seconds": round(seconds, 1),
            "chosen": auto.lever,
            "auto": dataclasses.asdict(report.auto),
            "fitted": {row.fitted.lever: row.summary() for row in report.levers},
            "out_of_fold": {row.fitted.lever: [row.gain, *row.interval] for row in report.levers},
        }
        for name, examples in data.test.items():
            statistics = statistics_of(ModelPair(model), tokenizer, examples, report.vector)
            found[name] = judged(statistics, fitted)
            if data.choice:
                continue
            some = examples[:ANSWERED]
            for one in fitted:
                system = System(one.lever, one.lever, report.of_lever(one.lever).steering())
                given = answer(
                    model, tokenizer, [e.prompt for e in some], system, batch_size=32, max_new_tokens=24
                )
                right = [float(a.strip() == e.completion.strip()) for a, e in zip(given, some, strict=True)]
                found[name][one.lever]["exact"] = right
        return found


def table(runs: list[dict[str, Any]]) -> str:
    """What each lever gains over ``none``, seeds averaged: 95 % intervals over the test examples."""
    lines = [
        "| task | lever | nats a token or choice | right, points | each seed, points |",
        "|---|---|---|---|---|",
    ]
    for task, test in itertools.product(TASKS, ("dates", "records", "movies", "products (out of domain)")):
        mine = [one[test] for one in runs if one["task"] == task and test in one]
        for lever in levers.COSTS:
            if not mine or lever == "none" or any(lever not in one for one in mine):
                continue
            tokens = torch.tensor(mine[0]["tokens"]).double()
            nats = torch.tensor([one[lever]["nats"] for one in mine]).double()
            kind = "exact" if "exact" in mine[0][lever] else "hits"
            right = torch.tensor([one[lever][kind] for one in mine]).double()
            if kind == "exact":
                right = right - torch.tensor([one["none"][kind] for one in mine]).double()
            cells = [
                _cell(nats.mean(0), tokens, 1, 4),
                _cell(right.mean(0), torch.ones(right.shape[1]), 100, 1),
            ]
            each = " ".join(f"{100 * float(x):+.1f}" for x in right.mean(1))
            lines.append(f"| {test} | `{lever}` | {cells[0]} | {cells[1]} | {each} |")
    return "\n".join(lines)


def _cell(values: Tensor, weights: Tensor, scale: float, digits: int) -> str:
    mean, (low, high) = bootstrap(values, weights.double(), resamples=5000, seed=0)
    return f"{scale * mean:+.{digits}f} ({scale * low:+.{digits}f} to {scale * high:+.{digits}f})"


def main() -> None:
    """Run what is missing, or print the table of what is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the sentiment files")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="print what --output holds, run nothing")
    given = parser.parse_args()
    runs = json.loads(given.output.read_text())["runs"] if given.output.exists() else []
    if not given.table:
        base, tokenizer = load_model(SMOLLM2)
        machine = describe(torch.device("cpu"))
        settings = {"steps": STEPS, "batch": BATCH, "learning_rate": RATE, "lr_scheduler": SCHEDULE}
        done = {(one["task"], one["seed"]) for one in runs}
        for seed, task in itertools.product(SEEDS, TASKS):
            if (task, seed) in done:
                continue
            found = run(base, tokenizer, make(task, seed, given.data), seed)
            runs.append({"task": task, "seed": seed, **found})
            print(task, seed, found["chosen"], found["fitted"], flush=True)
            write_json(given.output, {"machine": machine, **settings, "runs": runs})
    print(table(runs))


if __name__ == "__main__":
    main()
