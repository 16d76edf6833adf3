"""Strengths by class of the token that is due, on synthetic statistics."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from svdk.calibration import levers
from svdk.calibration.artifact import Steering
from svdk.calibration.classes import ClassFit, fit_classes
from svdk.calibration.estimators import fit
from svdk.calibration.report import CalibrationConfig, make_report
from svdk.calibration.shrinkage import FARTHEST, cross_validated
from svdk.errors import ArtifactError, InputError
from svdk.ops.configs import ClassStrengths
from tests.calibration.test_estimators import statistics_of_rows
from tests.calibration.test_levers import judge, problem

V, LENGTH = 40, 8
STOP, TEMPLATE = 0, 7
TRUTH = {"content": 2.0, "template": -1.0, "stop": 0.5}


def of_classes(examples: int, truth=TRUTH, seed: int = 0):
    """Statistics of labels drawn at a strength that the likeliest token decides.

    A token of the template is due at five places of eight, not the same ones in all examples; a stop token
    is due at the last.
    """
    g = torch.Generator().manual_seed(seed)
    tokens = examples * LENGTH
    base = 2.0 * torch.randn(tokens, V, generator=g, dtype=torch.float64)
    warm = base + 1.2 * torch.randn(tokens, V, generator=g, dtype=torch.float64)
    due = torch.full((examples, LENGTH), -1)
    due[:, -1] = STOP
    places = torch.stack([torch.randperm(LENGTH - 1, generator=g)[:5] for _ in range(examples)])
    due.scatter_(1, places, TEMPLATE)
    due = due.flatten()
    forced = due >= 0
    warm[:, [STOP, TEMPLATE]] -= 4.0
    # The adapter is surer of them than the base model is, which likes them already.
    base[forced, due[forced]] = base[forced].max(1).values + 1.0
    warm[forced, due[forced]] = warm[forced].max(1).values + 3.0
    mu = torch.full((tokens, 1), truth["content"], dtype=torch.float64)
    mu[due == TEMPLATE], mu[due == STOP] = truth["template"], truth["stop"]
    steered = warm + mu * (warm.log_softmax(1) - base.log_softmax(1))
    labels = torch.multinomial(steered.softmax(1), 1, generator=g)[:, 0]
    return statistics_of_rows(warm.float(), base.float(), labels, examples)


@pytest.fixture(scope="module")
def many():
    return of_classes(500)


@pytest.mark.parametrize("setting", [("log_ratio", 0.0), ("log_ratio", 0.1)])
def test_classes_find_the_strengths_that_made_the_labels(many, setting):
    found = fit_classes(many, many.view(*setting))
    assert found.classes.template_ids == (TEMPLATE,) and found.classes.stop_ids == (STOP,)
    if setting == ("log_ratio", 0.0):
        got = (found.strength, found.classes.template, found.classes.stop)
        assert torch.tensor(got).sub(torch.tensor(list(TRUTH.values()))).abs().max() < 0.35
    # Behind a mask the labels are not of this model: only the order that is far apart is sure.
    assert found.classes.template < min(found.classes.stop, found.strength)


def test_little_data_shrinks_towards_the_single_strength():
    few = of_classes(6)
    view = few.view("log_ratio", 0.0)
    single = fit(view).strength
    found = fit_classes(few, view)
    same = of_classes(80, truth=dict.fromkeys(TRUTH, 1.0), seed=3)
    level = fit_classes(same, same.view("log_ratio", 0.0))
    for one, mu in ((found, single), (level, fit(same.view("log_ratio", 0.0)).strength)):
        assert (one.of_tokens() - mu).abs().max() <= (FARTHEST if one is found else 0.6)


def test_the_template_is_told_by_the_examples_that_are_kept(many):
    keep = torch.zeros(many.examples, dtype=torch.bool)
    assert many.template_ids(keep) == ()
    keep[:4] = True  # too few to call anything a template
    assert many.template_ids(keep) == ()
    keep[:40] = True
    assert many.template_ids(keep) == (TEMPLATE,)
    example = many.examples_of_tokens()
    other = dataclasses.replace(
        many, label_ids=torch.where((example < 5) & (many.label_ids == TEMPLATE), 8, many.label_ids)
    )
    assert other.template_ids(keep) == ()  # five of forty are without it now
    keep[:5] = False
    assert other.template_ids(keep) == (TEMPLATE,)


def test_the_lever_is_judged_out_of_fold_and_chosen_where_it_pays(many):
    one = judge(many)
    rows = {name: one.row(name) for name in ("none", "constant", "classes", "positions")}
    assert rows["classes"].interval[0] > rows["constant"].gain
    found, why = levers.cheapest(list(rows.values()), many.tokens.double(), resamples=400, seed=0)
    assert found.fitted.lever == "classes" and "demonstrably" in why
    assert "template" in found.summary() and "stop" in found.summary()


@pytest.mark.parametrize("seed", range(4))
def test_classes_are_not_worse_than_none_on_other_examples(seed):
    mine, others = of_classes(15, seed=seed), of_classes(300, seed=50 + seed)
    everything = torch.ones(mine.examples, dtype=torch.bool)
    saved, _ = judge(others).gains(judge(mine).fit("classes", everything))
    assert float(saved.mean()) > 0


def test_what_auto_gains_is_judged_with_the_choice_made_anew():
    there, nothing = of_classes(60, seed=1), problem(60, truth=(0.0,) * 6, seed=5)
    names = ("none", "constant", "classes")
    found = judge(there).auto(names)
    assert found.chosen == {"classes": 5} and found.interval[0] > 0
    assert found.gain == pytest.approx(judge(there).row("classes").gain)  # as the same lever won every time
    zero = judge(nothing).auto(names)
    assert zero.gain <= max(0.0, *(judge(nothing).row(name).gain for name in names)) + 1e-12
    assert sum(zero.chosen.values()) == 5 and "none" in zero.chosen and "x) gains" in zero.line("nats")


def test_a_row_of_some_examples_leaves_the_others_out(many):
    keep = torch.arange(many.examples) < 100
    row = judge(many).row("constant", keep)
    alone = judge(of_some(many, 100)).row("constant")
    assert row.gain == pytest.approx(alone.gain) and len(row.examples) == 100
    assert row.fitted.strength == pytest.approx(alone.fitted.strength)


def of_some(statistics, examples: int):
    """The first examples alone, of one length."""
    tokens = int(statistics.tokens[:examples].sum())
    full = {
        name: dataclasses.replace(
            sums, moments=sums.moments[:, :tokens], curves=sums.curves[:, :tokens], hits=sums.hits[:tokens]
        )
        for name, sums in statistics.full.items()
    }
    named = ("logprob_warm", "logprob_base", "sizes", "label", "position", "label_ids", "greedy")
    first = {name: getattr(statistics, name)[:tokens] for name in named}
    inside = int(statistics.sizes[:tokens].sum())
    return dataclasses.replace(
        statistics, tokens=statistics.tokens[:examples], full=full, p=statistics.p[:inside],
        ratio=statistics.ratio[:inside], **first,
    )  # fmt: skip


def test_the_report_and_the_artifact_hold_them(many, tmp_path):
    config = CalibrationConfig("log_ratio", 0.0, lever="classes", resamples=100)
    report = make_report(many, config)
    steering = report.steering(statistics=many.tensors())
    assert steering.lever == "classes" and steering.classes == report.lever.fitted.classes
    assert "for content" in steering.setting() and "template" in report.table()
    steering.save(tmp_path)
    again = Steering.load(tmp_path)
    assert again.classes == steering.classes and again.strength == steering.strength
    assert again.report().lever.fitted == report.lever.fitted


def test_statistics_without_the_likeliest_tokens_have_the_other_levers(many):
    old = dataclasses.replace(many, greedy=None)
    config = CalibrationConfig("log_ratio", 0.0, resamples=100)
    auto = make_report(old, dataclasses.replace(config, lever="auto"))
    assert [row.fitted.lever for row in auto.levers] == ["none", "constant", "positions"]
    with pytest.raises(InputError, match="lever 'classes': the calibration once more"):
        make_report(old, dataclasses.replace(config, lever="classes"))
    bad = many.tensors() | {"greedy": torch.zeros(3, dtype=torch.int32)}
    with pytest.raises(ArtifactError, match="greedy must be"):
        type(many).from_tensors(bad)


def test_the_class_is_that_of_the_likeliest_token():
    classes = ClassStrengths(-1.0, 0.5, (2, 0), (3,))
    due = torch.tensor([0, 1, 2, 3, 4])
    assert classes.classes_of(due).tolist() == [1, 0, 1, 2, 0]
    warm = torch.eye(5)[due]
    expected = [-1.0, 2.0, -1.0, 0.5, 2.0]
    assert classes.of(warm, 2.0).tolist() == expected == classes.at(due, 2.0).tolist()
    rows = torch.arange(5.0)
    assert classes.of(warm, rows).tolist() == [-1.0, 1.0, -1.0, 0.5, 4.0]
    assert ClassFit(2.0, None, 0.0, due).of_tokens().tolist() == [2.0] * 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"template": float("nan")}, r"classes\.template was nan"),
        ({"stop": "x"}, r"classes\.stop was 'x'"),
        ({"template_ids": [1]}, r"classes\.template_ids was \[1\]"),
        ({"stop_ids": (-1,)}, r"classes\.stop_ids was"),
    ],
)
def test_bad_classes_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        ClassStrengths(**{"template": 1.0, "stop": 1.0} | change)


def test_one_width_for_all_is_the_narrower_of_equals(many):
    view = many.view("log_ratio", 0.0)
    keep = torch.ones(many.examples, dtype=torch.bool)
    tried = []

    @dataclasses.dataclass
    class Level:
        mu: float

        def of_tokens(self):
            return torch.full((len(view.example),), self.mu, dtype=torch.float64)

    def fit_at(keep, single, tau):
        tried.append(tau)
        return Level(single)

    cross_validated(view, keep, fit_at, 5, 0)
    assert tried[-1] == 0.0
