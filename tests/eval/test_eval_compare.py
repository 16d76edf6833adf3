"""Paired bootstrap: what it must give where the answer is known, and what it must refuse."""

from __future__ import annotations

import math

import pytest
import torch

from svdk.errors import InputError
from svdk.eval.compare import Difference, family, macro, paired, summarise
from svdk.eval.report_steps import equivalent_steps
from svdk.utils.bootstrap import RESAMPLES, draws


def normal(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- draws and intervals ---


def test_interval_is_the_normal_one_for_many_questions():
    gaps = 0.3 + 2 * normal(2000, 1)
    found = paired(torch.zeros(2000), gaps)
    assert found.mean == pytest.approx(float(gaps.mean()))
    half = 1.96 * float(gaps.std()) / math.sqrt(2000)
    assert found.low == pytest.approx(found.mean - half, abs=0.06 * half)
    assert found.high == pytest.approx(found.mean + half, abs=0.06 * half)
    assert (found.n, found.significant, found.sign) == (2000, True, 1)


def test_interval_covers_the_truth_as_often_as_it_says():
    hits = 0
    for seed in range(300):
        found = paired(torch.zeros(40), 0.5 + normal(40, seed), resamples=500, seed=seed)
        hits += found.low <= 0.5 <= found.high
    assert 0.89 <= hits / 300 <= 0.98  # the percentile interval of 40 covers about 93.5 %


def test_no_difference_is_rarely_called_one():
    found = [paired(normal(100, s), normal(100, 10_000 + s), resamples=500) for s in range(300)]
    assert sum(d.significant for d in found) / 300 < 0.1


def test_comparison_is_paired():
    a = 100 * normal(200, 3)
    assert paired(a, a + 0.01 + 0.001 * normal(200, 4)).significant
    assert not paired(
        a, (a + 0.01)[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    ).significant


def test_direction_is_b_minus_a():
    a, b = normal(50, 5), normal(50, 6) + 1
    forth, back = paired(a, b), paired(b, a)
    assert forth.mean > 0 > back.mean
    assert (back.low, back.high) == pytest.approx((-forth.high, -forth.low))
    assert (forth.sign, back.sign) == (1, -1)


def test_levels_nest():
    a, b = normal(80, 7), normal(80, 8)
    wide, narrow = paired(a, b, level=0.99), paired(a, b, level=0.8)
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize("gap", [0.0, 0.1, -0.25])
def test_equal_differences_have_a_point_for_an_interval(gap):
    found = paired(torch.zeros(7, dtype=torch.float64), torch.full((7,), gap, dtype=torch.float64))
    assert (found.mean, found.low, found.high) == (pytest.approx(gap), gap, gap)
    assert found.significant == (gap != 0)


def test_one_question_shows_nothing():
    found = paired(torch.tensor([0.0]), torch.tensor([1.0]))
    assert (found.mean, found.low, found.high) == (1.0, -math.inf, math.inf)
    assert (found.n, found.significant, found.sign) == (1, False, 0)


def test_same_arguments_same_interval():
    a, b = normal(60, 9), normal(60, 10)
    assert paired(a, b) == paired(a, b)
    assert paired(a, b) != paired(a, b, seed=1)


def test_p_value_agrees_with_the_interval():
    found = [paired(torch.zeros(60), 0.02 * k + normal(60, 14)) for k in range(25)]
    assert all(d.significant == (d.p < 0.05) for d in found if not 0.045 < d.p < 0.055)
    assert min(d.p for d in found) >= 2 / (RESAMPLES + 1)
    assert {d.significant for d in found} == {True, False}


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([0.0, math.nan], [0.0, 1.0], "a was nan for question 1; allowed: finite scores"),
        ([0.0, 1.0], [math.inf, 1.0], "b was inf for question 0; allowed: finite scores"),
        ([0.0, 1.0], [1.0], "b held 1 scores; allowed: 2, as many as a"),
        ([], [], r"a had shape \(0,\); allowed: \(Q,\) with at least 1 question"),
        ([[0.0]], [[0.0]], r"a had shape \(1, 1\)"),
    ],
)
def test_unusable_scores_are_refused(a, b, message):
    with pytest.raises(InputError, match=message):
        paired(torch.tensor(a), torch.tensor(b))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resamples": 0}, "resamples was 0; allowed: an integer of at least 1"),
        ({"resamples": 1.5}, "resamples was 1.5"),
        ({"level": 1.0}, "level was 1.0; allowed: a number between 0 and 1"),
    ],
)
def test_unusable_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        paired(torch.zeros(3), torch.arange(3.0), **arguments)


