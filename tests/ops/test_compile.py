"""The ops while something else than a plain call runs them: torch.compile, fake tensors, make_fx, vmap."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx

import svdk
from svdk.errors import InputError
from tests.helpers import ops_cases as oc

pytestmark = pytest.mark.skipif(svdk.backends.status()["cpu"] != "available", reason="svdk._C was not built")

W, B = oc.logits(4, 300)
LABELS = torch.tensor([1, 5, 7, 299])
DYNAMIC = pytest.mark.parametrize("dynamic", [None, True])
RANDOM = random.Random(5)

STEPS = {
    "seed": range(20),
    "large_seed": [RANDOM.getrandbits(64) for _ in range(18)] + [2**64 - 1, 2**63],
    "negative_seed": range(-20, 0),
    "offset": range(20),
    "top_k": range(20),
    "temperature": [0.1 * i for i in range(1, 20)] + [0.0],
    "top_p": [0.05 * i for i in range(20)] + [1.0],
    "min_p": [0.01 * i for i in range(20)],
    "strength": [0.2 * i - 1 for i in range(20)],
    "alpha": [0.05 * i for i in range(20)] + [1.0],
}


def compiled(function, dynamic, backend="eager"):
    """A function and its compilation, with the number of compilations as ``frame_count``."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter), counter


def agree(function, dynamic, values, backend="eager"):
    """Few compilations for many values, and what a plain call gives."""
    fast, counter = compiled(function, dynamic, backend)
    for value in values:
        want, got = function(W, B, value), fast(W, B, value)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, msg=lambda m, v=value: f"{v}: {m}")
    assert 1 <= counter.frame_count <= 3


@DYNAMIC
@pytest.mark.parametrize("name", STEPS)
def test_a_parameter_of_sampling_that_changes_every_step(name, dynamic):
    def step(warm, base, value):
        given = {"seed": 3, name.split("_")[-1] if name.endswith("_seed") else name: value}
        return svdk.steered_sample(warm, base, **given)

    agree(step, dynamic, STEPS[name])


@DYNAMIC
@pytest.mark.parametrize("name", ["large_seed", "offset", "top_k", "temperature", "top_p", "strength"])
def test_generated_code_takes_it_too(name, dynamic):
    def step(warm, base, value):
        given = {"seed": 3, name.split("_")[-1] if name.endswith("_seed") else name: value}
        return svdk.steered_sample(warm, base, **given) + 1

    agree(step, dynamic, STEPS[name], "inductor")


@DYNAMIC
def test_all_parameters_change_every_step(dynamic):
    def step(warm, base, values):
        seed, offset, top_k, temperature, top_p, min_p, strength, alpha = values
        return svdk.steered_sample(
            warm,
            base,
            seed=seed,
            offset=offset,
            top_k=top_k,
            temperature=temperature,
            top_p=top_p,
            min_p=min_p,
            strength=strength,
            alpha=alpha,
        )

    steps = [(i, 2 * i, i + 1, 0.3 + i / 9, 0.8 + i / 99, i / 999, i / 7, i / 77) for i in range(1, 20)]
    agree(step, dynamic, steps, "aot_eager")


@DYNAMIC
@pytest.mark.parametrize("name", ["strength", "alpha"])
@pytest.mark.parametrize("penalty", [-math.inf, -1.0])
def test_steered_logits_with_a_number_that_changes(name, penalty, dynamic):
    def steer(warm, base, value):
        return svdk.steered_logits(warm, base, penalty=penalty, **{name: value})

    agree(steer, dynamic, STEPS[name], "aot_eager")


@DYNAMIC
def test_steered_logits_with_a_budget_that_changes(dynamic):
    def steer(warm, base, value):
        return svdk.steered_logits(warm, base, strength_mode="kl_budget", strength=value)

    agree(steer, dynamic, [0.01 * i for i in range(1, 20)], "aot_eager")


@DYNAMIC
@pytest.mark.parametrize("name", ["strength", "alpha"])
def test_scoring_with_a_number_that_changes(name, dynamic):
    def score(warm, base, value):
        info = svdk.steered_logprob(warm, base, LABELS, **{name: value})
        return info.logprob, info.slope, info.greedy

    agree(score, dynamic, STEPS[name], "aot_eager")


def test_integers_for_floats_change_too():
    agree(lambda w, b, v: svdk.steered_sample(w, b, temperature=v, strength=v), None, range(1, 20))


