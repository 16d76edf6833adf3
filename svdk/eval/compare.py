"""Paired comparisons of two systems on the same questions: percentile bootstrap over questions.

The bootstrap draws questions anew, with replacement, and takes both systems' scores from the same draw
(Efron and Tibshirani 1993, chapters 13 and 15). It covers the choice of the questions and nothing else: not
the seed of a warm start, and not the choice of what to compare, which :func:`family` accounts for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svdk.errors import InputError
from svdk.utils.bootstrap import LEVEL, RESAMPLES, draws, quantiles


@dataclass(frozen=True)
class Difference:
    """The mean of b - a over n questions, with its bootstrap interval."""

    mean: float
    low: float
    high: float
    n: int
    significant: bool
    """Whether the interval excludes 0."""
    p: float = math.nan
    """Two-sided bootstrap p-value, at least 2 / (resamples + 1): for :func:`family`."""

    @property
    def sign(self) -> int:
        """1 or -1 when the interval lies above or below 0, else 0."""
        return 0 if not self.significant else 1 if self.mean > 0 else -1


def paired(
    a: Tensor, b: Tensor, *, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> Difference:
    """The mean of ``b - a`` over questions and its percentile bootstrap interval.

    Equal differences have the interval [d, d]; a single question has an unbounded one, for it says nothing
    of the spread.

    Args:
        a: (Q,) score of each question under one system.
        b: (Q,) the same questions, in the same order, under the other.
        resamples: of the bootstrap, at least 1.
        seed: of the resampling; the same for the same number of questions gives the same draws.
        level: of the interval, between 0 and 1.

    Raises:
        InputError: shapes that differ or are not (Q,), no question, NaN or infinite scores.

    """
    for name, scores in (("a", a), ("b", b)):
        _check(name, scores)
    if a.shape != b.shape:
        raise InputError(f"b held {len(b)} scores; allowed: {len(a)}, as many as a")
    gaps = b.double() - a.double()
    return summarise(float(gaps.mean()), draws(gaps, resamples=resamples, seed=seed), len(gaps), level)


def macro(
    gaps: Sequence[Tensor], *, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> Difference:
    """The unweighted mean over tasks of their mean differences; each task's questions are drawn apart.

    ``gaps``: (Q_t,) differences b - a of each task t. ``n`` of the result is the sum of the Q_t.
    """
    if not gaps:
        raise InputError("gaps held 0 tasks; allowed: at least 1")
    for index, task in enumerate(gaps):
        _check(f"gaps[{index}]", task)
    # A seed for each task: two tasks of one size must not share their draws.
    drawn = [draws(task, resamples=resamples, seed=seed + index) for index, task in enumerate(gaps)]
    mean = sum(float(task.double().mean()) for task in gaps) / len(gaps)
    count = sum(len(task) for task in gaps)
    if min(len(task) for task in gaps) < 2:
        return _unknown(mean, count)
    return summarise(mean, torch.stack(drawn).mean(0), count, level)


def summarise(mean: float, drawn: Tensor, n: int, level: float = LEVEL) -> Difference:
    """A :class:`Difference` from the means (R,) of R resamples."""
    if not 0 < level < 1:
        raise InputError(f"level was {level}; allowed: a number between 0 and 1")
    if n < 2:
        return _unknown(mean, n)
    low, high = quantiles(drawn, level)
    tail = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    p = min(1.0, 2 * (tail + 1) / (len(drawn) + 1))
    return Difference(mean, low, high, n, low > 0 or high < 0, p)


def _unknown(mean: float, n: int) -> Difference:
    return Difference(mean, -math.inf, math.inf, n, False, 1.0)


def family(differences: Sequence[Difference], *, level: float = LEVEL) -> tuple[bool, ...]:
    """Which differences stay significant when all are judged together (Holm 1979, Scand. J. Statist. 6).

    The probability of even one false claim in the family is then at most 1 - ``level``. One that is not
    ``significant`` by itself never becomes so.
    """
    order = sorted(range(len(differences)), key=lambda i: differences[i].p)
    kept = [False] * len(differences)
    for rank, index in enumerate(order):
        found = differences[index]
        if math.isnan(found.p) or found.p > (1 - level) / (len(differences) - rank):
            break
        kept[index] = found.significant
    return tuple(kept)


def _check(name: str, scores: Tensor) -> None:
    if scores.dim() != 1 or not len(scores):
        raise InputError(f"{name} had shape {tuple(scores.shape)}; allowed: (Q,) with at least 1 question")
    if not bool(scores.isfinite().all()):
        bad = int((~scores.isfinite()).nonzero()[0])
        raise InputError(f"{name} was {float(scores[bad])} for question {bad}; allowed: finite scores")
