"""From a base model, an adapter and labelled data to a :class:`svdk.Steering`, and its report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from svdk.calibration.artifact import Steering
from svdk.calibration.estimators import (
    ESTIMATORS,
    OBJECTIVES,
    Setting,
    fit,
    gains_at,
    out_of_fold,
    per_token_optimum,
    select,
)
from svdk.calibration.kept_statistics import Statistics, View
from svdk.calibration.sweep import DIRECTIONS, extract_steering
from svdk.errors import ArtifactError, DataError, InputError
from svdk.utils.bootstrap import bootstrap
from svdk.utils.checks import check_choice, check_count, check_number
from svdk.warmstart.data import Example, data_hash, load_examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from svdk.models.pair import ModelPair

CALIBRATION_FILE = "calibration.jsonl"


@dataclass(frozen=True)
class Row:
    """One estimator in one setting."""

    direction: str
    alpha: float
    estimator: str
    strength: float
    nll: float
    """Nats a token at ``strength``, on the same data."""
    accuracy: float
    """Share of labels that are the greedy token at ``strength``."""
    gain: float
    """Out-of-fold gain in the objective: nats a token, or share of tokens."""
    interval: tuple[float, float]
    at_bound: bool


@dataclass(frozen=True)
class Report:
    """What a calibration found."""

    direction: str
    alpha: float
    estimator: str
    objective: str
    gain: float
    """Expected gain of the whole procedure, the choice of the setting included; out of fold."""
    interval: tuple[float, float]
    rows: tuple[Row, ...]
    """Every estimator in the chosen setting."""
    settings: tuple[Row, ...]
    """The chosen estimator in every setting that was compared."""
    metrics: Mapping[str, float]
    view: View

    @property
    def chosen(self) -> Row:
        """The row of the result."""
        return next(row for row in self.rows if row.estimator == self.estimator)

    def steering(self, **origin: Any) -> Steering:
        """The result; ``origin`` are the fields of :class:`svdk.Steering` that say what it was made from."""
        row = self.chosen
        return Steering(
            strength=row.strength,
            direction=self.direction,
            alpha=self.alpha,
            estimator=self.estimator,
            objective=self.objective,
            gain=self.gain,
            confidence_interval=self.interval,
            at_bound=row.at_bound,
            metrics=self.metrics,
            **origin,
        )

    def table(self) -> str:
        """The report as text: the data, the settings (when several were compared), the estimators."""
        m = self.metrics
        unit = "accuracy" if self.objective == "accuracy" else "nats a token"
        lines = [
            f"{m['examples']:.0f} examples, {m['tokens']:.0f} tokens; NLL (nats a token): base "
            f"{m['nll_base']:.4f}, warm start {m['nll_warm']:.4f}; token accuracy: warm start "
            f"{m['accuracy_warm']:.1%}",
            f"per-token optimum: mean {m['per_token_mean']:.4g}, standard deviation {m['per_token_std']:.4g} "
            f"over {m['per_token_count']:.0f} tokens",
        ]
        if m["excluded"]:
            lines.append(
                f"{m['excluded']:.0f} tokens left out: the warm start gives their label probability 0"
            )
        head = f"{'direction':<12} {'alpha':>5}  {'estimator':<13} {'mu':>10} {'NLL':>8} {'accuracy':>9}"
        head += f"  out-of-fold gain, {unit} (95 % interval)"
        if len(self.settings) > 1:
            lines += ["", "settings compared:", head, *map(self._line, self.settings)]
        lines += ["", "estimators:", head, *map(self._line, self.rows)]
        if any(row.at_bound for row in (*self.rows, *self.settings)):
            lines.append(">  at or beyond the end of the range that was measured")
        return "\n".join(lines)

    def _line(self, row: Row) -> str:
        mine = (self.direction, self.alpha, self.estimator) == (row.direction, row.alpha, row.estimator)
        low, high = row.interval
        name = f"{row.direction:<12} {row.alpha:>5g}  {row.estimator:<13}"
        mu = f"{'>' if row.at_bound else ''}{row.strength:.4g}"
        gain = f"{row.gain:+.4f} ({low:+.4f} to {high:+.4f})"
        return f"{name} {mu:>10} {row.nll:>8.4f} {row.accuracy:>9.1%}  {gain}{'  <- chosen' if mine else ''}"

    def curve(self, strengths: Sequence[float]) -> tuple[list[float], list[float]]:
        """NLL (nats a token) and token accuracy at each strength."""
        tokens = float(self.view.tokens.sum())
        nll = [float(self.view.evaluate(mu).nll.sum()) / tokens for mu in strengths]
        return nll, [float(self.view.correct(mu).sum()) / tokens for mu in strengths]


def calibrate(
    model: Any,
    adapter: str | Path,
    data: str | Path | Sequence[Mapping[str, Any] | Example] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    direction: str = "kl_gradient",
    alpha: float = 0.1,
    estimator: str = "optimum",
    objective: str = "nll",
    seed: int = 0,
    folds: int = 5,
    resamples: int = 2000,
    max_length: int = 512,
    too_long: str = "error",
    batch_size: int = 8,
    backend: str = "auto",
    progress: bool = False,
) -> Steering:
    """Find the steering strength of an adapter on labelled data; both models run over the data once.

    The expected gain is out of fold (the strength for an example is fitted without its fold, and so is the
    choice of the setting with ``direction="auto"``); its interval is a bootstrap over examples. The same
    arguments give the same result. Nothing is written: see :meth:`svdk.Steering.save`.

    Args:
        model: hub name, folder or file (see :func:`svdk.load_model`), a base model, or a PEFT model that
            already has this adapter.
        adapter: PEFT adapter folder.
        data: JSONL path or rows (prompt and completion, or messages); default: the ``calibration.jsonl``
            that the warm start left in the adapter folder.
        tokenizer: needed when ``model`` is not a name.
        direction: ``kl_gradient`` (the paper's), ``log_ratio``, or ``auto``: the best by cross-validation of
            both directions, each with mask ``alpha`` and without mask.
        alpha: confidence mask in [0, 1].
        estimator: ``mean`` (the paper's), ``median``, ``trimmed_mean``, ``ratio``, ``newton``, ``optimum``.
        objective: ``nll`` or ``accuracy`` (greedy tokens); what ``optimum`` and ``auto`` optimise and what
            the gain is measured in.
        seed: of the folds and the bootstrap.
        folds: of the cross-validation, at least 2.
        resamples: of the bootstrap, at least 1.
        max_length: in tokens, as in :func:`svdk.extract_steering`.
        too_long: ``error`` or ``skip``, for examples of more tokens.
        batch_size: examples in one forward pass.
        backend: of the ops.
        progress: show a progress bar on standard error.

    Raises:
        InputError, DataError, ArtifactError, InvalidLogitsError: naming the argument, example or file.

    """
    check_arguments(direction, alpha, estimator, objective, seed, folds, resamples)
    # Before a large model is loaded: what can be seen without it.
    if not Path(adapter, "adapter_config.json").is_file():
        raise ArtifactError(f"adapter {adapter} has no adapter_config.json; allowed: a PEFT adapter folder")
    if data is None:
        data = Path(adapter) / CALIBRATION_FILE
        if not data.exists():
            raise DataError(f"data was not given and {data} does not exist; needed: labelled examples")
    elif isinstance(data, (str, Path)) and not Path(data).is_file():
        raise DataError(f"data file {data} does not exist")
    with attached_pair(model, adapter, tokenizer) as (pair, peft_model, tokenizer):
        from svdk.models.fingerprints import adapter_fingerprint, model_fingerprint, tokenizer_fingerprint

        examples = load_examples(data, tokenizer)
        if len(examples) < 2:
            raise DataError(f"calibration data held {len(examples)} example; allowed: at least 2")
        statistics = extract_steering(
            pair, examples, tokenizer=tokenizer, direction=direction, alpha=alpha, max_length=max_length,
            too_long=too_long, batch_size=batch_size, backend=backend, progress=progress,
        )  # fmt: skip
        origin = {
            "peft_type": pair.peft_type,
            "base_model_fingerprint": model_fingerprint(peft_model),
            "adapter_fingerprint": adapter_fingerprint(adapter),
            "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
            "vocab_size": pair.vocab_size,
            "data_hash": data_hash(examples),
        }
    report = make_report(
        statistics, direction, alpha, estimator, objective, seed=seed, folds=folds, resamples=resamples
    )
    return report.steering(statistics=statistics.tensors(), **origin)


def recalibrate(
    folder: str | Path,
    *,
    direction: str | None = None,
    alpha: float | None = None,
    estimator: str | None = None,
    objective: str | None = None,
    seed: int = 0,
    folds: int = 5,
    resamples: int = 2000,
) -> Steering:
    """Estimate anew from the statistics saved in ``folder``; no model runs, and nothing is written.

    What is None stays as saved. Raises ``InputError`` for a setting that was not extracted and
    ``ArtifactError`` when the artifact is damaged or has no statistics.
    """
    old = Steering.load(folder)
    statistics = saved_statistics(old)
    direction, alpha = direction or old.direction, old.alpha if alpha is None else alpha
    estimator, objective = estimator or old.estimator, objective or old.objective
    check_arguments(direction, alpha, estimator, objective, seed, folds, resamples)
    report = make_report(
        statistics, direction, alpha, estimator, objective, seed=seed, folds=folds, resamples=resamples
    )
    names = ("peft_type", "base_model_fingerprint", "adapter_fingerprint", "tokenizer_fingerprint")
    origin = {name: getattr(old, name) for name in (*names, "vocab_size", "data_hash", "statistics")}
    return report.steering(**origin)


def report_of(steering: Steering, *, resamples: int = 2000) -> Report:
    """The report of a calibrated ``steering``, made again from its statistics."""
    m = steering.metrics
    direction = "auto" if m.get("settings", 1) > 1 else steering.direction
    return make_report(
        saved_statistics(steering), direction, steering.alpha, steering.estimator, steering.objective,
        seed=int(m.get("seed", 0)), folds=int(m.get("folds", 5)), resamples=resamples,
    )  # fmt: skip


def saved_statistics(steering: Steering) -> Statistics:
    """The calibration statistics that ``steering`` carries; ``ArtifactError`` if it has none."""
    if steering.statistics is None or steering.estimator is None or steering.objective is None:
        raise ArtifactError("this steering holds no calibration statistics; needed: one made by calibrate")
    return Statistics.from_tensors(steering.statistics)


def make_report(
    statistics: Statistics,
    direction: str = "kl_gradient",
    alpha: float = 0.1,
    estimator: str = "optimum",
    objective: str = "nll",
    *,
    seed: int = 0,
    folds: int = 5,
    resamples: int = 2000,
) -> Report:
    """Fit and judge every estimator on ``statistics``; ``direction="auto"`` compares all they hold."""
    settings = statistics.settings() if direction == "auto" else [(direction, float(alpha))]
    views: dict[Setting, View] = {setting: statistics.view(*setting) for setting in settings}
    everything = torch.ones(statistics.examples, dtype=torch.bool)
    best = select(views, estimator, objective, everything, folds, seed)
    view = views[best]

    def judged(candidates: Mapping[Setting, View], name: str) -> tuple[float, tuple[float, float]]:
        gains = out_of_fold(candidates, name, objective, folds=folds, seed=seed)
        return bootstrap(gains.of(objective), view.tokens, resamples=resamples, seed=seed)

    def row(setting: Setting, name: str) -> Row:
        fitted, one = fit(views[setting], name, objective), views[setting]
        tokens = float(one.tokens.sum())
        return Row(
            *setting, name, fitted.strength,
            float(one.evaluate(fitted.strength).nll.sum()) / tokens,
            float(one.correct(fitted.strength).sum()) / tokens,
            *judged({setting: one}, name), fitted.at_bound,
        )  # fmt: skip

    rows = tuple(row(best, name) for name in ESTIMATORS)
    gain, interval = judged(views, estimator)
    compared = tuple(row(setting, estimator) for setting in settings)
    strength = next(r.strength for r in rows if r.estimator == estimator)
    metrics = metrics_of(statistics, view, strength) | {
        "seed": seed,
        "folds": folds,
        "settings": len(settings),
    }
    return Report(*best, estimator, objective, gain, interval, rows, compared, metrics, view)


def metrics_of(statistics: Statistics, view: View, strength: float) -> dict[str, float]:
    """What an artifact records of its calibration data: losses, accuracies, the per-token optima."""
    tokens = float(view.tokens.sum())
    optima = per_token_optimum(view)
    gains = gains_at(view, strength)
    nll, correct = float(view.evaluate(0.0).nll.sum()), float(view.correct(0.0).sum())
    return {
        "examples": statistics.examples,
        "tokens": int(tokens),
        "excluded": statistics.excluded,
        "nll_base": -float(statistics.logprob_base.double().mean()),
        "nll_warm": nll / tokens,
        "nll_steered": (nll - float(gains.nll.sum())) / tokens,
        "accuracy_warm": correct / tokens,
        "accuracy_steered": (correct + float(gains.correct.sum())) / tokens,
        "per_token_mean": float(optima.mean()) if len(optima) else math.nan,
        "per_token_std": float(optima.std()) if len(optima) > 1 else math.nan,
        "per_token_count": len(optima),
    }


def check_arguments(direction, alpha, estimator, objective, seed, folds, resamples) -> None:
    """``InputError`` naming the first argument of a calibration that is not allowed."""
    check_choice("direction", direction, (*DIRECTIONS, "auto"))
    check_number("alpha", alpha, "[0, 1]")
    check_choice("estimator", estimator, ESTIMATORS)
    check_choice("objective", objective, OBJECTIVES)
    for name, value, least in (("seed", seed, 0), ("folds", folds, 2), ("resamples", resamples, 1)):
        check_count(name, value, least)


@contextmanager
def attached_pair(
    model: Any, adapter: str | Path, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[tuple[ModelPair, Any, PreTrainedTokenizerBase]]:
    """The pair, the PEFT model and the tokenizer; a base model has the adapter inside the block only."""
    from peft import PeftModel

    from svdk.models.loading import detach, load_adapter, load_model
    from svdk.models.pair import ModelPair

    if isinstance(model, (str, Path)):
        model, loaded = load_model(model)
        tokenizer = tokenizer or loaded
    if tokenizer is None:
        raise InputError("tokenizer was None; allowed with a loaded model: its tokenizer")
    if isinstance(model, PeftModel):
        _check_attached(model, adapter)
        yield ModelPair(model), model, tokenizer
        return
    peft_model = load_adapter(model, adapter)
    try:
        yield ModelPair(peft_model), peft_model, tokenizer
    finally:
        detach(peft_model)


def _check_attached(model: Any, adapter: str | Path) -> None:
    """``ArtifactError`` unless the active adapter of ``model`` is the one in the folder ``adapter``."""
    from peft import get_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(adapter) / "adapter_model.safetensors"
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"adapter {path} cannot be read: {error}") from error
    attached = get_peft_model_state_dict(
        model, adapter_name=model.active_adapter, save_embedding_layers=False
    )
    for name in sorted(saved.keys() | attached.keys()):
        ours, theirs = attached.get(name), saved.get(name)
        same = ours is not None and theirs is not None and ours.shape == theirs.shape
        # Not exact: the model may have been loaded in another dtype than the adapter was saved in.
        if not same or not torch.allclose(ours.float().cpu(), theirs.float(), rtol=1e-2, atol=1e-3):
            raise ArtifactError(
                f"model had another adapter attached than the one in {adapter} (tensor {name} differs); "
                "allowed: that adapter, or the base model alone"
            )
