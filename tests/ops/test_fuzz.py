"""Random problems, awkward ones among them, against the float64 reference; SVDK_FUZZ=N runs N times as many.

Every backend must draw the reference's token (or one that ties with it within rounding), give the same
diagnostics and statuses, and refuse the same arguments in the same words. The C++ kernels alone are fuzzed
harder, in C++, by ``tests/fuzz``.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import Tensor

import svdk
from svdk.ops import reference, schema
from tests.helpers import cuda_shim
from tests.helpers import ops_cases as oc

EFFORT = int(os.environ.get("SVDK_FUZZ", "1"))
EXAMPLES = {"cpu": 500, "cuda": 150, "shim": 100, "triton": 60}
INF, NAN = math.inf, math.nan
pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("shim_backend")]
BACKEND = pytest.mark.parametrize("backend", cuda_shim.kernels())


def fuzzed(backend: str, strategy, body) -> None:
    """Run ``body`` on examples; the number of them depends on the backend's speed."""
    settings(max_examples=EFFORT * EXAMPLES[backend])(given(strategy)(body))()


VALUES = (-INF, NAN, INF, 1e30, -1e30, torch.finfo(torch.float32).min, 3e38, 1e-45, 88.0, -200.0, 30.0)


@st.composite
def operand(draw, rows: int, vocab: int, like: Tensor | None = None) -> Tensor:
    """(rows, vocab) float32 logits of some shape: noise, ties, one-hot, ramps; and then some odd entries."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    scale = draw(st.sampled_from([3.0, 1.0, 0.01, 30.0, 1000.0, 1e10, 1e30]))
    noise = torch.randn(rows, vocab, generator=generator)
    ramp = torch.linspace(-1, 1, vocab).expand(rows, -1)
    kind = draw(
        st.sampled_from(["noise", "noise", "near", "flat", "one_hot", "rising", "falling", "ties", "masked"])
    )
    x = {
        "noise": noise * scale,
        "near": noise if like is None else like + 0.5 * noise,
        "flat": torch.full((rows, vocab), scale),
        "one_hot": (torch.arange(vocab) == vocab // 2).float().expand(rows, -1) * scale,
        "rising": ramp * scale,
        "falling": -ramp * scale,
        "ties": noise.round() * scale,
        "masked": torch.where(noise > 1, noise, -INF),
    }[kind].clone()
    for _ in range(draw(st.integers(0, 2)) if rows else 0):
        value, row = draw(st.sampled_from(VALUES)), draw(st.integers(0, rows - 1))
        where = draw(st.sampled_from(["entry", "entry", "row", "half"]))
        if where == "entry":
            x[row, draw(st.integers(0, vocab - 1))] = value
        elif where == "row":
            x[row] = value
        else:
            x[row, : vocab // 2] = value
    return x


def layout(draw, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The same numbers, contiguous, or as a view with another row stride or offset."""
    x = x.to(dtype)
    rows, vocab = x.shape
    kind = draw(st.sampled_from(["contiguous", "padded", "offset", "every_second", "one_row"]))
    if kind == "padded":
        wide = torch.full((rows, vocab + draw(st.sampled_from([1, 3, 1000]))), 7.0, dtype=dtype)
        wide[:, :vocab] = x
        return wide[:, :vocab]
    if kind == "offset":
        wide = torch.full((rows, vocab + 3), 7.0, dtype=dtype)
        wide[:, 3:] = x
        return wide[:, 3:]
    if kind == "every_second":
        return x.repeat_interleave(2, 0)[::2]
    if kind == "one_row" and rows:
        return x[:1].expand(rows, -1)
    return x


@st.composite
def parameter(draw, values, batch: int, dtype=torch.float32):
    """A number, or a tensor with one a row."""
    one = st.sampled_from(values)
    if draw(st.booleans()):
        return torch.tensor(draw(st.lists(one, min_size=batch, max_size=batch)), dtype=dtype)
    return draw(one)


VOCABS = [1, 2, 3, 15, 16, 17, 33, 100, 255, 257, 1000, 1025, 4500]


