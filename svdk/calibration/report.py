"""What a calibration asks for and what it found: every estimator fitted and judged on the same statistics."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from svdk.calibration import levers
from svdk.calibration.artifact import Steering
from svdk.calibration.choice_view import ChoiceView
from svdk.calibration.choices import ChoiceStatistics
from svdk.calibration.estimators import (
    ESTIMATORS,
    OBJECTIVES,
    Judged,
    Setting,
    fit,
    gains_at,
    out_of_fold,
    per_token_optimum,
    select,
)
from svdk.calibration.kept_statistics import DIRECTIONS, Statistics
from svdk.calibration.levers import AutoGain, Fitted, LeverRow
from svdk.calibration.loss_views import GridView, MaskedView
from svdk.errors import ArtifactError, InputError
from svdk.utils.bootstrap import bootstrap
from svdk.utils.checks import check_choice, check_count, check_number
from svdk.utils.threads import one_thread

CHOICES = (*levers.COSTS, "auto")
"""Of a calibration's lever."""
UNITS = {"nll": "nats a token", "accuracy": "accuracy", "choice": "nats a choice"}
NO_STATISTICS = "this steering holds no calibration statistics; needed: one made by calibrate"


@dataclass(frozen=True)
class CalibrationConfig:
    """What to fit and how to judge it; the arguments of :func:`svdk.calibrate`.

    Raises:
        InputError: naming the first value that is not allowed.

    """

    direction: str = "kl_gradient"
    alpha: float = 0.1
    estimator: str = "optimum"
    objective: str = "nll"
    seed: int = 0
    folds: int = 5
    resamples: int = 2000
    lever: str = "constant"

    def __post_init__(self) -> None:
        """Check every field."""
        check_choice("lever", self.lever, CHOICES)
        check_choice("direction", self.direction, (*DIRECTIONS, "auto"))
        check_number("alpha", self.alpha, "[0, 1]")
        check_choice("estimator", self.estimator, ESTIMATORS)
        check_choice("objective", self.objective, OBJECTIVES)
        allowed = (*(levers.OF_CHOICES if self.objective == "choice" else levers.OF_TEXT), "auto")
        if self.lever not in allowed:
            raise InputError(
                f"lever was {self.lever!r} with objective {self.objective!r}; allowed: {', '.join(allowed)}"
            )
        if self.objective == "choice" and self.estimator != "optimum":
            raise InputError(
                f"estimator was {self.estimator!r} with objective 'choice'; allowed: 'optimum' (the others "
                "are averages over tokens)"
            )
        if self.lever != "constant" and self.estimator != "optimum":
            raise InputError(
                f"estimator was {self.estimator!r} with lever {self.lever!r}; allowed: 'optimum' (the others "
                "give one strength)"
            )
        for name, least in (("seed", 0), ("folds", 2), ("resamples", 1)):
            check_count(name, getattr(self, name), least)

    @classmethod
    def of(cls, steering: Steering) -> CalibrationConfig:
        """What a calibrated ``steering`` was made with; ``ArtifactError`` if it was not calibrated."""
        if steering.estimator is None or steering.objective is None:
            raise ArtifactError(NO_STATISTICS)
        m = steering.metrics
        direction = "auto" if m.get("settings", 1) > 1 else steering.direction
        if direction == "vector" and "direction" in m:  # that lever, of a calibration with a direction
            direction = DIRECTIONS[int(m["direction"])]
        seed, folds = int(m.get("seed", 0)), int(m.get("folds", 5))
        lever = "auto" if m.get("levers", 1) > 1 else steering.lever or "constant"
        alpha = m.get("alpha", steering.alpha)  # of the statistics, where the lever has none
        return cls(direction, alpha, steering.estimator, steering.objective, seed, folds, lever=lever)

    def override(self, **changes: Any) -> CalibrationConfig:
        """A copy with ``changes``; those that are None stay as they are."""
        return dataclasses.replace(self, **{name: x for name, x in changes.items() if x is not None})


