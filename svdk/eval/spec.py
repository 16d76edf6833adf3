"""What a study compares: models, tasks, warm starts and steering settings, read from a JSON file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from svdk.calibration.estimators import ESTIMATORS, OBJECTIVES
from svdk.calibration.kept_statistics import DIRECTIONS
from svdk.errors import InputError
from svdk.eval.generation import DECODINGS
from svdk.eval.tasks import NAMES, TRUTHFULQA
from svdk.utils.checks import check_choice, check_count, check_number, is_number
from svdk.utils.files import parse_json, read_text
from svdk.warmstart.peft_configs import PEFT_TYPES

FOLDER = Path(__file__).parent / "studies"
"""Studies that come with svdk."""


@dataclass(frozen=True)
class Run:
    """One task with one kind of adapter, at several lengths of the warm start."""

    task: str
    peft: str
    steps: tuple[int, ...]
    """Optimiser steps of the warm start; each length is a run of its own, with its own schedule."""
    learning_rate: float = 5e-4
    batch_size: int = 8
    folds: int = 1
    """Parts of the test set, each judged by an adapter that never saw it; 1 with a training set."""
    limit: int | None = None
    """Test questions of each fold (all without it)."""
    calibration: int = 64
    """Calibration examples, taken from the training set."""
    peft_options: Mapping[str, Any] = field(default_factory=dict)
    generate: int = 0
    """Test questions of the first fold that are answered by generation too."""
    generate_steps: tuple[int, ...] = ()
    """The lengths that this is done for (default: all)."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run, before anything is."""
        check_choice("task", self.task, NAMES)
        check_choice("peft", self.peft, PEFT_TYPES)
        counts = {"batch_size": self.batch_size, "calibration": self.calibration - 1, "folds": self.folds}
        if self.limit is not None:
            counts["limit"] = self.limit
        for number, steps in enumerate(self.steps):
            counts[f"steps[{number}]"] = steps
        for name, value in counts.items():
            check_count(name, value, 1)
        check_count("generate", self.generate, 0)
        if not self.steps or len(set(self.steps)) < len(self.steps):
            raise InputError(f"steps was {list(self.steps)}; allowed: one or more different counts")
        if not set(self.generate_steps) <= set(self.steps):
            raise InputError(f"generate_steps was {list(self.generate_steps)}; allowed: some of steps")
        if (self.task == TRUTHFULQA) != (self.folds > 1):
            raise InputError(
                f"folds was {self.folds} for {self.task}; allowed: at least 2 for {TRUTHFULQA}, 1 for others"
            )
        check_number("learning_rate", self.learning_rate, "(0, inf)")


@dataclass(frozen=True)
class Study:
    """Runs, and the steering settings that each of their adapters is judged with."""

    runs: tuple[Run, ...]
    model: str = "smollm2-135m"
    directions: tuple[str, ...] = DIRECTIONS
    alpha: float = 0.1
    """The mask; every direction is judged with it and without."""
    penalties: tuple[float, ...] = (0.0,)
    """lambda in scoring, with the mask; other values than 0 with the default estimator only."""
    estimators: tuple[str, ...] = ESTIMATORS
    objectives: tuple[str, ...] = OBJECTIVES
    kl_budget: bool = True
    static_vector: bool = True
    static_alpha: float = 0.1
    """The mask of the static vector's average."""
    decoding: tuple[str, ...] = ("greedy",)
    """Of the runs that generate."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be run, before anything is."""
        choices = {
            "directions": DIRECTIONS,
            "estimators": ESTIMATORS,
            "objectives": OBJECTIVES,
            "decoding": tuple(DECODINGS),
        }
        for name, allowed in choices.items():
            for value in getattr(self, name):
                check_choice(name, value, allowed)
        if not self.runs or not self.directions or not self.estimators:
            raise InputError("runs, directions and estimators were empty; allowed: at least one of each")
        check_number("alpha", self.alpha, "(0, 1]")
        check_number("static_alpha", self.static_alpha, "[0, 1]")
        for penalty in self.penalties:
            if not is_number(penalty) or math.isnan(penalty) or penalty == math.inf:
                raise InputError(f"penalties held {penalty!r}; allowed: finite numbers or -inf")
        check_count("seed", self.seed, 0)


def load_study(source: str | Path) -> Study:
    """A study from a JSON file, or one that comes with svdk by its name.

    The file holds the fields of :class:`Study`; ``runs`` is a list of objects with those of :class:`Run`;
    a penalty of -inf is written ``"-inf"``. Raises :class:`InputError` naming the file and the field.
    """
    path = Path(source)
    shipped = sorted(p.stem for p in FOLDER.glob("*.json"))
    if str(source) in shipped:
        path = FOLDER / f"{source}.json"
    if not path.is_file():
        raise InputError(f"study was {source}; allowed: {', '.join(shipped)}, or a JSON file")
    record = parse_json(read_text(path, "study"), f"study {path}")
    try:
        return _study(record)
    except InputError as error:
        raise InputError(f"study {path}: {error}") from None


def _study(record: Any) -> Study:
    values = _fields(record, Study, "study")
    runs = values.get("runs")
    if not isinstance(runs, list):
        raise InputError("runs was missing or not a list; allowed: a list of objects")
    values["runs"] = tuple(Run(**_fields(run, Run, f"runs[{i}]")) for i, run in enumerate(runs))
    if "penalties" in values:
        values["penalties"] = tuple(-math.inf if p == "-inf" else p for p in values["penalties"])
    return Study(**values)


def _fields(record: Any, kind: type, name: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise InputError(f"{name} was a {type(record).__name__}; allowed: an object")
    known = {f.name for f in fields(kind)}
    unknown = sorted(set(record) - known)
    if unknown:
        raise InputError(f"{name} had the field {unknown[0]!r}; allowed: {', '.join(sorted(known))}")
    missing = sorted({"task", "peft", "steps"} - set(record)) if kind is Run else []
    if missing:
        raise InputError(f"{name} lacked the field {missing[0]!r}")
    return {k: tuple(v) if isinstance(v, list) and k != "runs" else v for k, v in record.items()}
