"""The part of a study that runs no model: every steering setting scored from the kept statistics.

A cell, one line of the results, is one system on all test questions of a task. Its strength comes from
the calibration data of each fold alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svdk.calibration.artifact import Steering
from svdk.calibration.estimators import (
    fit,
    fit_kl_budget,
    kl_budget_strength,
    out_of_fold,
    per_token_optimum,
)
from svdk.calibration.kept_statistics import Statistics
from svdk.calibration.loss_views import MaskedView, View
from svdk.calibration.option_statistics import OptionStatistics
from svdk.calibration.report import saved_statistics
from svdk.eval.answers import kept_answers
from svdk.eval.generation import score_answers
from svdk.eval.metrics import score
from svdk.eval.runner import STATIC, Place, load_statistics, places, questions_hash, task_of
from svdk.eval.spec import Run, Study
from svdk.eval.systems import System, scoring_systems
from svdk.eval.tasks import Question, Task
from svdk.utils.bootstrap import bootstrap
from svdk.utils.files import write_file

if TYPE_CHECKING:
    from svdk.eval.judge import Judge

RESULTS = "RESULTS.jsonl"
CURVES = "CURVES.jsonl"
FORMAT_VERSION = 1
CURVE_STRENGTHS = (*(k / 4 for k in range(-8, 9)), 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0, 20.0, 24.0)
"""Dense where the optimum of the log-ratio lies, and as far out as that of a short warm start's gradient."""
RESAMPLES = 1000
"""Of the interval of the calibration's expected gain."""


@dataclass(frozen=True, eq=False)
class Fold:
    """What is kept of one adapter: its test questions, their statistics, and its calibration."""

    task: Task
    options: OptionStatistics
    calibration: Statistics
    static: Steering | None
    identity: str

    def gold(self) -> Tensor:
        """(Q,) the place of each gold option among all options."""
        starts = self.options.options.cumsum(0) - self.options.options
        return starts + torch.tensor([question.best for question in self.task.test])

    def strength(self, system: System) -> float:
        """The strength mu of ``system`` (``kl_budget``: kappa), from the calibration data."""
        if system.direction == "vector":
            return self.vector().strength
        view = self.calibration.view(*system.setting)
        if system.strength_mode == "kl_budget":
            return fit_kl_budget(_masked(view))
        return fit(view, *system.fitting).strength

    def vector(self) -> Steering:
        """The static vector of a study that compares it."""
        if self.static is None:
            raise ValueError("the study has no static vector")
        return self.static

    def scores(self, system: System, strength: float | None) -> dict[str, Tensor]:
        """Each metric of every question, (Q,) float64."""
        statistics, gold = self.options.statistics, self.gold()
        if system.system == "base":
            logprobs = self.options.base_logprobs()
            correct = _unmasked(statistics).correct(-1.0)  # log-ratio without mask, mu = -1: the base model
        else:
            penalty = -math.inf if system.penalty is None else system.penalty
            view = _unmasked(statistics)
            if system.direction is not None:
                view = statistics.view(*system.setting, penalty)
            if system.strength_mode == "kl_budget":
                view = _masked(view)
                each = kl_budget_strength(view, strength or 0.0)
                logprobs, correct = self.options.logprobs(view, each), view.correct(each)
            else:
                mu = _on_grid(strength or 0.0)
                logprobs, correct = self.options.logprobs(view, mu), view.correct(mu)
        return self._metrics(logprobs, correct, gold)

    def _metrics(self, logprobs: Tensor, correct: Tensor, gold: Tensor) -> dict[str, Tensor]:
        tokens = self.options.statistics.tokens.double()[gold]
        right = correct[gold]
        found = score(self.task.metrics, self.options.by_question(logprobs), self.task.test)
        found["nll"] = -logprobs[gold] / tokens
        found["token_accuracy"] = right / tokens
        whole = (right >= tokens - 1e-6) & ~self.options.impossible[gold]
        found["exact"] = whole.double()
        return found

    def curve(self, direction: str, alpha: float, strengths: Sequence[float]) -> list[dict[str, Tensor]]:
        """Scores at each strength; without mask, between grid points, losses are interpolated."""
        view, gold = self.options.statistics.view(direction, alpha), self.gold()
        return [self._metrics(self.options.logprobs(view, mu), view.correct(mu), gold) for mu in strengths]


def _unmasked(statistics: Statistics) -> View:
    """A view of which mu = 0 is the warm start and mu = -1 the base model."""
    return statistics.view("log_ratio", 0.0)


def _masked(view: View) -> MaskedView:
    if not isinstance(view, MaskedView):
        raise ValueError("the mode kl_budget has a mask")
    return view


