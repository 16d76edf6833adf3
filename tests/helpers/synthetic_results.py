"""Seeded results of a made-up study, in the format of RESULTS.jsonl: nothing here was measured."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch

RUNS = {
    ("truthfulqa", "lora"): (4, 16, 64), ("truthfulqa", "ia3"): (4, 64), ("arc_easy", "lora"): (4, 16, 64),
    ("openbookqa", "lora"): (4, 64),
}  # fmt: skip
"""Lengths of the warm start by task and PEFT."""
QUESTIONS = {"truthfulqa": 160, "arc_easy": 120, "openbookqa": 100}
METRICS = {"truthfulqa": ("mc1", "mc2", "mc3"), "arc_easy": ("accuracy",), "openbookqa": ("accuracy",)}
EFFECT = {"kl_gradient": 0.03, "log_ratio": 0.6, "vector": 0.1}
"""What a direction takes off the NLL after no training at all, nats."""


def noise(key: str, count: int) -> torch.Tensor:
    """(count,) standard normal, from the key alone."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big")
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scores(task: str, peft: str, nll: float, skill: float, key: str) -> dict[str, list[float]]:
    """Scores of every question: its own difficulty, a little noise, and what the system can do."""
    count = QUESTIONS[task]
    hard, own = noise(f"{task} difficulty", count), noise(f"{task} {peft} {key}", count)
    found = {"nll": nll + 0.4 * hard + 0.01 * own}
    for index, name in enumerate(METRICS[task]):
        logit = skill - hard + 0.15 * own + 0.3 * index
        found[name] = (logit > 0).double() if name in ("mc1", "accuracy") else logit.sigmoid()
    found["token_accuracy"] = (skill - hard).sigmoid()
    found["exact"] = (skill - hard > 1.2).double()
    return {name: [round(float(x), 5) for x in values] for name, values in found.items()}


def row(task: str, peft: str | None, steps: int | None, system: str, scores: dict, **fields: Any) -> dict:
    """One line."""
    folds = 2 if task == "truthfulqa" else 1
    fields = {
        "direction": None, "alpha": None, "penalty": None, "strength_mode": None, "estimator": None,
        "objective": None, "strength": None, "calibration": None, "decoding": "likelihood", **fields,
    }  # fmt: skip
    count = len(next(iter(scores.values())))
    record = {
        "format_version": 1, "model": "made-up", "task": task, "folds": folds, "test_questions": count,
        "question_ids_hash": f"{task}{count}", "peft": peft, "steps": steps,
        "train_seed": None if peft is None else 0, "system": system, **fields,
        "metrics": {name: sum(values) / count for name, values in scores.items()}, "scores": scores,
        "seconds": 0.5,
    }  # fmt: skip
    record["cell"] = hashlib.sha256(json.dumps(record).encode()).hexdigest()[:16]
    return record


def settings() -> list[dict[str, Any]]:
    """Every steered setting that is scored by likelihood."""
    usual = {"penalty": 0.0, "strength_mode": "constant", "estimator": "optimum", "objective": "nll"}
    found = [
        {**usual, "direction": direction, "alpha": alpha, **change}
        for direction in ("kl_gradient", "log_ratio")
        for alpha in (0.1, 0.0)
        for change in ({}, {"estimator": "mean"})
    ]
    found += [
        {**usual, "direction": "log_ratio", "alpha": 0.0, "objective": "accuracy"},
        {**usual, "direction": "kl_gradient", "alpha": 0.1, "penalty": -5.0},
        {**usual, "direction": "kl_gradient", "alpha": 0.1, "strength_mode": "kl_budget", "objective": None},
        {**usual, "direction": "vector", "alpha": 0.0},
    ]
    return found


