"""From calibration statistics to one task strength: estimators and cross-validation. No model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from svdk.calibration.choice_view import ChoiceView
from svdk.calibration.loss_views import LIMIT, MaskedView, View

EPS = 1e-12
TRIM = 0.1
"""Share of the per-token optima that ``trimmed_mean`` drops at either end."""
ESTIMATORS = ("mean", "median", "trimmed_mean", "ratio", "newton", "optimum")
OBJECTIVES = ("nll", "accuracy", "choice")
Setting = tuple[str, float]
"""(direction, alpha)"""
Judged = View | ChoiceView
"""What a strength is fitted on: the loss of tokens, or that of choices."""


@dataclass(frozen=True)
class Fit:
    """A fitted strength."""

    strength: float
    """What to use: ``raw`` inside the range that was measured."""
    raw: float
    at_bound: bool
    """True when the estimate lies beyond that range (or the loss still falls at its end)."""


def per_token_optimum(view: View, keep: Tensor | None = None) -> Tensor:
    """The paper's mu* = g / (||delta||^2 + eps) of every token with ||delta||^2 >= eps, (<= T,)."""
    use = view.norm2 >= EPS
    if keep is not None:
        use &= keep[view.example]
    return view.gain[use] / (view.norm2[use] + EPS)


def fit(view: Judged, estimator: str = "optimum", objective: str = "nll", keep: Tensor | None = None) -> Fit:
    """The strength that ``estimator`` gives on the examples ``keep`` (E,) bool (default: all).

    ``objective`` matters to ``optimum`` only: least NLL, or most correct greedy tokens; of choices, the least
    NLL over the options. Without any token that steering changes, the strength is 0.
    """
    keep = torch.ones(view.examples, dtype=torch.bool) if keep is None else keep
    if isinstance(view, ChoiceView):
        best, at_bound = view.minimise(keep)
        return Fit(best, best, at_bound)
    low, high = view.limits
    if estimator == "optimum":
        if objective == "nll":
            return minimise_nll(view, keep)
        best = view.best_accuracy(keep)
        return Fit(best, best, best in (low, high))
    raw = _closed_form(view, estimator, keep)
    strength = min(max(raw, low), high)
    return Fit(strength, raw, strength != raw)


