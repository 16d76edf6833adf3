"""Steered decoding of every causal family that transformers registers, against a slow loop.

By default a spread of families with every kind of architecture; with SVDK_LONG=1 all of them (long), and with
SVDK_WRITE=1 also docs/families.md is written again.
"""

from __future__ import annotations

import functools
import os

import pytest
import torch
import transformers

from tests import ROOT
from tests.helpers import families, family_page
from tests.helpers.families import FAMILIES, FORWARDS, KINDS, PROCESSOR, Verdict
from tests.helpers.family_configs import VOCAB, tiny_family

LONG = os.environ.get("SVDK_LONG") == "1"
WRITE = LONG and os.environ.get("SVDK_WRITE") == "1"
PAGE = ROOT / "docs" / "families.md"

# What each stands for; the parts that others share are left out.
SPREAD = {
    "llama": "rotary positions, grouped heads",
    "gpt2": "learned positions, Conv1D",
    "gpt_bigcode": "one key head",
    "gpt_neox": "parallel attention and MLP",
    "opt": "learned positions counted from the mask; rows flattened before the MLP",
    "bloom": "ALiBi counted from the mask",
    "mpt": "ALiBi, no position_ids",
    "bert": "an encoder as decoder",
    "roberta": "positions that start behind the padding id",
    "bart": "the decoder of an encoder-decoder, no position_ids",
    "gemma2": "sliding and full layers, soft caps",
    "gemma3n_text": "shared keys and values, embeddings a layer",
    "gemma4_text": "heads of two sizes, dense and mixture side by side",
    "phi3": "sliding window in every layer, fused projections",
    "gpt_oss": "attention sinks, experts as parameters",
    "mixtral": "mixture of experts",
    "llama4_text": "chunked attention, layers without positions",
    "deepseek_v3": "latent attention, dense and sparse MLPs, shared experts",
    "deepseek_v32": "indexed sparse attention",
    "minimax": "lightning attention",
    "qwen3_next": "gated delta net",
    "jamba": "Mamba and attention",
    "falcon_h1": "Mamba 2 beside attention",
    "lfm2": "short convolutions",
    "recurrent_gemma": "linear recurrence and local attention",
    "zamba2": "one attention shared by layers",
    "mamba": "no attention",
    "rwkv": "no attention, own state",
    "openai-gpt": "no cache",
    "gemma3": "text and images, text alone",
}  # fmt: skip
RUN = FAMILIES if LONG else list(SPREAD)


@functools.cache
def verdicts(family: str, kind: str) -> tuple[Verdict, ...]:
    """One a forward; also of "auto" where "paired" is refused."""
    found = [families.verdict(family, kind, forward) for forward in (*FORWARDS, PROCESSOR)]
    if found[0].verdict == "refused":
        found.append(families.verdict(family, kind, "auto"))
    return tuple(found)


@functools.cache
def committed() -> dict[str, list[family_page.Cell]]:
    """The page is the list of exceptions: what is not equal is there with the error that the user sees."""
    return family_page.parse(PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("family", RUN)
def test_decoding_equals_the_slow_loop_or_is_refused(family):
    found = {kind: verdicts(family, kind) for kind in KINDS}
    faults = [v for kind in KINDS for v in found[kind] if v.verdict in family_page.FAULTS]
    assert not faults
    for kind in KINDS:
        by_forward = {v.forward: v.verdict for v in found[kind]}
        assert by_forward.get("auto", by_forward["two_pass"]) == by_forward["two_pass"]
    if not WRITE and is_of_this_page():
        assert committed()[family] == family_page.cells(found)


def is_of_this_page() -> bool:
    """Other releases have other families and other errors."""
    return f"transformers {transformers.__version__} " in PAGE.read_text(encoding="utf-8")


@pytest.mark.skipif(not LONG and not is_of_this_page(), reason="docs/families.md is of another transformers")
def test_page_is_what_would_be_written():
    if not LONG:
        assert list(committed()) == FAMILIES
        assert not [c for row in committed().values() for c in row if c[0].startswith(family_page.FAULTS)]
        return
    page = family_page.render({f: {k: verdicts(f, k) for k in KINDS} for f in FAMILIES})
    if WRITE:
        PAGE.write_text(page, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page


@pytest.mark.parametrize("family", RUN)
def test_no_token_sees_later_ones_where_it_is_not_refused(family):
    """Teacher-forced sweeps, calibration among them, take every position from one forward."""
    if all(v.verdict != "equal" for v in verdicts(family, "lora")):
        pytest.skip("not steered")
    model, row = tiny_family(family), families.prompts()[2][0]
    with families.Choices() as choices:
        each = torch.stack([families.last_logits(model, row[: i + 1]) for i in range(len(row))])
        whole = families.all_logits(model, row)
    if not choices.tied:
        torch.testing.assert_close(whole, each, rtol=0, atol=families.ROUNDING * float(each.abs().max()))


@pytest.mark.parametrize("family", [name for name in RUN if name in ("gemma2", "jamba", "roberta")])
def test_tiny_models_are_the_same_each_time_and_not_flat(family):
    row = families.prompts()[2][0]
    first, again = (families.last_logits(tiny_family(family), row) for _ in range(2))
    assert first.equal(again)
    assert first.shape == (VOCAB,)
    assert 0.02 < float(first.softmax(-1).max()) < 0.999
