"""`svdk.warm_up`: every batch from the largest to 1, with what belongs to rows cut to them."""

from __future__ import annotations

import pytest
import torch

import svdk
from svdk.ops import warming
from tests.helpers import ops_cases as oc


@pytest.mark.parametrize(("most", "batches"), [(1, (1,)), (5, (5, 4, 2, 1)), (8, (8, 4, 2, 1)), (0, (0,))])
def test_the_largest_batch_and_the_powers_of_two_below_it(most, batches):
    warm, base = torch.zeros(most, 40), torch.zeros(most, 40)
    assert svdk.warm_up(svdk.steered_sample, warm, base) == batches


@pytest.mark.parametrize("paired", [False, True])
def test_what_belongs_to_rows_is_cut_and_the_rest_is_passed_on(monkeypatch, paired):
    calls = []

    def op(warm, base, **options):
        calls.append((warm, base, options))

    monkeypatch.setattr(warming, "OPS", (op,))
    warm, base = oc.logits(6 if paired else 3, 3)
    rows = {"warm_rows": torch.arange(3), "base_rows": torch.arange(3) + 3} if paired else {}
    options = {"seed": torch.arange(3), "vector": torch.zeros(3), "logit_bias": torch.zeros(3, 3)}
    svdk.warm_up(op, warm, None if paired else base, **options, **rows, strengths=torch.zeros(3), top_k=3)
    assert [len(given["seed"]) for *_, given in calls] == [3, 2, 1]
    for n, (got_warm, got_base, given) in zip((3, 2, 1), calls, strict=True):
        assert len(got_warm) == (6 if paired else n)
        assert got_base is None if paired else len(got_base) == n
        assert given["logit_bias"].shape == (n, 3)
        assert given["vector"].shape == given["strengths"].shape == (3,)  # of the vocabulary, of a grid
        assert given["top_k"] == 3
        assert all(len(given[name]) == n for name in rows)


def test_every_op_that_can_be_captured_is_taken():
    warm, base = oc.logits(3, 50)
    labels, out = torch.tensor([1, 2, 3]), torch.full((3, 50), 7.0)
    svdk.warm_up(svdk.steered_logprob, warm, base, labels=labels, strengths=torch.tensor([0.0, 1.0]))
    svdk.warm_up(svdk.steered_logits, warm, base, out=out, skip=torch.tensor([True, False, True]))
    assert torch.equal(out[0], warm[0])
    assert not bool((out == 7.0).any())