def _on_grid(strength: float) -> float:
    return float(torch.tensor(strength, dtype=torch.float32))  # the ops saw the grid in float32


def write_cells(
    study: Study,
    output: str | Path,
    data_dir: str | Path | None = None,
    *,
    judge: Judge | None = None,
    advance: Callable[[int], Any] = lambda count: None,
) -> Path:
    """Score every setting of ``study`` from what :func:`svdk.eval.runner.run_models` left in ``output``.

    Lines that are there already stay; those of other adapters or settings go. Returns the path of
    ``RESULTS.jsonl``; ``CURVES.jsonl`` lies beside it. ``judge`` judges free answers (by default
    :class:`svdk.eval.judge.OverlapJudge`); ``advance`` is told of each cell that was scored.

    Raises:
        ArtifactError: statistics that are absent or of another study.
        InputError, DataError: as :func:`svdk.eval.tasks.load_task`.

    """
    output = Path(output)
    path = output / RESULTS
    known = _read_known(path)
    wanted: dict[str, dict[str, Any]] = {}
    curves: list[str] = []
    # Appended as they come, so that a stopped run loses nothing; put in order at the end.
    with path.open("a", encoding="utf-8") as file:
        for run, steps, members in _groups(study, output):
            folds = [_fold(place, study, data_dir) for place in members]
            tests = [fold.task.test for fold in folds]
            for system in scoring_systems(study):
                record = _identity(study, run, steps, system, tests, [fold.identity for fold in folds])
                if record["cell"] in wanted:  # the base model, once for all adapters
                    continue
                found = known.get(record["cell"])
                if found is None:
                    found = record | _score(system, folds)
                    file.write(json.dumps(found, allow_nan=False) + "\n")
                    file.flush()
                    advance(1)
                wanted[record["cell"]] = found
            for record, score_it in _answer_cells(study, run, steps, members[0], folds[0].task, judge):
                if record["cell"] not in wanted:
                    wanted[record["cell"]] = known.get(record["cell"]) or record | score_it()
            curves += _curves(study, run, steps, folds)
    lines = [json.dumps(cell, allow_nan=False) for cell in wanted.values()]
    write_file(output / CURVES, "".join(f"{line}\n" for line in curves))
    write_file(path, "".join(f"{line}\n" for line in lines))
    return path


def _groups(study: Study, output: Path) -> Iterator[tuple[Run, int, list[Place]]]:
    """The adapters of all folds that make one cell."""
    found: dict[tuple[int, int], list[Place]] = {}
    for place in places(study, output):
        found.setdefault((study.runs.index(place.run), place.steps), []).append(place)
    for run, steps in sorted(found):
        yield study.runs[run], steps, found[run, steps]


def _fold(place: Place, study: Study, data_dir: str | Path | None) -> Fold:
    task = task_of(place, study, data_dir)
    options = load_statistics(place, task, study)
    calibration = saved_statistics(Steering.load(place.adapter))
    static = Steering.load(place.adapter / STATIC) if study.static_vector else None
    identity = hashlib.sha256(place.statistics.read_bytes()).hexdigest()
    return Fold(task, options, calibration, static, identity)


def _identity(
    study: Study,
    run: Run,
    steps: int,
    system: System,
    tests: Sequence[Sequence[Question]],
    sources: Sequence[str],
    decoding: str = "likelihood",
) -> dict[str, Any]:
    """The fields that say what a cell is; its id follows from them and from what it was scored on."""
    questions = [question for test in tests for question in test]
    base = system.system == "base"
    record = {
        "format_version": FORMAT_VERSION,
        "model": study.model,
        "task": run.task,
        "folds": len(tests),
        "test_questions": len(questions),
        "question_ids_hash": questions_hash(questions),
        "peft": None if base else run.peft,
        "steps": None if base else steps,
        "train_seed": None if base else study.seed,
        **asdict(system),
        "decoding": decoding,
    }
    return {"cell": _cell_id(record, [] if base else sources), **record}


