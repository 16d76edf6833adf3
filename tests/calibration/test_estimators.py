"""Estimators against brute force: statistics of random logits, no language model."""

import math

import pytest
import torch

from svdk import extract, steered_logprob
from svdk.calibration import estimators
from svdk.calibration.estimators import (
    ESTIMATORS,
    fit,
    out_of_fold,
    per_token_optimum,
    select,
    split_folds,
)
from svdk.calibration.kept_statistics import GridSums, Statistics, default_grid
from svdk.errors import ArtifactError, InputError
from svdk.utils.bootstrap import bootstrap

V = 60
EXAMPLES = 12
SETTINGS = [("kl_gradient", 0.1), ("log_ratio", 0.1), ("kl_gradient", 0.0), ("log_ratio", 0.0)]


def problem(truth: float = 1.3, seed: int = 0, per_example: int = 25):
    """Logits (T, V) and labels drawn from the log-ratio model at strength ``truth``."""
    g = torch.Generator().manual_seed(seed)
    tokens = EXAMPLES * per_example
    base = 2.5 * torch.randn(tokens, V, generator=g, dtype=torch.float64)
    warm = base + 1.0 * torch.randn(tokens, V, generator=g, dtype=torch.float64)
    steered = warm + truth * (warm.log_softmax(1) - base.log_softmax(1))
    labels = torch.multinomial(steered.softmax(1), 1, generator=g)[:, 0]
    return warm.float(), base.float(), labels


def statistics_of(warm, base, labels, alpha=0.1):
    return statistics_of_rows(warm, base, labels, EXAMPLES, alpha)


