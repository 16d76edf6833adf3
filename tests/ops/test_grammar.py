"""A real grammar's bitmasks, as xgrammar makes them, held to ``steered_sample`` step by step."""

from __future__ import annotations

import json

import pytest
import torch

import svdk
from tests.helpers import ops_cases as oc

xgrammar = pytest.importorskip("xgrammar")

PIECES = [
    '{"',
    '"}',
    '": ',
    '", "',
    "name",
    "age",
    "true",
    "null",
    "<eos>",
    *(chr(c) for c in range(32, 127)),
]
EOS = PIECES.index("<eos>")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def compiled():
    vocabulary = xgrammar.TokenizerInfo(PIECES, vocab_size=len(PIECES), stop_token_ids=[EOS])
    schema = json.dumps(SCHEMA)
    return xgrammar.GrammarCompiler(vocabulary, max_threads=1).compile_json_schema(
        schema, max_whitespace_cnt=1
    )


@pytest.mark.parametrize(
    "backend", [name for name in oc.kernels() if not oc.interpreted(name)] + ["reference"]
)
@pytest.mark.parametrize("steered", [False, True])
def test_what_is_drawn_under_a_grammar_is_json(compiled, backend, steered):
    rows, vocab = 3, len(PIECES)
    matchers = [xgrammar.GrammarMatcher(compiled) for _ in range(rows)]
    texts = [""] * rows
    generator = torch.Generator().manual_seed(1)
    device = oc.device_of(backend)
    for step in range(200):
        alive = [row for row in range(rows) if not matchers[row].is_terminated()]
        if not alive:
            break
        bitmask = xgrammar.allocate_token_bitmask(len(alive), vocab)
        for place, row in enumerate(alive):
            matchers[row].fill_next_token_bitmask(bitmask, place)
        warm, base = torch.randn(2, len(alive), vocab, generator=generator)
        warm[:, EOS] += 3.0
        call = {
            "seed": torch.tensor(alive) + 5,
            "offset": step,
            "temperature": 1.5,
            "top_p": 0.95,
            "alpha": 0.01,
        }
        pair = (warm, base) if steered else (warm,)
        token, info = svdk.steered_sample(
            *(x.to(device) for x in pair), bitmask=bitmask.to(device), backend=backend, return_info=True,
            **{name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in call.items()},
        )  # fmt: skip
        assert not info.status.any()
        by_hand = [x.clone() for x in pair]
        for x in by_hand:
            xgrammar.apply_token_bitmask_inplace(x, bitmask)
        assert torch.equal(token.cpu(), svdk.steered_sample(*by_hand, backend="reference", **call))
        for row, drawn in zip(alive, token.tolist(), strict=True):
            assert matchers[row].accept_token(drawn)
            texts[row] += PIECES[drawn] if drawn != EOS else ""
    found = [json.loads(text) for text in texts]
    assert all(isinstance(x["name"], str) and isinstance(x["age"], int) and len(x) == 2 for x in found)