# --- means over tasks ---


def test_macro_weighs_tasks_equally():
    gaps = [torch.full((10,), 1.0), torch.full((1000,), 0.0)]
    assert macro(gaps) == Difference(0.5, 0.5, 0.5, 1010, True, macro(gaps).p)


def test_macro_draws_tasks_of_one_size_apart():
    gaps = normal(100, 15)
    alone, twice = paired(torch.zeros(100), gaps), macro([gaps, gaps])
    # Shared draws would leave the width as it is; draws apart divide it by the root of 2.
    assert (twice.high - twice.low) / (alone.high - alone.low) == pytest.approx(0.707, abs=0.04)


def test_macro_of_single_questions_shows_nothing():
    found = macro([torch.ones(1), torch.ones(50)])
    assert (found.n, found.low, found.significant) == (51, -math.inf, False)


def test_macro_refuses_nothing_and_nan():
    with pytest.raises(InputError, match="gaps held 0 tasks"):
        macro([])
    with pytest.raises(InputError, match=r"gaps\[1\] was nan for question 0"):
        macro([torch.ones(2), torch.tensor([math.nan])])


# --- many comparisons ---


def difference(p: float, significant: bool = True) -> Difference:
    return Difference(1.0, 0.5, 1.5, 100, significant, p)


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ([], ()),
        ([0.04], (True,)),
        ([0.01, 0.04, 0.03], (True, False, False)),  # 0.03 > 0.05 / 2 ends it, 0.04 with it
        ([0.03, 0.001, 0.02], (True, True, True)),
        ([0.04, 0.04], (False, False)),
    ],
)
def test_holm(values, kept):
    assert family([difference(p) for p in values]) == kept


def test_family_adds_no_claim():
    assert family([difference(0.001, significant=False), difference(0.02)]) == (False, True)
    assert family([Difference(1.0, 0.5, 1.5, 9, True)]) == (False,)  # without a p-value


def test_family_keeps_false_claims_rare():
    wrong = 0
    for seed in range(100):
        drawn = draws(normal(60 * 20, seed).reshape(60, 20), resamples=1000, seed=seed)
        means = drawn.mean(0)
        wrong += any(family([summarise(float(means[i]), drawn[:, i], 60) for i in range(20)]))
    assert wrong <= 15  # singly, about 70 of 100 sets of 20 would hold a false claim


# --- worth in steps ---


def test_equivalent_steps():
    warm = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64)
    targets = {-0.1: 0.0, 0.0: 4.0, 0.5: 8.0, 1.0: 16.0, 1.5: 32.0, 2.0: 64.0, 2.1: math.inf}
    for target, steps in targets.items():
        found = equivalent_steps((4, 16, 64), warm, torch.tensor([target], dtype=torch.float64))
        assert float(found) == pytest.approx(steps)


def test_equivalent_steps_counts_the_first_time():
    warm = torch.tensor([[0.0, 2.0, 1.0]] * 2, dtype=torch.float64)
    found = equivalent_steps((4, 16, 64), warm, torch.tensor([1.0, 1.5], dtype=torch.float64))
    assert found.tolist() == pytest.approx([8.0, 2**3.5])