def _closed_form(view: View, estimator: str, keep: Tensor) -> float:
    if estimator in ("ratio", "newton"):
        use = keep[view.example]
        curvature = view.norm2 if estimator == "ratio" else view.variance
        bottom = float(curvature[use].sum())
        return float(view.gain[use].sum()) / bottom if bottom >= EPS else 0.0
    optima = per_token_optimum(view, keep).sort().values
    if not len(optima):
        return 0.0
    if estimator == "mean":
        return float(optima.mean())
    if estimator == "median":
        middle = len(optima) // 2
        return float(optima[middle] + optima[(len(optima) - 1) // 2]) / 2
    if estimator == "trimmed_mean":
        cut = int(TRIM * len(optima))
        return float(optima[cut : len(optima) - cut].mean())
    raise ValueError(estimator)


def minimise_nll(view: View, keep: Tensor) -> Fit:
    """The minimiser of the convex calibration NLL by Newton's method inside a shrinking bracket."""

    def slopes(mu: float) -> tuple[float, float]:
        curve = view.evaluate(mu)
        return float(curve.slope[keep].sum()), float(curve.curvature[keep].sum())

    slope, curvature = slopes(0.0)
    if slope == 0.0:
        return Fit(0.0, 0.0, False)
    limit = min(LIMIT, view.limits[1]) if slope < 0 else max(-LIMIT, view.limits[0])
    if slopes(limit)[0] * math.copysign(1.0, slope) > -1e-12 * abs(slope):  # falling, or flat to rounding
        return Fit(limit, limit, True)
    inner, outer, mu = 0.0, limit, 0.0  # the slope has the sign of slope(0) at inner, another at outer
    sign = math.copysign(1.0, slope)
    for _ in range(200):
        step = -slope / curvature if curvature > 0 else math.nan
        proposal = mu + step
        if not min(inner, outer) < proposal < max(inner, outer):
            proposal = (inner + outer) / 2
        if abs(proposal - mu) <= 1e-12 * max(1.0, abs(mu)):
            break
        mu = proposal
        slope, curvature = slopes(mu)
        if slope == 0.0:
            break
        if slope * sign > 0:
            inner = mu
        else:
            outer = mu
    return Fit(mu, mu, False)


def kl_budget_strength(view: View, budget: float) -> Tensor:
    """(T,) strengths of mode ``kl_budget``: sqrt(2 kappa / Var_p(delta)), 0 where the variance vanishes."""
    variance = view.variance
    return torch.where(variance < EPS, 0.0, (2 * budget / variance.clamp(min=EPS)).sqrt())


def fit_kl_budget(view: MaskedView, keep: Tensor | None = None) -> float:
    """The budget kappa (nats) with the least NLL on the examples ``keep``, among 0 and a log-spaced grid.

    The loss need not be convex in kappa, hence a grid: 1e-5 to 10, six points a decade.
    """
    keep = torch.ones(view.examples, dtype=torch.bool) if keep is None else keep
    budgets = [0.0, *torch.logspace(-5, 1, 37, dtype=torch.float64).tolist()]
    losses = [float(view.evaluate(kl_budget_strength(view, b)).nll[keep].sum()) for b in budgets]
    return budgets[losses.index(min(losses))]


@dataclass(frozen=True)
class Gains:
    """Out-of-fold improvement over mu = 0, sums over the tokens of each example, (E,) float64 each."""

    nll: Tensor
    correct: Tensor

    def of(self, objective: str) -> Tensor:
        """The gain in one objective, larger is better."""
        return self.correct if objective == "accuracy" else self.nll


def split_folds(examples: int, folds: int, seed: int) -> Tensor:
    """(E,) int64: a fold for each example, sizes as equal as can be, shuffled by ``seed``."""
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(seed))
    fold = torch.empty(examples, dtype=torch.int64)
    fold[order] = torch.arange(examples) % min(folds, examples)
    return fold


def folds_of(keep: Tensor, folds: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The examples ``keep`` (E,) bool without each fold of them, and that fold; (E,) bool each."""
    members = keep.nonzero()[:, 0]
    fold = torch.full((len(keep),), -1)
    fold[members] = split_folds(len(members), folds, seed)
    for k in range(min(folds, len(members))):
        yield keep & (fold != k), fold == k


def gains_at(view: Judged, strength: float) -> Gains:
    """Improvement of every example at ``strength`` over mu = 0."""
    return Gains(
        view.evaluate(0.0).nll - view.evaluate(strength).nll, view.correct(strength) - view.correct(0.0)
    )


def select(
    views: Mapping[Setting, Judged], estimator: str, objective: str, keep: Tensor, folds: int, seed: int
) -> Setting:
    """The setting with the largest cross-validated gain on the examples ``keep``; on ties the first."""
    if len(views) == 1 or int(keep.sum()) < 2:
        return next(iter(views))
    totals = {}
    for setting, view in views.items():
        gains = out_of_fold({setting: view}, estimator, objective, folds=folds, seed=seed, keep=keep)
        totals[setting] = float(gains.of(objective).sum())
    return max(totals, key=totals.__getitem__)


def out_of_fold(
    views: Mapping[Setting, Judged],
    estimator: str,
    objective: str,
    *,
    folds: int = 5,
    seed: int = 0,
    keep: Tensor | None = None,
) -> Gains:
    """Gain of every example under the strength that was fitted without its fold.

    With several settings the choice between them is part of the fit: it too is made, by an inner
    cross-validation, without the fold. Examples outside ``keep`` (E,) bool play no part and get 0.
    """
    first = next(iter(views.values()))
    keep = torch.ones(first.examples, dtype=torch.bool) if keep is None else keep
    nll, correct = torch.zeros(2, first.examples, dtype=torch.float64)
    for train, held_out in folds_of(keep, folds, seed):
        view = views[select(views, estimator, objective, train, folds, seed)]
        gains = gains_at(view, fit(view, estimator, objective, train).strength)
        nll[held_out], correct[held_out] = gains.nll[held_out], gains.correct[held_out]
    return Gains(nll, correct)
