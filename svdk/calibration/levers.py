"""Which lever: nothing, a bias a label, the adapter's own scale, one strength or several. No model.

All are fitted on the same statistics and judged out of fold on the same examples, so that their gains are
paired; what a lever costs in decoding is the number of rows that a step runs for each sequence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from svdk.calibration.choice_view import ChoiceView
from svdk.calibration.choices import ChoiceStatistics
from svdk.calibration.classes import fit_classes
from svdk.calibration.estimators import Judged, Setting, fit, folds_of, select
from svdk.calibration.kept_statistics import KINDS, Statistics
from svdk.calibration.loss_views import GridView, MaskedView
from svdk.calibration.positions import fit_positions, strengths_at
from svdk.errors import InputError
from svdk.ops.configs import ClassStrengths
from svdk.utils.bootstrap import bootstrap

COSTS = {"none": 1, "bias": 1, "scale": 1, "vector": 1, "constant": 2, "classes": 2, "positions": 2}
"""Rows a step by lever, the cheapest (and, of two equal ones, the simplest) first."""
OF_TEXT = ("none", "scale", "vector", "constant", "classes", "positions")
OF_CHOICES = ("none", "bias", "scale", "constant")
"""Which of them there are for what is asked."""
VECTOR: Setting = ("vector", 0.0)
"""Of a static vector: no mask applies when it steers."""
VOCABULARY = "vocabulary"
"""No lever: of choices, the strength of least NLL of the right words over the whole vocabulary."""


@dataclass(frozen=True)
class Fitted:
    """One lever, fitted on some examples."""

    lever: str
    setting: Setting | None = None
    """(direction, alpha) of those that steer."""
    strength: float = 0.0
    positions: tuple[float, ...] = ()
    classes: ClassStrengths | None = None
    scale: float = 1.0
    bias: tuple[float, ...] = ()
    """Of each option."""


@dataclass(frozen=True, eq=False, repr=False)
class LeverRow:
    """A lever on all examples, and what it gains out of fold."""

    fitted: Fitted
    gain: float
    """In the objective over the warm start: nats a token or a choice, or share of tokens."""
    interval: tuple[float, float]
    right: float
    """Share of tokens, or choices, that are right and were not before, out of fold."""
    right_interval: tuple[float, float]
    kinds: Mapping[str, float]
    """The gain in nats a token that comes from content, template and stop tokens; they add up."""
    examples: Tensor
    """(E,) float64: the gain of each example it was judged on, summed over its tokens."""

    @property
    def rows(self) -> int:
        """That a step runs for each sequence."""
        return COSTS[self.fitted.lever]

    def summary(self) -> str:
        """What was fitted, briefly."""
        one = self.fitted
        if one.lever == "scale":
            return f"scale {one.scale:g}"
        if one.bias:
            return "bias " + " ".join(f"{x:+.3g}" for x in one.bias)
        if one.setting is None:
            return ""
        text = f"{one.setting[0]}, alpha {one.setting[1]:g}, mu {one.strength:.3g}"
        if one.positions:
            text += f", {len(one.positions)} positions {min(one.positions):.2g} to {max(one.positions):.2g}"
        if one.classes is not None:
            text += f", template {one.classes.template:.3g}, stop {one.classes.stop:.3g}"
        return text


@dataclass(frozen=True)
class AutoGain:
    """What choosing a lever gains on examples that played no part in the choice."""

    gain: float
    interval: tuple[float, float]
    right: float
    right_interval: tuple[float, float]
    chosen: Mapping[str, int]
    """How many folds took each lever."""

    def line(self, unit: str) -> str:
        """All of it, in a sentence."""
        low, high = self.interval
        took = ", ".join(f"{name} {count}x" for name, count in self.chosen.items())
        return (
            f"the choice of the lever made anew without each fold ({took}) gains {self.gain:+.4f} {unit} "
            f"({low:+.4f} to {high:+.4f})"
        )


@dataclass(frozen=True)
class Judge:
    """What every lever is fitted on and judged by."""

    statistics: Statistics | ChoiceStatistics
    views: Mapping[Setting, Judged]
    objective: str
    folds: int
    seed: int
    resamples: int
    _settings: dict[bytes, Setting] = field(default_factory=dict, init=False, repr=False, compare=False)

    def fit(self, lever: str, keep: Tensor) -> Fitted:
        """A lever on the examples ``keep`` (E,) bool; the setting is chosen with the single strength."""
        if lever == "none":
            return Fitted(lever)
        if lever == "scale":
            return Fitted(lever, scale=self._best_scale(keep))
        if lever == "bias":
            return Fitted(lever, bias=tuple(self._choices().bias(keep).tolist()))
        if lever == "vector":
            along = self._of_tokens().vector_view()
            return Fitted(lever, VECTOR, fit(along, "optimum", self.objective, keep).strength)
        setting = self._setting(keep)
        view = self.views[setting]
        if lever == VOCABULARY:
            return Fitted(lever, setting, self._choices().vocabulary_strength(view, keep))
        if lever == "constant":
            return Fitted(lever, setting, fit(view, "optimum", self.objective, keep).strength)
        statistics, tokens = self._tokens(view)
        if lever == "classes":
            by_class = fit_classes(statistics, tokens, keep, folds=self.folds, seed=self.seed)
            return Fitted(lever, setting, by_class.strength, classes=by_class.classes)
        found = fit_positions(tokens, statistics.positions(), keep, folds=self.folds, seed=self.seed)
        return Fitted(lever, setting, found.strength, found.positions)

    def _setting(self, keep: Tensor) -> Setting:
        """Of the single strength, which several levers ask for on the same examples."""
        key = bytes(keep.tolist())
        if key not in self._settings:
            self._settings[key] = select(self.views, "optimum", self.objective, keep, self.folds, self.seed)
        return self._settings[key]

    def _of_tokens(self) -> Statistics:
        if not isinstance(self.statistics, Statistics):
            raise InputError("lever was one of tokens, with choices; allowed: " + ", ".join(OF_CHOICES))
        return self.statistics

    def _tokens(self, view: Judged) -> tuple[Statistics, MaskedView | GridView]:
        statistics = self._of_tokens()
        assert not isinstance(view, ChoiceView)  # which statistics of tokens do not have
        return statistics, view

    def _choices(self) -> ChoiceStatistics:
        if not isinstance(self.statistics, ChoiceStatistics):
            raise InputError("lever was 'bias' without choices; allowed: " + ", ".join(OF_TEXT))
        return self.statistics

    def _best_scale(self, keep: Tensor) -> float:
        scales, nll, hits = self.statistics.scale_curves()
        use = keep[self.statistics.examples_of_tokens()]
        total = -hits[use].sum(0) if self.objective == "accuracy" else nll[use].sum(0)
        return _nearest(scales, total)

    def gains(self, one: Fitted) -> tuple[Tensor, Tensor]:
        """NLL saved and tokens more right than unsteered, (T,) float64 each, of all tokens (or choices)."""
        if one.lever == "scale":
            scales, nll, hits = self.statistics.scale_curves()
            at, warm = (int((scales == s).nonzero()[0]) for s in (one.scale, 1.0))
            return nll[:, warm] - nll[:, at], hits[:, at] - hits[:, warm]
        if one.lever == "bias":
            choices, (loss, hits) = self._choices(), self._choices().unsteered
            biased, right = choices.loss(choices.logprobs + choices.of_options(one.bias))
            return loss - biased, right - hits
        if one.setting is None:
            nothing = torch.zeros(len(self.statistics.examples_of_tokens()), dtype=torch.float64)
            return nothing, nothing
        view = self._of_tokens().vector_view() if one.lever == "vector" else self.views[one.setting]
        mu: float | Tensor = one.strength
        if one.positions:
            statistics, view = self._tokens(view)
            mu = strengths_at(statistics.positions(), one.positions, one.strength)
        if one.classes is not None:
            statistics, view = self._tokens(view)
            mu = one.classes.at(statistics.due(), one.strength)
        before, after = view.at_tokens(0.0).nll, view.at_tokens(mu).nll
        return before - after, view.correct_tokens(mu) - view.correct_tokens(0.0)

    def row(self, lever: str, keep: Tensor | None = None) -> LeverRow:
        """A lever fitted on the examples ``keep`` (E,) bool (default: all), judged on them out of fold."""
        keep = self._everything() if keep is None else keep
        nll, correct = self._out_of_fold(keep, lambda train: self.fit(lever, train))
        in_nats, in_hits = self._judged(nll, keep), self._judged(correct, keep)
        sums, gain, interval = in_hits if self.objective == "accuracy" else in_nats
        parts: dict[str, float] = {}
        if isinstance(self.statistics, Statistics):
            kinds, total = self.statistics.kinds(), max(1, len(nll))
            parts = {name: float(nll[kinds == i].sum()) / total for i, name in enumerate(KINDS)}
        _, share, of_share = in_hits
        return LeverRow(self.fit(lever, keep), gain, interval, share, of_share, parts, sums)

    def auto(self, names: Sequence[str]) -> AutoGain:
        """The gain of :func:`cheapest` among ``names``, chosen anew without each fold."""
        chosen: Counter[str] = Counter()

        def choose(train: Tensor) -> Fitted:
            rows, tokens = [self.row(name, train) for name in names], self.statistics.tokens[train].double()
            best, _ = cheapest(rows, tokens, resamples=self.resamples, seed=self.seed)
            chosen[best.fitted.lever] += 1
            return best.fitted

        keep = self._everything()
        nll, correct = self._out_of_fold(keep, choose)
        in_nats, in_hits = self._judged(nll, keep)[1:], self._judged(correct, keep)[1:]
        first = in_hits if self.objective == "accuracy" else in_nats
        return AutoGain(*first, *in_hits, dict(chosen.most_common()))

    def _everything(self) -> Tensor:
        return torch.ones(self.statistics.examples, dtype=torch.bool)

    def _out_of_fold(self, keep: Tensor, fit: Callable[[Tensor], Fitted]) -> tuple[Tensor, Tensor]:
        """As :meth:`gains`, each token's by what was fitted without its fold; 0 outside ``keep``."""
        example = self.statistics.examples_of_tokens()
        nll, correct = torch.zeros(2, len(example), dtype=torch.float64)
        for train, examples in folds_of(keep, self.folds, self.seed):
            held_out = examples[example]
            saved, right = self.gains(fit(train))
            nll[held_out], correct[held_out] = saved[held_out], right[held_out]
        return nll, correct

    def _judged(self, values: Tensor, keep: Tensor) -> tuple[Tensor, float, tuple[float, float]]:
        """Sums over each example of ``keep``, their mean a token, and its interval."""
        example, tokens = self.statistics.examples_of_tokens(), self.statistics.tokens.double()
        sums = torch.zeros(len(keep), dtype=torch.float64).index_add_(0, example, values)[keep]
        return sums, *bootstrap(sums, tokens[keep], resamples=self.resamples, seed=self.seed)


