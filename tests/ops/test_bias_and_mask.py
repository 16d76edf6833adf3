"""A logit bias and a bitmask of ``steered_sample``: as if both had been applied to the logits before.

``adjusted`` below is what that means, written without the reference's help.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import svdk
from svdk.bench.goodness import PER_TEST, fit_p_values
from svdk.ops import schema
from tests.helpers import cuda_shim
from tests.helpers import ops_cases as oc
from tests.helpers.ops_cases import INF, NAN

BACKEND = pytest.mark.parametrize("backend", cuda_shim.kernels())
CASE = pytest.mark.parametrize("case", oc.CASES, ids=lambda c: c.name)
TYPICAL = (
    "default",
    "kl_everywhere",
    "log_ratio_everywhere",
    "label",
    "vector_everywhere",
    "plain",
    "plain_top_p",
)
EACH = pytest.mark.parametrize(
    ("backend", "case"),
    [
        pytest.param(backend, case, id=f"{backend}-{case.name}")
        for backend in cuda_shim.kernels()
        for case in oc.CASES
        if case.name in TYPICAL or not oc.interpreted(backend)
    ],
)
"""Every case on every backend, but for an interpreter, which is slow, one of each kind."""
pytestmark = pytest.mark.usefixtures("shim_backend")
VOCABS = (1, 31, 32, 33, 999, 32000)
FLOATS = ("strength", "kl", "logprob_steered", "logprob_warm", "logprob_base")


def device_of(backend: str) -> str:
    return "cpu" if backend == "shim" else oc.device_of(backend)


def slow(backend: str) -> bool:
    """Whether a vocabulary of a thousand tokens is a large one."""
    return backend == "shim" or oc.interpreted(backend)


def packed(allowed: Tensor, words: int = 0) -> Tensor:
    """(B, V) bool as xgrammar packs it; bits and words past V are set, and nobody may heed them."""
    batch, vocab = allowed.shape
    bits = torch.ones(batch, max(words, -(-vocab // 32)), 32, dtype=torch.int64, device=allowed.device)
    bits.view(batch, -1)[:, :vocab] = allowed.long()
    return (bits << torch.arange(32, device=allowed.device)).sum(2).to(torch.int32)  # wraps to the sign


def adjusted(x: Tensor, bias: Tensor | None, allowed: Tensor | None) -> Tensor:
    """What bias and mask make of logits: float32."""
    x = x.float() if bias is None else x.float() + bias
    return x if allowed is None else torch.where(allowed, x, -INF)


def adjustments(batch: int, vocab: int, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(B, V) bias and allowed tokens: rows of half of them, all, one in twenty, one, blocks of 32, ..."""
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(batch, vocab, generator=generator) * 2
    bias[torch.rand(batch, vocab, generator=generator) < 0.02] = -INF
    share = torch.tensor([0.5, 1.0, 0.05, 0.0, 0.3])[torch.arange(batch) % 5]
    places = torch.rand(batch, vocab, generator=generator)
    places[4::5] = places[4::5, ::32].repeat_interleave(32, 1)[:, :vocab]
    allowed = places < share[:, None]
    rows, one = torch.arange(batch), torch.randint(vocab, (batch,), generator=generator)
    allowed[rows, one], bias[rows, one] = True, 1.0
    return bias.to(device), allowed.to(device)


def adjusted_call(case: oc.Case, warm: Tensor, base: Tensor, bias, allowed) -> tuple[tuple, dict, tuple]:
    """A case's positional and keyword arguments, and the positional ones with bias and mask applied."""
    after = tuple(adjusted(x, bias, allowed) for x in (warm, base))
    changed, kwargs = oc.operands(case, *after)
    return (warm, base)[: len(changed)], kwargs, changed


