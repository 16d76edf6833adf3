"""The percentile bootstrap: examples drawn anew, with replacement (Efron and Tibshirani 1993, chapter 13)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from svdk.utils.checks import check_count

RESAMPLES = 10_000
LEVEL = 0.95
_CHUNK = 1 << 20
"""Entries of the resampling weights that are expanded to floating point at once."""


def bootstrap(
    values: Tensor, weights: Tensor, *, resamples: int = 2000, seed: int = 0, level: float = LEVEL
) -> tuple[float, tuple[float, float]]:
    """A ratio of sums, ``values`` (E,) over ``weights`` (E,), and its interval over the E examples.

    A gain a token, for instance: the gain summed over the tokens of each example, and their number.
    """
    check_count("resamples", resamples)
    parts = [
        values[drawn].sum(1) / weights[drawn].sum(1).clamp(min=1)
        for drawn in _resample(len(values), resamples, seed, rows=256)
    ]
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.cat(parts).double().quantile(ends).tolist()
    return float(values.sum() / weights.sum()), (low, high)


def draws(scores: Tensor, *, resamples: int = RESAMPLES, seed: int = 0) -> Tensor:
    """The mean of each resample: (R,) float64 for scores (Q,), (R, M) for (Q, M), all M on the same draws."""
    check_count("resamples", resamples)
    columns = scores.double().reshape(len(scores), -1)
    count, means = len(scores), []
    constant = (columns == columns[0]).all(0)
    for weights in _weights(count, resamples, seed).split(max(1, _CHUNK // count)):
        means.append(weights.double() @ columns / count)
    result = torch.cat(means)
    # Scores that cancel leave a rounding error, which must not decide on which side of 0 an interval ends.
    result[result.abs() < 1e-12 * columns.abs().amax(0)] = 0.0
    result[:, constant] = columns[0, constant]  # not their value and a rounding error
    return result.reshape(resamples, *scores.shape[1:])


def quantiles(drawn: Tensor, level: float = LEVEL) -> tuple[float, float]:
    """The central interval of ``drawn`` (R,), which may hold infinities but no NaN, by order statistics."""
    ordered = drawn.sort().values
    outside = (1 - level) / 2
    # Rounded outwards: never narrower than asked for, and no interpolation between infinities.
    low = math.floor(outside * (len(ordered) - 1))
    return float(ordered[low]), float(ordered[len(ordered) - 1 - low])


@lru_cache(maxsize=4)  # a report compares hundreds of systems on the same few sets of questions
def _weights(count: int, resamples: int, seed: int) -> Tensor:
    """(R, Q) uint8: how often each question is in each resample (255 or more: once in 10^500 draws)."""
    parts = []
    for drawn in _resample(count, resamples, seed, rows=max(1, _CHUNK // count)):
        weights = torch.zeros(len(drawn), count, dtype=torch.int32)
        weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.int32))
        parts.append(weights.to(torch.uint8))
    return torch.cat(parts)


def _resample(count: int, resamples: int, seed: int, rows: int) -> Iterator[Tensor]:
    """Which of ``count`` examples each resample draws, (<= rows, count) int64 at a time: the same for any."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, resamples, rows):
        yield torch.randint(count, (min(rows, resamples - start), count), generator=generator)
