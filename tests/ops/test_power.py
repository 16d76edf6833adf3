"""The statistics can fail: samplers biased in the ways that are known from practice, and ours beside them.

Each bias is one that shipped somewhere: probabilities in bfloat16, uniforms of 24 bits (a float's), a draw
that goes by a token's rank, a uniform that can be 1. The same test that rejects it must accept every
backend of ours.
"""

from __future__ import annotations

import math

import pytest
import torch

import svdk
from svdk.bench.goodness import PER_TEST, chi_square_p_value, count_p_value, fit_p_values
from svdk.ops import reference
from svdk.ops.philox import row_uniforms
from tests.helpers import cuda_shim
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


@BACKEND
def test_uniforms_of_24_bits_are_noticed(backend):
    """Most tokens of 1e-8 lie between two of them: they are never drawn, and their neighbours eight times."""
    draws = 1_600_000
    logits, mass = rare_row(4096, 18.7)
    reached = logits.double().softmax(0).cumsum(0)
    steps = (torch.stack([torch.cat([reached.new_zeros(1), reached[:-1]]), reached]) * 2**24 - 0.5).ceil()
    between = steps[0] == steps[1]  # no (k + 0.5) / 2^24 in the token's share
    assert 3000 < int(between.sum()) < 4000
    ours = int(between[many(backend, logits, draws)].sum())
    assert count_p_value(ours, float(logits.double().softmax(0)[between].sum()) * draws) > PER_TEST

    uniform = torch.rand(draws, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    coarse = ((uniform * 2**24).floor() + 0.5) * 2.0**-24
    theirs = int(between[torch.searchsorted(reached, coarse, right=True).clamp(max=4095)].sum())
    assert count_p_value(theirs, mass * draws * 0.8) < OUTRIGHT


def coupling(p: torch.Tensor, q: torch.Tensor) -> float:
    """P(the same token) when both draw with the same uniform, tokens in order of id."""
    (a, b), (c, d) = ((x.cumsum(0) - x, x.cumsum(0)) for x in (p, q))
    return float((torch.minimum(b, d) - torch.maximum(a, c)).clamp(min=0).sum())


@BACKEND
def test_a_draw_that_goes_by_rank_is_noticed(backend):
    """Each row alone is right. But a token must depend on its own logits, not on what order they have."""
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
    uniform = row_uniforms(seeds, torch.zeros_like(seeds))

    def by_rank(logits):
        order = logits.argsort(descending=True)
        return order[torch.searchsorted(logits[order].softmax(0).cumsum(0), uniform).clamp(max=63)]

    tokens = by_rank(one)
    fit = fit_p_values(torch.bincount(tokens, minlength=64).double(), one.softmax(0))
    assert min(fit.values()) > PER_TEST, "the marginal distribution of this sampler is right"
    assert p_value(tokens, by_rank(two)) < OUTRIGHT


def test_masses_that_are_rounded_as_large_logits_are_noticed():
    """By ``ops_cases.assert_same_tokens``. Next to 1e6 a float loses what tells them apart."""
    warm = torch.randn(500, 40, generator=torch.Generator().manual_seed(5)).round(decimals=1) + 1e6
    kwargs = {"seed": torch.arange(500), "temperature": 0.7}
    rate = torch.tensor(1.4426950408889634 / 0.7)
    masses = torch.exp2(warm * rate - warm.amax(1, keepdim=True) * rate).double()
    rounded = reference.draw_row(masses, row_uniforms(kwargs["seed"], torch.zeros(500, dtype=torch.int64)))
    oc.assert_same_tokens(svdk.steered_sample(warm, **kwargs, backend="cpu"), (warm,), kwargs)
    with pytest.raises(AssertionError, match="of the mass away"):
        oc.assert_same_tokens(rounded, (warm,), kwargs)


# Where a row's uniform is next to 1 or 0 (found by search): seed, whether it is 1, nats of what is left.
EXTREMES = (
    (1352247272, True, -21.5),
    (1836991927, False, -21.5),
    (66150703786, True, -24.9),
    (43576376709, False, -25.6),
)


@pytest.mark.usefixtures("shim_backend")
@pytest.mark.parametrize("backend", cuda_shim.kernels())
@pytest.mark.parametrize("others", [63, 1])
@pytest.mark.parametrize(("seed", "near", "nats"), EXTREMES)
def test_a_uniform_is_never_0_or_1(backend, seed, near, nats, others):
    """A uniform of 1, which a float's next to it is, draws the last token whatever its logit is.

    And a token 25 nats below the best, or in the last 2^-36 of the mass, is drawn where it should be.
    """
    device = oc.device_of(backend)
    uniform = float(row_uniforms(torch.tensor([seed]), torch.tensor([0])))
    rest = 1 - uniform if near else uniform
    assert 0 < rest < math.exp(nats)
    assert float(torch.tensor(1 - rest, dtype=torch.float32)) == 1.0
    token = 63 if near else 0
    vector = torch.zeros(64, device=device)
    edge = math.log(rest * others / (1 - rest))  # the logit at which the token has just that share
    for gap, drawn in ((0.01, True), (-0.01, False), (-math.inf, False)):
        logits = torch.zeros(1, 64, device=device)
        if others == 1:
            logits[0, : 62 if near else 1], logits[0, 63 if near else 2 :] = -math.inf, -math.inf
        logits[0, token] = edge + gap
        for kwargs in (
            {},
            {"top_k": 64},
            {"vector": vector, "alpha": 0.0},
            {"vector": vector, "alpha": 1e-30},
            {"base_logits": logits, "alpha": 0.0, "direction": "log_ratio"},
            {"base_logits": logits, "alpha": 0.0},
        ):
            got = svdk.steered_sample(logits, seed=seed, backend=backend, **kwargs)
            assert (int(got[0]) == token) == drawn, (gap, kwargs)
            assert int(got[0]) in (token, 62 if near else 1)


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


# Seeds (found by search) whose uniforms are in the first or the last 1e-6.
TAILS = torch.tensor([75465, 677491, 1686699, 3618098, 2705167, 3760026, 5985477])


@BACKEND
@pytest.mark.parametrize("place", [0, 75_000, 150_000])
def test_tokens_25_nats_below_the_best_have_their_share(backend, place):
    """150,000 tokens of 1.4e-11 beside one of 1: which of them is drawn, in every seed that draws one.

    They are next to nothing in a float. Only the sum of a block of 1,024 may miss those beside the best.
    """
    device = oc.device_of(backend)
    warm = torch.full((1, 150_001), -25.0, device=device)
    warm[0, place] = 0.0
    masses = warm[0].double().cpu().exp()
    uniform = row_uniforms(TAILS, torch.zeros_like(TAILS))
    reached = masses.cumsum(0) / masses.sum()
    want = torch.searchsorted(reached, uniform, right=True)
    assert len(set(want.tolist())) > 3
    rows, seeds = warm.expand(len(TAILS), -1), TAILS.to(device)
    vector = torch.zeros(warm.shape[1], device=device)
    for kwargs in (
        {},
        {"top_k": 150_000},
        {"vector": vector, "alpha": 0.0},
        {"vector": vector, "alpha": 1e-30},
        {"base_logits": rows, "alpha": 0.0},
    ):
        token = svdk.steered_sample(rows, seed=seeds, backend=backend, **kwargs).cpu()
        assert torch.equal((token - place).sign(), (want - place).sign()), kwargs
        for t, u in zip(token.tolist(), uniform.tolist(), strict=True):
            assert oc.boundary_distance(masses, t, u) < 1024 * math.exp(-25), kwargs
