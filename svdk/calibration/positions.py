"""One strength for each output position, shrunk towards the single one. No model.

For position j the strength minimises ``NLL_j(mu) + (mu - mu0)^2 / (2 tau^2)``: the loss of the tokens there
and a Gaussian prior about the single optimum mu0 (design section 2). The sum is convex in mu. The width tau
is chosen by cross-validation over examples; 0 is among the widths, which is the single strength.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svdk.calibration.estimators import fit, split_folds
from svdk.calibration.loss_views import View

WIDTHS = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Candidates for tau, in units of mu."""
MOST = 64
"""Positions with a strength of their own, at most."""
LEAST = 5
"""Examples that reach such a position, at least."""
TOLERANCE = 1e-7
FARTHEST = 8.0
"""How far from the single strength a position's may be."""


def strengths_at(position: Tensor, positions: Sequence[float], strength: float) -> Tensor:
    """Mu float64 of tokens at ``position`` (T,): the listed one, beyond the list the single one."""
    table = torch.tensor([*positions, strength], dtype=torch.float64)
    return table[position.long().clamp(max=len(positions))]


@dataclass(frozen=True)
class PositionFit:
    """Strengths of the first output positions, and of all that come later."""

    strength: float
    positions: tuple[float, ...]
    width: float
    """tau; 0: the single strength did best, and there are no positions."""

    def of(self, position: Tensor) -> Tensor:
        """Mu float64 of tokens at ``position`` (T,)."""
        return strengths_at(position, self.positions, self.strength)


def fit_positions(
    view: View, position: Tensor, keep: Tensor | None = None, *, folds: int = 5, seed: int = 0
) -> PositionFit:
    """Strengths by position, from the examples ``keep`` (E,) bool (default: all).

    ``position`` (T,): the output position of each token. ``folds`` and ``seed``: of the cross-validation that
    chooses the width; of two widths that do equally well, the narrower one.
    """
    keep = torch.ones(view.examples, dtype=torch.bool) if keep is None else keep
    members = keep.nonzero()[:, 0]
    width = 0.0
    if len(members) >= 2:
        fold = torch.full((view.examples,), -1)
        fold[members] = split_folds(len(members), folds, seed)
        losses = dict.fromkeys(WIDTHS, 0.0)
        for k in range(min(folds, len(members))):
            single = fit(view, keep=keep & (fold != k)).strength
            for tau in WIDTHS:
                found = at_width(view, position, keep & (fold != k), single, tau)
                losses[tau] += float(view.evaluate(found.of(position)).nll[fold == k].sum())
        width = min(losses, key=losses.__getitem__)
    return at_width(view, position, keep, fit(view, keep=keep).strength, width)


def at_width(view: View, position: Tensor, keep: Tensor, single: float, tau: float) -> PositionFit:
    """The strengths for one width of the prior about ``single``."""
    use = keep[view.example]
    reached = torch.bincount(position[use].long(), minlength=1)[:MOST]
    short = (reached < LEAST).nonzero()
    count = int(short[0]) if len(short) else len(reached)
    if tau == 0 or count == 0:
        return PositionFit(single, (), 0.0)
    within = use & (position < count)
    group = position.long().clamp(max=count - 1)

    def slopes(mu: Tensor) -> tuple[Tensor, Tensor]:
        curve = view.at_tokens(mu[group])
        offset = mu - single
        parts = (curve.slope, offset / tau**2), (curve.curvature, torch.full_like(mu, tau**-2))
        slope, curvature = (prior.index_add(0, group[within], x[within]) for x, prior in parts)
        return slope, curvature

    # Newton's method, each position inside a bracket of its own that shrinks.
    low = torch.full((count,), max(view.limits[0], single - FARTHEST), dtype=torch.float64)
    high = torch.full_like(low, min(view.limits[1], single + FARTHEST))
    mu = torch.full_like(low, single)
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
    return PositionFit(single, tuple(mu.tolist()), tau)