@dataclass(frozen=True)
class EstimatorRow:
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
    rows: tuple[EstimatorRow, ...]
    """Every estimator in the chosen setting."""
    settings: tuple[EstimatorRow, ...]
    """The chosen estimator in every setting that was compared."""
    metrics: Mapping[str, float]
    view: Judged
    lever: LeverRow | None = None
    """What was chosen; None where statistics of an older svdk cannot tell levers apart."""
    levers: tuple[LeverRow, ...] = ()
    """All that these statistics can judge, the cheapest first."""
    why: str = ""
    """Why this lever, in a sentence."""
    vector: Tensor | None = None
    """(V,) float32, where that lever was tried."""
    auto: AutoGain | None = None
    """With lever ``auto``: what the choice itself gains out of fold."""
    options: tuple[str, ...] = ()
    """Of choices, where they are the same for all."""
    vocabulary: LeverRow | None = None
    """Of choices: what the strength of least NLL over the vocabulary would do to them, out of fold."""

    @property
    def chosen(self) -> EstimatorRow:
        """The row of the result."""
        return next(row for row in self.rows if row.estimator == self.estimator)

    @property
    def item(self) -> str:
        """What is judged: a ``choice`` or a ``token``."""
        return "choice" if self.objective == "choice" else "token"

    def of_lever(self, name: str) -> Report:
        """The same with this one of :attr:`levers` taken, and its gain in place of auto's.

        ``InputError`` for one that was not judged here.
        """
        rows = [row for row in self.levers if row.fitted.lever == name]
        if not rows:
            have = ", ".join(row.fitted.lever for row in self.levers)
            raise InputError(f"lever was {name!r}; allowed, as judged here: {have}")
        (row,) = rows
        metrics = dict(self.metrics) | {f"gain_{kind}": x for kind, x in row.kinds.items()} | {"levers": 1}
        return dataclasses.replace(
            self, lever=row, why="", auto=None, metrics=metrics, gain=row.gain, interval=row.interval
        )

    def steering(self, **origin: Any) -> Steering:
        """The result; ``origin`` are the fields of :class:`svdk.Steering` that say what it was made from."""
        row = self.chosen
        one = Fitted("constant", (self.direction, self.alpha), row.strength)
        if self.lever is not None and self.lever.fitted.lever != "constant":  # of which there are estimators
            one = self.lever.fitted
        direction, alpha = one.setting or (self.direction, 0.0)
        steering = Steering(
            strength=one.strength,
            direction=direction,
            alpha=alpha,
            lever=one.lever,
            positions=one.positions,
            classes=one.classes,
            scale=one.scale,
            vector=self.vector if one.lever == "vector" else None,
            bias=one.bias,
            options=self.options if one.bias else (),
            estimator=self.estimator,
            objective=self.objective,
            gain=self.gain,
            confidence_interval=self.interval,
            at_bound=row.at_bound and one.lever == "constant",
            metrics=self.metrics,
            **origin,
        )
        vars(steering)["_report"] = self  # what Steering.report() would have to work out again
        return steering

    def table(self) -> str:
        """The report as text: the data, the settings (when several were compared), the estimators."""
        m = self.metrics
        unit = UNITS[self.objective]
        lines = self._about_choices() if self.objective == "choice" else self._about_tokens()
        head = f"{'direction':<12} {'alpha':>5}  {'estimator':<13} {'mu':>10} {'NLL':>8} {'accuracy':>9}"
        head += f"  out-of-fold gain, {unit} (95 % interval)"
        if len(self.settings) > 1:
            lines += ["", "settings compared:", head, *map(self._line, self.settings)]
        lines += ["", "estimators:", head, *map(self._line, self.rows)]
        if any(row.at_bound for row in (*self.rows, *self.settings)):
            lines.append(">  at or beyond the end of the range that was measured")
        if self.lever is not None:

            def ms(rows: int) -> float | None:
                return m.get(f"ms_rows_{rows}")

            lines += ["", "levers:", levers.table(self.levers, self.lever, unit, ms)]
            if self.why:
                lines.append(self.why)
            if self.auto is not None:
                lines.append(self.auto.line(unit))
        if self.vocabulary is not None:
            lines += ["", self._disagreement(self.vocabulary)]
        return "\n".join(lines)

    def _about_tokens(self) -> list[str]:
        m = self.metrics
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
        return lines

    def _about_choices(self) -> list[str]:
        m = self.metrics
        among = f"among {', '.join(map(repr, self.options))}" if self.options else "with options of their own"
        lines = [
            f"objective choice: {m['examples']:.0f} questions {among}",
            f"NLL over the options (nats a choice): base {m['nll_base']:.4f}, warm start "
            f"{m['nll_warm']:.4f}; accuracy: base {m['accuracy_base']:.1%}, warm start "
            f"{m['accuracy_warm']:.1%}; at random {m['accuracy_random']:.1%}",
        ]
        if m["excluded"]:
            lines.append(f"{m['excluded']:.0f} options have a token that the warm start gives probability 0")
        return lines

    def _disagreement(self, other: LeverRow) -> str:
        """Whether the NLL over the vocabulary asks for what the choice asks for, in plain words."""
        low, high = other.interval
        points = "{:+.1f} points, {:+.1f} to {:+.1f}".format(
            *(100 * x for x in (other.right, *other.right_interval))
        )
        text = (
            "the NLL of the right words over the whole vocabulary would set mu = "
            f"{other.fitted.strength:.3g} (here {self.chosen.strength:.3g}), which saves "
            f"{other.gain:+.4f} nats a choice ({low:+.4f} to "
            f"{high:+.4f}) and changes accuracy by {points}"
        )
        if high < 0 or other.right_interval[1] < 0:
            why = "it fits how likely the words are, not which of them is right"
            return f"the two objectives disagree: {text}: {why}"
        return text

    def _line(self, row: EstimatorRow) -> str:
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


def saved_statistics(steering: Steering) -> Statistics:
    """The statistics of tokens that ``steering`` carries; ``ArtifactError`` if it has none."""
    found = judged_statistics(steering)
    if not isinstance(found, Statistics):
        raise ArtifactError("this steering holds statistics of choices; needed: of tokens")
    return found


