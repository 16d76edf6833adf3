"""``steered_logits``: whole rows against the reference and against what the other ops say of them."""

from __future__ import annotations

import math

import pytest
import torch

import svdk
from svdk.errors import InvalidLogitsError
from svdk.ops import schema
from tests.helpers import ops_cases as oc

BACKEND = pytest.mark.parametrize("backend", oc.kernels())
CASES = (
    oc.Case("default"),
    oc.Case("log_ratio", {"direction": "log_ratio", "strength": 0.8}),
    oc.Case("log_ratio_everywhere", {"direction": "log_ratio", "alpha": 0.0, "strength": 1.5}),
    oc.Case("kl_everywhere", {"alpha": 0.0, "strength": 3.0}),
    oc.Case("negative", {"strength": -2.0}),
    oc.Case("finite_penalty", {"penalty": -1.5, "strength": 2.0}),
    oc.Case("zero", {"strength": 0.0}),
    oc.Case("zero_penalty", {"strength": 0.0, "penalty": 0.0}),
    oc.Case("kl_budget", {"strength_mode": "kl_budget", "strength": 0.1}),
    oc.Case("kl_budget_everywhere", {"strength_mode": "kl_budget", "strength": 0.05, "alpha": 0.0}),
    oc.Case("kl_budget_penalty", {"strength_mode": "kl_budget", "strength": 0.1, "penalty": -0.5}),
    oc.Case("only_the_best", {"alpha": 1.0}),
    oc.Case("vector", {"strength": 1.5}, "vector"),
    oc.Case("vector_everywhere", {"strength": 1.5, "alpha": 0.0}, "vector"),
    oc.Case("vector_budget", {"strength_mode": "kl_budget", "strength": 0.1}, "vector"),
    oc.Case("plain", {}, "nothing"),
)
CASE = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
DTYPE = pytest.mark.parametrize("dtype", oc.DTYPES, ids=str)


def vocabs(backend: str) -> list[int]:
    """Those of the other ops' tests, as far as whole rows are quick."""
    return [v for v in oc.vocabs(backend) if v <= 32000]


def inputs(backend, batch, vocab, dtype=torch.float32, seed=0, scale=3.0):
    """Logits on a backend's device."""
    return (x.to(oc.device_of(backend)) for x in oc.logits(batch, vocab, dtype, seed, scale))


def assert_rounded(got, exact, backend) -> None:
    """Each entry is the float32 one, rounded to the nearest of its dtype."""
    if oc.interpreted(backend) and got.dtype == torch.bfloat16:  # Triton's interpreter rounds towards 0
        oc.assert_close(got, exact.bfloat16(), "bfloat16", rtol=2**-7, atol=0.0)
    else:
        assert torch.equal(got, exact.to(got.dtype)), "rounded once, to the nearest"


@BACKEND
@CASE
@DTYPE
def test_equals_reference(backend, case, dtype):
    for vocab in vocabs(backend):
        args, kwargs = oc.operands(case, *inputs(backend, 3, vocab, dtype, vocab))
        want = svdk.steered_logits(*args, **kwargs, backend="reference")
        got = svdk.steered_logits(*args, **kwargs, backend=backend)
        assert got.dtype == torch.float32
        oc.assert_close(got, want, f"V={vocab}")
        out = torch.full_like(args[0], 7.0)
        same = svdk.steered_logits(*args, **kwargs, out=out, backend=backend)
        assert same is out
        assert_rounded(same, got, backend)


@BACKEND
@CASE
@pytest.mark.parametrize(("warm", "base", "status"), oc.odd_rows())
def test_odd_rows(backend, case, warm, base, status):
    args, kwargs = oc.operands(case, warm.to(oc.device_of(backend)), base.to(oc.device_of(backend)))
    got, want = (svdk.steered_logits(*args, **kwargs, backend=name) for name in (backend, "reference"))
    # K and log q are as large as the largest base logit, and their difference is rounded as they are.
    atol = 2e-5 + 1e-6 * max(float(base.nan_to_num(0.0, 0.0).max()), 0.0)
    oc.assert_close(got, want, case.name, atol=atol)
    assert bool(got.isnan().all()) == bool(want.isnan().any())
    assert not bool((got == math.inf).any())


