"""Gradients of log-probabilities, against autograd through an expression of its own, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import svdk
from svdk.ops import arguments
from svdk.ops.schema import STEERED_LOGPROB

ROWS, VOCAB = 4, 301
BACKENDS = ["cpu", "reference"]


def problem(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    warm = torch.randn(ROWS, VOCAB, generator=generator) * 2
    base = warm + torch.randn(ROWS, VOCAB, generator=generator)
    warm[0, 5] = base[1, 6] = -math.inf  # nothing there; a masked base token
    return {
        "warm": warm.to(dtype),
        "base": base.to(dtype),
        "vector": torch.randn(ROWS, VOCAB, generator=generator),
        "labels": warm.argmax(1),
        "strength": torch.tensor([0.5, -1.0, 2.0, 0.0]),
    }


def expected(
    warm: Tensor, base: Tensor | None, vector: Tensor | None, mu: Tensor, labels: Tensor, **rest
) -> Tensor:
    """The log-probability in plain torch, from the definitions; mu (B,)."""
    w = warm.double()
    log_p = w.log_softmax(1)
    inside = (w.detach() >= w.detach().max(1, keepdim=True).values + math.log(rest["alpha"])) & (
        w > -math.inf
    )
    if vector is not None:
        delta = vector.double().expand(w.shape)
    elif base is not None:
        log_q = base.double().log_softmax(1)
        usable = (w > -math.inf) & (base > -math.inf)
        ratio = torch.where(usable, log_p.masked_fill(~usable, 0.0) - log_q.masked_fill(~usable, 0.0), 0.0)
        p = log_p.masked_fill(w == -math.inf, -1e4).exp()
        kl = (p * usable * ratio).sum(1, keepdim=True)
        delta = torch.where(usable, ratio - kl, 0.0)
        delta = delta if rest["direction"] == "log_ratio" else p * delta
    else:
        delta = torch.zeros_like(w)
    penalty = rest["penalty"]
    outside = w + mu.double()[:, None] * penalty if math.isfinite(penalty) else torch.full_like(w, -1e30)
    z = torch.where(inside, w + mu.double()[:, None] * delta, outside)
    return z.masked_fill(w == -math.inf, -1e30).log_softmax(1).gather(1, labels[:, None])[:, 0]


CALLS = {
    "plain": ("warm",),
    "log_ratio": ("warm", "base"),
    "kl_gradient": ("warm", "base"),
    "vector": ("warm", "vector"),
}


def call(kind: str, x: dict[str, Tensor], backend: str, **rest):
    base, vector = (x[name] if name in CALLS[kind] else None for name in ("base", "vector"))
    direction = kind if kind in ("log_ratio", "kl_gradient") else "kl_gradient"
    rest = {"strength": x["strength"]} | rest
    return svdk.steered_logprob(
        x["warm"], base, x["labels"], vector=vector, direction=direction, backend=backend, **rest
    )


def leaves(x: dict[str, Tensor], kind: str) -> list[Tensor]:
    return [x[name].requires_grad_() for name in (*CALLS[kind], *(() if kind == "plain" else ("strength",)))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize(("alpha", "penalty"), [(0.05, 0.0), (0.05, -math.inf), (0.2, -1.5), (1e-9, 0.0)])
def test_against_autograd(backend, kind, alpha, penalty):
    x = problem()
    inputs = leaves(x, kind)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0])
    info = call(kind, x, backend, alpha=alpha, penalty=penalty)
    found = torch.autograd.grad((info.logprob * weights).sum(), inputs)
    base, vector = (x[name] if name in CALLS[kind] else None for name in ("base", "vector"))
    rest = {"alpha": alpha if kind != "plain" else 1e-30, "penalty": penalty, "direction": kind}
    want = expected(x["warm"], base, vector, x["strength"], x["labels"], **rest)
    torch.testing.assert_close(info.logprob, want.float(), atol=2e-5, rtol=1e-4)
    for mine, theirs in zip(found, torch.autograd.grad((want * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", CALLS)
def test_forwards_is_what_backwards_is(kind):
    x = problem(1)
    names = (*CALLS[kind], *(() if kind == "plain" else ("strength",)))
    values = tuple(x[name] for name in names)
    tangents = tuple(torch.randn(v.shape, generator=torch.Generator().manual_seed(9)) for v in values)

    def function(*given: Tensor) -> Tensor:
        return call(kind, x | dict(zip(names, given, strict=True)), "cpu", alpha=0.05).logprob

    _, pushed = torch.func.jvp(function, values, tangents)
    for row in range(ROWS):
        places = tuple(range(len(values)))
        pulled = torch.func.grad(lambda *given, row=row: function(*given)[row], argnums=places)(*values)
        total = sum((g * t).sum() for g, t in zip(pulled, tangents, strict=True))
        torch.testing.assert_close(pushed[row], total, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_grid_of_strengths(backend):
    x = problem(2)
    grid = torch.tensor([-0.5, 0.0, 1.5], requires_grad=True)
    x["warm"].requires_grad_()
    info = call("log_ratio", x, backend, strengths=grid, alpha=0.05)
    weights = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad((info.logprob * weights).sum(), [x["warm"], grid])
    rest = {"alpha": 0.05, "penalty": 0.0, "direction": "log_ratio"}
    columns = [expected(x["warm"], x["base"], None, mu.expand(ROWS), x["labels"], **rest) for mu in grid]
    want = torch.autograd.grad((torch.stack(columns, 1) * weights).sum(), [x["warm"], grid])
    for mine, theirs in zip(found, want, strict=True):
        torch.testing.assert_close(mine, theirs, atol=3e-5, rtol=1e-4)


def test_rows_that_are_used_twice_and_a_shared_vector():
    x = problem(4)
    pair = torch.cat([x["warm"], x["base"]]).requires_grad_()
    rows, base_rows = torch.tensor([0, 2, 2, 1]), torch.tensor([4, 6, 7, 0])
    labels = x["labels"][rows]
    options = {"strength": x["strength"], "direction": "log_ratio", "alpha": 0.05, "vocab_size": VOCAB - 1}
    info = svdk.steered_logprob(pair, None, labels, warm_rows=rows, base_rows=base_rows, **options)
    (found,) = torch.autograd.grad(info.logprob.sum(), pair)
    cut = pair[:, : VOCAB - 1]
    rest = {"alpha": 0.05, "penalty": 0.0, "direction": "log_ratio"}
    want = expected(cut[rows], cut[base_rows], None, x["strength"], labels, **rest)
    torch.testing.assert_close(found, torch.autograd.grad(want.sum(), pair)[0], atol=3e-5, rtol=1e-4)
    vector = x["vector"][0].clone().requires_grad_()
    info = svdk.steered_logprob(x["warm"], None, x["labels"], vector=vector, strength=0.7)
    (found,) = torch.autograd.grad(info.logprob.sum(), vector)
    rest = {"alpha": 0.1, "penalty": 0.0, "direction": "vector"}
    want = expected(x["warm"], None, vector, torch.full((ROWS,), 0.7), x["labels"], **rest)
    torch.testing.assert_close(found, torch.autograd.grad(want.sum(), vector)[0], atol=3e-5, rtol=1e-4)


def test_16_bits_and_invalid_rows():
    x = problem(5, torch.bfloat16)
    x["warm"][2, 7] = math.nan
    x["labels"][3] = 0
    x["warm"][3, 0] = -math.inf  # a label that cannot be drawn
    x["warm"].requires_grad_()
    info = call("log_ratio", x, "cpu", alpha=0.05)
    (found,) = torch.autograd.grad(info.logprob[[0, 1, 3]].sum(), x["warm"])
    assert found.dtype == torch.bfloat16 and found.isfinite().all()
    assert not found[2:].any() and found[:2].any(1).all()


def test_only_log_probabilities_claim_a_gradient():
    x = problem(6)
    warm, base = x["warm"].requires_grad_(), x["base"].requires_grad_()
    info = call("kl_gradient", x, "cpu")
    claims = [name for name, value in vars(info).items() if value.requires_grad]
    assert claims == ["logprob"]
    token, sample = svdk.steered_sample(warm, base, return_info=True)
    others = [token, *vars(sample).values(), *vars(svdk.extract(warm, base)).values()]
    others.append(svdk.steered_logits(warm, base))
    assert not any(x.requires_grad for x in others)
    z, b = warm.detach(), base.detach()
    _, along = torch.func.jvp(lambda w: svdk.steered_logits(w, b), (z,), (z,))
    assert along is None or not along.any()


def test_opcheck_and_the_op_by_itself():
    x = problem(7)
    warm = x["warm"].requires_grad_()
    rows = arguments.operands(warm, x["base"], direction="log_ratio")
    given = {"labels": x["labels"], "strength": (0.0, x["strength"]), "alpha": (0.05, None), "penalty": 0.0}
    given["strengths"] = None
    flat = STEERED_LOGPROB.flatten(rows, given)
    torch.library.opcheck(torch.ops.svdk.steered_logprob, tuple(flat))
    curves = torch.ops.svdk.steered_logprob(*flat)[0]
    (by_op,) = torch.autograd.grad(curves[0].sum(), warm)
    (by_name,) = torch.autograd.grad(call("log_ratio", x, "cpu", alpha=0.05).logprob.sum(), warm)
    assert torch.equal(by_op, by_name)


def test_compiled():
    x = problem(8)

    def function(warm: Tensor, strength: Tensor) -> Tensor:
        info = call("log_ratio", x | {"warm": warm, "strength": strength}, "cpu")
        assert not info.slope.requires_grad
        return info.logprob.sum()

    inputs = [x["warm"].requires_grad_(), x["strength"].requires_grad_()]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    found, want = (torch.autograd.grad(f(*inputs), inputs) for f in (compiled, function))
    for mine, theirs in zip(found, want, strict=True):
        torch.testing.assert_close(mine, theirs)
