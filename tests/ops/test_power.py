"""The statistics can fail: samplers biased in the ways that are known from practice, and ours beside them.

Each bias is one that shipped somewhere: probabilities in bfloat16, uniforms of 24 bits (a float's), noise
that goes with a token's rank, a uniform that can be 1. The same test that rejects it must accept every
backend of ours.
"""

from __future__ import annotations

import math

import pytest
import torch

import svdk
from svdk.bench.goodness import PER_TEST, chi_square_p_value, count_p_value, fit_p_values
from svdk.ops.philox import random_bits
from tests.helpers import ops_cases as oc

BACKEND = pytest.mark.parametrize("backend", [b for b in oc.kernels() if not oc.interpreted(b)])
OUTRIGHT = PER_TEST / 1000
"""A biased sampler must fail by a margin."""


def many(backend: str, logits: torch.Tensor, draws: int, **kwargs) -> torch.Tensor:
    """Tokens of ``draws`` rows that are all ``logits`` (V,), with seeds 7, 8, ..."""
    row = logits.float()[None].to(oc.device_of(backend))
    seeds = torch.arange(draws, device=row.device) + 7
    parts = [
        svdk.steered_sample(row.expand(len(part), -1), seed=part, backend=backend, **kwargs).cpu()
        for part in seeds.split(250_000)
    ]
    return torch.cat(parts)


@BACKEND
def test_bfloat16_probabilities_are_noticed(backend):
    """Two groups of tokens, one of which bfloat16 rounds up by half a step and the other down: 0.4 %."""
    draws = 4_000_000
    step = 2.0**-13
    exact = 2.0**-6 + step * torch.where(torch.arange(63) % 2 == 0, 0.49, 0.51).double()
    exact = torch.cat([exact, 1 - exact.sum(0, keepdim=True)])
    rounded = exact.bfloat16().double()

    def p_value(probabilities):
        counts = torch.bincount(many(backend, probabilities.log(), draws), minlength=64).double()
        groups = [slice(0, 63, 2), slice(1, 63, 2), slice(63, 64)]
        cells = [torch.stack([x[g].sum() for g in groups]) for x in (counts, exact * draws)]
        return chi_square_p_value(*cells)

    assert p_value(exact) > PER_TEST
    assert p_value(rounded) < OUTRIGHT


def rare_row(vocab: int, gap: float) -> tuple[torch.Tensor, float]:
    """One token for nearly all, and others at e^-gap of it each; the mass that they have together."""
    logits = torch.full((vocab,), -gap)
    logits[vocab // 2] = 0.0
    rare = (vocab - 1) * math.exp(float(logits[0]))
    return logits, rare / (1 + rare)


def gumbel(uniform: torch.Tensor) -> torch.Tensor:
    return -(-uniform.log()).log()


@BACKEND
def test_uniforms_of_24_bits_are_noticed(backend):
    """Their Gumbel noise ends at 17.3, so tokens much further than that below the best are hardly drawn."""
    draws = 1_600_000
    logits, mass = rare_row(4096, 18.7)
    ours = int((many(backend, logits, draws) != logits.argmax()).sum())
    assert count_p_value(ours, mass * draws) > PER_TEST

    generator = torch.Generator().manual_seed(3)

    def coarse(u):
        return ((u * 2**24).floor() + 0.5) * 2.0**-24

    u = torch.rand(2, draws, generator=generator, dtype=torch.float64)
    best_of_rare = gumbel(coarse(u[0] ** (1 / (len(logits) - 1)))) + float(logits[0])
    theirs = int((best_of_rare > gumbel(coarse(u[1]))).sum())
    assert count_p_value(theirs, mass * draws) < OUTRIGHT


def coupling(p: torch.Tensor, q: torch.Tensor) -> float:
    """P(the same token) when both draw with the same Gumbel noise keyed by token id."""
    return float((1 / torch.maximum(p[None] / p[:, None], q[None] / q[:, None]).sum(1)).sum())


@BACKEND
def test_noise_that_goes_with_the_rank_is_noticed(backend):
    """Each row alone is right. But a small change of the logits must change few tokens for a given seed."""
    draws = 100_000
    generator = torch.Generator().manual_seed(4)
    one = torch.randn(64, generator=generator).double() * 0.1
    two = one + torch.randn(64, generator=generator).double() * 0.05
    same = coupling(one.softmax(0), two.softmax(0)) * draws

    def p_value(a, b):
        agree = int((a == b).sum())
        counts = torch.tensor([agree, draws - agree]).double()
        return chi_square_p_value(counts, torch.tensor([same, draws - same], dtype=torch.float64))

    assert p_value(many(backend, one, draws), many(backend, two, draws)) > PER_TEST

    seeds = torch.arange(draws) + 7
    noise = gumbel((random_bits(seeds, torch.zeros_like(seeds), 64).double() + 0.5) * 2.0**-32)

    def by_rank(logits):
        order = logits.argsort(descending=True)
        return order[(logits[order] + noise).argmax(1)]

    tokens = by_rank(one)
    fit = fit_p_values(torch.bincount(tokens, minlength=64).double(), one.softmax(0))
    assert min(fit.values()) > PER_TEST, "the marginal distribution of this sampler is right"
    assert p_value(tokens, by_rank(two)) < OUTRIGHT


# Where Philox yields the extreme words (found by search): seed, token, word.
EXTREMES = ((346191657, 7, 0xFFFFFFFF), (1343428, 3, 0))


@pytest.mark.parametrize("backend", oc.kernels())
@pytest.mark.parametrize(("seed", "token", "word"), EXTREMES, ids=["ones", "zeros"])
def test_a_uniform_is_never_0_or_1(backend, seed, token, word):
    """A uniform of 1 draws its token whatever its logit is; one of 0 never does."""
    device = oc.device_of(backend)
    assert int(random_bits(torch.tensor([seed]), torch.tensor([0]), 64)[0, token]) == word
    logits = torch.zeros(1, 64, device=device)
    logits[0, token] = -40.0 if word else 40.0
    vector = torch.zeros(64, device=device)
    for kwargs in ({}, {"top_k": 63}, {"vector": vector, "alpha": 0.0}, {"vector": vector, "alpha": 1e-30}):
        got = svdk.steered_sample(logits, seed=seed, backend=backend, **kwargs)
        oc.assert_same_tokens(got, (logits,), {"seed": seed, **kwargs})
        assert (int(got[0]) == token) == (word == 0)

    # Float arithmetic does just that: 32 bits and a half do not fit, and the uniform becomes 1.
    bits = random_bits(torch.tensor([seed]), torch.tensor([0]), 64).float()
    careless = logits.cpu() + gumbel(bits * 2.0**-32)
    assert (int(careless.argmax()) == token) == (word != 0)


@BACKEND
def test_tokens_far_below_the_best_are_drawn_as_often_as_they_should_be(backend):
    """Steered and filtered too: the shortcuts of the sweeps must not cut the tail off."""
    draws = 200_000
    logits, mass = rare_row(300, 14.0)
    vector = torch.zeros(len(logits), device=oc.device_of(backend))
    for kwargs in (
        {"top_k": len(logits) - 1},
        {"vector": vector, "alpha": 1e-9},
        {"vector": vector, "alpha": 0.0},
    ):
        seen = int((many(backend, logits, draws, **kwargs) != logits.argmax()).sum())
        assert count_p_value(seen, mass * draws) > PER_TEST, kwargs
