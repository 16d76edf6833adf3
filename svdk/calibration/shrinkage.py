"""Strengths of groups of tokens, shrunk towards the single one. No model.

For group j the strength minimises ``NLL_j(mu) + (mu - mu0)^2 / (2 tau^2)``: the loss of its tokens and a
Gaussian prior about the single optimum mu0 (design section 2). The sum is convex in mu. The width tau is
chosen by cross-validation over examples; 0 is among the widths, which is the single strength.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from svdk.calibration.estimators import fit, folds_of
from svdk.calibration.loss_views import View

WIDTHS = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Candidates for tau, in units of mu."""
TOLERANCE = 1e-7
FARTHEST = 8.0
"""How far from the single strength a group's may be."""


class Grouped(Protocol):
    """Strengths that a token's group decides."""

    def of_tokens(self) -> Tensor:
        """Mu float64 (T,) of all tokens."""


Found = TypeVar("Found", bound=Grouped)


def cross_validated(
    view: View, keep: Tensor, fit_at: Callable[[Tensor, float, float], Found], folds: int, seed: int
) -> Found:
    """What ``fit_at`` makes of the examples ``keep`` (E,) bool at the width that does best out of fold.

    ``fit_at(keep, single, tau)`` fits groups on some examples, given their single strength. Of two widths
    that do equally well, the narrower one is taken.
    """
    width = 0.0
    if int(keep.sum()) >= 2:
        losses = dict.fromkeys(WIDTHS, 0.0)
        for train, held_out in folds_of(keep, folds, seed):
            single = fit(view, keep=train).strength
            for tau in WIDTHS:
                found = fit_at(train, single, tau)
                losses[tau] += float(view.evaluate(found.of_tokens()).nll[held_out].sum())
        width = min(losses, key=losses.__getitem__)
    return fit_at(keep, fit(view, keep=keep).strength, width)


def group_strengths(view: View, group: Tensor, count: int, keep: Tensor, single: float, tau: float) -> Tensor:
    """Mu float64 (count,) of the groups, from the tokens of the examples ``keep`` (E,) bool.

    ``group`` (T,) int64: the group of each token; tokens from ``count`` on belong to none. A group without
    tokens has the ``single`` strength, as all have with ``tau`` 0.
    """
    mu = torch.full((count,), single, dtype=torch.float64)
    if tau == 0 or count == 0:
        return mu
    within = keep[view.example] & (group < count)
    place = group.clamp(max=count - 1)

    def slopes(mu: Tensor) -> tuple[Tensor, Tensor]:
        curve = view.at_tokens(mu[place])
        parts = ((mu - single) / tau**2, curve.slope), (torch.full_like(mu, tau**-2), curve.curvature)
        slope, curvature = (prior.index_add(0, place[within], x[within]) for prior, x in parts)
        return slope, curvature

    # Newton's method, each group inside a bracket of its own that shrinks.
    low = torch.full_like(mu, max(view.limits[0], single - FARTHEST))
    high = torch.full_like(mu, min(view.limits[1], single + FARTHEST))
    for _ in range(100):
        slope, curvature = slopes(mu)
        step = slope / curvature
        low, high = torch.where(slope < 0, mu, low), torch.where(slope > 0, mu, high)
        moving = (step.abs() > TOLERANCE) & (high - low > TOLERANCE)
        if not bool(moving.any()):
            break
        proposal = mu - step
        inside = (proposal > low) & (proposal < high)
        mu = torch.where(moving, torch.where(inside, proposal, (low + high) / 2), mu)
    return mu