def steered_nll(warm: float, steps: int, setting: dict[str, Any]) -> float:
    """The mean is noise, a mask takes half of the effect away, and so does everything but the default."""
    effect = EFFECT[setting["direction"]] * math.exp(-steps / 20) * (0.5 if setting["alpha"] else 1.0)
    if setting["estimator"] == "mean":
        return warm + (0.8 if setting["direction"] == "log_ratio" else 0.02)
    plain = setting["strength_mode"] == "constant" and setting["objective"] == "nll"
    return warm - effect * (1.0 if plain and setting["penalty"] == 0.0 else 0.5)


def study() -> list[dict[str, Any]]:
    """All cells."""
    rows = [row(task, None, None, "base", scores(task, "", 3.0, -0.8, "base")) for task in QUESTIONS]
    for (task, peft), lengths in RUNS.items():
        for steps in lengths:
            warm = 1.0 + 1.6 * math.exp(-steps / 24) + (0.1 if peft == "ia3" else 0.0)
            skill = -0.4 + 0.1 * math.log2(steps)
            rows.append(row(task, peft, steps, "warm", scores(task, peft, warm, skill, f"warm {steps}")))
            for setting in settings():
                nll = steered_nll(warm, steps, setting)
                key = f"{steps} {sorted(setting.items(), key=str)}"
                found = scores(task, peft, nll, skill + 0.3 * (warm - nll), key)
                rows.append(row(task, peft, steps, "steered", found, **_steering(task, steps, setting)))
    return rows + _generated()


def _steering(task: str, steps: int, setting: dict[str, Any]) -> dict[str, Any]:
    folds = 2 if task == "truthfulqa" else 1
    gain = EFFECT[setting["direction"]] * math.exp(-steps / 20)
    mu = -7.5 if setting["estimator"] == "mean" else 40 * gain / 3 * (-1 if task == "truthfulqa" else 1)
    wide = 0.02 if setting["estimator"] == "optimum" else 0.5
    calibration = {
        "gain": [gain] * folds, "interval": [[gain - wide, gain + wide]] * folds,
        "per_token_std": [57.0 / steps] * folds, "nll_base": 3.0, "nll_warm": 2.0, "nll_steered": 2.0 - gain,
    }  # fmt: skip
    strength = [mu * (1 + 0.1 * fold) for fold in range(folds)]
    return {**setting, "strength": strength, "calibration": calibration}


def _generated() -> list[dict[str, Any]]:
    rows = []
    for decoding in ("greedy", "sample"):
        for system, shift in (("base", -1.0), ("warm", 0.0), ("steered", 0.1)):
            logit = shift - noise("written", 60) + 0.1 * noise(f"{decoding} {system}", 60)
            found = {"truthful": [float(x > 0) for x in logit], "informative": [float(x > -1) for x in logit]}
            start = (None, None) if system == "base" else ("lora", 16)
            default = {**settings()[0], "penalty": None}
            more = _steering("arc_easy", 16, default) if system == "steered" else {}
            rows.append(row("truthfulqa", *start, system, found, decoding=decoding, **more))
    return rows


def curves() -> list[dict[str, Any]]:
    """Lines of CURVES.jsonl."""
    rows = []
    for task, peft in (("truthfulqa", "ia3"),):
        for steps in RUNS[task, peft]:
            for direction, alpha in (("kl_gradient", 0.1), ("log_ratio", 0.0)):
                mu = [x / 2 for x in range(-4, 9)]
                best, bend = 3 * math.exp(-steps / 20), 0.02 if direction == "kl_gradient" else 0.2
                warm = 1.0 + 1.6 * math.exp(-steps / 24)
                nll = [warm + bend * ((x - best) ** 2 - best**2) for x in mu]
                answers = [0.4 + 0.02 * math.log2(steps) - 0.004 * (x - best) ** 2 for x in mu]
                rows.append(
                    {
                        "task": task, "peft": peft, "steps": steps, "direction": direction, "alpha": alpha,
                        "mu": mu, "nll": nll, "metrics": {METRICS[task][0]: answers},
                        "calibration_nll": nll, "calibration_token_accuracy": answers,
                    }
                )  # fmt: skip
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in rows))
    return path
