"""The ops as PyTorch sees them: schemas, fakes, opcheck, torch.compile."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import svdk
from svdk.ops import schema
from tests.helpers import ops_cases as oc

pytestmark = pytest.mark.skipif(svdk.backends.status()["cpu"] != "available", reason="svdk._C was not built")

W, B = oc.logits(3, 200)
LABELS = torch.tensor([1, 5, 7])
ROWS = torch.tensor([2, 0, 1])


@pytest.mark.parametrize("info", [False, True])
def test_opcheck_sample(info):
    arguments = oc.flat(schema.STEERED_SAMPLE, W, B, seed=7, info=info)
    torch.library.opcheck(torch.ops.svdk.steered_sample.default, arguments)


def test_opcheck_sample_with_rows():
    rows = {"warm_rows": ROWS, "base_rows": ROWS, "strength": torch.ones(3)}
    label = {"labels": LABELS, "strength_mode": schema.LABEL}
    arguments = oc.flat(schema.STEERED_SAMPLE, W, B, **rows, **label, seed=7, info=True)
    torch.library.opcheck(torch.ops.svdk.steered_sample.default, arguments)


@pytest.mark.parametrize("strengths", [None, torch.tensor([0.0, 1.0, 2.0])])
def test_opcheck_logprob(strengths):
    arguments = oc.flat(schema.STEERED_LOGPROB, W, B, labels=LABELS, penalty=0.0, strengths=strengths)
    torch.library.opcheck(torch.ops.svdk.steered_logprob.default, arguments)


def test_opcheck_extract():
    torch.library.opcheck(torch.ops.svdk.extract.default, oc.flat(schema.EXTRACT, W, B))


def test_compiled_function_equals_eager():
    def step(warm, base, seed):
        token, info = svdk.steered_sample(warm * 2, base * 2, strength=1.5, seed=seed, return_info=True)
        return token + 1, info.logprob_steered.exp()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for value in (1, 2):
        seed = torch.full((3,), value)
        for got, want in zip(compiled(W, B, seed), step(W, B, seed), strict=True):
            assert torch.equal(got, want)


def test_the_first_call_of_a_process_may_be_a_compiled_one():
    """Loading the extension must not break the graph."""
    code = (
        "import torch, svdk; f = torch.compile(lambda x: svdk.steered_sample(x), fullgraph=True, "
        "backend='aot_eager'); print(f(torch.zeros(1, 5)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "torch.Size([1])\n", done.stderr


def test_compiled_scoring_equals_eager():
    def score(warm, base):
        info = svdk.steered_logprob(warm, base, LABELS, strengths=torch.tensor([0.0, 1.0]))
        return info.logprob.sum(), info.kl

    compiled = torch.compile(score, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(W, B), score(W, B), strict=True):
        assert torch.equal(got, want)


def test_wrong_calls_of_the_raw_op_are_refused():
    """The wrapper checks first; a direct call of the op must not read out of bounds either."""
    with pytest.raises(RuntimeError, match="vocab_size"):
        torch.ops.svdk.extract(*oc.flat(schema.EXTRACT, W, B, vocab=201))
    with pytest.raises(RuntimeError, match="warm_rows was 9"):
        rows = {"warm_rows": torch.tensor([9]), "base_rows": torch.tensor([0])}
        torch.ops.svdk.extract(*oc.flat(schema.EXTRACT, W, B, **rows))
    with pytest.raises(RuntimeError, match="base_logits"):
        torch.ops.svdk.extract(*oc.flat(schema.EXTRACT, W, B.bfloat16()))
