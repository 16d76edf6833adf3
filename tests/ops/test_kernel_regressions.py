"""What fuzzing found in the kernels, one test a finding, on every backend; each fails without its fix."""

from __future__ import annotations

import math

import pytest
import torch

import svdk
from tests.helpers import cuda_shim
from tests.helpers import ops_cases as oc

pytestmark = [
    pytest.mark.parametrize("backend", cuda_shim.kernels()),
    pytest.mark.usefixtures("shim_backend"),
]
LOWEST = torch.finfo(torch.float32).min
LARGE = 5000  # more tokens than a list of candidates holds, and not a whole number of blocks


def on(backend: str, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.to(oc.device_of(backend)) for x in tensors]


@pytest.mark.parametrize("vocab", [LARGE, 8192])
def test_scores_of_a_plain_row_need_no_second_operand(backend, vocab):
    """It was read all the same: a crash, or NaN gains where the vocabulary was a multiple of 1024."""
    warm, labels = on(backend, oc.logits(2, vocab)[0], torch.tensor([3, 7]))
    got = svdk.steered_logprob(warm, labels=labels, backend=backend)
    want = svdk.steered_logprob(warm, labels=labels, backend="reference")
    for name in ("logprob", "gain", "norm2", "variance", "slope", "curvature"):
        oc.assert_close(getattr(got, name), getattr(want, name), name)


@pytest.mark.parametrize("kwargs", [{"top_k": 6000}, {"top_k": LARGE}, {"top_k": 6000, "min_p": 1e-30}])
def test_filters_that_remove_nothing_from_a_large_vocabulary(backend, kwargs):
    """The token was -1: the floor of "no filter" was a NaN."""
    (warm,) = on(backend, oc.logits(2, LARGE, scale=0.5)[0])
    token = svdk.steered_sample(warm, seed=4, backend=backend, **kwargs)
    oc.assert_same_tokens(token, (warm,), {"seed": 4, **kwargs})


def test_min_p_where_every_logit_is_the_lowest_float(backend):
    """A crash: the floor was above all of them."""
    (warm,) = on(backend, torch.full((2, 9), LOWEST))
    for kwargs in ({"min_p": 0.1}, {"min_p": 0.1, "top_p": 0.9}):
        token = svdk.steered_sample(warm, seed=1, backend=backend, **kwargs)
        oc.assert_same_tokens(token, (warm,), {"seed": 1, **kwargs})


def test_min_p_keeps_the_best_token_whatever_its_float_is_rounded_to(backend):
    """A crash: the best steered logit, rounded to float, lay below the floor taken from its double."""
    warm, base = on(backend, *oc.logits(64, LARGE, scale=0.01))
    kwargs = {"alpha": 0.0, "strength": -37.3, "min_p": 1.0, "direction": "log_ratio"}
    token = svdk.steered_sample(warm, base, backend=backend, **kwargs)
    oc.assert_same_tokens(token, (warm, base), kwargs)


@pytest.mark.parametrize("value", [1e17, 1e30, -1e30])
def test_equal_huge_logits_share_their_probability(backend, value):
    """max + log(n) is max again from 1e16 on: each token had probability 1."""
    warm, labels = on(backend, torch.full((2, 40), value), torch.tensor([0, 9]))
    vector = torch.linspace(-1, 1, 40, device=warm.device)
    batch = svdk.extract(warm, vector=vector, backend=backend)
    oc.assert_close(batch.p, torch.full((80,), 1 / 40), "p")
    info = svdk.steered_logprob(warm, labels=labels, vector=vector, strength=0.0, backend=backend)
    oc.assert_close(info.logprob, torch.full((2,), -math.log(40)), "logprob")
    oc.assert_close(info.logprob_warm, torch.full((2,), -math.log(40)), "logprob_warm")