@BACKEND
@CASE
def test_the_draw_is_from_these_rows(backend, case):
    warm, base = inputs(backend, 4, 999, seed=3)
    args, kwargs = oc.operands(case, warm, base)
    z = svdk.steered_logits(*args, **kwargs, backend=backend)
    token, info = svdk.steered_sample(*args, **kwargs, temperature=0.0, return_info=True, backend=backend)
    assert torch.equal(z.argmax(1), token)
    for seed in range(3):
        drawn, info = svdk.steered_sample(*args, **kwargs, seed=seed, return_info=True, backend=backend)
        chosen = z.log_softmax(1).gather(1, drawn[:, None])[:, 0]
        oc.assert_close(chosen, info.logprob_steered, "logprob")


@BACKEND
@pytest.mark.parametrize("scale", [0.0, 0.02, 0.5])
@pytest.mark.parametrize("penalty", [-math.inf, -1.0])
def test_flat_rows_take_a_second_sweep(backend, scale, penalty):
    """More candidates than any backend keeps, at first or for good."""
    warm, base = inputs(backend, 2, vocabs(backend)[-1], seed=1, scale=scale)
    for kwargs in ({}, {"strength_mode": "kl_budget", "strength": 0.01}, {"alpha": 0.9}):
        kwargs = dict(kwargs, penalty=penalty)
        got, want = (svdk.steered_logits(warm, base, **kwargs, backend=b) for b in (backend, "reference"))
        oc.assert_close(got, want, str(kwargs))


@BACKEND
def test_a_rising_maximum_loses_no_candidate(backend):
    warm = torch.linspace(-40, 20, 999, device=oc.device_of(backend))[None].contiguous()
    base = warm.flip(1).contiguous()
    for w, b in ((warm, base), (base, warm)):
        got, want = (svdk.steered_logits(w, b, backend=name) for name in (backend, "reference"))
        oc.assert_close(got, want, "steered")


@BACKEND
@CASE
@DTYPE
def test_skipped_rows_are_copied(backend, case, dtype):
    warm, base = inputs(backend, 4, 999, dtype, seed=4)
    warm[1, 7], base[1] = -math.inf, math.nan
    warm[2, 5], warm[2, 6] = math.nan, math.inf
    skip = torch.tensor([False, True, True, False], device=warm.device)
    args, kwargs = oc.operands(case, warm, base)
    if case.uses == "vector":
        kwargs["vector"] = kwargs["vector"].repeat(4, 1)
        kwargs["vector"][1] = math.inf
    steered = svdk.steered_logits(*args, **kwargs, backend=backend)
    for out in (None, torch.empty_like(warm)):
        got = svdk.steered_logits(*args, **kwargs, skip=skip, out=out, check=True, backend=backend)
        assert torch.equal(got[skip].nan_to_num(9.0), warm[skip].to(got.dtype).nan_to_num(9.0))
        assert_rounded(got[~skip], steered[~skip], backend)


@BACKEND
@DTYPE
@pytest.mark.parametrize("penalty", [-math.inf, -0.5])
def test_strength_zero(backend, dtype, penalty):
    """The warm logits, bit for bit, but for what a penalty of -inf takes out at every strength."""
    warm, base = inputs(backend, 3, 999, dtype, seed=6)
    warm[0, 5] = -math.inf
    got = svdk.steered_logits(warm, base, strength=0.0, penalty=penalty, backend=backend)
    inside = warm.float() >= warm.float().amax(1, keepdim=True) + math.log(0.1)
    want = warm.float() if penalty > -math.inf else torch.where(inside, warm.float(), -math.inf)
    assert torch.equal(got, want)


@BACKEND
@CASE
def test_in_place(backend, case):
    for dtype in oc.DTYPES:
        warm, base = inputs(backend, 4, 999, dtype, seed=8)
        base = base.clone()  # not beside the warm rows
        args, kwargs = oc.operands(case, warm, base)
        skip = torch.tensor([False, False, True, False], device=warm.device)
        want = svdk.steered_logits(*args, **kwargs, skip=skip, out=torch.empty_like(warm), backend=backend)
        wide = torch.full((4, 1024), 50.0, dtype=dtype, device=warm.device)
        wide[:, :999] = warm
        for target in (warm.clone(), wide[:, :999]):
            moved = (target, *args[1:])
            got = svdk.steered_logits(*moved, **kwargs, skip=skip, out=target, backend=backend)
            assert torch.equal(got, want)
        assert bool((wide[:, 999:] == 50.0).all()), "written beside the rows"


