"""svdk.sampling: FlashInfer's functions; what each may draw, how often, and from whose seed."""

from __future__ import annotations

import inspect

import pytest
import torch

from svdk import sampling
from svdk.errors import InputError
from svdk.ops import reference

VOCAB = 40
DRAWS = 20000
K = torch.tensor([3, 7, 0])
P = torch.tensor([0.5, 0.9, 0.7])


def logits(rows=3, seed=0):
    return 2 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def probs(rows=3, seed=0):
    return logits(rows, seed).softmax(-1)


def kept(p, top_k=0, top_p=1.0, min_p=0.0):
    """The (B, V) mask of the specification."""
    row = torch.ones(p.shape[0], dtype=torch.double)
    cuts = (row * torch.as_tensor(cut) for cut in (top_k, top_p, min_p))
    return reference.filter_row(p.double().log(), row, *cuts)


def joint(p):
    return kept(p, top_k=K) & kept(p, top_p=P)


# name, arguments after the distributions, the mask of what may be drawn
CASES = {
    "sampling_from_logits": ((), lambda p: kept(p)),
    "sampling_from_probs": ((), lambda p: kept(p)),
    "top_p_sampling_from_probs": ((P,), lambda p: kept(p, top_p=P)),
    "top_k_sampling_from_probs": ((K,), lambda p: kept(p, top_k=K)),
    "min_p_sampling_from_probs": ((0.1,), lambda p: kept(p, min_p=0.1)),
    "top_k_top_p_sampling_from_logits": ((K, P), lambda p: kept(p, top_k=K, top_p=P)),
    "top_k_top_p_sampling_from_probs": ((K, P), lambda p: kept(p, top_k=K, top_p=P)),
    "top_k_top_p_sampling_from_logits joint": ((K, P, None, "joint"), joint),
    "top_k_top_p_sampling_from_probs joint": ((K, P, None, "joint"), joint),
}
SAMPLERS = sorted({case.split()[0] for case in CASES})


@pytest.mark.parametrize("case", CASES)
def test_support_and_frequencies(case):
    name = case.split()[0]
    arguments, mask = CASES[case]
    p = probs()
    given = logits() if "logits" in name else p
    # `indices` draws each row many times over, in no order; parameters belong to the distributions.
    rows = torch.arange(3).repeat_interleave(DRAWS)[torch.randperm(3 * DRAWS, generator=torch.Generator())]
    options = {"filter_apply_order": "joint"} if "joint" in case else {}
    drawn = getattr(sampling, name)(given, *arguments[:2], indices=rows, seed=1, offset=0, **options)
    assert drawn.dtype == torch.int64
    keep = mask(p)
    for i in range(3):
        count = torch.bincount(drawn[rows == i], minlength=VOCAB).double()
        assert (count[~keep[i]] == 0).all()
        want = torch.where(keep[i], p[i].double(), 0.0)
        want = want / want.sum() * DRAWS
        seen = keep[i] & (want > 5)
        degrees = max(int(seen.sum()) - 1, 1)
        chi2 = ((count - want) ** 2 / want)[seen].sum().item()
        assert chi2 < degrees + 6 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("name", SAMPLERS)
def test_rows_without_indices_and_seeds(name):
    extra = {"top_k": (5,), "top_p": (0.9,), "min_p": (0.05,), "top_k_top_p": (5, 0.9)}
    arguments = extra.get(name.partition("_sampling")[0], ())
    draw = getattr(sampling, name)
    given = logits(400) if "logits" in name else probs(400)
    seeds = torch.arange(400) * 977 + 5
    drawn = draw(given, *arguments, seed=seeds, offset=3)
    assert drawn.dtype == torch.int32 and drawn.shape == (400,)
    # A row's token is its own seed's, whatever is around it.
    assert torch.equal(draw(given[100:200], *arguments, seed=seeds[100:200], offset=3), drawn[100:200])
    assert torch.equal(draw(given, *arguments, seed=seeds.to(torch.uint64), offset=torch.tensor([3])), drawn)
    assert not torch.equal(draw(given, *arguments, seed=seeds, offset=4), drawn)
    # One seed for all: equal rows draw independently, and the seed decides.
    same = given[:1].expand(400, -1).contiguous()
    one = draw(same, *arguments, seed=9, offset=0)
    assert len(set(one.tolist())) > 1
    assert torch.equal(draw(same, *arguments, seed=torch.tensor([9]), offset=0), one)
    # No seed: the generator, or torch's own.
    first, second = (draw(given, *arguments, generator=torch.Generator().manual_seed(2)) for _ in range(2))
    assert torch.equal(first, second)
    torch.manual_seed(0)
    third, fourth = (draw(given, *arguments) for _ in range(2))
    assert not torch.equal(third, fourth)
    torch.manual_seed(0)
    assert torch.equal(draw(given, *arguments), third)


