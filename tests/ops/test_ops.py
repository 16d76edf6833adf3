"""Every backend against the float64 reference: the same body for all of them."""

from __future__ import annotations

import math

import pytest
import torch

import svdk
from tests.helpers import ops_cases as oc

KERNELS = oc.kernels()
CASE = pytest.mark.parametrize("case", oc.CASES, ids=lambda c: c.name)
BACKEND = pytest.mark.parametrize("backend", KERNELS)


def test_there_is_a_kernel_to_test():
    assert "cpu" in KERNELS, svdk.backends.status()


@BACKEND
@CASE
@pytest.mark.parametrize("dtype", oc.DTYPES, ids=str)
def test_sample_equals_reference(backend, case, dtype):
    for vocab in oc.vocabs(backend):
        batch = 2 if vocab > 5000 else 4
        warm, base = (x.to(oc.device_of(backend)) for x in oc.logits(batch, vocab, dtype, seed=vocab))
        args, kwargs = oc.operands(case, warm, base)
        kwargs |= {"seed": vocab + 1, "offset": 3}
        token, info = svdk.steered_sample(*args, **kwargs, backend=backend, return_info=True)
        assert token.dtype == torch.int64
        assert token.shape == (batch,)
        alone = svdk.steered_sample(*args, **kwargs, backend=backend)
        assert torch.equal(alone, token), "asking for diagnostics changed the token"
        want_token, want = svdk.steered_sample(*args, **kwargs, backend="reference", return_info=True)
        oc.assert_same_tokens(token, args, kwargs, want_token)
        if torch.equal(token, want_token):
            for name in ("strength", "kl", "logprob_steered", "logprob_warm", "logprob_base"):
                oc.assert_close(getattr(info, name), getattr(want, name), f"{case.name} V={vocab} {name}")
        assert torch.equal(info.status.cpu(), want.status.cpu())
        assert torch.equal(info.candidates.cpu(), want.candidates.cpu())


@BACKEND
@CASE
@pytest.mark.parametrize(("warm", "base", "status"), oc.odd_rows())
def test_odd_rows(backend, case, warm, base, status):
    warm, base = warm.to(oc.device_of(backend)), base.to(oc.device_of(backend))
    args, kwargs = oc.operands(case, warm, base)
    if case.uses != "base":
        status = (
            status
            if torch.isnan(warm).any() or (warm == math.inf).any() or not torch.isfinite(warm).any()
            else 0
        )
    token, info = svdk.steered_sample(*args, **kwargs, backend=backend, return_info=True)
    assert int(info.status[0]) == status
    assert 0 <= int(token[0]) < warm.shape[1]
    if torch.isfinite(warm).any():
        assert math.isfinite(float(warm[0, token[0]])), "a masked token was drawn"
    oc.assert_same_tokens(token, args, kwargs)
    _, want = svdk.steered_sample(*args, **kwargs, backend="reference", return_info=True)
    assert torch.equal(info.candidates.cpu(), want.candidates.cpu())
    oc.assert_close(info.kl, want.kl, "kl")
    oc.assert_close(info.strength, want.strength, "strength")