def judged_statistics(steering: Steering) -> Statistics | ChoiceStatistics:
    """What ``steering`` was calibrated on; ``ArtifactError`` if it has no statistics."""
    if steering.statistics is None:
        raise ArtifactError(NO_STATISTICS)
    kind = ChoiceStatistics if "texts" in steering.statistics else Statistics
    return kind.from_tensors(steering.statistics)


@one_thread()
def make_report(
    statistics: Statistics | ChoiceStatistics,
    config: CalibrationConfig,
    costs: Mapping[str, float] | None = None,
) -> Report:
    """Fit and judge every estimator and lever on ``statistics``; direction ``auto`` compares all they hold.

    ``costs``: measured milliseconds a token, ``ms_rows_1`` and ``ms_rows_2``, for the table.
    """
    estimator, objective, seed, folds = config.estimator, config.objective, config.seed, config.folds
    choices = isinstance(statistics, ChoiceStatistics)
    if choices != (objective == "choice"):
        have, other = ("choices", "choice") if choices else ("tokens", "nll or accuracy")
        raise InputError(f"objective was {objective!r} with statistics of {have}; allowed: {other}")
    auto = config.direction == "auto"
    settings = statistics.settings() if auto else [(config.direction, float(config.alpha))]
    views: dict[Setting, Judged] = {setting: statistics.view(*setting) for setting in settings}
    everything = torch.ones(statistics.examples, dtype=torch.bool)
    best = select(views, estimator, objective, everything, folds, seed)
    view = views[best]

    def judged(candidates: Mapping[Setting, Judged], name: str) -> tuple[float, tuple[float, float]]:
        gains = out_of_fold(candidates, name, objective, folds=folds, seed=seed)
        return bootstrap(gains.of(objective), view.tokens, resamples=config.resamples, seed=seed)

    def row(setting: Setting, name: str) -> EstimatorRow:
        one = views[setting]
        fitted, tokens = fit(one, name, objective), float(one.tokens.sum())
        nll = float(one.evaluate(fitted.strength).nll.sum()) / tokens
        accuracy = float(one.correct(fitted.strength).sum()) / tokens
        gain, interval = judged({setting: one}, name)
        return EstimatorRow(*setting, name, fitted.strength, nll, accuracy, gain, interval, fitted.at_bound)

    rows = tuple(row(best, name) for name in (ESTIMATORS if not choices else ("optimum",)))
    gain, interval = judged(views, estimator)
    compared = tuple(row(setting, estimator) for setting in settings)
    strength = next(r.strength for r in rows if r.estimator == estimator)
    if isinstance(statistics, ChoiceStatistics):
        metrics = statistics.metrics(view, strength)
    else:
        assert not isinstance(view, ChoiceView)
        metrics = metrics_of(statistics, view, strength)
    metrics |= {"seed": seed, "folds": folds, "settings": len(settings), "alpha": best[1]}
    metrics["direction"] = DIRECTIONS.index(best[0])
    metrics |= costs or {}
    found = Report(*best, estimator, objective, gain, interval, rows, compared, metrics, view)
    return _with_levers(found, statistics, views, config)


def _with_levers(
    report: Report,
    statistics: Statistics | ChoiceStatistics,
    views: Mapping[Setting, Judged],
    config: CalibrationConfig,
) -> Report:
    """``report`` with the levers beside each other, and its gain that of the one that was chosen."""
    is_old = isinstance(statistics, Statistics) and statistics.position is None
    if config.estimator != "optimum" or (is_old and config.lever == "constant"):
        return report
    judge = levers.Judge(statistics, views, config.objective, config.folds, config.seed, config.resamples)
    names: tuple[str, ...] = levers.OF_TEXT
    absent = {"scale"} if statistics.scales is None else set()
    if isinstance(statistics, Statistics):
        absent |= {"classes"} if statistics.greedy is None else set()
        absent |= {"vector"} if statistics.vector is None else set()
        report = dataclasses.replace(report, vector=statistics.vector)
    if isinstance(statistics, ChoiceStatistics):
        names, absent = levers.OF_CHOICES, absent | (set() if statistics.texts else {"bias"})
        vocabulary = judge.row(levers.VOCABULARY)
        report = dataclasses.replace(report, options=statistics.texts, vocabulary=vocabulary)
    if config.lever == "auto":
        offered = [name for name in names if name not in absent]
    else:  # the others cost time
        offered = [name for name in names if name in ("none", "constant", config.lever)]
    rows = tuple(map(judge.row, offered))
    found = dataclasses.replace(report, levers=rows)
    if config.lever != "auto":
        return found.of_lever(config.lever)
    tokens = statistics.tokens.double()
    chosen, why = levers.cheapest(rows, tokens, resamples=config.resamples, seed=config.seed)
    auto, found = judge.auto(offered), found.of_lever(chosen.fitted.lever)
    metrics = dict(found.metrics) | {"levers": len(rows)}
    return dataclasses.replace(
        found, metrics=metrics, why=why, auto=auto, gain=auto.gain, interval=auto.interval
    )


def metrics_of(statistics: Statistics, view: MaskedView | GridView, strength: float) -> dict[str, float]:
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