@pytest.mark.parametrize("order", ["top_k_first", "joint"])
@pytest.mark.parametrize("what", ["logits", "probs"])
def test_parameters_belong_to_the_rows_of_the_distribution(what, order):
    """As many outputs as rows, so that a parameter of the outputs would be taken too."""
    p = torch.tensor([[0.6, 0.3, 0.1]] * 3)
    rows = torch.tensor([2, 1, 0], dtype=torch.int32)
    given = p.log() if what == "logits" else p
    both = getattr(sampling, f"top_k_top_p_sampling_from_{what}")
    ones, limits = torch.tensor([1, 1, 0]), torch.tensor([0.1, 0.1, 1.0])
    calls = [
        lambda seed: both(given, ones, 1.0, rows, order, seed=seed, offset=0),
        lambda seed: both(given, 0, limits, rows, order, seed=seed, offset=0),
    ]
    if what == "probs":
        calls += [
            lambda seed: sampling.top_p_sampling_from_probs(p, limits, rows, seed=seed, offset=0),
            lambda seed: sampling.top_k_sampling_from_probs(p, ones, rows, seed=seed, offset=0),
            lambda seed: sampling.min_p_sampling_from_probs(p, 1 - limits, rows, seed=seed, offset=0),
        ]
    for call in calls:
        drawn = torch.stack([call(seed) for seed in range(60)])
        assert [set(column.tolist()) for column in drawn.T] == [{0, 1, 2}, {0}, {0}]
    for length in (2, 4):
        with pytest.raises(InputError, match=rf"top_p was .*\({length},\).*allowed: a scalar or \(3,\)"):
            both(given, 5, torch.ones(length), torch.zeros(length, dtype=torch.int64), order)


def test_seeds_belong_to_the_outputs():
    z, rows = logits(2), torch.tensor([1, 1, 0, 1])
    seeds, offsets = torch.tensor([5, 6, 7, 5]), torch.tensor([0, 0, 0, 1])
    drawn = sampling.sampling_from_logits(z, rows, seed=seeds, offset=offsets)
    each = [
        sampling.sampling_from_logits(z, rows[i : i + 1], seed=seeds[i : i + 1], offset=int(offsets[i]))
        for i in range(4)
    ]
    assert torch.equal(drawn, torch.cat(each))
    with pytest.raises(InputError, match=r"seed was .*\(2,\).*\(4,\)"):
        sampling.sampling_from_logits(z, rows, seed=torch.arange(2), offset=0)


def test_output_takes_the_dtype_of_indices():
    for dtype in (torch.int32, torch.int64):
        rows = torch.tensor([2, 0, 0], dtype=dtype)
        assert sampling.sampling_from_logits(logits(), rows).dtype == dtype


@pytest.mark.parametrize("name", [n for n in SAMPLERS if n.endswith("probs")])
def test_valid_rows(name):
    p = probs(4)
    p[1] = 0
    p[2, 3] = torch.nan
    arguments = {"top_k": (5,), "top_p": (0.9,), "min_p": (0.05,), "top_k_top_p": (5, 0.9)}
    arguments = arguments.get(name.partition("_sampling")[0], ())
    token, valid = getattr(sampling, name)(p, *arguments, return_valid=True)
    assert valid.tolist() == [True, False, False, True]
    assert ((token >= 0) & (token < VOCAB)).all()
    with pytest.raises(ValueError, match="probs held NaN"):
        getattr(sampling, name)(p, *arguments, check_nan=True)


