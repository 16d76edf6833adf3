"""One run of lm-evaluation-harness for the base, the warm-started and the steered model.

lm-eval can keep pickles (``cache_requests``, by dill) and answers (``use_cache``); neither is ever turned on
here, and its own bootstrap, which pickles into worker processes, is replaced by a paired one. The tasks in
``harness_tasks`` also work with lm-eval's command line: ``--include_path`` that folder and
``--metadata '{"data_dir": ...}'``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from svdk import __version__
from svdk.calibration.calibrate import attached_pair
from svdk.errors import DataError, InputError
from svdk.eval.compare import paired
from svdk.eval.harness_model import SYSTEMS, SteeredLM
from svdk.utils.checks import check_choice, is_number
from svdk.utils.files import write_json
from svdk.utils.views import STEERED
from svdk.warmstart.data import CALIBRATION_FILE, load_examples

FORMAT_VERSION = 1
TASK_FOLDER = Path(__file__).with_name("harness_tasks")


def evaluate_harness(
    model: Any,
    adapter: str | Path,
    tasks: Sequence[str],
    *,
    tokenizer: Any = None,
    systems: Sequence[str] = SYSTEMS,
    limit: int | float | None = None,
    include_path: str | Path | Sequence[str | Path] | None = None,
    data_dir: str | Path | None = None,
    fold: int | str = 0,
    folds: int = 2,
    seed: int = 0,
    num_fewshot: int | None = None,
    gen_kwargs: Mapping[str, Any] | None = None,
    batch_size: int | str = 8,
    resamples: int = 10000,
    output: str | Path | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Score the systems with lm-eval's ``simple_evaluate``, the model loaded once.

    Args:
        model: what :func:`svdk.load_model` takes, or a loaded base or PEFT model (with ``tokenizer``).
        adapter: calibrated adapter folder.
        tasks: names of lm-eval tasks: those of ``harness_tasks`` (``svdk_truthfulqa_mc1``, ``..._mc2``,
            ``..._gen``, ``svdk_arc_easy`` and so on), of ``include_path``, or lm-eval's own.
        tokenizer: the tokenizer of a loaded model.
        systems: of "base", "warm", "steered".
        limit: this many questions of each task (a share of them when below 1).
        include_path: more folders with task files.
        data_dir: local data for the tasks of ``harness_tasks`` (see :func:`svdk.eval.tasks.load_task`); None:
            the hub. Tasks of ``include_path`` find it in their metadata.
        fold, folds: of TruthfulQA, as in :func:`svdk.eval.tasks.load_task`; ``fold="all"`` asks every
            question, those of the warm start's training too.
        seed: of the folds, of ``limit``, of sampling and of the bootstrap.
        num_fewshot: examples in the prompt, where a task does not fix it.
        gen_kwargs: over a task's ``generation_kwargs``.
        batch_size: rows in one forward, or "auto".
        resamples: of the bootstrap.
        output: JSON file to write, atomically.
        overrides: ``strength``, ``strength_mode``, ``direction``, ``alpha``, ``penalty``,
            ``scoring_penalty``, ``ops_backend``, ``max_length`` of :class:`SteeredLM`.

    Returns:
        What ``output`` holds: by system ``model`` (what was scored), ``results`` (metrics by task),
        ``scores`` (by task and metric, one a question, in the same order for all systems; null where a metric
        is undefined), ``seconds``; ``questions`` by task; and ``differences`` of neighbouring systems, each
        with its paired 95 % bootstrap interval, where at least two questions are defined in both.

    Raises:
        InputError: a bad argument, an unknown task, or lm-eval is not installed.
        DataError: unusable data, or a question that the adapter was calibrated on.
        ArtifactError: an adapter or artifact that does not fit.

    """
    if isinstance(tasks, str) or not tasks or not all(isinstance(name, str) for name in tasks):
        raise InputError(f"tasks was {tasks!r}; allowed: a list of task names, at least 1")
    if isinstance(systems, str) or not systems or len(set(systems)) < len(systems):
        raise InputError(f"systems was {systems!r}; allowed: different ones of {', '.join(SYSTEMS)}")
    for system in systems:
        check_choice("systems", system, SYSTEMS)
    if limit is not None and (not is_number(limit) or not 0 < limit < math.inf):
        raise InputError(f"limit was {limit!r}; allowed: a number above 0, or None")
    metadata = {"fold": fold, "folds": folds, "seed": seed}
    if data_dir is not None:
        metadata["data_dir"] = str(data_dir)
    manager = _task_manager(tasks, include_path, metadata)
    loaded = dict(manager.load(list(tasks))["tasks"])  # groups and tags taken apart
    known = _calibration_prompts(adapter)
    for name, task in loaded.items():
        _check_unseen(name, task, limit, known)

    runs: dict[str, Any] = {}
    with attached_pair(model, adapter, tokenizer) as (_, peft_model, tokenizer):
        for system in systems:
            steering = overrides if system == STEERED else _unsteered(overrides)
            lm = SteeredLM(
                peft_model, adapter, system=system, tokenizer=tokenizer, batch_size=batch_size, **steering
            )
            runs[system] = _run(lm, loaded, manager, limit, num_fewshot, gen_kwargs, seed)
    report = {
        "format_version": FORMAT_VERSION,
        "svdk_version": __version__,
        "lm_eval_version": _lm_eval_version(),
        "base_model": model if isinstance(model, str) else str(getattr(model, "name_or_path", model)),
        "tasks": list(loaded),
        "limit": limit,
        "fold": fold,
        "folds": folds,
        "seed": seed,
        "num_fewshot": num_fewshot,
        "calibration_prompts_checked": len(known),
        "questions": {name: len(ids) for name, ids in runs[systems[0]].pop("ids").items()},
        "systems": runs,
        "differences": list(_differences(runs, resamples, seed)),
    }
    for run in runs.values():
        run.pop("ids", None)
    if output is not None:
        path = Path(output)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, report)
    return report


