"""A row's token is its own, whatever its batch mates, order, threads, slices, instruction set or backend."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st

import svdk
from svdk.ops import seeds
from tests import ROOT
from tests.helpers import ops_cases as oc
from tests.ops import test_fuzz

BACKENDS = oc.kernels()
EXAMPLES = {"cpu": 250, "cuda": 80, "triton": 2 if oc.interpreted("triton") else 40}
pytestmark = pytest.mark.timeout(300)


def vocabs(backend: str) -> list[int]:
    return [3, 17, 100] if oc.interpreted(backend) else [1, 17, 257, 1000, 4500, 20000]


def valid_calls(backend: str):
    """Calls of steered_sample that are not refused."""

    def accepted(call) -> bool:
        args, kwargs = call
        try:
            svdk.steered_sample(*args, **kwargs, backend="reference")
        except svdk.InputError:
            return False
        return test_fuzz.shape_of(args, kwargs)[0] > 0

    return test_fuzz.sample_call(vocabs(backend)).filter(accepted)


def pick(args, kwargs, rows: torch.Tensor) -> tuple[tuple, dict]:
    """The same call for some of its rows, in this order, each with its own parameters."""
    batch = test_fuzz.shape_of(args, kwargs)[0]
    kwargs = dict(kwargs)
    if "warm_rows" not in kwargs:
        kwargs["warm_rows"] = torch.arange(batch)
        if len(args) > 1:
            kwargs["base_rows"] = torch.arange(batch)
    for name, value in kwargs.items():
        shared_vector = name == "vector" and value.dim() == 1
        if isinstance(value, torch.Tensor) and not shared_vector:
            kwargs[name] = value[rows]
    return args, kwargs


def bits(outcome) -> list:
    token, info = outcome
    return [token, *(getattr(info, name).nan_to_num(9e9) for name in info.__dataclass_fields__)]


def fuzzed(backend: str, body) -> None:
    effort = test_fuzz.EFFORT * EXAMPLES[backend]
    settings(max_examples=effort)(given(call=valid_calls(backend), data=st.data())(body))()


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_mates_batch_size_and_order(backend):
    """Any rows of a batch, repeated and in any order, give the tokens and diagnostics that they gave."""

    def body(call, data):
        args, kwargs = call
        note(f"{args} {kwargs}")
        batch = test_fuzz.shape_of(args, kwargs)[0]
        key, keys = seeds.row_keys(kwargs.get("seed", 0), batch, args[0])
        # Its own wherever a row goes.
        kwargs = kwargs | {"seed": torch.tensor([int(key)]) if keys is None else keys}
        together = bits(svdk.steered_sample(*args, **kwargs, backend=backend, return_info=True))
        rows = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=6))
        some_args, some = pick(args, kwargs, torch.tensor(rows))
        got = bits(svdk.steered_sample(*some_args, **some, backend=backend, return_info=True))
        for x, y in zip(got, together, strict=True):
            assert torch.equal(x, y[torch.tensor(rows)])

    fuzzed(backend, body)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="svdk._C was not built")
def test_threads_and_slices():
    """Whole rows on a thread, or rows cut into slices: 1 to 7 threads, small batches and large rows."""

    def body(call, data):
        args, kwargs = call
        note(f"{args} {kwargs}")
        before = torch.get_num_threads()
        try:
            tokens = []
            for threads in (1, data.draw(st.sampled_from([2, 3, 5, 7]))):
                torch.set_num_threads(threads)
                tokens.append(svdk.steered_sample(*args, **kwargs, backend="cpu"))
        finally:
            torch.set_num_threads(before)
        if not torch.equal(*tokens):  # sums of other slices round otherwise: a tie, or a bug
            for row in (tokens[0] != tokens[1]).nonzero()[:, 0].tolist():
                for token in (tokens[0], tokens[1]):
                    test_fuzz.check_draw(row, int(token[row]), oc.flat_arguments(args, kwargs))

    fuzzed("cpu", body)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_rows_may_be_anything(backend):
    """Rows of NaN, of infinities or of other logits beside a row change nothing in it."""
    vocab = 100 if oc.interpreted(backend) else 5000
    warm, base = (x.to(oc.device_of(backend)) for x in oc.logits(6, vocab, seed=3))
    for case in oc.CASES if not oc.interpreted(backend) else oc.CASES[:3]:
        args, kwargs = oc.operands(case, warm, base)
        before = svdk.steered_sample(*args, **kwargs, backend=backend, seed=2)
        others = [x.clone() for x in args]
        for x in others:
            x[0], x[2], x[5] = float("nan"), float("inf"), -x[5]
        after = svdk.steered_sample(*others, **kwargs, backend=backend, seed=2)
        assert torch.equal(after[[1, 3, 4]], before[[1, 3, 4]]), case.name


ARCHS = """
import sys, torch, svdk, svdk._C
from hypothesis import given, settings
from hypothesis import HealthCheck
from tests.ops import test_invariance
torch.set_num_threads(1)
out = []
@settings(max_examples=int(sys.argv[1]), derandomize=True, database=None, deadline=None,
          suppress_health_check=list(HealthCheck))
@given(call=test_invariance.valid_calls("cpu"))
def body(call):
    out.extend(svdk.steered_sample(*call[0], **call[1], backend="cpu").tolist())
body()
print(svdk._C.cpu_arch(), *out)
"""


@pytest.mark.skipif("cpu" not in BACKENDS, reason="svdk._C was not built")
def test_instruction_sets():
    """The same random calls on each instruction set of this machine: the same tokens."""
    tokens = {}
    for arch in ("portable", "avx2", "avx512"):
        env = dict(os.environ, SVDK_CPU_ARCH=arch, PYTHONPATH=str(ROOT))
        command = [sys.executable, "-c", ARCHS, str(40 * test_fuzz.EFFORT)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=250, cwd=ROOT)
        if "SVDK_CPU_ARCH was" in done.stderr:
            continue  # not on this processor
        assert done.returncode == 0, done.stderr[-2000:]
        name, *tokens[arch] = done.stdout.split()
        assert name == arch
    assert len(tokens["portable"]) > 30
    for arch, drawn in tokens.items():
        assert drawn == tokens["portable"], arch