def statistics_of_rows(warm, base, labels, examples, alpha=0.1):
    """What extraction keeps, built through the ops in one go; the examples are of one length."""
    grid = default_grid().float().double()
    info = steered_logprob(warm, base, labels, strength=0.0, alpha=alpha, backend="reference")
    batch = extract(warm, base, direction="log_ratio", alpha=alpha, backend="reference")
    sizes = batch.row_ptr.diff()
    place = [
        next((i for i, t in enumerate(batch.row(r)[0].tolist()) if t == labels[r]), -1)
        for r in range(len(labels))
    ]
    tokens = torch.full((examples,), len(labels) // examples)
    full = {}
    for direction in ("kl_gradient", "log_ratio"):
        f = steered_logprob(
            warm, base, labels, strengths=grid.float(), direction=direction, alpha=0.0, backend="reference"
        )
        curves = torch.stack([-f.logprob, -f.slope, f.curvature])
        moments = torch.stack([f.gain, f.norm2, f.variance])
        full[direction] = GridSums(moments, curves, f.greedy == labels[:, None])
    position = torch.arange(len(labels)) % (len(labels) // examples)
    return Statistics(
        tokens, info.logprob_warm, info.logprob_base, alpha=alpha, sizes=sizes.int(), p=batch.p,
        ratio=batch.delta, label=torch.tensor(place).int(), grid=grid, full=full,
        position=position.int(), label_ids=labels.int(), stop_ids=torch.tensor([0]),
        greedy=warm.argmax(1).int(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def data():
    warm, base, labels = problem()
    return warm, base, labels, statistics_of(warm, base, labels)


def brute(data, setting, strength):
    """Loss per example and derivatives, correct tokens: straight from the definition, in float64."""
    warm, base, labels, _ = data
    direction, alpha = setting
    info = steered_logprob(
        warm.double(), base.double(), labels, strength=strength, direction=direction, alpha=alpha,
        backend="reference",
    )  # fmt: skip
    per = [x.double().view(EXAMPLES, -1).sum(1) for x in (-info.logprob, -info.slope, info.curvature)]
    return *per, (info.greedy == labels).double().view(EXAMPLES, -1).sum(1)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("strength", [0.0, 0.37, 1.25, -2.2, 9.7])
def test_loss_and_derivatives_along_mu(data, setting, strength):
    """Exact with a mask; between grid points within 1e-4 nats a token of the truth."""
    view = data[3].view(*setting)
    nll, slope, curvature, correct = brute(data, setting, strength)
    curve = view.evaluate(strength)
    tokens = view.tokens
    loose = 1e-4 if setting[1] == 0 else 3e-6
    assert ((curve.nll - nll) / tokens).abs().max() < loose
    assert ((curve.slope - slope) / tokens).abs().max() < 10 * loose
    assert ((curve.curvature - curvature) / tokens).abs().max() < 100 * loose
    if setting[1] > 0:
        assert torch.equal(view.correct(strength), correct)


@pytest.mark.parametrize("setting", SETTINGS)
def test_optimum_is_the_brute_force_minimum(data, setting):
    found = fit(data[3].view(*setting), "optimum", "nll")
    total = [float(brute(data, setting, found.strength + d)[0].sum()) for d in (-0.01, 0.0, 0.01)]
    assert total[1] < min(total[0], total[2])
    # The slope of the true loss changes sign within 2e-4 of the estimate.
    below, above = (float(brute(data, setting, found.strength + d)[1].sum()) for d in (-2e-4, 2e-4))
    assert below < 0 < above
    assert not found.at_bound


def test_optimum_finds_the_strength_that_made_the_labels(data):
    """Labels were drawn at mu = 1.3 along log_ratio without mask; 300 tokens leave about 0.1 of noise."""
    assert fit(data[3].view("log_ratio", 0.0), "optimum").strength == pytest.approx(1.3, abs=0.25)


def test_estimators_follow_their_formulas(data):
    warm, base, labels, statistics = data
    view = statistics.view("kl_gradient", 0.1)
    info = steered_logprob(warm, base, labels, strength=0.0, alpha=0.1, backend="reference")
    g, n2, var = info.gain.double(), info.norm2.double(), info.variance.double()
    optima = (g / (n2 + 1e-12))[n2 >= 1e-12].sort().values
    cut = len(optima) // 10
    expected = {
        "mean": optima.mean(),
        "median": optima.median() if len(optima) % 2 else optima[len(optima) // 2 - 1 :][:2].mean(),
        "trimmed_mean": optima[cut : len(optima) - cut].mean(),
        "ratio": g.sum() / n2.sum(),
        "newton": g.sum() / var.sum(),
    }
    for name, value in expected.items():
        assert fit(view, name).raw == pytest.approx(float(value), rel=1e-4), name
    assert torch.allclose(per_token_optimum(view).sort().values, optima, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("setting", SETTINGS)
def test_best_accuracy(data, setting):
    """No strength on a fine grid gives more correct tokens; without a mask, none on the stored grid."""
    view = data[3].view(*setting)
    best = fit(view, "optimum", "accuracy").strength
    tried = torch.linspace(-6, 6, 2001).tolist() if setting[1] else view.grid.tolist()
    assert float(view.correct(best).sum()) >= max(float(view.correct(mu).sum()) for mu in tried)
    assert float(brute(data, setting, best)[3].sum()) == float(view.correct(best).sum())


@pytest.mark.parametrize("setting", SETTINGS)
def test_loss_that_falls_for_ever_is_reported_as_at_bound(setting):
    """Every label is the token that delta raises most, above all tokens outside C: more is always better."""
    warm, base, _ = problem(per_example=3)
    direction, alpha = setting
    batch = extract(warm, base, direction=direction, alpha=alpha, backend="reference")
    best = torch.stack([batch.row(r)[2].max() for r in range(len(warm))])
    usable = (best > 0.1 * best.max()).nonzero()[:, 0]
    rows = usable[torch.arange(len(warm)) % len(usable)]
    labels = torch.stack([batch.row(r)[0][batch.row(r)[2].argmax()] for r in rows])
    warm, base = warm[rows], base[rows]
    found = fit(statistics_of(warm, base, labels).view(*setting), "optimum", "nll")
    assert found.strength == pytest.approx(64)
    assert found.at_bound


def test_without_a_difference_between_the_models_the_strength_is_zero():
    warm, _, labels = problem(per_example=3)
    statistics = statistics_of(warm, warm, labels)
    for setting in SETTINGS:
        view = statistics.view(*setting)
        assert [fit(view, name).strength for name in ESTIMATORS] == [0.0] * len(ESTIMATORS)


def test_strength_is_kept_on_the_grid(data):
    view = data[3].view("kl_gradient", 0.0)
    narrow = type(view)(
        **{**vars(view), "grid": view.grid[23:26], "nll": view.nll[:, 23:26], "slope": view.slope[:, 23:26],
           "curvature": view.curvature[:, 23:26], "hits": view.hits[:, 23:26]}
    )  # fmt: skip
    found = fit(narrow, "ratio")
    assert found.raw > narrow.limits[1] and found.strength == narrow.limits[1] and found.at_bound


def test_out_of_fold_gain_uses_the_other_folds_only(data):
    """The strength for an example is the optimum of the examples outside its fold."""
    statistics = data[3]
    setting = ("log_ratio", 0.1)
    view = statistics.view(*setting)
    fold = split_folds(EXAMPLES, 4, 7)
    gains = out_of_fold({setting: view}, "optimum", "nll", folds=4, seed=7)
    for k in range(4):
        mu = fit(view, "optimum", "nll", fold != k).strength
        expected = view.evaluate(0.0).nll - view.evaluate(mu).nll
        assert torch.allclose(gains.nll[fold == k], expected[fold == k])
    assert sorted(torch.bincount(fold).tolist()) == [3, 3, 3, 3]


def test_select_takes_the_setting_that_made_the_labels(data):
    views = {setting: data[3].view(*setting) for setting in SETTINGS}
    everything = torch.ones(EXAMPLES, dtype=torch.bool)
    assert select(views, "optimum", "nll", everything, 5, 0) == ("log_ratio", 0.0)


def test_choosing_among_settings_does_not_promise_a_gain_from_noise():
    """Labels drawn from the warm model itself: nothing to gain, and the interval must not say otherwise."""
    promised = 0
    for seed in range(20):
        warm, base, labels = problem(truth=0.0, seed=seed, per_example=8)
        statistics = statistics_of(warm, base, labels)
        views = {setting: statistics.view(*setting) for setting in SETTINGS}
        gains = out_of_fold(views, "optimum", "nll")
        _, (low, _) = bootstrap(gains.nll, torch.full((EXAMPLES,), 8.0), resamples=500)
        promised += low > 0
    assert promised <= 3  # 2.5 % expected; 4 of 20 has a probability of 0.2 %


def test_statistics_survive_the_artifact_form(data):
    statistics = data[3]
    again = Statistics.from_tensors({k: v.clone() for k, v in statistics.tensors().items()})
    for setting in SETTINGS:
        for name in ESTIMATORS:
            assert fit(again.view(*setting), name) == fit(statistics.view(*setting), name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("p"), "incomplete"),
        (lambda t: t.update(p=t["p"][1:]), "must have shape"),
        (lambda t: t.update(label=t["label"] + 100), "outside its candidates"),
        (lambda t: t.update(tokens=t["tokens"] + 1), "must have shape"),
        (lambda t: t.update(grid=t["grid"].flip(0)), "ascend"),
        (lambda t: t.update(stranger=t["p"]), "incomplete"),
    ],
)
def test_inconsistent_statistics_are_refused(data, change, message):
    tensors = dict(data[3].tensors())
    change(tensors)
    with pytest.raises(ArtifactError, match=message):
        Statistics.from_tensors(tensors)


def test_unknown_setting_is_named(data):
    with pytest.raises(InputError, match=r"alpha 0\.3.*hold: \(kl_gradient, alpha 0\.1\)"):
        data[3].view("kl_gradient", 0.3)


def test_grid_is_symmetric_with_zero_in_the_middle():
    grid = default_grid()
    assert grid[len(grid) // 2] == 0 and torch.equal(grid, -grid.flip(0))
    assert math.isclose(float(grid[-1]), 64)
    assert estimators.LIMIT == 64
