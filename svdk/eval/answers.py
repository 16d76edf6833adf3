"""The part of a study that generates: free answers of every system, kept in a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdk.calibration.artifact import Steering
from svdk.calibration.calibrate import recalibrate
from svdk.eval.generation import generate_answers
from svdk.eval.spec import Study
from svdk.eval.systems import BASE, WARM, System, system_key
from svdk.eval.tasks import Question, Task
from svdk.models.fingerprints import adapter_fingerprint
from svdk.utils.files import read_object, write_json

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

MAX_NEW_TOKENS = {"truthfulqa": 32, "choice": 12}


def generating_systems(study: Study) -> list[System]:
    """The systems that answer freely: the paper's setting, both directions at their optimum."""
    found = [BASE, WARM]
    for direction in study.directions:
        alpha = study.alpha if direction == "kl_gradient" else 0.0
        for estimator in [name for name in ("mean", "optimum") if name in study.estimators]:
            if (direction, estimator) != ("log_ratio", "mean"):
                setting = ("steered", direction, alpha, None, "constant", estimator, "nll")
                found.append(System(*setting))
    return found


def run_answers(
    peft_model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    adapter: Path,
    path: Path,
    count: int,
    study: Study,
) -> None:
    """Write what every system answers to the first ``count`` test questions to ``path``, once each."""
    from tqdm.auto import tqdm

    questions = task.test[:count]
    record = read_answers(path, questions, adapter) or {
        "questions": [question.id for question in questions],
        "adapter": adapter_fingerprint(adapter),
        "answers": {},
        "strengths": {},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    for decoding in study.decoding:
        for system in generating_systems(study):
            key = system_key(system, decoding)
            if key in record["answers"]:
                continue
            steering = _steering(system, adapter)
            with tqdm(total=len(questions), desc=f"{decoding} {key[:40]}", file=sys.stderr) as bar:
                record["answers"][key] = generate_answers(
                    peft_model, tokenizer, questions, steering=steering, decoding=decoding, seed=study.seed,
                    max_new_tokens=MAX_NEW_TOKENS[task.kind], advance=bar.update,
                )  # fmt: skip
            record["strengths"][key] = steering.strength if isinstance(steering, Steering) else None
            write_json(path, record, ensure_ascii=False, indent=1)


def read_answers(path: Path, questions: Sequence[Question], adapter: Path) -> dict[str, Any] | None:
    """The answers at ``path`` if they are those of this adapter to these questions."""
    try:
        record = read_object(path)
        mine = record["questions"] == [question.id for question in questions]
        return record if mine and record["adapter"] == adapter_fingerprint(adapter) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def answered(task: Task, adapter: Path, path: Path, count: int, study: Study) -> bool:
    """Whether every system has answered."""
    record = read_answers(path, task.test[:count], adapter)
    wanted = {system_key(s, decoding) for s in generating_systems(study) for decoding in study.decoding}
    return record is not None and wanted <= set(record["answers"])


def kept_answers(
    task: Task, adapter: Path, path: Path, count: int, study: Study
) -> Iterator[tuple[System, str, float | None, list[str]]]:
    """(system, decoding, strength, answers) of everything that was generated."""
    record = read_answers(path, task.test[:count], adapter)
    for decoding in study.decoding:
        for system in generating_systems(study):
            key = system_key(system, decoding)
            if record is not None and key in record["answers"]:
                yield system, decoding, record["strengths"][key], record["answers"][key]


def _steering(system: System, adapter: Path) -> Steering | str | None:
    if system.system != "steered":
        return "base" if system.system == "base" else None
    return recalibrate(
        adapter, direction=system.direction, alpha=system.alpha, estimator=system.estimator,
        objective=system.objective, resamples=1,
    )  # fmt: skip