@BACKEND
@CASE
@pytest.mark.parametrize("dtype", oc.DTYPES, ids=str)
def test_equals_reference_on_adjusted_logits(backend, case, dtype):
    batch = 5
    for vocab in VOCABS:
        if slow(backend) and vocab not in ((1, 33, 999) if dtype == torch.float32 else (31, 32)):
            continue
        warm, base = (x.to(device_of(backend)) for x in oc.logits(batch, vocab, dtype, seed=vocab))
        bias, allowed = adjustments(batch, vocab, warm.device, seed=vocab)
        args, kwargs, changed = adjusted_call(case, warm, base, bias, allowed)
        kwargs |= {"seed": torch.arange(batch, device=warm.device) + vocab, "offset": 3}
        given = {"logit_bias": bias, "bitmask": packed(allowed, 1003), "backend": backend}
        token, info = svdk.steered_sample(*args, **kwargs, **given, return_info=True)
        assert torch.equal(svdk.steered_sample(*args, **kwargs, **given), token)
        assert bool(allowed.gather(1, token[:, None]).all()), "a masked token was drawn"
        want, want_info = svdk.steered_sample(*changed, **kwargs, backend="reference", return_info=True)
        oc.assert_same_tokens(token, changed, kwargs, want)
        same = (token == want).cpu()
        for name in FLOATS:
            got, exact = getattr(info, name).cpu()[same], getattr(want_info, name).cpu()[same]
            oc.assert_close(got, exact, f"{case.name} V={vocab} {name}")
        assert torch.equal(info.status.cpu(), want_info.status.cpu())
        assert torch.equal(info.candidates.cpu(), want_info.candidates.cpu())


@CASE
@pytest.mark.parametrize("dtype", [*oc.DTYPES, torch.float64], ids=str)
def test_the_reference_is_the_reference_on_adjusted_logits(case, dtype):
    """Bit for bit; float64 logits, which no kernel takes, are not rounded."""
    warm, base = (x.to(dtype) for x in oc.logits(5, 300))
    bias, allowed = adjustments(5, 300, "cpu")
    args, kwargs = oc.operands(case, warm, base)
    given = {"logit_bias": bias, "bitmask": packed(allowed), "backend": "reference", "return_info": True}
    got = svdk.steered_sample(*args, **kwargs, **given)
    as_wide = (x if dtype == torch.float64 else x.float() for x in args)
    changed = [torch.where(allowed, x + bias, -INF) for x in as_wide]
    want = svdk.steered_sample(*changed, **kwargs, backend="reference", return_info=True)
    assert torch.equal(got[0], want[0])
    for name in got[1].__dataclass_fields__:
        torch.testing.assert_close(
            getattr(got[1], name), getattr(want[1], name), equal_nan=True, rtol=0, atol=0
        )


@EACH
def test_one_of_the_two_alone(backend, case):
    """A bias alone, shared or a row each, and a mask alone; a bias of -inf is a mask."""
    batch, vocab = 5, 700
    warm, base = (x.to(device_of(backend)) for x in oc.logits(batch, vocab, seed=2))
    bias, allowed = adjustments(batch, vocab, warm.device)
    shared = bias[0].nan_to_num(neginf=-3.0)
    ban = torch.where(allowed, 0.0, -INF)
    for given, both in (
        ({"logit_bias": shared}, (shared, None)),
        ({"logit_bias": shared.expand(batch, -1)}, (shared, None)),
        ({"logit_bias": bias}, (bias, None)),
        ({"bitmask": packed(allowed)}, (None, allowed)),
        ({"logit_bias": ban}, (None, allowed)),
        ({"logit_bias": shared, "bitmask": packed(allowed)}, (shared, allowed)),
    ):
        args, kwargs, changed = adjusted_call(case, warm, base, *both)
        got, info = svdk.steered_sample(*args, **kwargs, **given, backend=backend, return_info=True)
        want, want_info = svdk.steered_sample(*changed, **kwargs, backend="reference", return_info=True)
        oc.assert_same_tokens(got, changed, kwargs, want)
        assert torch.equal(info.status.cpu(), want_info.status.cpu())
        assert torch.equal(info.candidates.cpu(), want_info.candidates.cpu())


