"""The metrics: worked examples, formulas written a second time, ties, -inf, and the order of the options."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svdk.errors import InputError
from svdk.eval.metrics import METRICS, accuracy, mc1, mc2, mc3, score
from svdk.eval.question import Question

INF = math.inf


def make(correct, best=0, mc1=()):
    options = tuple(f" option {i}" for i in range(len(correct)))
    return Question("q", "Q: ?\nA:", options, tuple(map(bool, correct)), best, tuple(mc1))


def logs(*probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


# A question with two true answers (0 and 2, the best is 2) and two false ones; MC1 compares 2, 1 and 3.
Q = make([1, 0, 1, 0], best=2, mc1=(2, 1, 3))


@pytest.mark.parametrize(
    "probabilities, expected",
    [
        ((0.4, 0.1, 0.3, 0.2), (1, 0.7, 1, 0)),  # 0 is ahead, but MC1 does not compare it
        ((0.1, 0.2, 0.4, 0.3), (1, 0.5, 0.5, 1)),
        ((0.4, 0.3, 0.2, 0.1), (0, 0.6, 0.5, 0)),
        ((0.1, 0.2, 0.3, 0.4), (0, 0.4, 0, 0)),
        ((0.2, 0.1, 0.04, 0.06), (0, 0.6, 0.5, 0)),  # the mass is normalised: the sum is 0.4
    ],
)
def test_worked_examples(probabilities, expected):
    values = logs(*probabilities)
    found = [metric(values, Q) for metric in (mc1, mc2, mc3, accuracy)]
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("best", [0, 1, 2])
def test_a_tie_at_the_top_is_not_a_hit_wherever_the_gold_option_stands(best):
    question = make([i == best for i in range(3)], best, mc1=(0, 1, 2))
    tied = torch.tensor([-1.0, -1.0, -1.0])
    assert [accuracy(tied, question), mc1(tied, question), mc3(tied, question)] == [0, 0, 0]
    tied[best] += 1e-5
    assert [accuracy(tied, question), mc1(tied, question), mc3(tied, question)] == [1, 1, 1]


def test_impossible_options():
    assert [m(torch.full((4,), -INF), Q) for m in METRICS.values()] == [0, 0, 0, 0]
    only_best = torch.tensor([-INF, -INF, -50.0, -INF])
    assert [m(only_best, Q) for m in METRICS.values()] == [1, 1, 0.5, 1]
    only_false = torch.tensor([-INF, -3.0, -INF, -INF])
    assert [m(only_false, Q) for m in METRICS.values()] == [0, 0, 0, 0]


def test_long_answers_do_not_underflow():
    values = torch.tensor([-2000.0, -2001.0, -3000.0, -4000.0], dtype=torch.float64)
    assert mc2(values, Q) == pytest.approx(1 / (1 + math.exp(-1)), rel=1e-12)


values_and_labels = st.integers(2, 8).flatmap(
    lambda n: st.tuples(
        st.lists(st.sampled_from([-9.0, -4.5, -2.0, -1.0, -0.25, -INF]), min_size=n, max_size=n),
        st.lists(st.booleans(), min_size=n, max_size=n).filter(lambda x: any(x) and not all(x)),
        st.permutations(range(n)),
        st.integers(0, n - 1),
    )
)


@given(values_and_labels)
def test_formulas_and_order(case):
    values, correct, order, pick = case
    true = [i for i, c in enumerate(correct) if c]
    false = [i for i, c in enumerate(correct) if not c]
    best = true[pick % len(true)]
    question = make(correct, best, mc1=(best, *false))
    p = [math.exp(v) for v in values]
    expected = {
        "mc1": float(all(values[best] > values[i] for i in false)),
        "mc2": sum(p[i] for i in true) / sum(p) if sum(p) else 0.0,
        "mc3": sum(all(values[i] > values[j] for j in false) for i in true) / len(true),
        "accuracy": float(all(values[best] > v for i, v in enumerate(values) if i != best)),
    }
    tensor = torch.tensor(values, dtype=torch.float64)
    for name, metric in METRICS.items():
        assert metric(tensor, question) == pytest.approx(expected[name], abs=1e-12), name
    place = {old: new for new, old in enumerate(order)}
    moved = make([correct[old] for old in order], place[best], mc1=sorted(place[i] for i in (best, *false)))
    for name, metric in METRICS.items():
        found = metric(tensor[list(order)], moved)
        assert found == pytest.approx(expected[name], abs=1e-12), f"{name}, options in another order"


def test_score_keeps_the_order_of_the_questions():
    hit, miss = logs(0.1, 0.2, 0.4, 0.3), logs(0.1, 0.2, 0.3, 0.4)
    found = score(("mc1", "mc2"), [hit, miss, hit], [Q, Q, Q])
    assert list(found) == ["mc1", "mc2"]
    assert found["mc1"].tolist() == [1, 0, 1]
    assert found["mc2"].tolist() == pytest.approx([0.5, 0.4, 0.5])
    assert found["mc2"].dtype == torch.float64
    assert score(("mc1",), [], [])["mc1"].shape == (0,)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: mc2(logs(0.5, 0.5), Q), r"question q had shape \(2,\); allowed: \(4,\)"),
        (lambda: mc2(torch.tensor([0.0, math.nan, 0, 0]), Q), "held NaN"),
        (lambda: accuracy(torch.tensor([0.0, INF, 0, 0]), Q), "held NaN or .inf"),
        (lambda: mc1(logs(0.5, 0.5), make([1, 0])), "no MC1 options"),
        (lambda: mc3(logs(0.5, 0.5), make([1, 1])), "lacked true or false options"),
        (lambda: score(("mc4",), [], []), "metric was 'mc4'; allowed: mc1, mc2, mc3, accuracy"),
        (lambda: score(("mc2",), [logs(0.5)], []), "held 1; allowed: 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
