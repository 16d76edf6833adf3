"""The bootstrap: what it must give where the answer is known, and the same draws as ever."""

from __future__ import annotations

import math

import pytest
import torch

from svdk.errors import InputError
from svdk.utils import bootstrap
from svdk.utils.bootstrap import bootstrap as ratio
from svdk.utils.bootstrap import draws, quantiles


def normal(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_draws_follow_the_bootstrap_distribution():
    # Two questions: the mean of a resample is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4.
    drawn = draws(torch.tensor([0.0, 1.0]), resamples=40_000)
    shares = [float((drawn == x).double().mean()) for x in (0.0, 0.5, 1.0)]
    assert sum(shares) == pytest.approx(1.0)
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.01)  # 0.01: four standard errors


def test_memory_bound_does_not_change_the_draws(monkeypatch):
    scores = normal(30, 11)
    whole = draws(scores, resamples=500, seed=77)
    bootstrap._weights.cache_clear()
    monkeypatch.setattr(bootstrap, "_CHUNK", 100)
    assert torch.allclose(draws(scores, resamples=500, seed=77), whole, rtol=0, atol=1e-12)
    bootstrap._weights.cache_clear()


def test_scores_that_cancel_leave_no_rounding_error():
    drawn = draws(torch.tensor([0.1, 0.2, -0.3], dtype=torch.float64), resamples=1000)
    assert float(drawn.abs()[drawn != 0].min()) > 0.03  # each question once: 0, not 2e-17


def test_columns_share_their_draws():
    scores = torch.stack([normal(40, 12), normal(40, 13)], 1)
    both = draws(scores, resamples=200)
    assert both.shape == (200, 2)
    assert torch.allclose(both[:, 1], draws(scores[:, 1].clone(), resamples=200), atol=1e-12)


def test_quantiles_take_infinities():
    drawn = torch.tensor([1.0, 2.0, 3.0] + [math.inf] * 97)
    assert quantiles(drawn) == (3.0, math.inf)


def test_bootstrap_is_deterministic_and_resamples_examples():
    gain, tokens = torch.tensor([4.0, 0.0, 0.0, 0.0], dtype=torch.float64), torch.full((4,), 2.0).double()
    mean, (low, high) = ratio(gain, tokens, seed=3)
    assert (mean, (low, high)) == ratio(gain, tokens, seed=3)
    assert mean == 0.5
    # The example with the gain is drawn 0 times in 32 % of the resamples, 3 or more times in 5 %.
    assert (low, high) == (0.0, 1.5)


@pytest.mark.parametrize("resamples", [0, 1.5, True])
def test_unusable_numbers_of_resamples_are_refused(resamples):
    message = f"resamples was {resamples}; allowed: an integer of at least 1"
    with pytest.raises(InputError, match=message):
        draws(normal(3, 0), resamples=resamples)
    with pytest.raises(InputError, match=message):
        ratio(normal(3, 0), torch.ones(3), resamples=resamples)


def test_draws_are_those_of_earlier_versions():
    """Intervals in reports that were written with them must come out again."""
    values, weights = normal(50, 1), torch.arange(1.0, 51).double()
    mean, ends = ratio(values, weights, resamples=300, seed=7)
    assert mean == pytest.approx(0.0035168869183322027, rel=1e-12)
    assert ends == pytest.approx((-0.00937628740400409, 0.013236750109202423), rel=1e-12)
    found = draws(torch.stack([values, weights], 1), resamples=300, seed=7)
    assert found.sum(0).tolist() == pytest.approx([23.966547311197196, 7620.36], rel=1e-12)
    assert quantiles(found[:, 0]) == pytest.approx((-0.23718458340799575, 0.3408384114600638), rel=1e-12)
