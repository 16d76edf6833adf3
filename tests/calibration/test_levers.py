"""Levers on synthetic statistics: strengths by position, the adapter's scale, and which one to take."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from svdk.calibration import levers
from svdk.calibration.estimators import fit
from svdk.calibration.kept_statistics import KINDS, GridSums, Statistics
from svdk.calibration.positions import at_width, fit_positions, strengths_at
from svdk.calibration.report import CalibrationConfig, make_report
from svdk.calibration.shrinkage import FARTHEST
from svdk.errors import ArtifactError, InputError
from tests.calibration.test_estimators import statistics_of_rows

V = 40
LENGTH = 6
TRUTH = (-1.5, 0.0, 1.0, 2.0, 3.0, 0.5)


def problem(examples: int, truth=TRUTH, seed: int = 0):
    """Statistics of labels drawn from the log-ratio model, at a strength of its own for each position."""
    g = torch.Generator().manual_seed(seed)
    tokens = examples * LENGTH
    base = 2.0 * torch.randn(tokens, V, generator=g, dtype=torch.float64)
    warm = base + 1.2 * torch.randn(tokens, V, generator=g, dtype=torch.float64)
    mu = torch.tensor(truth, dtype=torch.float64).repeat(examples)[:, None]
    steered = warm + mu * (warm.log_softmax(1) - base.log_softmax(1))
    labels = torch.multinomial(steered.softmax(1), 1, generator=g)[:, 0]
    return statistics_of_rows(warm.float(), base.float(), labels, examples)


@pytest.fixture(scope="module")
def many():
    return problem(400)


@pytest.mark.parametrize("setting", [("log_ratio", 0.0), ("log_ratio", 0.1)])
def test_positions_find_the_strengths_that_made_the_labels(many, setting):
    found = fit_positions(many.view(*setting), many.positions())
    assert found.width > 0 and len(found.positions) == LENGTH
    if setting == ("log_ratio", 0.0):
        assert torch.tensor(found.positions).sub(torch.tensor(TRUTH)).abs().max() < 0.5
    order = torch.tensor(found.positions).argsort()
    assert order[0] == 0 and order[-1] in (3, 4)


def test_a_position_minimises_its_loss_and_the_prior(many):
    view, position, tau = many.view("log_ratio", 0.0), many.positions(), 0.5
    keep = torch.ones(many.examples, dtype=torch.bool)
    single = fit(view).strength
    found = at_width(view, position, keep, single, tau)

    def loss(mu: float, at: int) -> float:
        here = position == at
        return float(view.at_tokens(mu).nll[here].sum()) + (mu - single) ** 2 / (2 * tau**2)

    for at, mu in enumerate(found.positions):
        assert loss(mu, at) <= min(loss(mu + step, at) for step in (-0.01, 0.01))


def test_little_data_shrinks_towards_the_single_strength():
    few = problem(6)
    view, position = few.view("log_ratio", 0.0), few.positions()
    keep = torch.ones(few.examples, dtype=torch.bool)
    single = fit(view).strength
    spread = [
        max(abs(mu - single) for mu in at_width(view, position, keep, single, tau).positions)
        for tau in (0.05, 0.5, 4.0)
    ]
    assert spread[0] < 0.1 < spread[1] < spread[2] <= FARTHEST
    assert at_width(view, position, keep, single, 0.0).positions == ()


def test_no_positions_where_there_is_nothing_to_find():
    same = problem(60, truth=(1.0,) * LENGTH, seed=3)
    found = fit_positions(same.view("log_ratio", 0.0), same.positions())
    assert all(abs(mu - found.strength) < 0.8 for mu in found.positions)


def test_positions_that_few_examples_reach_have_the_single_strength(many):
    short = dataclasses.replace(many, position=torch.where(many.position == 5, 70, many.position))
    found = fit_positions(short.view("log_ratio", 0.0), short.positions())
    assert len(found.positions) == LENGTH - 1
    of = strengths_at(torch.tensor([4, 5, 1000]), found.positions, found.strength)
    assert of.tolist() == [found.positions[4], *[found.strength] * 2]
    assert torch.equal(found.of_tokens(), strengths_at(short.positions(), found.positions, found.strength))


def judge(statistics: Statistics, **changes) -> levers.Judge:
    settings = [("log_ratio", 0.0)]
    given = {"objective": "nll", "folds": 5, "seed": 0, "resamples": 400} | changes
    return levers.Judge(statistics, {s: statistics.view(*s) for s in settings}, **given)


def with_scales(statistics: Statistics, best: float, depth: float) -> Statistics:
    """As if the loss at other scales of the adapter were a parabola with its minimum at ``best``."""
    scales = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64)
    nll = -statistics.logprob_warm[:, None] + depth * ((scales - best) ** 2 - (1 - best) ** 2).float()
    hits = torch.zeros(nll.shape, dtype=torch.bool)
    return dataclasses.replace(statistics, scales=scales, scale_nll=nll, scale_hits=hits)


def test_gains_are_out_of_fold_and_add_up(many):
    row = judge(many).row("positions")
    one = judge(many).row("constant")
    assert row.gain > one.gain > 0 and row.interval[0] > 0
    assert float(row.examples.sum()) == pytest.approx(row.gain * float(many.tokens.sum()))
    assert sum(row.kinds.values()) == pytest.approx(row.gain)
    assert judge(many).row("none").gain == 0


def test_the_scale_with_the_least_loss_is_taken(many):
    row = judge(with_scales(many, 1.5, 0.3)).row("scale")
    assert row.fitted.scale == 1.5 and row.gain == pytest.approx(0.075, rel=1e-3) and row.rows == 1


def test_the_cheapest_that_is_not_demonstrably_worse(many):
    def chosen(statistics):
        one = judge(statistics)
        absent = {"vector"} if statistics.scales is not None else {"vector", "scale"}
        rows = [one.row(n) for n in levers.OF_TEXT if n not in absent]
        found, why = levers.cheapest(rows, statistics.tokens.double(), resamples=400, seed=0)
        assert found.fitted.lever in why
        return found.fitted.lever

    assert chosen(many) == "positions"
    assert chosen(with_scales(many, 2.0, 5.0)) == "scale"  # the best, and cheap
    assert chosen(with_scales(many, 1.5, 1e-3)) == "positions"
    assert chosen(problem(200, truth=(0.0,) * LENGTH, seed=5)) == "none"
    assert chosen(problem(200, truth=(1.5,) * LENGTH, seed=6)) == "constant"


@pytest.mark.parametrize("seed", range(8))
def test_the_chosen_lever_is_not_worse_than_none_on_other_examples(seed):
    mine, others = problem(12, seed=seed), problem(300, seed=100 + seed)
    config = CalibrationConfig("log_ratio", 0.0, lever="auto", resamples=200)
    one = make_report(mine, config).lever.fitted
    saved, _ = judge(others).gains(one)
    assert float(saved.mean()) > -0.02


def test_kinds_of_tokens():
    examples, eos = 20, 7
    labels = torch.tensor([[1, 10 + i, 2, 3, eos] for i in range(examples)]).flatten()
    labels[2] = 30  # one in twenty has something else there
    kinds = dataclasses.replace(
        problem(examples),
        tokens=torch.full((examples,), 5),
        position=torch.arange(5).repeat(examples).int(),
        label_ids=labels.int(),
        stop_ids=torch.tensor([eos]),
    ).kinds()
    names = [KINDS[i] for i in kinds[5:10].tolist()]
    assert names == ["template", "content", "template", "template", "stop"]
    assert KINDS[int(kinds[2])] == "content"


def test_reports_say_what_was_chosen_and_the_artifact_holds_it(many):
    config = CalibrationConfig("log_ratio", 0.0, lever="positions", resamples=100)
    report = make_report(many, config, {"ms_rows_1": 10.0, "ms_rows_2": 14.0})
    text = report.table()
    assert "levers:" in text and "14.00" in text and "6 positions" in text
    steering = report.steering()
    assert steering.lever == "positions" and len(steering.positions) == LENGTH
    assert steering.gain == report.lever.gain and "6 positions" in steering.verdict()
    assert steering.metrics["gain_content"] == report.lever.kinds["content"]
    scale = make_report(with_scales(many, 1.5, 0.3), dataclasses.replace(config, lever="scale")).steering()
    assert (scale.scale, scale.strength, scale.alpha, scale.steers) == (1.5, 0.0, 0.0, False)
    assert CalibrationConfig.of(scale).lever == "scale"


def test_statistics_of_format_1_have_one_strength_only(many):
    tensors = many.tensors()
    for name in ("position", "label_ids", "stop_ids"):
        tensors.pop(name)
    for direction in ("kl_gradient", "log_ratio"):
        curves = tensors.pop(f"full.{direction}.curves").double()
        hits = tensors.pop(f"full.{direction}.hits").int()
        shape = (many.examples, LENGTH, -1)
        tensors[f"full.{direction}.curves"] = curves.view(3, *shape).sum(2)
        tensors[f"full.{direction}.counts"] = hits.view(shape).sum(1).int()
    old = Statistics.from_tensors(tensors)
    new, config = make_report(many, CalibrationConfig("auto")), CalibrationConfig("auto")
    was = make_report(old, config)
    assert was.lever is None and was.chosen.strength == pytest.approx(new.chosen.strength, rel=1e-6)
    assert was.gain == pytest.approx(new.gain, rel=1e-5)
    with pytest.raises(InputError, match="calibration once more"):
        make_report(old, dataclasses.replace(config, lever="positions"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position": torch.zeros(3, dtype=torch.int32)}, "position must be"),
        ({"scales": torch.tensor([1.0, 0.5])}, "absent|ascend|scale curves"),
    ],
)
def test_inconsistent_lever_statistics_are_refused(many, change, message):
    with pytest.raises(ArtifactError, match=message):
        Statistics.from_tensors(many.tensors() | change)


def test_levers_other_than_one_strength_are_fitted_to_the_optimum():
    with pytest.raises(InputError, match="estimator was 'mean' with lever 'positions'"):
        CalibrationConfig(estimator="mean", lever="positions")
    with pytest.raises(InputError, match="scale was not tried"):
        make_report(problem(20), CalibrationConfig("log_ratio", 0.0, lever="scale"))


def test_grid_views_by_token_agree_with_their_sums(many):
    view = many.view("kl_gradient", 0.0)
    by_token = view.at_tokens(0.7).map(view._by_example)
    for x, y in zip(vars(by_token).values(), vars(view.evaluate(0.7)).values(), strict=True):
        torch.testing.assert_close(x, y)
    mu = torch.linspace(-2, 2, len(view.example), dtype=torch.float64)
    each = torch.stack([view.at_tokens(float(m)).nll[i] for i, m in enumerate(mu[:20])])
    torch.testing.assert_close(view.at_tokens(mu).nll[:20], each)
    assert isinstance(many.full["kl_gradient"], GridSums)
