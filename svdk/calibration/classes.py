"""Strengths by class of token (content, template, stop), shrunk towards the single one. No model.

The class is that of the token that the warm-started model likes best, because in decoding no label is known.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from svdk.calibration.kept_statistics import Statistics
from svdk.calibration.loss_views import View
from svdk.calibration.shrinkage import cross_validated, group_strengths
from svdk.ops.configs import ClassStrengths


@dataclass(frozen=True, eq=False)
class ClassFit:
    """Strengths of content, and of the other classes."""

    strength: float
    """Of content."""
    classes: ClassStrengths | None
    """None: the single strength did best."""
    width: float
    """tau"""
    due: Tensor
    """(T,): the token that the warm-started model likes best."""

    def of_tokens(self) -> Tensor:
        """Mu float64 (T,)."""
        if self.classes is None:
            return torch.full(self.due.shape, self.strength, dtype=torch.float64)
        return self.classes.at(self.due, self.strength)


def fit_classes(
    statistics: Statistics, view: View, keep: Tensor | None = None, *, folds: int = 5, seed: int = 0
) -> ClassFit:
    """Strengths by class, from the examples ``keep`` (E,) bool (default: all).

    What is template is told by the same examples. ``folds`` and ``seed``: of the cross-validation that
    chooses the width (see :mod:`svdk.calibration.shrinkage`).
    """
    keep = torch.ones(view.examples, dtype=torch.bool) if keep is None else keep
    due, stop_ids = statistics.due(), statistics.stops()

    def fit_at(keep: Tensor, single: float, tau: float) -> ClassFit:
        if tau == 0:
            return ClassFit(single, None, 0.0, due)
        known = ClassStrengths(single, single, statistics.template_ids(keep), stop_ids)
        mu = group_strengths(view, known.classes_of(due), 3, keep, single, tau)
        content, template, stop = mu.tolist()
        return ClassFit(content, dataclasses.replace(known, template=template, stop=stop), tau, due)

    return cross_validated(view, keep, fit_at, folds, seed)