def _cell_id(record: Mapping[str, Any], sources: Sequence[str]) -> str:
    text = json.dumps([record, list(sources)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _score(system: System, folds: Sequence[Fold]) -> dict[str, Any]:
    start = time.perf_counter()
    steered = system.system == "steered"
    strengths = [fold.strength(system) for fold in folds] if steered else []
    used: Sequence[float | None] = strengths if steered else [None] * len(folds)
    parts = [fold.scores(system, mu) for fold, mu in zip(folds, used, strict=True)]
    return {
        "strength": strengths if steered else None,
        **summary(parts),
        "calibration": _calibration(system, folds, strengths) if steered else None,
        "seconds": round(time.perf_counter() - start, 3),
    }


def _answer_cells(
    study: Study, run: Run, steps: int, place: Place, task: Task, judge: Judge | None
) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """What was generated: what each cell is, and a function that scores it."""
    if not place.generates:
        return
    test = task.test[: place.generates]
    judged_by = repr(judge) if task.kind == "truthfulqa" else ""
    for system, decoding, strength, answers in kept_answers(
        task, place.adapter, place.answers, place.generates, study
    ):
        sources = [judged_by, *answers]

        def score_it(strength=strength, answers=answers) -> dict[str, Any]:
            start = time.perf_counter()
            scores = score_answers(task.kind, test, answers, judge=judge)
            found = {"strength": None if strength is None else [strength], **summary([scores])}
            return found | {"calibration": None, "seconds": round(time.perf_counter() - start, 3)}

        yield _identity(study, run, steps, system, [test], sources, decoding), score_it


def summary(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """The scores of all folds in their order, and their means.

    A metric that is infinite for a question (with lambda = -inf: a label outside C) is left out whole.
    """
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    finite = {name: values for name, values in joined.items() if bool(values.isfinite().all())}
    return {
        "metrics": {name: float(values.mean()) for name, values in finite.items()},
        "scores": {name: [round(x, 5) for x in values.tolist()] for name, values in finite.items()},
    }


def _calibration(system: System, folds: Sequence[Fold], strengths: Sequence[float]) -> dict[str, Any] | None:
    """The expected gain of every fold, and how much the per-token optima scatter."""
    if system.direction == "vector":
        return {
            "gain": [fold.vector().gain for fold in folds],
            "interval": [list(fold.vector().confidence_interval or ()) for fold in folds],
        }
    if system.strength_mode != "constant" or system.penalty != 0:
        return None
    gains, intervals, spread = [], [], []
    nll: dict[str, list[float]] = {"base": [], "warm": [], "steered": []}
    estimator, objective = system.fitting
    for fold, strength in zip(folds, strengths, strict=True):
        view = fold.calibration.view(*system.setting)
        found = out_of_fold({system.setting: view}, estimator, objective)
        gain, interval = bootstrap(found.of(objective), view.tokens, resamples=RESAMPLES)
        gains.append(gain)
        intervals.append(list(interval))
        optima = per_token_optimum(view)
        spread.append(float(optima.std()) if len(optima) > 1 else 0.0)
        tokens = float(view.tokens.sum())
        nll["base"].append(-float(fold.calibration.logprob_base.double().mean()))
        nll["warm"].append(float(view.evaluate(0.0).nll.sum()) / tokens)
        nll["steered"].append(float(view.evaluate(strength).nll.sum()) / tokens)
    return {
        "gain": gains,
        "interval": intervals,
        "per_token_std": spread,
        **{f"nll_{name}": values for name, values in nll.items()},
    }


def _curves(study: Study, run: Run, steps: int, folds: Sequence[Fold]) -> list[str]:
    """A line for each direction and mask: the test metrics and the calibration's along mu."""
    lines = []
    for direction in study.directions:
        for alpha in (study.alpha, 0.0):
            by_fold = [fold.curve(direction, alpha, CURVE_STRENGTHS) for fold in folds]
            means = [summary(parts)["metrics"] for parts in zip(*by_fold, strict=True)]
            views = [fold.calibration.view(direction, alpha) for fold in folds]
            tokens = sum(float(view.tokens.sum()) for view in views)
            record = {
                "task": run.task, "peft": run.peft, "steps": steps, "direction": direction, "alpha": alpha,
                "mu": list(CURVE_STRENGTHS),
                "nll": [one["nll"] for one in means],
                "metrics": {name: [one[name] for one in means] for name in means[0] if name != "nll"},
                "calibration_nll": [
                    sum(float(view.evaluate(mu).nll.sum()) for view in views) / tokens
                    for mu in CURVE_STRENGTHS
                ],
                "calibration_token_accuracy": [
                    sum(float(view.correct(mu).sum()) for view in views) / tokens for mu in CURVE_STRENGTHS
                ],
            }  # fmt: skip
            lines.append(json.dumps(record, allow_nan=False))
    return lines


def _read_known(path: Path) -> dict[str, dict[str, Any]]:
    """The cells that are there, by id; a line that a stopped run left unfinished is dropped."""
    if not path.exists():
        return {}
    known: dict[str, dict[str, Any]] = {}
    lines = path.read_text(encoding="utf-8").split("\n")
    for line in lines[:-1]:  # the last piece is empty, or unfinished
        if line.strip():
            record = json.loads(line)
            known[record["cell"]] = record
    text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in known.values())
    write_file(path, text)
    return known
