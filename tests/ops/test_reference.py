"""The reference against the mathematics: identities of the paper and of the design, by hypothesis."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import svdk
from svdk.ops import reference
from svdk.ops.philox import philox4x32, row_uniforms
from svdk.ops.schema import KL_GRADIENT, LOG_RATIO, Operands

SEEDS = st.integers(0, 2**31 - 1)
VOCABS = st.sampled_from([1, 2, 5, 33, 200])
DIRECTIONS = st.sampled_from(["kl_gradient", "log_ratio"])


def rows_for(seed: int, vocab: int, batch: int = 2, scale: float = 2.0):
    generator = torch.Generator().manual_seed(seed)
    warm = torch.randn(batch, vocab, generator=generator, dtype=torch.float64) * scale
    return warm, warm + torch.randn(batch, vocab, generator=generator, dtype=torch.float64)


def steering(warm, base, direction="kl_gradient", alpha=0.0):
    code = {"kl_gradient": KL_GRADIENT, "log_ratio": LOG_RATIO}[direction]
    batch, vocab = warm.shape
    alphas = torch.full((batch,), alpha, dtype=torch.float64)
    operands = Operands(warm, base, None, None, None, vocab, code)
    return reference.open_rows(operands, SimpleNamespace(alpha=alphas))


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    """The philox4x32-10 vectors published with Random123 (Salmon et al.)."""
    got = philox4x32(*(tuple(torch.tensor([x]) for x in group) for group in (counter, key)))
    assert tuple(int(x) for x in got) == words


def test_a_rows_uniform_is_keyed_by_seed_and_offset():
    seed, offset = 5 - 2**40, 2**33 + 1
    key = (torch.tensor([seed & 0xFFFFFFFF]), torch.tensor([(seed >> 32) & 0xFFFFFFFF]))
    words = [int(w) for w in philox4x32(tuple(torch.tensor([x]) for x in (0, 1, 2, 0)), key)]
    want = (((words[0] << 32 | words[1]) >> 11) + 0.5) / 2**53
    seeds, offsets = torch.tensor([seed, seed, seed + 1]), torch.tensor([offset, offset + 1, offset])
    got = row_uniforms(seeds, offsets)
    assert got.dtype == torch.float64
    assert float(got[0]) == want
    assert len(set(got.tolist())) == 3


def test_a_token_is_where_the_uniform_ends():
    """Cumulative mass in order of id; the last token with mass where rounding leaves none."""
    masses = torch.tensor([[0.0, 1.0, 0.0, 2.0, 1.0, 0.0]], dtype=torch.float64)
    for uniform, token in (
        (0.0, 1),
        (0.2499, 1),
        (0.25, 3),
        (0.7499, 3),
        (0.75, 4),
        (1 - 2**-53, 4),
        (1.0, 4),
    ):
        got = reference.draw_row(masses, torch.tensor([uniform], dtype=torch.float64))
        assert int(got) == token, uniform


@given(SEEDS, VOCABS, DIRECTIONS)
def test_theorem_2_derivative_of_task_kl(seed, vocab, direction):
    """d/dmu KL(q_task || softmax(z + mu delta)) at 0 = <p - q_task, delta> (paper, Theorem 2)."""
    warm, base = rows_for(seed, vocab)
    rows = steering(warm, base, direction)
    task = torch.softmax(rows_for(seed + 1, vocab)[0], 1)
    mu = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    log_steered = torch.log_softmax(rows.w + mu[:, None] * rows.delta, 1)
    kl = (task * (task.log() - log_steered)).sum()
    (derivative,) = torch.autograd.grad(kl, mu)
    torch.testing.assert_close(derivative, ((rows.log_p.exp() - task) * rows.delta).sum(1))


@given(SEEDS, VOCABS)
def test_kl_gradient_is_the_softmax_jacobian_of_the_kl(seed, vocab):
    """delta = J log(p/q) is the gradient of KL(softmax(z) || q) in the logits, by autograd."""
    warm, base = rows_for(seed, vocab)
    z = warm.clone().requires_grad_()
    p = torch.softmax(z, 1)
    kl = (p * (p.log() - torch.log_softmax(base, 1))).sum()
    (gradient,) = torch.autograd.grad(kl, z)
    rows = steering(warm, base)
    torch.testing.assert_close(gradient, rows.delta)
    torch.testing.assert_close(kl.detach(), rows.c.kl.sum())


@given(SEEDS, VOCABS, st.floats(-5, 5), st.sampled_from([0.0, 0.1]))
def test_sign_of_direction_and_strength_cancel(seed, vocab, mu, alpha):
    warm, base = rows_for(seed, vocab)
    delta = steering(warm, base, alpha=alpha).delta.float()
    common = {"alpha": alpha, "seed": seed, "backend": "reference", "return_info": True}
    a, info_a = svdk.steered_sample(warm, vector=delta, strength=mu, **common)
    b, info_b = svdk.steered_sample(warm, vector=-delta, strength=-mu, **common)
    assert torch.equal(a, b)
    assert torch.equal(info_a.logprob_steered, info_b.logprob_steered)


@given(SEEDS, VOCABS, DIRECTIONS, st.floats(-100, 100), st.floats(-100, 100))
def test_shifting_either_row_changes_nothing(seed, vocab, direction, shift_w, shift_b):
    warm, base = rows_for(seed, vocab)
    labels = torch.tensor([0, vocab - 1])
    kwargs = {"direction": direction, "backend": "reference"}
    plain = svdk.steered_logprob(warm, base, labels, **kwargs)
    moved = svdk.steered_logprob(warm + shift_w, base + shift_b, labels, **kwargs)
    for name in ("logprob", "slope", "curvature", "gain", "norm2", "variance", "kl", "logprob_warm"):
        torch.testing.assert_close(getattr(moved, name), getattr(plain, name), rtol=1e-5, atol=1e-6)


@given(SEEDS, VOCABS, DIRECTIONS)
def test_no_strength_and_no_penalty_is_plain_sampling(seed, vocab, direction):
    warm, base = rows_for(seed, vocab)
    common = {"seed": seed, "top_k": 20, "top_p": 0.95, "temperature": 0.9, "backend": "reference"}
    steered = svdk.steered_sample(warm, base, strength=0.0, penalty=0.0, direction=direction, **common)
    assert torch.equal(steered, svdk.steered_sample(warm, **common))


@given(SEEDS, st.sampled_from([2, 5, 33]), DIRECTIONS, st.sampled_from([0.0, 0.2]))
def test_label_strength_minimises_its_quadratic_model(seed, vocab, direction, alpha):
    """mu* = g / (||delta||^2 + eps) minimises NLL(0) - g mu + (||delta||^2 + eps) mu^2 / 2."""
    warm, base = rows_for(seed, vocab)
    labels = torch.tensor([seed % vocab, 0])
    kwargs = {"direction": direction, "alpha": alpha, "backend": "reference"}
    _, info = svdk.steered_sample(
        warm, base, strength_mode="label", labels=labels, return_info=True, **kwargs
    )
    stats = svdk.steered_logprob(warm, base, labels, **kwargs)
    for row in range(2):
        gain, norm2, mu = (float(x[row]) for x in (stats.gain, stats.norm2, info.strength))
        if norm2 < reference.EPS:
            assert mu == 0
            continue
        best = -gain * mu + 0.5 * norm2 * mu * mu
        for other in (mu + 0.1 * (abs(mu) + 1), mu - 0.1 * (abs(mu) + 1)):
            assert best < -gain * other + 0.5 * norm2 * other * other


@given(SEEDS, VOCABS, DIRECTIONS)
def test_gain_and_variance_are_the_derivatives_of_the_nll(seed, vocab, direction):
    """gain = -dNLL/dmu and variance = d2NLL/dmu2 at mu = 0, lambda = 0, by autograd."""
    warm, base = rows_for(seed, vocab)
    labels = torch.tensor([0, vocab - 1])
    rows = steering(warm, base, direction, alpha=0.1)
    mu = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    nll = -torch.log_softmax(rows.w + mu[:, None] * rows.delta, 1).gather(1, labels[:, None]).sum()
    (first,) = torch.autograd.grad(nll, mu, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), mu)
    got = svdk.steered_logprob(
        warm, base, labels, strength=0.0, direction=direction, alpha=0.1, backend="reference"
    )
    torch.testing.assert_close(got.gain.double(), -first.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.variance.double(), second, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.slope, got.gain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.curvature, got.variance, rtol=1e-5, atol=1e-6)


@given(SEEDS, st.sampled_from([5, 33]), DIRECTIONS, st.floats(1e-4, 0.05))
def test_kl_budget_spends_its_budget_to_second_order(seed, vocab, direction, kappa):
    warm, base = rows_for(seed, vocab)
    kwargs = {"strength_mode": "kl_budget", "strength": kappa, "direction": direction, "alpha": 0.0}
    _, info = svdk.steered_sample(warm, base, backend="reference", return_info=True, **kwargs)
    variance = reference.moments_of(steering(warm, base, direction)).variance
    spent = 0.5 * info.strength.double() ** 2 * variance
    torch.testing.assert_close(spent, torch.full_like(spent, kappa), rtol=1e-5, atol=0)


@given(SEEDS, st.floats(0.05, 1.0), st.integers(0, 40), st.floats(0.0, 1.0), st.floats(0.0, 0.5))
def test_filters_are_those_of_transformers(seed, temperature, top_k, top_p, min_p):
    warpers = pytest.importorskip("transformers.generation.logits_process")
    z = rows_for(seed, 33)[0]
    scores = warpers.TemperatureLogitsWarper(temperature)(None, z)
    if top_k:
        scores = warpers.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = warpers.TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = warpers.MinPLogitsWarper(min_p)(None, scores)
    columns = [torch.full((2,), float(x), dtype=torch.float64) for x in (temperature, top_k, top_p, min_p)]
    keep = reference.filter_row(z, *columns)
    assert torch.equal(keep, torch.isfinite(scores))


def test_outside_the_mask_nothing_is_drawn_whatever_the_strength():
    warm, base = rows_for(3, 200, batch=1)
    warm, base = warm.expand(500, -1), base.expand(500, -1)
    inside = warm[0] >= warm[0].max() + math.log(0.1)
    for mu in (0.0, -3.0, 2.0):
        tokens = svdk.steered_sample(warm, base, strength=mu, seed=torch.arange(500), backend="reference")
        assert inside[tokens].all()


def test_base_masked_token_is_not_steered_and_left_out_of_kl():
    warm, base = rows_for(4, 33, batch=1)
    base[0, 7] = -math.inf
    rows = steering(warm, base)
    keep = torch.arange(33) != 7
    p, log_q = torch.softmax(warm, 1), torch.log_softmax(base, 1)
    kl = (p * (p.log() - log_q))[:, keep].sum()
    torch.testing.assert_close(rows.c.kl[0, 0], kl)
    assert rows.delta[0, 7] == 0
    assert int(rows.status[0]) == svdk.Status.BASE_MASKED