@st.composite
def rows_of(draw, vocabs, need_steering: bool = False) -> tuple[tuple, dict]:
    """The positional and keyword arguments that hold the rows of a call."""
    vocab, batch = draw(st.sampled_from(vocabs)), draw(st.integers(0, 3))
    dtype = draw(st.sampled_from(oc.DTYPES))
    uses = draw(
        st.sampled_from(["base", "base", "vector"] if need_steering else ["base", "vector", "nothing"])
    )
    warm = draw(operand(batch, vocab))
    if uses == "base" and draw(st.booleans()):  # both halves in one tensor, rows by index
        base = draw(operand(batch, vocab, warm))
        order = torch.tensor(draw(st.permutations(range(2 * batch))), dtype=torch.int64)
        both = torch.empty(2 * batch, vocab)
        both[order] = torch.cat([warm, base])
        return (layout(draw, both, dtype),), {"warm_rows": order[:batch], "base_rows": order[batch:]}
    extra = {"vocab_size": vocab - draw(st.integers(0, vocab - 1))} if draw(st.booleans()) else {}
    first = layout(draw, warm, dtype)
    if uses == "base":
        return (first, layout(draw, draw(operand(batch, vocab, warm)), dtype)), extra
    if uses == "vector":
        vector = draw(operand(batch, vocab))
        per_row = draw(st.booleans()) or batch == 0
        return (first,), {"vector": vector if per_row else vector[0], **extra}
    return (first,), extra


def shape_of(args, kwargs) -> tuple[int, int]:
    """Batch and vocabulary of a call."""
    index = kwargs.get("warm_rows")
    return (args[0] if index is None else index).shape[0], kwargs.get("vocab_size") or args[0].shape[1]


MU = [1.0, 0.0, -1.0, 0.5, 5.0, 1e30, -1e30, -20.0, NAN]
ALPHA = [0.1, 0.0, 1e-8, 1.0, 0.5, 0.1, 2.0]
PENALTY = [-INF, -INF, 0.0, -1.5, 1.5, NAN, INF]


@st.composite
def sample_call(draw, vocabs) -> tuple[tuple, dict]:
    """A call of steered_sample, now and then one that must be refused."""
    args, kwargs = draw(rows_of(vocabs))
    batch, vocab = shape_of(args, kwargs)
    steered = len(args) > 1 or "base_rows" in kwargs or "vector" in kwargs
    mode = draw(st.sampled_from(["constant", "constant", "kl_budget", "label"])) if steered else "constant"
    kwargs |= {
        "direction": draw(st.sampled_from(["kl_gradient", "log_ratio"])),
        "strength_mode": mode,
        "strength": draw(parameter(MU if mode == "constant" else [0.1, 0.0, 1.0, 1e-8, -1.0], batch)),
        "alpha": draw(parameter(ALPHA, batch)),
        "penalty": draw(st.sampled_from(PENALTY)),
        "temperature": draw(parameter([1.0, 0.0, 1e-8, 1e8, 0.7, 1.3, -1.0], batch)),
        "top_k": draw(parameter([0, 0, 1, 2, vocab, vocab + 1, 7], batch, torch.int64)),
        "top_p": draw(parameter([1.0, 1.0, 0.0, 0.9, 0.5, 1e-8], batch)),
        "min_p": draw(parameter([0.0, 0.0, 1.0, 0.05, 1e-8], batch)),
        "seed": draw(parameter([0, 1, -1, 2**62], batch, torch.int64)),
        "offset": draw(parameter([0, 5, 2**40, -(2**63)], batch, torch.int64)),
    }
    if mode == "label":
        ids = st.integers(0, vocab - 1)
        kwargs["labels"] = torch.tensor(
            draw(st.lists(ids, min_size=batch, max_size=batch)), dtype=torch.int64
        )
    return args, kwargs


def both(op, backend: str, args, kwargs):
    """What the backend and the reference return; None when both refuse, in the same words."""
    outcome = []
    for name in (backend, "reference"):
        try:
            outcome.append(op(*args, **kwargs, backend=name))
        except svdk.SvdkError as error:
            outcome.append(error)
    got, want = outcome
    if isinstance(want, svdk.SvdkError) or isinstance(got, svdk.SvdkError):
        assert type(got) is type(want), f"{got!r}, the reference: {want!r}"
        assert str(got) == str(want)
        return None
    return got, want