def test_renormalised_probabilities_and_masked_logits():
    p, z = probs(), logits()
    for top_k in (K, 4):
        want = torch.where(kept(p, top_k=top_k), p, 0.0)
        want = want / want.sum(1, keepdim=True)
        torch.testing.assert_close(sampling.top_k_renorm_probs(p, top_k), want)
        masked = sampling.top_k_mask_logits(z, top_k)
        assert torch.equal(masked.isfinite(), kept(p, top_k=top_k))
        torch.testing.assert_close(masked.softmax(-1), want)
    for top_p in (P, 0.6, 1.0, 0.0):
        want = torch.where(kept(p, top_p=top_p), p, 0.0)
        torch.testing.assert_close(sampling.top_p_renorm_probs(p, top_p), want / want.sum(1, keepdim=True))
    half = sampling.top_k_renorm_probs(p.half(), 4)
    assert half.dtype == torch.half and (half > 0).sum(1).tolist() == [4, 4, 4]
    assert sampling.top_p_renorm_prob is sampling.top_p_renorm_probs
    assert sampling.top_k_renorm_prob is sampling.top_k_renorm_probs


def test_softmax():
    z = logits()
    torch.testing.assert_close(sampling.softmax(z), z.softmax(-1))
    torch.testing.assert_close(sampling.softmax(z, 0.5), (2 * z).softmax(-1))
    t = torch.tensor([0.5, 0.0, 2.0])
    got = sampling.softmax(z.bfloat16(), t)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got[::2], (z.bfloat16().float()[::2] / t[::2, None]).softmax(-1))
    assert got[1].argmax() == z[1].argmax() and got[1].max() == 1 and got[1].sum() == 1


@pytest.mark.parametrize("t", [1e-30, 1e-20, 0.5, 1.0])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_softmax_of_great_logits_and_small_temperatures(t, as_tensor):
    big, inf = torch.finfo(torch.float32).max, float("inf")
    z = torch.tensor([[big, 1, 2], [big, -big, big], [20, 10, 5], [-inf, 1, -inf], [-big, -big, -inf]])
    got = sampling.softmax(z, torch.full((5,), t) if as_tensor else t)
    want = ((z.double() - z.double().amax(1, keepdim=True)) / t).softmax(-1).float()
    torch.testing.assert_close(got, want)


def test_softmax_shows_what_is_no_distribution():
    nan, inf = float("nan"), float("inf")
    z = torch.tensor([[1.0, nan, 3.0], [1.0, inf, 3.0], [-inf, -inf, -inf], [1.0, 3.0, 3.0]])
    for t in (None, 0.0, 0.5, torch.tensor([0.0, 0.0, 0.0, 0.0]), torch.full((4,), 1e-30)):
        got = sampling.softmax(z, t)
        assert got[:3].isnan().all() and got[3].isfinite().all()
    assert sampling.softmax(z, 0)[3].tolist() == [0, 1, 0]  # the lower id


def test_bfloat16_logits():
    assert sampling.top_k_top_p_sampling_from_logits(logits().bfloat16(), 1, 0.9).tolist() == (
        logits().bfloat16().argmax(-1).tolist()
    )


# FlashInfer's parameters in order, as of its main branch in 2026.
DRAW = "indices deterministic generator check_nan seed offset"
SIGNATURES = {
    "softmax": "logits temperature enable_pdl",
    "sampling_from_logits": f"logits {DRAW}",
    "sampling_from_probs": f"probs {DRAW} return_valid",
    "top_p_sampling_from_probs": f"probs top_p {DRAW} return_valid",
    "top_k_sampling_from_probs": f"probs top_k {DRAW} return_valid",
    "min_p_sampling_from_probs": f"probs min_p {DRAW} return_valid",
    "top_k_top_p_sampling_from_logits": "logits top_k top_p "
    + DRAW.replace("indices", "indices filter_apply_order"),
    "top_k_top_p_sampling_from_probs": "probs top_k top_p "
    + DRAW.replace("indices", "indices filter_apply_order")
    + " return_valid",
    "top_p_renorm_probs": "probs top_p is_deterministic",
    "top_k_renorm_probs": "probs top_k is_deterministic",
    "top_k_mask_logits": "logits top_k",
    "chain_speculative_sampling": "draft_probs draft_token_ids target_probs maybe_output_accepted_token_num "
    "maybe_output_emitted_draft_token_num deterministic generator seed offset",
    "get_seed_and_offset": "increment generator device",
}


def test_the_documentation_names_everything():
    assert set(sampling.__all__) == set(SIGNATURES) | {"top_p_renorm_prob", "top_k_renorm_prob"}
    for name in (*sampling.__all__, "get_sampling_module"):
        assert f"``{name}``" in sampling.__doc__