@EACH
def test_rows_by_index_strided_and_padded(backend, case):
    """Bias and mask go by the rows of the result, whatever row of the logits that is; and by vocab_size."""
    batch, vocab, padded, device = 5, 997, 1024, device_of(backend)
    warm, base = (x.to(device) for x in oc.logits(batch, vocab, torch.bfloat16, seed=11))
    bias, allowed = adjustments(batch, vocab, device, seed=4)
    wide = torch.full((4 * batch, padded), 50.0, device=device, dtype=warm.dtype)
    warm_rows = torch.tensor([9, 1, 4, 15, 2], device=device)
    base_rows = torch.tensor([0, 11, 6, 3, 19], device=device)
    wide[warm_rows, :vocab], wide[base_rows, :vocab] = warm, base
    args, kwargs = oc.operands(case, warm, base)
    given = {"logit_bias": bias, "bitmask": packed(allowed)}
    want = svdk.steered_sample(*args, **kwargs, **given, backend=backend, seed=4)
    pair = dict(kwargs, warm_rows=warm_rows, vocab_size=vocab, seed=4, backend=backend)
    if case.uses == "base":
        pair["base_rows"] = base_rows
    for shape in ((batch, vocab + 3), (batch, padded)):
        table = torch.full(shape, NAN, device=device)
        table[:, :vocab] = bias
        words = torch.zeros(batch, 2 * 64, dtype=torch.int32, device=device)
        words[:, 5:37] = packed(allowed, 32)
        cut = table[:, :vocab] if shape[1] < padded else table
        strided = {"logit_bias": cut, "bitmask": words[:, 5:37]}
        assert torch.equal(svdk.steered_sample(wide, **pair, **strided), want)
    every_second = {
        "logit_bias": bias.T.contiguous().T,
        "bitmask": packed(allowed).repeat_interleave(2, 1)[:, ::2],
    }
    assert torch.equal(svdk.steered_sample(*args, **kwargs, **every_second, backend=backend, seed=4), want)


@EACH
def test_nothing_allowed(backend, case):
    batch, vocab = 4, 999
    warm, base = (x.to(device_of(backend)) for x in oc.logits(batch, vocab, seed=3))
    allowed = torch.ones(batch, vocab, dtype=torch.bool, device=warm.device)
    allowed[1], allowed[3] = False, False
    args, kwargs = oc.operands(case, warm, base)
    given = {"bitmask": packed(allowed), "backend": backend}
    token, info = svdk.steered_sample(*args, **kwargs, **given, return_info=True)
    assert info.status.tolist() == [0, svdk.Status.INVALID, 0, svdk.Status.INVALID]
    assert token.tolist()[1::2] == [0, 0]
    assert torch.isnan(info.logprob_warm[1])
    free = svdk.steered_sample(*args, **kwargs, backend=backend)
    assert torch.equal(token[::2], free[::2])
    with pytest.raises(svdk.errors.InvalidLogitsError, match="rows 1, 3: "):
        svdk.steered_sample(*args, **kwargs, **given, check=True)


@EACH
def test_one_token_allowed(backend, case):
    batch, vocab = 3, 999
    warm, base = (x.to(device_of(backend)) for x in oc.logits(batch, vocab, seed=3))
    only = torch.tensor([0, 500, vocab - 1], device=warm.device)
    allowed = torch.zeros(batch, vocab, dtype=torch.bool, device=warm.device)
    allowed[torch.arange(batch), only] = True
    args, kwargs = oc.operands(case, warm, base)
    token, info = svdk.steered_sample(
        *args, **kwargs, bitmask=packed(allowed), backend=backend, return_info=True
    )
    assert torch.equal(token, only)
    assert torch.equal(info.candidates.cpu(), torch.ones(batch, dtype=torch.int32))
    oc.assert_close(info.logprob_steered, torch.zeros(batch), "logprob_steered")


