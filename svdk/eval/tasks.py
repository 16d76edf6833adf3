"""The tasks of the evaluation: labelled examples to learn from, and questions that they do not contain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from svdk.errors import DataError, InputError
from svdk.eval import commonsense, truthfulqa
from svdk.eval.question import Question, normalised, seeded_order
from svdk.utils.checks import check_choice, check_count
from svdk.warmstart.data import Example

__all__ = ["NAMES", "Question", "Task", "load_task"]

TRUTHFULQA = "truthfulqa"
NAMES = (TRUTHFULQA, *commonsense.SOURCES)


@dataclass(frozen=True)
class Task:
    """What to learn from and what to be judged on; no question is in both."""

    name: str
    kind: str
    """"truthfulqa" or "choice"."""
    train: tuple[Example, ...]
    """In the prompt of the test questions; the completion is the best option."""
    test: tuple[Question, ...]
    """In the order of the data set."""
    metrics: tuple[str, ...]
    """Names in :data:`svdk.eval.metrics.METRICS`."""
    left_out: int = 0
    """Training rows left out because their question is also a test question."""


def load_task(
    name: str,
    data_dir: str | Path | None = None,
    *,
    fold: int = 0,
    folds: int = 2,
    seed: int = 0,
    limit: int | None = None,
) -> Task:
    """Load a task of the evaluation.

    TruthfulQA has no training split: its questions are dealt by a seeded hash of their texts into ``folds``
    parts of equal size; part ``fold`` is the test set, the others are for training (the best answer as
    completion). Over all folds every question is tested once. It also has pairs of questions that differ in
    a few words; these may fall into different folds.

    The other tasks have a training split of their own; of that, rows that ask a test question (whatever the
    options) are left out.

    Args:
        name: one of :data:`NAMES`.
        data_dir: a folder with ``truthfulqa/mc_task.json`` and ``commonsense/NAME/{train,test}.json``; None:
            the Hugging Face hub, by the optional package ``datasets``.
        fold: which part is tested, in [0, folds); 0 for tasks with a training split.
        folds: parts of TruthfulQA, at least 2.
        seed: of the dealing, and of the choice that ``limit`` makes.
        limit: keep this many test questions, the first of a seeded shuffle; the training set stays the same.

    Raises:
        InputError: an argument out of range.
        DataError: data that cannot be read or is not what it should be.

    """
    check_choice("task", name, NAMES)
    integers = {"folds": (folds, 2), "fold": (fold, 0), "seed": (seed, 0)}
    if limit is not None:
        integers["limit"] = (limit, 1)
    for argument, (value, low) in integers.items():
        check_count(argument, value, low)
    folder = None if data_dir is None else Path(data_dir)
    if folder is not None and not folder.is_dir():
        raise DataError(f"data_dir was {str(folder)!r}, which is not a folder; allowed: a folder, or None")
    if name == TRUTHFULQA:
        if fold >= folds:
            raise InputError(f"fold was {fold}; allowed: an integer in [0, {folds})")
        train, test = _deal(truthfulqa.load(folder), fold, folds, seed)
        return _task(name, "truthfulqa", train, test, truthfulqa.METRICS, _truthfulqa_key, seed, limit)
    if fold:
        raise InputError(f"fold was {fold}; allowed for {name}, which has a training split: 0")
    train, test = (commonsense.load(name, folder, split) for split in ("train", "test"))
    return _task(name, "choice", train, test, commonsense.METRICS, commonsense.stem, seed, limit)


def example(question: Question) -> Example:
    """A question with its best option as the completion."""
    return Example(question.prompt, question.options[question.best])


def _truthfulqa_key(question: Question) -> str:
    return normalised(question.prompt)


def _deal(
    questions: list[Question], fold: int, folds: int, seed: int
) -> tuple[list[Question], list[Question]]:
    if len(questions) < folds:
        raise DataError(f"{TRUTHFULQA} held {len(questions)} questions; allowed: at least folds = {folds}")
    keys = [_truthfulqa_key(question) for question in questions]
    if len(set(keys)) < len(keys):
        twice = questions[next(i for i, key in enumerate(keys) if key in keys[:i])]
        raise DataError(f"{TRUTHFULQA} held {truthfulqa.asked(twice)!r} twice; allowed: different questions")
    place = [0] * len(questions)
    for rank, index in enumerate(seeded_order(keys, seed, "folds")):
        place[index] = rank % folds
    parts: tuple[list[Question], list[Question]] = ([], [])
    for question, part in zip(questions, place, strict=True):
        parts[part == fold].append(question)
    return parts


def _task(
    name: str,
    kind: str,
    train: Sequence[Question],
    test: Sequence[Question],
    metrics: tuple[str, ...],
    key: Callable[[Question], str],
    seed: int,
    limit: int | None,
) -> Task:
    asked = {key(question) for question in test}
    # Against the whole test set, not what a limit keeps of it: the training set must not depend on that.
    kept = [question for question in train if key(question) not in asked]
    if not kept:
        raise DataError(f"{name} had 0 training questions that are not test questions; allowed: at least 1")
    if limit is not None:
        chosen = sorted(seeded_order((question.id for question in test), seed, "limit")[:limit])
        test = [test[index] for index in chosen]
    return Task(name, kind, tuple(map(example, kept)), tuple(test), metrics, len(train) - len(kept))