def _nearest(scales: Tensor, total: Tensor) -> float:
    """Of the scales with the least ``total`` the one nearest to 1."""
    best = scales[total == total.min()]
    return float(best[(best - 1).abs().argmin()])


def cheapest(rows: Sequence[LeverRow], tokens: Tensor, *, resamples: int, seed: int) -> tuple[LeverRow, str]:
    """The cheapest lever that is not demonstrably worse than the best, and why, in a sentence.

    Demonstrably: the 95 % interval of the paired difference, over examples, lies above 0. ``rows`` in the
    order of :data:`COSTS`; ``tokens`` (E,).
    """
    best = max(rows, key=lambda row: row.gain)
    for row in rows:
        if row is best:
            break
        gap, (low, high) = bootstrap(best.examples - row.examples, tokens, resamples=resamples, seed=seed)
        if low <= 0:
            why = (
                f"{row.fitted.lever} is the cheapest that is not demonstrably worse than the best, "
                f"{best.fitted.lever} (ahead by {gap:.4f}, 95 % interval {low:.4f} to {high:.4f})"
            )
            return row, why
    return best, f"{best.fitted.lever} is demonstrably better than everything cheaper"


def table(rows: Sequence[LeverRow], chosen: LeverRow, unit: str, ms: Callable[[int], float | None]) -> str:
    """The levers as text; ``ms``: measured milliseconds a token by rows a step."""
    head = f"{'lever':<10} {'rows':>4} {'ms/token':>8}  {f'out-of-fold gain, {unit}':<38}"
    split = any(row.kinds for row in rows)
    head += f" {'of it content, template, stop (nats)' if split else 'points of accuracy':<38}"
    lines = [head + " fitted"]
    for row in rows:
        low, high = row.interval
        cost = ms(row.rows)
        gain = f"{row.gain:+.4f} ({low:+.4f} to {high:+.4f})"
        kinds = "  ".join(f"{row.kinds[name]:+.4f}" for name in KINDS if row.kinds)
        if not split:
            points = (100 * x for x in (row.right, *row.right_interval))
            kinds = "{:+.1f} ({:+.1f} to {:+.1f})".format(*points)
        lines.append(
            f"{row.fitted.lever:<10} {row.rows:>4} {'-' if cost is None else f'{cost:.2f}':>8}  {gain:<38} "
            f"{kinds:<38} {row.summary()}{'  <- chosen' if row is chosen else ''}"
        )
    return "\n".join(lines)