def test_a_mask_of_lowest_floats_is_a_mask(backend):
    """exp() of far too little was 1e-38, and that times the lowest float is 3: K was off by thousands.

    (In C++ without AVX-512 only; ``tests/csrc/test_sanitizers.py`` replays it for each instruction set.)
    """
    warm, base = on(backend, *oc.logits(2, 4096, seed=3))
    warm[:, 100:] = LOWEST
    for alpha in (0.1, 0.0):
        got = svdk.extract(warm, base, alpha=alpha, backend=backend)
        want = svdk.extract(warm, base, alpha=alpha, backend="reference")
        oc.assert_close(got.kl, want.kl, "kl")


def test_tokens_without_mass_do_not_weigh_when_the_base_maximum_leaps_up(backend):
    """Beside a masked token, exp() of far too little was 1e-38 with AVX-512: K was in the thousands."""
    warm = torch.where(oc.logits(1, 4500)[0] > 0, 3.0, -3.0)
    warm[0, 0] = 200.0
    base = -0.2 * torch.arange(4500.0)[None]
    base[0, 0], base[0, 4000:] = -math.inf, -LOWEST
    warm, base = on(backend, warm, base)
    got, want = (svdk.extract(warm, base, backend=name) for name in (backend, "reference"))
    oc.assert_close(got.kl, want.kl, "kl")


def test_a_lone_huge_base_logit_does_not_overflow_the_sums(backend):
    """K was infinite, every steered logit NaN, and the token -1."""
    warm, base = on(backend, *oc.logits(2, 1280, seed=1, scale=0.1))
    base[0, 40] = 3e38
    for kwargs in (
        {},
        {"strength_mode": "kl_budget", "strength": 3.0, "alpha": 1e-30, "direction": "log_ratio"},
    ):
        token, info = svdk.steered_sample(warm, base, backend=backend, return_info=True, **kwargs)
        _, want = svdk.steered_sample(warm, base, backend="reference", return_info=True, **kwargs)
        assert bool(((token >= 0) & (token < 1280)).all())
        oc.assert_close(info.kl, want.kl, "kl")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_steered_logits_beyond_the_range_of_a_float(backend, temperature):
    """They were all taken for the largest float, and the block seen first won."""
    vector = torch.linspace(1, 2, LARGE) * 1e10
    warm, vector = on(backend, torch.zeros(1, LARGE), vector)
    for sign, best in ((1, LARGE - 1), (-1, 0)):
        token = svdk.steered_sample(
            warm, vector=vector, strength=sign * 1e30, temperature=temperature, backend=backend
        )
        assert token.tolist() == [best]
        label = torch.tensor([best], device=warm.device)
        info = svdk.steered_logprob(
            warm, labels=label, vector=vector, strength=sign * 1e30, alpha=0.0, backend=backend
        )
        assert info.logprob.tolist() == [0.0], "it was +inf"
        assert info.greedy.tolist() == [best]