def check_draw(row: int, got: int, flat) -> None:
    """``got`` must be allowed, and the uniform in its share of the mass, both within rounding."""
    *_, z, _ = reference.steered_rows(*flat)
    values = dict(zip(ARGUMENTS, flat, strict=True))

    def of(name: str) -> Tensor:
        rows = values[f"{name}_rows"]
        value = values[name] if rows is None else rows[row].item()
        return torch.tensor([value], dtype=torch.int64 if isinstance(value, int) else torch.float64)

    z, t = z[row : row + 1], of("temperature")
    finite = torch.isfinite(z[0])
    slack = 1e-5 * (1 + float(z[0, finite].abs().max()))
    assert finite[got], f"row {row}: token {got} was masked"
    if float(t) == 0:
        assert float(z.max()) <= float(z[0, got]) + slack, f"row {row}: {z[0, got]} is not the largest"
        return

    def floor(shift: float) -> float:
        """The least that the filters keep, were top-p and min-p larger by so much."""
        p, m = (of("top_p") + shift).clamp(0, 1), (of("min_p") * (1 - shift)).clamp(0, 1)
        return float(z[0, reference.filter_row(z, t, of("top_k").double(), p, m)[0]].min())

    may, must = finite & (z[0] >= floor(1e-5) - slack), finite & (z[0] > floor(-1e-5) + slack)
    must |= z[0] == z.max()
    assert may[got], f"row {row}: token {got} was filtered out"
    x, blur = (z[0] - z.max()) / t, slack / float(t)
    least = torch.where(must, (x - blur).exp(), 0.0)
    most = torch.where(may, (x + blur).exp(), 0.0)
    uniform = float(reference.row_uniforms(of("seed"), of("offset")))
    before, through = float(least[:got].sum()), float(most[: got + 1].sum())
    after, from_here = float(least[got + 1 :].sum()), float(most[got:].sum())
    # At least so much lies before the token, and so much behind it.
    assert uniform >= before / (before + from_here) - 1e-9, f"row {row}: token {got} is behind the uniform"
    assert 1 - uniform >= after / (after + through) - 1e-9, f"row {row}: token {got} is before the uniform"


ARGUMENTS = schema.STEERED_SAMPLE.names


def check_sample(backend: str, call) -> None:
    args, kwargs = call
    note(f"{args} {kwargs}")
    outcome = both(svdk.steered_sample, backend, args, kwargs | {"return_info": True})
    if outcome is None:
        return
    (token, info), (want_token, want) = outcome
    batch, vocab = shape_of(args, kwargs)
    assert token.shape == (batch,)
    assert token.dtype == torch.int64
    assert bool(((token >= 0) & (token < vocab)).all()), token
    assert torch.equal(svdk.steered_sample(*args, **kwargs, backend=backend), token), "info changed the token"
    assert torch.equal(info.status, want.status)
    assert torch.equal(info.candidates, want.candidates)
    if not batch:
        return
    size = magnitude(args, kwargs)
    close(info.kl, want.kl, size, "kl")
    same = token == want_token
    for name in ("logprob_warm", "logprob_base"):
        close(getattr(info, name)[same], getattr(want, name)[same], size[same], name)
    flat = oc.flat_arguments(args, kwargs)
    for row in (token != want_token).nonzero()[:, 0].tolist():
        assert int(info.status[row]) != svdk.Status.INVALID, f"row {row}: fallback {token[row]}"
        check_draw(row, int(token[row]), flat)


@BACKEND
def test_sample_agrees_with_the_reference_or_refuses_alike(backend):
    vocabs = VOCABS[:-4] if oc.interpreted(backend) else VOCABS
    fuzzed(backend, sample_call(vocabs), lambda call: check_sample(backend, call))


@st.composite
def score_call(draw, vocabs, with_labels: bool) -> tuple[tuple, dict]:
    """A call of steered_logprob, or (without labels) of extract."""
    args, kwargs = draw(rows_of(vocabs, need_steering=not with_labels))
    batch, vocab = shape_of(args, kwargs)
    kwargs |= {
        "direction": draw(st.sampled_from(["kl_gradient", "log_ratio"])),
        "alpha": draw(parameter(ALPHA, batch)),
    }
    if with_labels:
        ids = st.integers(0, vocab - 1)
        kwargs["labels"] = torch.tensor(
            draw(st.lists(ids, min_size=batch, max_size=batch)), dtype=torch.int64
        )
        kwargs["penalty"] = draw(st.sampled_from(PENALTY))
        mus = [0.0, 1.0, -1.0, 0.5, 8.0, -20.0]
        if draw(st.booleans()):
            kwargs["strengths"] = torch.tensor(draw(st.lists(st.sampled_from(mus), max_size=3)))
        else:
            kwargs["strength"] = draw(parameter([*mus, NAN], batch))
    return args, kwargs


def close(got: Tensor, want: Tensor, size: Tensor, name: str) -> None:
    """Equal within float rounding of numbers of the given size (B,), infinities and NaNs in place."""
    size = size.reshape(-1, *[1] * (want.dim() - 1)).expand(want.shape)
    odd = ~torch.isfinite(want)
    assert torch.equal(got[odd].nan_to_num(9e9, INF, -INF), want[odd].nan_to_num(9e9, INF, -INF)), name
    error = (got - want).abs().where(~odd, 0.0).double()
    assert bool((error <= 5e-5 + 5e-4 * want.abs().where(~odd, 0.0) + 2e-5 * size).all()), (
        f"{name}: {got}, not {want}"
    )