@BACKEND
@pytest.mark.parametrize("alpha", [0.0, 1e-8, 0.1, 1.0])
@pytest.mark.parametrize("penalty", [-math.inf, 0.0, -2.0, 1.5])
@pytest.mark.parametrize("direction", ["kl_gradient", "log_ratio", "vector"])
def test_logprob_equals_reference(backend, alpha, penalty, direction):
    strengths = torch.tensor([-3.0, -0.5, 0.0, 0.7, 2.0, 8.0], device=oc.device_of(backend))
    for vocab in [v for v in oc.vocabs(backend) if v <= 49152]:
        warm, base = (x.to(oc.device_of(backend)) for x in oc.logits(5, vocab, seed=vocab + 1))
        labels = torch.tensor([0, vocab // 2, vocab - 1, 0, 0], device=warm.device)
        labels[3:] = warm[3:].argmax(1)
        kwargs = {"alpha": alpha, "penalty": penalty}
        if direction == "vector":
            kwargs["vector"] = base[0] - warm[0]
            args = (warm, None, labels)
        else:
            kwargs["direction"] = direction
            args = (warm, base, labels)
        got = svdk.steered_logprob(*args, strengths=strengths, backend=backend, **kwargs)
        want = svdk.steered_logprob(*args, strengths=strengths, backend="reference", **kwargs)
        for name in want.__dataclass_fields__:
            x, y = getattr(got, name), getattr(want, name)
            if x.dtype.is_floating_point:
                oc.assert_close(x, y, f"V={vocab} {name}", rtol=5e-4, atol=5e-5)
            else:
                assert torch.equal(x.cpu(), y.cpu()), f"V={vocab} {name}"
        one = svdk.steered_logprob(*args, strength=2.0, backend=backend, **kwargs)
        assert torch.equal(one.logprob, got.logprob[:, 4])
        per_row = torch.tensor([2.0, -0.5, 0.0, 8.0, 0.7], device=warm.device)
        own = svdk.steered_logprob(*args, strength=per_row, backend=backend, **kwargs)
        assert torch.equal(own.logprob, got.logprob[torch.arange(5), torch.tensor([4, 1, 2, 5, 3])])


@BACKEND
@pytest.mark.parametrize("dtype", oc.DTYPES, ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.1])
@pytest.mark.parametrize("direction", ["kl_gradient", "log_ratio"])
def test_extract_equals_reference(backend, alpha, direction, dtype):
    for vocab in [v for v in oc.vocabs(backend) if v <= 32000]:
        warm, base = (x.to(oc.device_of(backend)) for x in oc.logits(4, vocab, dtype, seed=vocab + 2))
        warm[2, 0] = math.nan
        if vocab > 4:
            base[1, 3] = -math.inf
        got = svdk.extract(warm, base, alpha=alpha, direction=direction, backend=backend)
        want = svdk.extract(warm, base, alpha=alpha, direction=direction, backend="reference")
        for name in ("row_ptr", "token_ids", "status"):
            assert torch.equal(getattr(got, name).cpu(), getattr(want, name).cpu()), f"V={vocab} {name}"
        for name in ("p", "delta", "kl", "max_logit", "lse"):
            oc.assert_close(getattr(got, name), getattr(want, name), f"V={vocab} {name}")


@BACKEND
@pytest.mark.parametrize("direction", ["kl_gradient", "log_ratio"])
def test_per_row_parameters_are_each_rows_own(backend, direction):
    batch, vocab, device = 6, 999, oc.device_of(backend)
    warm, base = (x.to(device) for x in oc.logits(batch, vocab, seed=3))
    rows = {
        "strength": torch.tensor([0.0, 1.0, -1.0, 5.0, 0.5, 2.0]),
        "alpha": torch.tensor([0.1, 0.0, 0.5, 0.01, 1.0, 0.1]),
        "temperature": torch.tensor([1.0, 0.0, 0.7, 1.5, 1.0, 0.3]),
        "top_k": torch.tensor([0, 5, 10, 0, 3, 1]),
        "top_p": torch.tensor([1.0, 0.9, 0.5, 0.99, 1.0, 0.8]),
        "min_p": torch.tensor([0.0, 0.1, 0.0, 0.01, 0.0, 0.2]),
        "seed": torch.tensor([1, -2, 3, 2**62, 5, 6]),
        "offset": torch.tensor([0, 1, 2**40, 3, 4, -5]),
    }
    kwargs = {k: v.to(device) for k, v in rows.items()}
    got = svdk.steered_sample(warm, base, direction=direction, backend=backend, **kwargs)
    oc.assert_same_tokens(got, (warm, base), {"direction": direction, **kwargs})
    for i in range(batch):  # the same row alone, with numbers instead of tensors
        alone = svdk.steered_sample(
            warm[i : i + 1],
            base[i : i + 1],
            direction=direction,
            backend=backend,
            **{k: v[i].item() for k, v in rows.items()},
        )
        assert int(alone[0]) == int(got[i]), f"row {i}"


@BACKEND
@CASE
def test_paired_strided_and_padded_rows(backend, case):
    batch, vocab, padded, device = 3, 997, 1024, oc.device_of(backend)
    warm, base = (x.to(device) for x in oc.logits(batch, padded, seed=11))
    wide = torch.full((4 * batch, padded), 50.0, device=device)  # what must not be read would win
    warm_rows, base_rows = torch.tensor([9, 1, 4], device=device), torch.tensor([0, 11, 6], device=device)
    wide[warm_rows, :vocab], wide[base_rows, :vocab] = warm[:, :vocab], base[:, :vocab]
    args, kwargs = oc.operands(case, warm[:, :vocab].contiguous(), base[:, :vocab].contiguous())
    want = svdk.steered_sample(*args, **kwargs, backend=backend, seed=4)
    pair = dict(kwargs, warm_rows=warm_rows, vocab_size=vocab, seed=4, backend=backend)
    if case.uses == "base":
        pair["base_rows"] = base_rows
    assert torch.equal(svdk.steered_sample(wide, **pair), want), "rows by index of one tensor"
    sliced = tuple(x[:, :vocab] for x in ((warm, base) if case.uses == "base" else (warm,)))
    assert sliced[0].stride(0) == padded
    assert torch.equal(svdk.steered_sample(*sliced, **kwargs, backend=backend, seed=4), want), "strided rows"
    every = tuple(x.repeat_interleave(2, 0)[::2] for x in args)
    assert torch.equal(svdk.steered_sample(*every, **kwargs, backend=backend, seed=4), want), (
        "every second row"
    )


@BACKEND
@CASE
def test_a_row_does_not_depend_on_its_batch(backend, case):
    device = oc.device_of(backend)
    vocab = 4999 if device == "cuda" or backend == "cpu" else 999
    warm, base = (x.to(device) for x in oc.logits(9, vocab, seed=21))
    seeds = torch.arange(9, device=device) + 100
    args, kwargs = oc.operands(case, warm, base)
    labels = kwargs.pop("labels", None)
    extra = {} if labels is None else {"labels": labels}
    together = svdk.steered_sample(*args, **kwargs, **extra, seed=seeds, backend=backend)
    order = torch.tensor([4, 8, 0, 2], device=device)
    extra = {} if labels is None else {"labels": labels[order]}
    some = svdk.steered_sample(
        *(x[order] for x in args), **kwargs, **extra, seed=seeds[order], backend=backend
    )
    assert torch.equal(some, together[order])


@BACKEND
def test_ties_go_to_the_lowest_id(backend):
    warm = torch.zeros(2, 500, device=oc.device_of(backend))
    warm[0, [77, 78, 300]] = 5.0
    got = svdk.steered_sample(warm, warm.clone(), temperature=0.0, backend=backend)
    assert got.tolist() == [77, 0]
    assert svdk.steered_sample(warm, temperature=0.0, backend=backend).tolist() == [77, 0]


@BACKEND
def test_empty_batch(backend):
    warm = torch.empty(0, 50, device=oc.device_of(backend))
    token, info = svdk.steered_sample(warm, warm, backend=backend, return_info=True)
    assert token.shape == (0,)
    assert info.kl.shape == (0,)
    labels = torch.empty(0, dtype=torch.int64, device=warm.device)
    assert svdk.steered_logprob(warm, warm, labels, backend=backend).logprob.shape == (0,)
    assert svdk.extract(warm, warm, backend=backend).row_ptr.tolist() == [0]


@BACKEND
@pytest.mark.parametrize("mode", ["steered", "plain"])
def test_check_names_the_rows(backend, mode):
    warm, base = (x.to(oc.device_of(backend)) for x in oc.logits(5, 40))
    warm[1, 3], warm[4, :] = math.nan, -math.inf
    args = (warm, base) if mode == "steered" else (warm,)
    with pytest.raises(svdk.InputError, match=r"rows 1, 4: .*NaN"):
        svdk.steered_sample(*args, backend=backend, check=True)
    warm[1], warm[4] = 0.0, 1.0
    svdk.steered_sample(*args, backend=backend, check=True)


@BACKEND
def test_extreme_strengths_stay_in_range(backend):
    warm, base = (x.to(oc.device_of(backend)) for x in oc.logits(4, 999, seed=8))
    for strength in (1e30, -1e30, 1e-30, 0.0):
        for kwargs in ({}, {"alpha": 0.0}, {"alpha": 0.0, "direction": "log_ratio"}, {"penalty": 0.0}):
            kwargs = dict(kwargs, strength=strength)
            got = svdk.steered_sample(warm, base, backend=backend, **kwargs)
            oc.assert_same_tokens(got, (warm, base), kwargs)
