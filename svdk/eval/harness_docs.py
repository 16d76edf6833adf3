"""The evaluation's tasks as lm-evaluation-harness reads them; the YAML files in ``harness_tasks`` name these.

Documents come from :func:`svdk.eval.tasks.load_task`, so that the harness asks the same held-out questions as
``svdk eval``, from local files or the hub. They stand in the order in which ``limit`` picks: lm-eval's
``--limit n`` scores the n questions that ``load_task(limit=n)`` keeps. Rows are made in memory: nothing is
cached on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from svdk.errors import InputError
from svdk.eval import truthfulqa as source
from svdk.eval.question import Question, seeded_order
from svdk.eval.tasks import TRUTHFULQA, Task, load_task

if TYPE_CHECKING:
    from datasets import Dataset

NO_COMMENT = "I have no comment."


def choice(*, svdk_task: str, data_dir: str | None = None, seed: int = 0, **_: Any) -> dict[str, Dataset]:
    """Splits "train" and "test" of a commonsense task.

    lm-eval passes the metadata of the run (``--metadata '{"data_dir": ...}'``) and of the YAML file; what is
    not named here is not for this function.
    """
    task = load_task(svdk_task, data_dir, seed=seed)
    train = [{"prompt": e.prompt, "options": [e.completion], "best": 0} for e in task.train]
    test = [
        {"id": q.id, "prompt": q.prompt, "options": list(q.options), "best": q.best}
        for q in _shuffled(task.test, seed)
    ]
    return {"train": _dataset(train), "test": _dataset(test)}


def truthfulqa(
    *, data_dir: str | None = None, fold: int | Literal["all"] = 0, folds: int = 2, seed: int = 0, **_: Any
) -> dict[str, Dataset]:
    """Split "test" of TruthfulQA in the form of the hub's ``truthful_qa``; ``fold="all"``: all questions.

    The reference answers of the generation task are those of the multiple-choice one, formatted as lm-eval
    formats its own.
    """
    parts = range(folds) if fold == "all" else [fold]
    tasks: list[Task] = [load_task(TRUTHFULQA, data_dir, fold=k, folds=folds, seed=seed) for k in parts]
    questions = _shuffled([q for task in tasks for q in task.test], seed)
    return {"test": _dataset([_hub_form(q) for q in questions])}


def _hub_form(question: Question) -> dict[str, Any]:
    before, after = source.PROMPT.split("{question}")
    text = question.prompt.removeprefix(before).removesuffix(after)
    answers = [option.strip() for option in question.options]
    if source.PROMPT.format(question=text) != question.prompt:
        raise InputError(f"prompt was {question.prompt!r}; allowed: a question in {source.PROMPT!r}")
    true = [_sentence(a) for a, right in zip(answers, question.correct, strict=True) if right]
    false = [_sentence(a) for a, right in zip(answers, question.correct, strict=True) if not right]
    return {
        "id": question.id,
        "prompt": question.prompt,
        "question": text,
        "mc1_targets": {
            "choices": [answers[i] for i in question.mc1],
            "labels": [int(i == question.best) for i in question.mc1],
        },
        "mc2_targets": {"choices": answers, "labels": list(map(int, question.correct))},
        "correct_answers": true if NO_COMMENT in true else [*true, NO_COMMENT],
        "incorrect_answers": false,
    }


def _sentence(answer: str) -> str:
    return answer if answer.endswith(".") else f"{answer}."


def _shuffled(questions: Sequence[Question], seed: int) -> list[Question]:
    return [questions[i] for i in seeded_order((q.id for q in questions), seed, "limit")]


def _dataset(rows: list[dict[str, Any]]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_list(rows)
