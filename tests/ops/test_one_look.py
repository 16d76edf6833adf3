"""Plain rows are weighed block by block against the maximum so far: what must not pass for a mass there."""

from __future__ import annotations

import math

import pytest
import torch

import svdk
from svdk.ops.results import Status


@pytest.mark.parametrize("place", [0, 1500, 4000, 4999])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_what_is_not_finite_is_seen_in_any_block_of_a_plain_row(place, value, options):
    z = torch.randn(1, 5000, generator=torch.Generator().manual_seed(0))
    z[0, place] = value
    _, info = svdk.steered_sample(z, seed=1, return_info=True, **options)
    token = svdk.steered_sample(z, seed=1, **options)
    assert info.status.item() == Status.INVALID
    assert token.item() == torch.where(z.isfinite(), z, -math.inf).argmax()


@pytest.mark.parametrize("height", [10.0, 30.0, 200.0, 1e30])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"temperature": 0.05}])
def test_a_maximum_that_leaps_up_in_a_later_block(height, options):
    z = torch.zeros(64, 5000)
    z[:, 3000] = height
    tokens = svdk.steered_sample(z, seed=1, **options)
    want = svdk.steered_sample(z, seed=1, backend="reference", **options)
    assert torch.equal(tokens, want) and (tokens == 3000).float().mean() > 0.5
