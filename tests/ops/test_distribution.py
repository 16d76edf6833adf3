"""What the samplers draw, by support first and then by chi-square with the tail in view.

Not under an interpreter, which is too slow for enough draws: there, tokens are compared one by one with
the reference's (tests/ops/test_ops.py). ``svdk.bench.goodness`` says how rare a false alarm is, and
``tests/ops/test_power.py`` what these tests catch.
"""

from __future__ import annotations

import pytest
import torch

import svdk
from svdk.bench.goodness import PER_TEST, chi_square_p_value, fit_p_values
from tests.helpers import ops_cases as oc

VOCAB = 64
DRAWS = 1_000_000
BACKEND = pytest.mark.parametrize("backend", [b for b in oc.kernels() if not oc.interpreted(b)])


def one_row():
    """Probabilities from about 0.3 down to 1e-6, ids shuffled."""
    generator = torch.Generator().manual_seed(1)
    warm = -0.2 * torch.arange(VOCAB)[torch.randperm(VOCAB, generator=generator)].float()
    return warm[None], warm[None] + 0.5 * torch.randn(1, VOCAB, generator=generator)


SAMPLERS = {
    "steered": ({"alpha": 0.0, "strength": 2.0}, True),
    "masked": ({"alpha": 0.05, "strength": 2.0}, True),
    "log_ratio": ({"alpha": 0.0, "direction": "log_ratio", "strength": 0.7}, True),
    "penalty": ({"alpha": 0.3, "penalty": -1.0}, True),
    "plain": ({}, False),
    "plain_top_p": ({"top_p": 0.95, "temperature": 1.5}, False),
    "top_k_min_p": ({"top_k": 20, "min_p": 0.05, "alpha": 0.0}, True),
}


@BACKEND
@pytest.mark.parametrize("vary", ["seed", "offset"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_draws_follow_the_distribution(backend, name, vary):
    kwargs, steered = SAMPLERS[name]
    warm, base = (x.to(oc.device_of(backend)) for x in one_row())
    args = (warm, base) if steered else (warm,)
    *_, masses = svdk.reference.steered_rows(*oc.flat_arguments(args, kwargs))
    probabilities = masses[0] / masses[0].sum()
    allowed = probabilities > 0

    draws = DRAWS
    keys = torch.arange(draws, device=warm.device) + 12345
    rows = tuple(x.expand(draws, -1) for x in args)  # row stride 0: one row, many draws
    tokens = svdk.steered_sample(*rows, backend=backend, **{vary: keys}, **kwargs).cpu()
    counts = torch.bincount(tokens, minlength=VOCAB).double()
    assert counts[~allowed.cpu()].sum() == 0, "a token that the filters removed was drawn"
    for which, p in fit_p_values(counts, probabilities.cpu()).items():
        assert p > PER_TEST, f"{which}: p = {p:g}"


@BACKEND
def test_neighbouring_steps_draw_independently(backend):
    """With equal logits each pair of tokens must come equally often at one offset and the next."""
    draws = DRAWS
    flat = torch.zeros(1, 8, device=oc.device_of(backend)).expand(draws, -1)
    keys = torch.arange(draws, device=flat.device)
    a = svdk.steered_sample(flat, seed=keys, offset=0, backend=backend).cpu()
    b = svdk.steered_sample(flat, seed=keys, offset=1, backend=backend).cpu()
    pairs = torch.bincount(a * 8 + b, minlength=64).double()
    assert chi_square_p_value(pairs, torch.full((64,), draws / 64, dtype=torch.float64)) > PER_TEST


@BACKEND
@pytest.mark.parametrize("temperature", [1e-20, 1e-3, 1.0, 50.0, 1e20])
@pytest.mark.parametrize("size", [0.0, 1e8, -3e38])
def test_equal_logits_are_drawn_equally(backend, size, temperature):
    """Whatever their size: they are relative to the largest before anything is added to them."""
    device = oc.device_of(backend)
    flat = torch.full((1, 1500), size, device=device).expand(DRAWS // 10, -1)
    keys = torch.arange(flat.shape[0], device=device)
    tokens = svdk.steered_sample(flat, seed=keys, temperature=temperature, backend=backend).cpu()
    cells = torch.bincount(tokens // 15, minlength=100).double()
    expected = torch.full((100,), flat.shape[0] / 100, dtype=torch.float64)
    assert chi_square_p_value(cells, expected) > PER_TEST


def test_the_chi_square_test_can_fail():
    """The statistic rejects what it should: one token of probability 1e-3 drawn 20 % too often."""
    expected = torch.full((100,), 0.00999, dtype=torch.float64)
    expected[0] = 1 - expected[1:].sum()
    expected *= 1_000_000
    counts = expected.clone()
    assert chi_square_p_value(counts, expected) > 0.99
    counts[5] *= 1.2
    assert chi_square_p_value(counts, expected) < PER_TEST
