"""The part of a study that runs the model: warm starts, calibrations, statistics of the test questions.

Everything is kept in the output folder and found there again: an interrupted study goes on where it was, and
another estimator, strength or penalty needs no model (:mod:`svdk.eval.cells`).
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from svdk.calibration.artifact import Steering
from svdk.calibration.calibrate import calibrate
from svdk.calibration.estimators import ESTIMATORS, OBJECTIVES, fit
from svdk.calibration.kept_statistics import default_grid
from svdk.calibration.option_statistics import OptionStatistics, score_options
from svdk.calibration.report import saved_statistics
from svdk.calibration.static_vector import static_steering
from svdk.errors import ArtifactError, DataError
from svdk.eval.answers import answered, run_answers
from svdk.eval.spec import Run, Study
from svdk.eval.tasks import Question, Task, load_task
from svdk.models.adapter_files import WARMSTART_FILE
from svdk.models.base_cache import BaseCache
from svdk.models.fingerprints import adapter_fingerprint
from svdk.models.loading import detach, load_adapter, load_model
from svdk.models.pair import ModelPair
from svdk.utils.files import read_object, write_file
from svdk.warmstart.api import warm_start
from svdk.warmstart.data import CALIBRATION_FILE, load_examples, split

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STATIC = "static"
"""Folder of the static vector's artifact, inside the adapter's."""


@dataclass(frozen=True)
class Place:
    """One adapter of a study: a task, a fold, a kind of adapter, a length of the warm start."""

    run: Run
    fold: int
    steps: int
    output: Path

    @property
    def name(self) -> str:
        """Of its folder and file."""
        return f"{self.run.task}-{self.fold}-{self.run.peft}-{self.steps}"

    @property
    def adapter(self) -> Path:
        """The adapter folder, with the calibration in it."""
        return self.output / "adapters" / self.name

    @property
    def statistics(self) -> Path:
        """The statistics of the test questions."""
        return self.output / "statistics" / f"{self.name}.safetensors"

    @property
    def answers(self) -> Path:
        """What was generated."""
        return self.output / "answers" / f"{self.name}.json"

    @property
    def generates(self) -> int:
        """Test questions to answer by generation."""
        chosen = self.steps in (self.run.generate_steps or self.run.steps)
        return self.run.generate if self.fold == 0 and chosen else 0


def places(study: Study, output: Path) -> Iterator[Place]:
    """The adapters of a study; those with the same test questions follow each other."""
    seen = []
    for run in study.runs:
        key = (run.task, run.folds, run.limit)
        if key in seen:
            continue
        seen.append(key)
        alike = [other for other in study.runs if (other.task, other.folds, other.limit) == key]
        for fold in range(run.folds):
            for other in alike:
                for steps in other.steps:
                    yield Place(other, fold, steps, output)


def task_of(place: Place, study: Study, data_dir: str | Path | None) -> Task:
    """The task with the test questions of the fold; ``DataError`` when training data overlap them."""
    run = place.run
    folds = {"fold": place.fold, "folds": run.folds} if run.folds > 1 else {}
    task = load_task(run.task, data_dir, seed=study.seed, limit=run.limit, **folds)
    check_disjoint([example.prompt for example in task.train], task.test, "training")
    return task


def check_disjoint(prompts: Sequence[str], questions: Sequence[Question], what: str) -> None:
    """``DataError`` when a prompt of the training or calibration data is that of a test question."""
    both = set(prompts) & {question.prompt for question in questions}
    if both:
        raise DataError(
            f"{what} data held {len(both)} test questions, {sorted(both)[0]!r} for one; allowed: none"
        )


def run_models(study: Study, output: str | Path, data_dir: str | Path | None = None) -> None:
    """Train, calibrate and score every adapter of ``study`` that ``output`` does not hold yet.

    Args:
        study: what to run.
        output: folder for adapters and statistics.
        data_dir: of the tasks (:func:`svdk.eval.tasks.load_task`).

    Raises:
        InputError, DataError, ArtifactError: naming what cannot be used.

    """
    output = Path(output)
    todo = list(places(study, output))
    start = time.perf_counter()
    base: PreTrainedModel | None = None
    cache_key, cache = None, BaseCache()
    for number, place in enumerate(todo, start=1):
        task = task_of(place, study, data_dir)
        scored = _scored(place, task, study) is not None
        if scored and _answered(place, task, study):
            _say(start, number, len(todo), place, "already there")
            continue
        if base is None:
            base, tokenizer = load_model(study.model)
        if (place.run.task, place.fold, place.run.limit) != cache_key:
            cache_key, cache = (place.run.task, place.fold, place.run.limit), BaseCache()
        _say(start, number, len(todo), place, f"{len(task.test)} test questions")
        if not scored:
            _train(base, tokenizer, task, place, study)
        peft_model = load_adapter(base, place.adapter)
        try:
            if not scored:
                _calibrate(peft_model, tokenizer, task, place, study)
                _score(peft_model, tokenizer, task, place, study, cache)
            if not _answered(place, task, study):
                run_answers(peft_model, tokenizer, task, place.adapter, place.answers, place.generates, study)
        finally:
            detach(peft_model)


def _answered(place: Place, task: Task, study: Study) -> bool:
    return not place.generates or answered(task, place.adapter, place.answers, place.generates, study)


def _say(start: float, number: int, total: int, place: Place, text: str) -> None:
    seconds = time.perf_counter() - start
    print(f"[{seconds:5.0f} s] {number}/{total} {place.name}: {text}", file=sys.stderr, flush=True)


def _train(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, place: Place, study: Study
) -> None:
    """The warm start, unless the same one is there."""
    run = place.run
    fraction = min(0.5, run.calibration / len(task.train))
    train, held_out = split(task.train, fraction, study.seed)
    settings = {"steps": place.steps, "learning_rate": run.learning_rate, "batch_size": run.batch_size}
    wanted = settings | {"peft": run.peft, **run.peft_options}
    if _trained(place) == json.loads(json.dumps(wanted)):
        return
    warm_start(
        base, train, tokenizer=tokenizer, output_dir=place.adapter, peft=run.peft, calibration=held_out,
        max_steps=place.steps, learning_rate=run.learning_rate, batch_size=run.batch_size, seed=study.seed,
        overwrite=True, **run.peft_options,
    )  # fmt: skip


def _trained(place: Place) -> dict[str, Any] | None:
    """The settings of the adapter that is there."""
    try:
        record = read_object(place.adapter / WARMSTART_FILE)["settings"]
    except (OSError, ValueError, KeyError):
        return None
    names = ("learning_rate", "batch_size", "peft", *place.run.peft_options)
    return {"steps": record.get("max_steps"), **{name: record.get(name) for name in names}}


def _calibrate(
    peft_model: PeftModel, tokenizer: PreTrainedTokenizerBase, task: Task, place: Place, study: Study
) -> None:
    data = place.adapter / CALIBRATION_FILE
    check_disjoint([example.prompt for example in load_examples(data)], task.test, "calibration")
    options: dict[str, Any] = {"tokenizer": tokenizer, "seed": study.seed, "progress": True}
    calibrate(peft_model, place.adapter, direction="auto", alpha=study.alpha, **options).save(place.adapter)
    if study.static_vector:
        folder = place.adapter / STATIC
        folder.mkdir(exist_ok=True)
        static_steering(peft_model, place.adapter, alpha=study.static_alpha, **options).save(folder)


def _score(
    peft_model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    place: Place,
    study: Study,
    cache: BaseCache,
) -> None:
    steering = Steering.load(place.adapter)
    static = Steering.load(place.adapter / STATIC) if study.static_vector else None
    found = score_options(
        ModelPair(peft_model), tokenizer, task.test, alpha=study.alpha, directions=study.directions,
        vector=None if static is None else static.vector, grid=score_grid(steering, static, study.alpha),
        base_cache=cache, progress=True,
    )  # fmt: skip
    place.statistics.parent.mkdir(parents=True, exist_ok=True)
    write_file(place.statistics, save(found.tensors(), metadata=_identity(place, task, study)))


def score_grid(steering: Steering, static: Steering | None, alpha: float) -> torch.Tensor:
    """Strengths to evaluate without mask: a wide grid, -1 (the base model) and every strength of the study.

    Between the points of the grid losses are interpolated; a strength that a table shows lies on it.
    """
    statistics = saved_statistics(steering)
    points = {-1.0, *(() if static is None else (static.strength,))}
    for direction, mask in statistics.settings():
        if mask == 0:
            view = statistics.view(direction, mask)
            points |= {fit(view, name, what).strength for name in ESTIMATORS for what in OBJECTIVES}
    own = torch.tensor(sorted(points), dtype=torch.float64)
    wide = default_grid(17)
    # A point of the wide grid beside one of the study adds nothing; 0 has to be there.
    apart = ((wide[:, None] - own).abs().amin(1) > 1e-3) | (wide == 0)
    return torch.cat([own, wide[apart]]).float().unique().double()


def _identity(place: Place, task: Task, study: Study) -> dict[str, str]:
    """What the statistics belong to; kept in their file."""
    return {
        "questions": questions_hash(task.test),
        "adapter": adapter_fingerprint(place.adapter),
        "alpha": repr(study.alpha),
        "directions": " ".join(study.directions),
        "static_vector": repr(study.static_alpha if study.static_vector else None),
    }


def questions_hash(questions: Sequence[Question]) -> str:
    """sha256 (hex) of the questions' ids in their order."""
    return hashlib.sha256("\n".join(question.id for question in questions).encode()).hexdigest()


def _scored(place: Place, task: Task, study: Study) -> OptionStatistics | None:
    """The statistics of the test questions, if they are there and of this adapter and these questions."""
    try:
        with safe_open(place.statistics, framework="pt") as file:
            if file.metadata() != _identity(place, task, study):
                return None
            names = file.keys()
            return OptionStatistics.from_tensors({name: file.get_tensor(name) for name in names})
    except (OSError, SafetensorError, ArtifactError):
        return None


def load_statistics(place: Place, task: Task, study: Study) -> OptionStatistics:
    """What :func:`run_models` left for this adapter; ``ArtifactError`` if absent or of another run."""
    found = _scored(place, task, study)
    if found is None:
        raise ArtifactError(
            f"{place.statistics} is absent, damaged or of another study; needed: run the models"
        )
    return found