def _task_manager(
    tasks: Sequence[str], include_path: str | Path | Sequence[str | Path] | None, metadata: dict[str, Any]
) -> Any:
    """lm-eval's task manager, which knows all ``tasks``."""
    from lm_eval.tasks import TaskManager

    own = [include_path] if isinstance(include_path, (str, Path)) else list(include_path or ())
    for folder in own:
        if not Path(folder).is_dir():
            raise InputError(f"include_path was {str(folder)!r}; allowed: a folder with task files")
    paths = [TASK_FOLDER, *own]
    manager = TaskManager(include_path=paths, include_defaults=False, metadata=metadata)
    if not set(tasks) <= set(manager.all_tasks):  # lm-eval's own are thousands of files: read only if needed
        manager = TaskManager(include_path=paths, metadata=metadata)
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        ours = ", ".join(TaskManager(include_path=paths, include_defaults=False).all_tasks)
        raise InputError(f"tasks held {', '.join(unknown)}; allowed: {ours}, and lm-eval's own")
    return manager


def _calibration_prompts(adapter: str | Path) -> tuple[str, ...]:
    """The prompts that the strength was fitted on, where the adapter folder still holds them."""
    path = Path(adapter) / CALIBRATION_FILE
    return tuple({e.prompt for e in load_examples(path)}) if path.exists() else ()


def _check_unseen(name: str, task: Any, limit: int | float | None, known: tuple[str, ...]) -> None:
    """``DataError`` when a question to be scored ends in a calibration prompt (examples may precede it)."""
    from lm_eval.evaluator_utils import get_sample_size

    for _, doc in task.doc_iterator(limit=get_sample_size(task, limit)):
        # The generation task of TruthfulQA asks without the final "A:"; its documents name the prompt.
        texts = (task.doc_to_text(doc), doc.get("prompt"))
        if any(isinstance(text, str) and text.endswith(known) for text in texts):
            raise DataError(
                f"task {name} asks a question that the adapter was calibrated on: {texts[0][-80:]!r}; "
                "allowed: another fold, or an adapter made on other data"
            )


def _run(
    lm: SteeredLM,
    tasks: Mapping[str, Any],
    manager: Any,
    limit: int | float | None,
    num_fewshot: int | None,
    gen_kwargs: Mapping[str, Any] | None,
    seed: int,
) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate

    start = time.perf_counter()
    found = simple_evaluate(
        model=lm, tasks=list(tasks.values()), task_manager=manager, limit=limit, num_fewshot=num_fewshot,
        gen_kwargs=None if gen_kwargs is None else dict(gen_kwargs),
        use_cache=None, cache_requests=False, bootstrap_iters=0, log_samples=True,
        random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
    )  # fmt: skip
    results = {
        name: {
            _key(*metric.split(",", 1)): value
            for metric, value in one.items()
            if is_number(value) and metric != "sample_len"
        }
        for name, one in found["results"].items()
        if name in tasks
    }
    return {
        "model": lm.get_model_info(),
        "results": {name: {k: _strict(v) for k, v in one.items()} for name, one in results.items()},
        "scores": {name: _scores(found["samples"][name]) for name in tasks},
        "ids": {name: {s["doc_id"] for s in found["samples"][name]} for name in tasks},
        "seconds": round(time.perf_counter() - start, 3),
    }


def _scores(samples: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Values by metric, one a question; metrics that only make sense over all of them are left out."""
    scores: dict[str, list[float | None]] = {}
    for sample in sorted(samples, key=lambda one: one["doc_id"]):
        for metric in sample["metrics"]:
            value = sample[metric]
            if is_number(value) or getattr(value, "ndim", None) == 0:  # numpy's scalars
                scores.setdefault(_key(metric, sample["filter"]), []).append(_strict(value))
    return scores


def _differences(runs: Mapping[str, Any], resamples: int, seed: int) -> Iterator[dict[str, Any]]:
    """Neighbouring systems, in the order base, warm, steered, on the same questions."""
    order = [system for system in SYSTEMS if system in runs]
    for one, other in pairwise(order):
        for task, metrics in runs[one]["scores"].items():
            for metric, values in metrics.items():
                both = zip(values, runs[other]["scores"][task][metric], strict=True)
                defined = [pair for pair in both if None not in pair]
                if len(defined) < 2:  # one question says nothing of the spread: its interval is unbounded
                    continue
                found = paired(*torch.tensor(defined, dtype=torch.float64).T, resamples=resamples, seed=seed)
                yield {
                    "task": task, "metric": metric, "from": one, "to": other, "mean": found.mean,
                    "low": found.low, "high": found.high, "n": found.n, "significant": found.significant,
                }  # fmt: skip


def _key(metric: str, kind: str = "none") -> str:
    return metric if kind == "none" else f"{metric},{kind}"


def _strict(value: float) -> float | None:
    """For strict JSON."""
    return float(value) if math.isfinite(value) else None


def _unsteered(overrides: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in overrides.items() if k in ("ops_backend", "max_length")}


def _lm_eval_version() -> str:
    import lm_eval

    return lm_eval.__version__


__all__ = ["SYSTEMS", "TASK_FOLDER", "SteeredLM", "evaluate_harness"]
