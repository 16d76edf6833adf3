"""One strength for each of the first output positions, shrunk towards the single one. No model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svdk.calibration.loss_views import View
from svdk.calibration.shrinkage import cross_validated, group_strengths

MOST = 64
"""Positions with a strength of their own, at most."""
LEAST = 5
"""Examples that reach such a position, at least."""


def strengths_at(position: Tensor, positions: Sequence[float], strength: float) -> Tensor:
    """Mu float64 of tokens at ``position`` (T,): the listed one, beyond the list the single one."""
    table = torch.tensor([*positions, strength], dtype=torch.float64)
    return table[position.long().clamp(max=len(positions))]


@dataclass(frozen=True, eq=False)
class PositionFit:
    """Strengths of the first output positions, and of all that come later."""

    strength: float
    positions: tuple[float, ...]
    width: float
    """tau; 0: the single strength did best, and there are no positions."""
    position: Tensor
    """(T,): the output position of each token."""

    def of_tokens(self) -> Tensor:
        """Mu float64 (T,)."""
        return strengths_at(self.position, self.positions, self.strength)


def fit_positions(
    view: View, position: Tensor, keep: Tensor | None = None, *, folds: int = 5, seed: int = 0
) -> PositionFit:
    """Strengths by position, from the examples ``keep`` (E,) bool (default: all).

    ``position`` (T,): the output position of each token. ``folds`` and ``seed``: of the cross-validation that
    chooses the width (see :mod:`svdk.calibration.shrinkage`).
    """
    keep = torch.ones(view.examples, dtype=torch.bool) if keep is None else keep

    def fit_at(keep: Tensor, single: float, tau: float) -> PositionFit:
        return at_width(view, position, keep, single, tau)

    return cross_validated(view, keep, fit_at, folds, seed)


def at_width(view: View, position: Tensor, keep: Tensor, single: float, tau: float) -> PositionFit:
    """The strengths for one width of the prior about ``single``."""
    reached = torch.bincount(position[keep[view.example]].long(), minlength=1)[:MOST]
    short = (reached < LEAST).nonzero()
    count = int(short[0]) if len(short) else len(reached)
    if tau == 0 or count == 0:
        return PositionFit(single, (), 0.0, position)
    mu = group_strengths(view, position.long(), count, keep, single, tau)
    return PositionFit(single, tuple(mu.tolist()), tau, position)