@BACKEND
@CASE
def test_paired_strided_and_padded_rows(backend, case):
    batch, vocab, padded, device = 3, 997, 1024, oc.device_of(backend)
    warm, base = (x.to(device) for x in oc.logits(batch, padded, seed=11))
    wide = torch.full((4 * batch, padded), 50.0, device=device)
    warm_rows, base_rows = torch.tensor([9, 1, 4], device=device), torch.tensor([0, 11, 6], device=device)
    wide[warm_rows, :vocab], wide[base_rows, :vocab] = warm[:, :vocab], base[:, :vocab]
    args, kwargs = oc.operands(case, warm[:, :vocab].contiguous(), base[:, :vocab].contiguous())
    skip = torch.tensor([False, True, False], device=device)
    kwargs |= {"skip": skip, "backend": backend}
    want = svdk.steered_logits(*args, **kwargs)
    pair = dict(kwargs, warm_rows=warm_rows, vocab_size=vocab)
    if case.uses == "base":
        pair["base_rows"] = base_rows
    got = svdk.steered_logits(wide, **pair)
    assert got.shape == (batch, padded)
    assert torch.equal(got[:, :vocab], want)
    assert bool((got[:, vocab:] == -math.inf).all())
    sliced = tuple(x[:, :vocab] for x in ((warm, base) if case.uses == "base" else (warm,)))
    every_other = torch.full((2 * batch, padded), 7.0, device=device)[::2, :vocab]
    assert torch.equal(svdk.steered_logits(*sliced, **kwargs, out=every_other), want)


@BACKEND
def test_per_row_parameters_are_each_rows_own(backend):
    warm, base = inputs(backend, 6, 999, seed=3)
    rows = {
        "strength": torch.tensor([0.0, 1.0, -1.0, 5.0, 0.5, 2.0], device=warm.device),
        "alpha": torch.tensor([0.1, 0.0, 0.5, 0.01, 1.0, 0.1], device=warm.device),
    }
    for penalty in (-math.inf, -0.5):
        got = svdk.steered_logits(warm, base, **rows, penalty=penalty, backend=backend)
        for i in range(6):
            own = {name: float(x[i]) for name, x in rows.items()}
            alone = svdk.steered_logits(
                warm[i : i + 1], base[i : i + 1], **own, penalty=penalty, backend=backend
            )
            oc.assert_close(got[i : i + 1], alone, f"row {i}", rtol=1e-6, atol=1e-6)


@BACKEND
@DTYPE
def test_finite_logits_stay_finite(backend, dtype):
    warm, base = inputs(backend, 3, 999, dtype, seed=8)
    for strength in (1e30, -1e30, 3e38):
        for kwargs in ({}, {"alpha": 0.0}, {"alpha": 0.0, "direction": "log_ratio"}, {"penalty": -2.0}):
            kwargs = dict(kwargs, strength=strength, out=torch.empty_like(warm))
            got = svdk.steered_logits(warm, base, **kwargs, backend=backend)
            lost = got.isnan() | (got == math.inf)
            assert not bool(lost.any()), (strength, kwargs)
            if "penalty" in kwargs or "alpha" in kwargs:
                assert bool(got.isfinite().all())


@BACKEND
def test_check_names_the_rows(backend):
    warm, base = inputs(backend, 5, 40)
    warm[1, 3], warm[4, :] = math.nan, -math.inf
    got = svdk.steered_logits(warm, base, backend=backend)
    assert got.isnan().all(1).tolist() == got.isnan().any(1).tolist() == [False, True, False, False, True]
    with pytest.raises(InvalidLogitsError, match=r"rows 1, 4: .*NaN"):
        svdk.steered_logits(warm, base, backend=backend, check=True)


@BACKEND
def test_a_parameter_out_of_range_on_the_device_is_an_invalid_row(backend):
    warm, base = inputs(backend, 3, 40)
    strength = torch.tensor([1.0, math.nan, 1.0], device=warm.device)
    given = {"strength": strength, "out": torch.empty_like(warm)}
    flat = oc.flat(schema.STEERED_LOGITS, warm, base, **given)
    status = svdk.backends.resolve(backend, warm).steered_logits(*flat)
    assert status.tolist() == [0, 1, 0]
    assert given["out"].isnan().all(1).tolist() == [False, True, False]