def magnitude(args, kwargs) -> Tensor:
    """(B,) how large the finite logits (and the vector) are; what they are off by is of this size."""
    batch, vocab = shape_of(args, kwargs)
    parts = [args[0] if kwargs.get("warm_rows") is None else args[0][kwargs["warm_rows"]]]
    if "base_rows" in kwargs:
        parts.append(args[0][kwargs["base_rows"]])
    parts += [*args[1:], *([kwargs["vector"].expand(batch, -1)] if "vector" in kwargs else [])]
    finite = [x[:, :vocab].double().nan_to_num(0.0, 0.0, 0.0).abs().amax(1) for x in parts]
    return torch.stack(finite).amax(0) if batch else torch.zeros(0)


def check_logprob(backend: str, call) -> None:
    args, kwargs = call
    note(f"{args} {kwargs}")
    outcome = both(svdk.steered_logprob, backend, args, kwargs)
    if outcome is None:
        return
    got, want = outcome
    assert torch.equal(got.status, want.status)
    vocab = shape_of(args, kwargs)[1]
    assert bool(((got.greedy >= 0) & (got.greedy < vocab)).all())
    size = magnitude(args, kwargs)
    ordinary = size < 1e4  # beyond, a float difference of logits says nothing any more
    for name in ("kl", "logprob_warm", "logprob_base"):
        close(getattr(got, name), getattr(want, name), size, name)
    for name in ("logprob", "slope", "gain"):
        x, y = getattr(got, name)[ordinary], getattr(want, name)[ordinary]
        close(x, y, (1 + size[ordinary]) * 20, name)
    assert bool((got.curvature[ordinary].nan_to_num() >= 0).all())


@BACKEND
def test_logprob_agrees_with_the_reference_or_refuses_alike(backend):
    vocabs = VOCABS[:-4] if oc.interpreted(backend) else VOCABS
    fuzzed(backend, score_call(vocabs, True), lambda call: check_logprob(backend, call))


def check_extract(backend: str, call) -> None:
    args, kwargs = call
    note(f"{args} {kwargs}")
    outcome = both(svdk.extract, backend, args, kwargs)
    if outcome is None:
        return
    got, want = outcome
    for name in ("row_ptr", "token_ids", "status"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    size = magnitude(args, kwargs)
    entry = size[torch.repeat_interleave(torch.arange(size.shape[0]), got.row_ptr.diff())]
    close(got.p, want.p, torch.zeros_like(entry), "p")
    close(got.delta, want.delta, entry, "delta")
    for name in ("kl", "max_logit", "lse"):
        close(getattr(got, name), getattr(want, name), size, name)


@BACKEND
def test_extract_agrees_with_the_reference_or_refuses_alike(backend):
    vocabs = VOCABS[:-4] if oc.interpreted(backend) else VOCABS
    fuzzed(backend, score_call(vocabs, False), lambda call: check_extract(backend, call))


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=3), st.just([1.0]),
    st.just(torch.zeros(())), st.just(torch.zeros(2, 2)), st.just(torch.tensor([1, 2, 3])), st.just(object()),
    st.just(torch.tensor([0.5, NAN, 1.0])), st.just(torch.zeros(3, dtype=torch.complex64)),
    st.just(torch.zeros(3, 10).to_sparse()),
)  # fmt: skip
NAMES = [
    "base_logits", "vector", "strength", "strength_mode", "labels", "direction", "alpha", "penalty",
    "temperature", "top_k", "top_p", "min_p", "seed", "offset", "warm_rows", "base_rows", "vocab_size",
    "backend",
]  # fmt: skip


@settings(max_examples=EFFORT * 300)
@given(name=st.sampled_from([*NAMES, "warm_logits", "strengths"]), value=ANYTHING)
def test_an_argument_of_any_kind_works_or_is_refused_by_name(name, value):
    warm, base = oc.logits(3, 10)
    kwargs = {"warm_logits": warm, "base_logits": base, name: value}
    if name == "vector" and value is not None:
        kwargs["base_logits"] = None
    try:
        if name == "strengths":
            svdk.steered_logprob(**kwargs, labels=torch.tensor([0, 1, 2]))
        else:
            token = svdk.steered_sample(**kwargs)
            assert bool(((token >= 0) & (token < 10)).all())
    except svdk.InputError as error:
        assert name in str(error), f"{name}={value!r}: {error}"
    except svdk.errors.BackendError:
        assert name == "backend"
