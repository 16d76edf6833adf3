"""Goodness of fit of drawn tokens, for the tests and for the check on a GPU.

Seeds are fixed, so a test that passes once passes at every rerun. What ``PER_TEST`` bounds is the chance
that a right sampler fails when its bits change: a new stream of noise, other seeds, another test row. All
tests together then fail with a probability below ``FAMILY`` (Bonferroni), one CI run in ten thousand.
``tests/ops/test_power.py`` shows that biased samplers fail by far.
"""

from __future__ import annotations

import torch
from torch import Tensor

FAMILY = 1e-4
"""Probability of any false alarm in a whole run."""
TESTS = 200
"""Statistical tests in a run, at most: 37 a backend for three backends that draw, and the GPU check's."""
PER_TEST = FAMILY / TESTS
"""A test fails at a p-value below this: 5e-7."""


def chi_square_p_value(counts: Tensor, expected: Tensor) -> float:
    """Tail probability; cells are pooled from the rare end until each expects at least 10 draws."""
    order = expected.argsort()
    cells, seen, want = [], 0.0, 0.0
    for c, e in zip(counts[order].tolist(), expected[order].tolist(), strict=True):
        seen, want = seen + c, want + e
        if want >= 10:
            cells.append((seen, want))
            seen = want = 0.0
    statistic = sum((c - e) ** 2 / e for c, e in cells)
    shape = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(shape, torch.tensor(statistic / 2, dtype=torch.float64)))


def count_p_value(seen: float, expected: float) -> float:
    """Two-sided tail probability of a count of rare events (Poisson, which bounds the binomial's)."""
    rate = torch.tensor(float(expected), dtype=torch.float64)
    at_least = (
        float(torch.special.gammainc(torch.tensor(float(seen), dtype=torch.float64), rate)) if seen else 1.0
    )
    at_most = float(torch.special.gammaincc(torch.tensor(seen + 1.0, dtype=torch.float64), rate))
    return min(1.0, 2 * min(at_least, at_most))


def fit_p_values(counts: Tensor, probabilities: Tensor, tail_mass: float = 1e-3) -> dict[str, float]:
    """p-values of draws ``counts`` (V,) under ``probabilities`` (V,): of the whole, and of the tail.

    The tail is the rarest tokens that together hold ``tail_mass``; a fit dominated by the common ones would
    not see it.
    """
    draws = float(counts.sum())
    order = probabilities.argsort()
    tail = order[probabilities[order].cumsum(0) <= tail_mass]
    return {
        "fit": chi_square_p_value(counts, probabilities * draws),
        "tail": count_p_value(float(counts[tail].sum()), float(probabilities[tail].sum()) * draws),
    }