@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments_are_flashinfers(name):
    assert " ".join(inspect.signature(getattr(sampling, name)).parameters) == SIGNATURES[name]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sampling.sampling_from_logits(torch.randn(4)), "logits was a tensor of shape"),
        (
            lambda: sampling.sampling_from_logits(logits(), seed=torch.arange(2), offset=0),
            "seed was a tensor",
        ),
        (lambda: sampling.sampling_from_logits(logits() * torch.nan, check_nan=True), "logits held NaN"),
        (lambda: sampling.top_p_sampling_from_probs(probs(), 1.5), r"top_p was 1\.5"),
        (lambda: sampling.top_k_sampling_from_probs(probs(), -1), "top_k was -1"),
        (lambda: sampling.softmax(logits(), -1.0), r"temperature was -1\.0"),
        (lambda: sampling.top_k_renorm_probs(probs(), torch.tensor([1, 2])), "top_k was a tensor"),
        (
            lambda: sampling.top_k_top_p_sampling_from_probs(probs(), 1, 0.5, None, "top_p_first"),
            "filter_apply_order was 'top_p_first'; allowed: 'top_k_first' | 'joint'",
        ),
        (lambda: sampling.softmax(logits(), 1e-31), r"temperature was 1e-31; allowed: 0 \(greedy\) or"),
        (lambda: sampling.softmax(logits(), torch.tensor([1, 1e-31, 1])), r"temperature\[1\] was"),
        (lambda: sampling.softmax([[1.0]]), "logits was list"),
        (lambda: sampling.top_k_sampling_from_probs(probs(), 1 << 63), "top_k was 9223372036854775808"),
        (lambda: sampling.top_k_renorm_probs(probs(), 1 << 2000), "top_k was"),
        (lambda: sampling.top_k_mask_logits(logits(), 2.5), r"top_k was 2\.5"),
        (lambda: sampling.top_k_mask_logits(logits().long(), 2), "logits was torch.int64"),
        (lambda: sampling.min_p_sampling_from_probs(probs(), float("nan")), "min_p was nan"),
        (lambda: sampling.min_p_sampling_from_probs(probs(), torch.tensor([0.1, 2, 0])), r"min_p\[1\] was 2"),
        (lambda: sampling.sampling_from_logits(logits(), seed="a", offset=0), "seed was 'a'"),
        (
            lambda: sampling.sampling_from_logits(logits(), seed=torch.ones(3), offset=0),
            "seed was torch.float32",
        ),
        (lambda: sampling.sampling_from_logits(logits(), seed=0, offset=torch.zeros(2).long()), "offset was"),
        (lambda: sampling.sampling_from_logits(logits(), seed=1 << 64, offset=0), "seed was"),
        (
            lambda: sampling.sampling_from_logits(logits(), generator=5),
            "generator was 5; allowed: a torch.Gen",
        ),
        (lambda: sampling.sampling_from_logits([[1.0]], check_nan=True), "logits was list"),
        (lambda: sampling.sampling_from_logits(logits().double()), "logits was torch.float64"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("order", ["top_k_first", "joint"])
@pytest.mark.parametrize(
    ("indices", "was"),
    [
        ([0, 1], r"\[0, 1\]"),
        (1, "1"),
        (torch.tensor(1), r"a tensor of shape \(\)"),
        (torch.tensor([[1]]), r"a tensor of shape \(1, 1\)"),
        (torch.tensor([True]), "a tensor of shape .*bool"),
        (torch.tensor([1.0]), "a tensor of shape .*float32"),
        (torch.tensor([7]), r"7\.\.7"),
        (torch.tensor([-1]), r"-1\.\.-1"),
    ],
)
def test_bad_indices(name, order, indices, was):
    extra = {"top_k": (5,), "top_p": (0.9,), "min_p": (0.05,), "top_k_top_p": (5, 0.9)}
    kind = name.partition("_sampling")[0]
    options = {"filter_apply_order": order} if kind == "top_k_top_p" else {}
    given = logits() if "logits" in name else probs()
    with pytest.raises(InputError, match=f"indices was {was}.*; allowed: "):
        getattr(sampling, name)(given, *extra.get(kind, ()), indices=indices, **options)