@BACKEND
@pytest.mark.parametrize("uses", ["base", "vector", "nothing"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_what_makes_a_row_invalid(backend, uses, everywhere):
    """NaN, +inf and sums that overflow do, at tokens that are allowed; at the others nothing does."""
    vocab = 700
    bad = [
        (0.0, NAN),
        (0.0, INF),
        (3e38, 3e38),
        (INF, -INF),
        (NAN, 0.0),
        (-INF, INF),
        (-INF, 5.0),
        (3e38, -3e38),
    ]
    invalid = [True, True, True, True, True, True, False, False]
    warm, base = (x.to(device_of(backend)) for x in oc.logits(len(bad), vocab, seed=3))
    bias = torch.zeros_like(warm)
    for row, (logit, added) in enumerate(bad):
        warm[row, 40 * row + 7], bias[row, 40 * row + 7] = logit, added
    case = oc.Case("", {"alpha": 0.0, "direction": "log_ratio"} if everywhere else {}, uses)
    args, kwargs, changed = adjusted_call(case, warm, base, bias, None)
    kwargs["temperature"] = 0.0
    token, info = svdk.steered_sample(*args, **kwargs, logit_bias=bias, backend=backend, return_info=True)
    assert (info.status & svdk.Status.INVALID).bool().tolist() == invalid
    oc.assert_same_tokens(token, changed, kwargs)
    for row in range(6):
        assert int(token[row]) == int(changed[0][row].nan_to_num(-INF, -INF, -INF).argmax())
    allowed = torch.ones_like(warm, dtype=torch.bool)
    allowed[range(len(bad)), [40 * row + 7 for row in range(len(bad))]] = False
    given = {"logit_bias": bias, "bitmask": packed(allowed)}
    _, info = svdk.steered_sample(*args, **kwargs, **given, backend=backend, return_info=True)
    assert info.status.tolist() == [0] * len(bad)


@BACKEND
@pytest.mark.parametrize("direction", ["kl_gradient", "log_ratio"])
@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_a_masked_token_is_not_base_masked(backend, direction, alpha):
    warm, base = (x.to(device_of(backend)) for x in oc.logits(3, 300, seed=5))
    base[:, 17] = -INF
    allowed = torch.ones_like(warm, dtype=torch.bool)
    allowed[1, 17] = False
    bias = torch.zeros_like(warm)
    bias[2, 17] = -INF
    kwargs = {"direction": direction, "alpha": alpha}
    token, info = svdk.steered_sample(
        warm, base, logit_bias=bias, bitmask=packed(allowed), backend=backend, return_info=True, **kwargs
    )
    assert info.status.tolist() == [svdk.Status.BASE_MASKED, 0, 0]
    changed = tuple(adjusted(x, bias, allowed) for x in (warm, base))
    oc.assert_same_tokens(token, changed, kwargs)


@BACKEND
def test_filters_work_on_what_is_left(backend):
    batch, vocab = (5, 300) if slow(backend) else (40, 900)
    warm, base = (x.to(device_of(backend)) for x in oc.logits(batch, vocab, seed=6))
    bias, allowed = adjustments(batch, vocab, warm.device, seed=9)
    given = {"logit_bias": bias, "bitmask": packed(allowed), "backend": backend}
    changed = tuple(adjusted(x, bias, allowed) for x in (warm, base))
    seeds = torch.arange(batch, device=warm.device)
    for alpha in (0.1, 0.0):
        for filters in (
            {"top_k": 3},
            {"top_p": 0.6},
            {"min_p": 0.2},
            {"top_k": 20, "top_p": 0.9, "min_p": 0.02, "temperature": 1.7},
            {"top_k": 1},
        ):
            kwargs = {"alpha": alpha, "seed": seeds, **filters}
            got = svdk.steered_sample(warm, base, **kwargs, **given)
            oc.assert_same_tokens(got, changed, kwargs)
            got = svdk.steered_sample(warm, **kwargs, **given)
            oc.assert_same_tokens(got, changed[:1], kwargs)


@pytest.mark.parametrize("backend", [b for b in oc.kernels() if not oc.interpreted(b)])
@pytest.mark.parametrize("steered", [True, False])
def test_masked_draws_follow_the_distribution(backend, steered):
    draws, vocab = 300_000, 70
    warm, base = (x.to(device_of(backend)) for x in oc.logits(1, vocab, seed=2, scale=1.0))
    bias, allowed = adjustments(1, vocab, warm.device)
    args, kwargs = (warm, base) if steered else (warm,), {"alpha": 0.0, "strength": 1.5} if steered else {}
    changed = tuple(adjusted(x, bias, allowed) for x in args)
    *_, masses = svdk.reference.steered_rows(*oc.flat_arguments(changed, kwargs))
    rows = tuple(x.expand(draws, -1) for x in args)
    given = {"logit_bias": bias[0], "bitmask": packed(allowed).expand(draws, -1), "backend": backend}
    seeds = torch.arange(draws, device=warm.device)
    counts = torch.bincount(svdk.steered_sample(*rows, **kwargs, **given, seed=seeds).cpu(), minlength=vocab)
    assert counts[~allowed[0].cpu()].sum() == 0
    for which, p in fit_p_values(counts.double(), (masses[0] / masses[0].sum()).cpu()).items():
        assert p > PER_TEST, f"{which}: p = {p:g}"


@BACKEND
def test_empty_batch(backend):
    warm = torch.empty(0, 50, device=device_of(backend))
    given = {"logit_bias": warm, "bitmask": torch.empty(0, 2, dtype=torch.int32, device=warm.device)}
    assert svdk.steered_sample(warm, warm, **given, backend=backend).shape == (0,)


@pytest.mark.parametrize("info", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_opcheck(info, shared):
    warm, base = oc.logits(3, 200)
    bias, allowed = adjustments(3, 200, "cpu")
    given = {"logit_bias": bias[0] if shared else bias, "bitmask": packed(allowed), "info": info}
    arguments = oc.flat(schema.STEERED_SAMPLE, warm, base, seed=7, **given)
    torch.library.opcheck(torch.ops.svdk.steered_sample.default, arguments)


def test_compiled_function_equals_eager():
    def step(warm, base, bias, bitmask):
        return svdk.steered_sample(warm * 2, base * 2, logit_bias=bias, bitmask=bitmask) + 1

    warm, base = oc.logits(3, 200)
    bias, allowed = adjustments(3, 200, "cpu")
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for mask in (packed(allowed), packed(~allowed)):
        assert torch.equal(compiled(warm, base, bias, mask), step(warm, base, bias, mask))


def test_the_op_refuses_what_does_not_fit():
    """Whoever calls it without the checks in Python must not read past the end of anything."""
    warm, base = oc.logits(3, 100)
    for bad in (
        {"logit_bias": torch.zeros(99)},
        {"logit_bias": torch.zeros(2, 100)},
        {"logit_bias": torch.zeros(100, dtype=torch.float64)},
        {"logit_bias": torch.zeros(100, 3).T},
        {"bitmask": torch.zeros(3, 3, dtype=torch.int32)},
        {"bitmask": torch.zeros(2, 4, dtype=torch.int32)},
        {"bitmask": torch.zeros(3, 4, dtype=torch.int64)},
        {"bitmask": torch.zeros(4, 3, dtype=torch.int32).T},
    ):
        with pytest.raises(RuntimeError, match=f"{next(iter(bad))} must"):
            torch.ops.svdk.steered_sample(*oc.flat(schema.STEERED_SAMPLE, warm, base, **bad))