@pytest.mark.parametrize("vocab", [50, 6000])
def test_the_variance_of_a_vector_survives_an_offset_and_a_confident_row(backend, vocab):
    """Taken as E[d^2] - E[d]^2 it was rounding noise, and with it the strength of a KL budget."""
    generator = torch.Generator().manual_seed(2)
    vector = torch.randn(vocab, generator=generator)
    confident = torch.randn(1, vocab, generator=generator) * 0.01
    confident[0, vocab // 2] = 12.0 + math.log(vocab)
    flat = torch.randn(1, vocab, generator=generator) * 0.01
    for warm, offset in ((flat, 0.0), (flat, 3000.0), (confident, 5.0)):
        for alpha in (0.0, 0.1):
            args = on(backend, warm, vector + offset)
            kwargs = {"alpha": alpha, "strength_mode": "kl_budget", "strength": 0.01, "return_info": True}
            got = svdk.steered_sample(args[0], vector=args[1], backend=backend, **kwargs)[1]
            want = svdk.steered_sample(args[0], vector=args[1], backend="reference", **kwargs)[1]
            oc.assert_close(got.strength, want.strength, f"{offset} {alpha}", rtol=2e-3)
            label = torch.tensor([1], device=args[0].device)
            kwargs = {"labels": label, "strength": 0.3, "vector": args[1], "alpha": alpha}
            got = svdk.steered_logprob(args[0], backend=backend, **kwargs)
            want = svdk.steered_logprob(args[0], backend="reference", **kwargs)
            for name in ("variance", "curvature"):
                oc.assert_close(getattr(got, name), getattr(want, name), name, rtol=5e-3, atol=1e-9)


def test_tokens_far_outside_the_mask_can_still_carry_the_mass(backend):
    """Next to C they underflow; a strength that pushes C down brings them back."""
    warm = torch.full((1, 300), 0.0)
    warm[0, 5] = 2000.0
    vector = torch.zeros(300)
    vector[5] = 1.0
    warm, vector, labels = on(backend, warm, vector, torch.tensor([7]))
    kwargs = {"labels": labels, "vector": vector, "strength": -2100.0, "penalty": 0.0}
    got = svdk.steered_logprob(warm, backend=backend, **kwargs)
    oc.assert_close(got.logprob, torch.tensor([-math.log(299)]), "logprob", rtol=1e-4)


def test_top_p_of_a_distribution_whose_mass_is_lost_to_rounding(backend):
    """The share of equal tokens to keep was 0 / 0, cast to an integer (a sanitizer's finding)."""
    warm, base = on(backend, torch.full((1, 9000), 30.0), torch.full((1, 9000), 30.0))
    base[0, 4] = 88.0
    kwargs = {"top_p": 0.5, "alpha": 0.0, "strength": 4e19, "direction": "log_ratio"}
    token = svdk.steered_sample(warm, base, backend=backend, **kwargs)
    assert 0 <= int(token) < 9000


@pytest.mark.parametrize("offset", [1e25, 3e38])
def test_a_log_ratio_to_huge_base_logits(backend, offset):
    """The sweep that does without the maxima rounded the warm logits away next to the base's."""
    warm, base = on(backend, oc.logits(20, 50, seed=6)[0], torch.full((20, 50), offset))
    kwargs = {"alpha": 0.0, "direction": "log_ratio", "strength": 2.0, "seed": 3}
    token = svdk.steered_sample(warm, base, backend=backend, **kwargs)
    assert torch.equal(token, svdk.steered_sample(warm, base, backend="reference", **kwargs))


def test_top_p_where_the_logits_are_large(backend):
    """The mass of all tokens was taken from rounded logits and that of the first ones from exact ones."""
    warm = torch.full((200, 100), -2e10)
    warm[:, [7, 30, 60]] = 2e10
    base = torch.zeros(200, 100)
    base[:, 60] = 60.0
    warm, base = on(backend, warm, base)
    seeds = torch.arange(200, device=warm.device)
    kwargs = {"top_p": 0.999, "strength": 0.5, "penalty": -1e30, "seed": seeds}
    token = svdk.steered_sample(warm, base, backend=backend, **kwargs)
    assert sorted(set(token.tolist())) == [7, 30], "two equal tokens have nearly all of the mass"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_invalid_row_whose_base_is_masked_earlier_on(backend, value):
    """The log-ratio sweep breaks off at a masked base token; what the next one finds was not looked at."""
    warm, base = on(backend, *oc.logits(2, LARGE, seed=8))
    base[:, 3] = -math.inf
    warm[0, LARGE - 9] = value
    base[1, LARGE - 9] = value
    kwargs = {"alpha": 0.0, "direction": "log_ratio"}
    for seed in range(5):  # without diagnostics: they take another path
        token = svdk.steered_sample(warm, base, seed=seed, backend=backend, **kwargs)
        assert torch.equal(token, svdk.steered_sample(warm, base, seed=seed, backend="reference", **kwargs))


@pytest.mark.parametrize("size", [1e8, -1e8])
def test_a_draw_among_large_logits(backend, size):
    """The sweep that drew without the maximum rounded draws away, and the lowest id of equal tokens won."""
    warm, base, vector = on(backend, torch.full((30, 40), size), torch.full((30, 40), size), torch.ones(40))
    kwargs = {"alpha": 0.0, "direction": "log_ratio", "seed": torch.arange(30, device=warm.device)}
    for args, more in (((warm,), {}), ((warm, base), {}), ((warm,), {"vector": vector})):
        token = svdk.steered_sample(*args, backend=backend, **kwargs, **more)
        assert torch.equal(token, svdk.steered_sample(*args, backend="reference", **kwargs, **more))


@pytest.mark.parametrize("temperature", [1e-8, 1e-30])
def test_a_low_temperature_and_huge_logits(backend, temperature):
    """Over the temperature they were all infinite, and so the same."""
    (warm,) = on(backend, torch.tensor([[1e31, 2e31, 3e31, 1e31]]))
    for kwargs in ({}, {"min_p": 0.1}, {"top_p": 0.9}, {"vector": warm[0].flip(0) / 4}):
        token = svdk.steered_sample(warm, temperature=temperature, backend=backend, **kwargs)
        assert token.tolist() == [2], kwargs
    vector = torch.tensor([0.0, 0.0, 0.0, 1.0], device=warm.device)
    steering = {"vector": vector, "strength": 9.0, "alpha": 0.01, "temperature": temperature}
    for kwargs in ({"min_p": 0.1}, {"top_p": 0.9}):
        token = svdk.steered_sample(warm / 1e31, backend=backend, **steering, **kwargs)
        assert token.tolist() == [3], kwargs


@pytest.mark.parametrize("alpha", [0.0, 0.1])
@pytest.mark.parametrize("direction", ["kl_gradient", "log_ratio"])
def test_logits_at_both_ends_of_the_range(backend, direction, alpha):
    """Their difference is infinite in a float, and times a probability of 0 it was NaN."""
    warm, base = on(backend, *oc.logits(3, 50, seed=2))
    warm[:, 7], warm[:, 30] = -LOWEST, LOWEST
    base[1, 30], base[2, 30] = -LOWEST, LOWEST
    labels = torch.tensor([7, 7, 3], device=warm.device)
    kwargs = {"alpha": alpha, "direction": direction, "strength": 0.5}
    token, info = svdk.steered_sample(warm, base, backend=backend, return_info=True, **kwargs)
    want_token, want = svdk.steered_sample(warm, base, backend="reference", return_info=True, **kwargs)
    assert torch.equal(token.cpu(), want_token.cpu())
    for name in ("kl", "logprob_steered", "logprob_warm"):
        oc.assert_close(getattr(info, name), getattr(want, name), name)
    got = svdk.steered_logprob(warm, base, labels, backend=backend, **kwargs)
    want = svdk.steered_logprob(warm, base, labels, backend="reference", **kwargs)
    for name in ("kl", "logprob", "logprob_warm", "gain", "slope"):
        oc.assert_close(getattr(got, name), getattr(want, name), name)
    assert torch.equal(got.greedy.cpu(), want.greedy.cpu())
    got = svdk.extract(warm, base, alpha=alpha, direction=direction, backend=backend)
    want = svdk.extract(warm, base, alpha=alpha, direction=direction, backend="reference")
    for name in ("p", "delta", "kl"):
        oc.assert_close(getattr(got, name), getattr(want, name), name)


@pytest.mark.parametrize("vocab", [60, 1200])
def test_a_penalty_that_lifts_the_tokens_outside_the_mask_far_above_it(backend, vocab):
    """Next to that much, what tells them apart was rounded away."""
    warm, base = on(backend, *oc.logits(20, vocab, seed=4))
    labels = warm.argsort(1)[:, vocab // 2]
    kwargs = {"penalty": 1e5, "strength": 1e5}
    got = svdk.steered_logprob(warm, base, labels, backend=backend, **kwargs)
    want = svdk.steered_logprob(warm, base, labels, backend="reference", **kwargs)
    oc.assert_close(got.logprob, want.logprob, "logprob", rtol=1e-3)
    assert torch.equal(got.greedy.cpu(), want.greedy.cpu())