@BACKEND
def test_empty_batch(backend):
    warm = torch.empty(0, 50, device=oc.device_of(backend))
    assert svdk.steered_logits(warm, warm, backend=backend).shape == (0, 50)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"skip": torch.zeros(2, dtype=torch.bool)}, r"skip was .*\(2,\)"),
        ({"skip": torch.zeros(3)}, r"skip was .*float32"),
        ({"out": torch.empty(3, 9)}, r"out was .*allowed: \(3, 10\)"),
        ({"out": torch.empty(3, 10, dtype=torch.float16)}, "out was torch.float16"),
        ({"out": torch.empty(10, 3).T}, "out was strided"),
        ({"out": torch.empty(1, 10).expand(3, 10)}, "out was strided"),
        ({"strength_mode": "label"}, "strength_mode was 'label'; allowed: 'constant' | 'kl_budget'"),
        ({"strength_mode": "kl_budget", "strength": -1.0}, "strength was -1"),
        ({"alpha": 1.5}, "alpha was 1.5"),
    ],
)
def test_refuses(change, message):
    warm, base = oc.logits(3, 10)
    with pytest.raises(svdk.InputError, match=message.replace("|", r"\|")):
        svdk.steered_logits(warm, base, **change)


def test_out_may_be_the_warm_logits_and_share_nothing_else():
    both = torch.randn(7, 10)
    warm, base, vector = both[:3], both[3:6], both[6]
    rows = torch.tensor([0, 1, 2])
    for arguments, kwargs, name in (
        ((warm, base), {"out": both[1:4]}, "warm_logits"),
        ((warm, base), {"out": base}, "base_logits"),
        ((warm,), {"vector": vector, "out": both[4:7]}, "vector"),
        ((warm, base), {"out": warm, "warm_rows": rows}, "warm_logits"),
        ((warm,), {"out": warm, "base_rows": rows}, "base_logits"),
    ):
        with pytest.raises(svdk.InputError, match=f"out was in the memory of {name}"):
            svdk.steered_logits(*arguments, **kwargs)
    half = torch.zeros(3, 10).bfloat16()
    narrow = half.untyped_storage()
    wide = torch.empty(0, dtype=torch.float32).set_(narrow, 0, (1, 10), (10, 1))
    with pytest.raises(svdk.InputError, match="out was in the memory of warm_logits"):
        svdk.steered_logits(half[:1], half[1:2], out=wide)
    svdk.steered_logits(warm, base, out=warm)


def test_opcheck():
    warm, base = oc.logits(3, 200)
    skip = torch.tensor([False, True, False])
    for given in (
        {},
        {"skip": skip, "penalty": -1.0, "strength_mode": schema.KL_BUDGET},
        {"warm_rows": torch.tensor([2, 0, 1]), "base_rows": torch.tensor([2, 0, 1])},
    ):
        flat = oc.flat(schema.STEERED_LOGITS, warm, base, out=torch.empty(3, 200), **given)
        torch.library.opcheck(torch.ops.svdk.steered_logits.default, flat)


@BACKEND
def test_compiled_function_equals_eager(backend):
    def fresh(warm, base, skip):
        return svdk.steered_logits(warm * 2, base * 2, skip=skip, backend=backend).softmax(1)

    def given(warm, base, skip):
        out = torch.zeros_like(warm)
        svdk.steered_logits(warm, base, penalty=-1.0, skip=skip, out=out, backend=backend)
        return out + 1

    def in_place(warm, base, skip):
        warm = warm + 1
        svdk.steered_logits(warm, base, skip=skip, out=warm, backend=backend)
        return warm

    warm, base = inputs(backend, 3, 200)
    skip = torch.tensor([False, True, False], device=warm.device)
    for function in (fresh, given, in_place):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(warm, base, skip), function(warm, base, skip))


def test_the_raw_op_does_not_write_out_of_bounds():
    warm, base = oc.logits(3, 200)
    for out in (torch.empty(3, 199), torch.empty(2, 200), torch.empty(3, 200, dtype=torch.float16)):
        with pytest.raises(RuntimeError, match="out must"):
            torch.ops.svdk.steered_logits(*oc.flat(schema.STEERED_LOGITS, warm, base, out=out))