def test_constants_stay_constants():
    """A number that does not change is no input of the graph: with it, a kernel can leave out what is off."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    torch.compile(lambda w: svdk.steered_sample(w, temperature=0.7, top_p=0.9), backend=keep, fullgraph=True)(
        W
    )
    (call,) = [node for node in graphs[0].graph.nodes if str(node.target) == "svdk.steered_sample"]
    assert 0.9 in call.args


def test_a_number_that_goes_out_of_range_is_refused():
    fast, _ = compiled(lambda w, v: svdk.steered_sample(w, top_p=v), None)
    for value in (0.1, 0.2, 0.3):
        fast(W, value)
    with pytest.raises(Exception, match=r"InputError.*top_p|top_p was"):
        fast(W, 1.5)


# --- fake tensors and make_fx

NUMBERS = torch.tensor([0.2, 0.4, 0.6, 0.8])
ROWS = torch.tensor([3, 2, 0, 1])


def sample(warm, base, numbers, rows):
    return svdk.steered_sample(warm, base, warm_rows=rows, base_rows=rows, top_p=numbers, temperature=numbers)


def label(warm, base, numbers, rows):
    return svdk.steered_sample(warm, base, strength_mode="label", labels=rows, seed=rows)


def score_strength(warm, base, numbers, rows):
    return svdk.steered_logprob(warm, base, rows, strength=numbers, alpha=numbers).logprob


def score_grid(warm, base, numbers, rows):
    return svdk.steered_logprob(warm, base, rows, strengths=numbers).greedy


def steer(warm, base, numbers, rows):
    return svdk.steered_logits(warm, base, strength=numbers, penalty=-1.0, skip=rows > 2)


def steer_in_place(warm, base, numbers, rows):
    return svdk.steered_logits(warm, base, strength=numbers, strength_mode="kl_budget", out=warm)


FUNCTIONS = (sample, label, score_strength, score_grid, steer, steer_in_place)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_fake_tensors(function):
    given = (W.clone(), B, NUMBERS, ROWS)
    with FakeTensorMode() as mode:
        fake = function(*map(mode.from_tensor, given))
    want = function(*given)
    assert (fake.shape, fake.dtype, fake.device) == (want.shape, want.dtype, want.device)


@pytest.mark.parametrize(
    "how", [{}, {"tracing_mode": "fake"}, {"tracing_mode": "symbolic"}, {"pre_dispatch": True}]
)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_make_fx(function, how):
    graph = make_fx(function, **how)(W.clone(), B, NUMBERS, ROWS)
    given = (W.flip(1), B.flip(0), NUMBERS.flip(0), ROWS.flip(0))
    assert torch.equal(graph(*(x.clone() for x in given)), function(*(x.clone() for x in given)))


def test_what_needs_values_is_refused_without_them():
    def checked(warm):
        return svdk.steered_sample(warm, check=True)

    with FakeTensorMode() as mode:
        fake = mode.from_tensor(W)
        with pytest.raises(InputError, match="check was True"):
            checked(fake)
        with pytest.raises(InputError, match="warm_logits was a fake tensor"):
            svdk.extract(fake, fake)
    with pytest.raises(InputError, match="check was True"):
        make_fx(checked)(W)
    with pytest.raises(InputError, match="check was True"):
        vmap(checked)(W[None])


def test_values_are_checked_again_after_tracing():
    make_fx(sample)(W, B, NUMBERS, ROWS)
    with pytest.raises(InputError, match=r"top_p\[1\] was 1.5"):
        svdk.steered_sample(W, top_p=torch.tensor([0.5, 1.5, 0.5, 0.5]))


# --- vmap

CALLS = 3
Z = torch.stack([oc.logits(4, 50, seed=i)[0] for i in range(CALLS)])
Q = torch.stack([oc.logits(4, 50, seed=i)[1] for i in range(CALLS)])
P = torch.rand(CALLS, 4, generator=torch.Generator().manual_seed(1))
PICKS = torch.tensor([[0, 3, 3, 1, 2], [2, 2, 1, 0, 3], [3, 0, 0, 0, 0]])


def one_by_one(function, given, dims):
    picked = (
        [x if d is None else x.select(d, i) for x, d in zip(given, dims, strict=True)] for i in range(CALLS)
    )
    return torch.stack([function(*call) for call in picked])


def vmap_agrees(function, *given, dims=None):
    dims = (0,) * len(given) if dims is None else dims
    assert torch.equal(vmap(function, in_dims=dims)(*given), one_by_one(function, given, dims))


@pytest.mark.filterwarnings("error")  # PyTorch's own loop over the calls warns
@pytest.mark.parametrize("dims", [(0, 0, 0), (0, None, 0), (None, 0, None), (None, None, 0), (2, 0, 1)])
def test_vmap_of_sampling(dims):
    given = [x.movedim(0, d) if d is not None else x[0] for x, d in zip((Z, Q, P), dims, strict=True)]

    def call(warm, base, numbers):
        return svdk.steered_sample(warm, base, seed=1, top_p=numbers, temperature=numbers + 0.1, alpha=0.01)

    vmap_agrees(call, *given, dims=dims)
    vmap_agrees(lambda w, b, t: svdk.steered_sample(w, b, return_info=True, strength=t)[1].kl, Z, Q, P[:, 0])


@pytest.mark.parametrize("dims", [(0, 0, 0), (0, None, 0), (None, 0, None), (0, 0, None)])
def test_vmap_of_picked_rows(dims):
    given = [x if d == 0 else x[0] for x, d in zip((Z, PICKS, PICKS.flip(1)), dims, strict=True)]

    def call(warm, warm_rows, base_rows):
        return svdk.steered_sample(warm, seed=2, warm_rows=warm_rows, base_rows=base_rows, vocab_size=40)

    vmap_agrees(call, *given, dims=dims)


@pytest.mark.parametrize(("shape", "dim"), [((50,), None), ((3, 50), 0), ((4, 50), None), ((3, 4, 50), 0)])
def test_vmap_of_vectors(shape, dim):
    vector = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    vmap_agrees(lambda w, v: svdk.steered_sample(w, vector=v, strength=2.0), Z, vector, dims=(0, dim))


def test_vmap_of_scoring():
    labels = PICKS[:, :4]
    grid = torch.tensor([0.0, 1.0, 2.0])
    for name in ("logprob", "greedy", "kl", "status"):
        vmap_agrees(lambda w, b, s, n=name: getattr(svdk.steered_logprob(w, b, s), n), Z, Q, labels)
        vmap_agrees(
            lambda w, b, s, n=name: getattr(svdk.steered_logprob(w, b, s, strengths=grid), n), Z, Q, labels
        )
    with pytest.raises(InputError, match=r"strengths was .*vmap"):
        vmap(lambda w, g: svdk.steered_logprob(w, w, labels[0], strengths=g).kl)(Z, P)


@pytest.mark.parametrize("dims", [(0, 0, 0), (None, None, 0), (None, 0, None), (1, 0, 0)])
def test_vmap_of_logits(dims):
    given = [x.movedim(0, d) if d is not None else x[0] for x, d in zip((Z, Q, P), dims, strict=True)]

    def fresh(warm, base, numbers):
        return svdk.steered_logits(warm, base, strength=numbers, skip=numbers > 0.5, penalty=-2.0)

    def in_place(warm, base, numbers):
        warm = warm + numbers[:, None]
        return svdk.steered_logits(warm, base, out=warm)

    vmap_agrees(fresh, *given, dims=dims)
    if dims[0] is not None or dims[2] is not None:  # else what it writes to is the same in all calls
        vmap_agrees(in_place, *given, dims=dims)


def test_vmap_writes_to_what_was_given():
    for out in (
        torch.zeros(CALLS, 4, 50),
        torch.zeros(4, CALLS, 50).transpose(0, 1),
        torch.zeros(2, 6, 50)[:, ::2],
    ):
        warm = Z[: len(out), : out.shape[1]]
        vmap(lambda w, o: svdk.steered_logits(w, w.flip(1), out=o))(warm, out)
        assert torch.equal(
            out, svdk.steered_logits(warm.flatten(0, 1), warm.flip(2).flatten(0, 1)).view_as(out)
        )
    with pytest.raises(InputError, match=r"out was .*vmap"):
        vmap(lambda w: svdk.steered_logits(w, w, out=torch.zeros(4, 50)))(Z)


def test_vmap_in_vmap_and_in_a_compiled_function():
    def call(warm, t):
        return svdk.steered_sample(warm, seed=3, temperature=t)

    both = vmap(vmap(call, in_dims=(0, None)), in_dims=(None, 0))(Z, P[:, 0])
    for i in range(CALLS):
        assert torch.equal(both[i], torch.stack([call(z, P[i, 0]) for z in Z]))
    fast, _ = compiled(vmap(call), None, "aot_eager")
    assert torch.equal(fast(Z, P), vmap(call)(Z, P))


def test_what_vmap_cannot_do_says_so():
    with pytest.raises(InputError, match="extract was called under"):
        vmap(lambda w, b: svdk.extract(w, b).p)(Z, Q)
    with pytest.raises(InputError, match=r"backend was .*vmap"):
        vmap(lambda w: svdk.steered_sample(w, backend="reference"))(Z)
