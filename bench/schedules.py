"""Learning-rate schedules of short warm starts: constant against linear decay, tasks by seeds by rates.

    python -m svdk.bench.schedules --data DIR --output bench/results/schedules-MACHINE.json

``DIR`` holds the sentiment files of :func:`svdk.bench.tasks.make`. Runs that ``--output`` already has are not
made again. Judged on test examples by the loss and by right answers, unsteered; nothing is chosen on them.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch

from svdk.bench.machine import describe
from svdk.bench.tasks import BATCH, Data, make, warm_started
from svdk.calibration.choices import choice_statistics, choices_of
from svdk.calibration.sweep import Sweep
from svdk.demo.evaluate import System, answer, completion_nll
from svdk.models.loading import SMOLLM2, load_model
from svdk.models.pair import ModelPair
from svdk.utils.files import write_json
from svdk.utils.views import WARM

TASKS = ("dates", "records", "sentiment")
SCHEDULES = ("linear", "constant")
RATES = (5e-4, 1e-3, 2e-3)
SEEDS = (0, 1, 2)
STEPS = 8


def measure(model: Any, tokenizer: Any, data: Data) -> dict[str, float]:
    """NLL (nats a token, or a choice) and share of right answers on each test set, unsteered."""
    found: dict[str, float] = {}
    for name, examples in data.test.items():
        if data.choice:
            choices = choices_of(examples, tokenizer)
            assert choices is not None
            sweep = Sweep.of("kl_gradient", 0.1, "auto")
            loss, hits = choice_statistics(ModelPair(model), tokenizer, choices, sweep).unsteered
            found |= {f"nll {name}": float(loss.mean()), f"right {name}": float(hits.mean())}
            continue
        system = System(WARM, "warm start")
        nll, tokens = completion_nll(ModelPair(model), tokenizer, examples, [system], batch_size=16)
        answers = answer(
            model, tokenizer, [e.prompt for e in examples], system, batch_size=32, max_new_tokens=24
        )
        right = [a.strip() == e.completion.strip() for a, e in zip(answers, examples, strict=True)]
        found |= {
            f"nll {name}": float(nll[WARM].sum() / tokens[WARM].sum()),
            f"right {name}": sum(right) / len(right),
        }
    return found


def run(base: Any, tokenizer: Any, data: Data, seed: int, **settings: Any) -> dict[str, Any]:
    """One warm start of :data:`STEPS` steps with ``settings``, measured."""
    with warm_started(base, tokenizer, data, STEPS, seed, **settings) as (model, _, seconds):
        return measure(model, tokenizer, data) | {"seconds": round(seconds, 1)}


def main() -> None:
    """Run what is missing; every run is written when it is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the sentiment files")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    runs = json.loads(given.output.read_text())["runs"] if given.output.exists() else []
    done = {(r["task"], r["seed"], r["lr_scheduler"], r["learning_rate"]) for r in runs}
    base, tokenizer = load_model(SMOLLM2)
    machine = describe(torch.device("cpu"))
    for seed, rate, task, schedule in itertools.product(SEEDS, RATES, TASKS, SCHEDULES):
        if (task, seed, schedule, rate) in done:
            continue
        settings = {"lr_scheduler": schedule, "learning_rate": rate}
        found = run(base, tokenizer, make(task, seed, given.data), seed, **settings)
        runs.append({"task": task, "seed": seed, **settings, **found})
        print(runs[-1], flush=True)
        write_json(given.output, {"machine": machine, "steps": STEPS, "batch": BATCH, "runs": runs})


if __name__ == "__main__":
    main()
