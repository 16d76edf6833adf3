"""The filters of ``svdk.sampling`` on probabilities: exact, the same for samplers and renormalisation."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from svdk import sampling
from svdk.ops import arguments, flashinfer, probabilities

VOCAB = 60
K = torch.tensor([1, 2, 7, 0, 59, 60, 3, 1])
P = torch.tensor([0.0, 0.137, 0.613, 1.0, 0.9917, 0.5003, 1e-9, 0.3331])


def near_ties(seed, vocab=VOCAB):
    """Rows of neighbouring floats, equal ones among them; the logarithms of most are the same."""
    draw = np.random.default_rng(seed)
    rows = []
    for base in (0.1, 1e-6, 0.9, 1 / 3, 1e-30, 0.02, 0.5, 1e-12):
        steps = draw.integers(0, 6, vocab)
        values = np.float32(base) + steps * np.spacing(np.float32(base))
        values[draw.random(vocab) < 0.2] = 0
        rows.append(values.astype(np.float32))
    return torch.tensor(np.stack(rows))


def held(row, top_k=0, top_p=1.0):
    """Ids that the definitions keep of one row, in exact arithmetic; top-p of what top-k leaves."""
    exact = [Fraction(float(x)) for x in row]
    order = sorted((i for i in range(len(exact)) if exact[i]), key=lambda i: (-exact[i], i))
    if 0 < top_k < len(order):
        order = [i for i in order if exact[i] >= exact[order[top_k - 1]]]
    if top_p >= 1:
        return set(order)
    need, have, kept = Fraction(float(np.float32(top_p))) * sum(exact[i] for i in order), Fraction(0), set()
    for i in order:
        if kept and have >= need:
            break
        kept.add(i)
        have += exact[i]
    return kept


@pytest.fixture
def support(monkeypatch):
    """A function: what the kernel may draw of each row, instead of what it drew."""
    seen = []
    draw = flashinfer.api.sample

    def record(rows, values, **kwargs):
        seen.append(rows.warm)
        assert values["top_k"] == 0 and values["top_p"] == 1 and values["min_p"] == 0
        return draw(rows, values, **kwargs)

    monkeypatch.setattr(flashinfer.api, "sample", record)

    def of(function, *args, **kwargs):
        token = function(*args, seed=1, offset=0, **kwargs)
        mask = seen.pop() > -torch.inf
        assert mask.gather(1, token.long()[:, None]).all()
        return mask

    return of


@pytest.fixture(params=["host", "device"])
def place(request, monkeypatch):
    """On a device nothing may be read on the host: the branch for it, run on the CPU."""
    if request.param == "device":
        monkeypatch.setattr(arguments, "host_values", lambda rows: False)
    return request.param


@pytest.mark.parametrize("seed", range(4))
def test_samplers_and_renormalisation_share_one_exact_boundary(seed, support, place):
    p = near_ties(seed)
    for top_k in (1, 3, K):
        ks = [int(k) for k in K] if top_k is K else [top_k] * len(p)
        mask = support(sampling.top_k_sampling_from_probs, p, top_k)
        assert [set(row.nonzero()[:, 0].tolist()) for row in mask] == [
            held(row, k) for row, k in zip(p, ks, strict=True)
        ]
        assert torch.equal(sampling.top_k_renorm_probs(p, top_k) > 0, mask)
        masked = sampling.top_k_mask_logits(p, top_k)
        assert torch.equal((masked > -torch.inf) & (p > 0), mask)
    for top_p in (0.0, 0.4177, P):
        ps = P.tolist() if top_p is P else [top_p] * len(p)
        mask = support(sampling.top_p_sampling_from_probs, p, top_p)
        assert [set(row.nonzero()[:, 0].tolist()) for row in mask] == [
            held(row, 0, x) for row, x in zip(p, ps, strict=True)
        ]
        assert torch.equal(sampling.top_p_renorm_probs(p, top_p) > 0, mask)
    both = zip(p, K.tolist(), P.tolist(), strict=True)
    first = [held(row, k, x) for row, k, x in both]
    joint = [held(row, k) & held(row, 0, x) for row, k, x in zip(p, K.tolist(), P.tolist(), strict=True)]
    for order, want in (("top_k_first", first), ("joint", joint)):
        mask = support(sampling.top_k_top_p_sampling_from_probs, p, K, P, None, order)
        assert [set(row.nonzero()[:, 0].tolist()) for row in mask] == want
    assert first != joint


def test_near_ties_by_draws():
    a = np.float32(0.1)
    p = torch.tensor([[a] * 5 + [np.nextafter(a, np.float32(1))] + [a] * 4])
    assert p.log().unique().numel() == 1  # or this tests nothing
    rows = torch.zeros(2000, dtype=torch.int64)
    for drawn in (
        sampling.top_k_sampling_from_probs(p, 1, rows, seed=1, offset=0),
        sampling.top_p_sampling_from_probs(p, 0.0, rows, seed=1, offset=0),
        sampling.min_p_sampling_from_probs(p, 1.0, rows, seed=1, offset=0),
        sampling.top_k_top_p_sampling_from_probs(p, 1, 0.5, rows, seed=1, offset=0),
        sampling.top_k_top_p_sampling_from_probs(p, 1, 0.5, rows, "joint", seed=1, offset=0),
    ):
        assert drawn.unique().tolist() == [5]
    logits = p.log()
    logits[0, 7] = float(np.nextafter(np.float32(logits[0, 7]), np.float32(0)))
    assert logits.softmax(-1).unique().numel() < 3
    joint = sampling.top_k_top_p_sampling_from_logits(logits, 1, 0.9, rows, "joint", seed=1, offset=0)
    assert joint.unique().tolist() == [7]  # by logits, not by their probabilities


@pytest.mark.parametrize(
    ("count", "top_p", "want"), [(10, 0.3, 3), (5, 0.6, 3), (1000, 0.7, 700), (7, 0.5, 4)]
)
def test_flat_rows_hold_their_share(count, top_p, want, support, place):
    p = torch.full((1, count), 1 / count)
    for limit in (top_p, torch.tensor([top_p])):
        mask = support(sampling.top_p_sampling_from_probs, p, limit)
        assert mask[0].nonzero()[:, 0].tolist() == list(range(want))
        assert torch.equal(sampling.top_p_renorm_probs(p, limit) > 0, mask)


def test_long_rows_are_looked_at_in_three_widths(support):
    vocab = 20000
    assert all(look < vocab for look in probabilities.FIRST_LOOKS)
    generator = torch.Generator().manual_seed(0)
    p = (torch.rand(4, vocab, generator=generator) * torch.tensor([[1.0], [1.0], [1.0], [0.0]])).double()
    p[3, :5] = torch.tensor([5.0, 4, 3, 2, 1])
    p = (p / p.sum(1, keepdim=True)).float()
    top_p = torch.tensor([0.03, 0.5, 0.999, 0.9])
    order = p.double().sort(dim=1, descending=True, stable=True)
    share = order.values / order.values.sum(1, keepdim=True)
    want = (share.cumsum(1) - share < top_p.double()[:, None]) & (share > 0)
    counts = want.sum(1).tolist()
    assert 1 < counts[0] < 1024 < counts[1] < 16384 < counts[2] < vocab and counts[3] == 4
    want = torch.zeros_like(want).scatter(1, order.indices, want)
    for rows in ([0], [1], [0, 3], [1, 0], [0, 1, 2, 3]):
        assert torch.equal(support(sampling.top_p_sampling_from_probs, p[rows], top_p[rows]), want[rows])


@pytest.mark.parametrize(
    ("row", "min_p"),
    [
        ([0.5, 0.25, 0.125, 0.125], 0.5),
        ([0.5, 0.25, 0.125, 0.125], 0.25),
        ([0.8, 0.1, 0.05, 0.05], 0.125),
        ([0.6, 0.3, 0.1, 0.0], 0.5),
        ([0.25, 0.25, 0.25, 0.25], 1.0),
        ([0.5, 0.25, 0.25, 0.0], 0.0),
    ],
)
def test_min_p_keeps_its_boundary(row, min_p, support, place):
    p = torch.tensor([row])
    want = (p >= min_p * p.max()) & (p > 0)
    for bound in (min_p, torch.tensor([min_p])):
        assert torch.equal(support(sampling.min_p_sampling_from_probs, p, bound), want)
    drawn = sampling.min_p_sampling_from_probs(
        p, min_p, torch.zeros(4000, dtype=torch.int64), seed=1, offset=0
    )
    assert drawn.unique().tolist() == want[0].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_compared_as_float32(dtype, support):
    p = torch.rand(6, VOCAB, generator=torch.Generator().manual_seed(3)).softmax(-1).to(dtype)
    for name, value in (("top_k", 5), ("top_p", 0.61), ("min_p", 0.7)):
        draw = getattr(sampling, f"{name}_sampling_from_probs")
        assert torch.equal(support(draw, p, value), support(draw, p.float(), value))


def test_rows_without_a_distribution(place):
    nan, inf = float("nan"), float("inf")
    p = torch.tensor(
        [[0.0, 0, 0, 0], [nan, 0.5, 0.25, 0.25], [-0.5, 1, 0.25, 0.25], [inf, 0, 0, 1], [1.0, 0, 0, 0]]
    )
    for got in (
        *(sampling.top_k_renorm_probs(p, k) for k in (1, 2, 0, torch.tensor([2] * 5))),
        *(sampling.top_p_renorm_probs(p, x) for x in (0.0, 0.6, 1.0, torch.tensor([0.6] * 5))),
    ):
        assert got[0].tolist() == [0, 0, 0, 0] and got[4].tolist() == [1, 0, 0, 0]
        assert got[1:4].isnan().all()
    z = torch.tensor([[nan, 1.0, 2.0], [3.0, 1.0, 2.0], [-inf, -inf, -inf]])
    for k in (1, 2, 3, 0, torch.tensor([1, 1, 1])):
        got = sampling.top_k_mask_logits(z, k)
        assert got[0].isnan().any() and got[0, 2] == 2 and not got[1:].isnan().any()
        assert got.softmax(-1)[0].isnan().all()
    for draw, value in (
        (sampling.top_k_sampling_from_probs, 1),
        (sampling.top_p_sampling_from_probs, 0.5),
        (sampling.min_p_sampling_from_probs, 0.5),
    ):
        token, valid = draw(p, value, return_valid=True)
        assert valid.tolist() == [False, False, False, False, True]
        assert token[:3].tolist() == [0, 1, 1] and token[4] == 0  # the argmax of what is finite


def test_parameters_on_a_device_mark_their_rows(monkeypatch):
    monkeypatch.setattr(arguments, "host_values", lambda rows: False)
    p = near_ties(0)[:3]
    bad = {"top_k": torch.tensor([2, -1, 0]), "top_p": torch.tensor([0.5, 1.5, 1.0])}
    for name, value in bad.items():
        _, valid = getattr(sampling, f"{name}_sampling_from_probs")(p, value, return_valid=True)
        assert valid.tolist() == [True, False, True]
        got = getattr(sampling, f"{name}_renorm_probs")(p, value)
        assert got.isnan().any(1).tolist() == [False, True, False]
    _, valid = sampling.min_p_sampling_from_probs(
        p, torch.tensor([0.5, float("nan"), 1.0]), return_valid=True
    )
    assert valid.tolist() == [True, False, True]
    assert sampling.top_k_mask_logits(p, bad["top_k"]).isnan().any(1).tolist() == [False, True, False]


def test_no_rows():
    none = torch.empty(0, 5)
    assert sampling.top_p_sampling_from_probs(none, 0.5).shape == (0,)
    assert sampling.top_k_sampling_from_probs(none, torch.empty(0, dtype=torch.int64)).shape == (0,)
    assert (
        sampling.top_k_renorm_probs(none, 2).shape == sampling.top_p_renorm_probs(none, 0.5).shape == (0, 5)
    )
    assert sampling.top_p_sampling_from_probs(near_ties(0), 0.5, torch.empty(0, dtype=torch.int32)).shape == (
        0,
    )
