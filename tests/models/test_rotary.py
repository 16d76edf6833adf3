"""Rotary tables that follow the length of a row: each row of a batch gets the one that it has alone."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, PhimoeConfig

import svdk
from svdk.generation.generate import decode
from svdk.models.pair import ModelPair
from svdk.models.rotary import LengthRotary
from tests.helpers import tiny
from tests.models.test_pair import close, left_padded

LIMIT = 12
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": LIMIT}
LONG |= {"short_factor": [1.0] * 4, "long_factor": [4.0, 8.0, 16.0, 32.0], "factor": 4.0}
COMMON = {
    "vocab_size": tiny.VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LENGTHS = (10, 3, 7)
STEPS = 8
"""The rows pass the limit one after the other, the second one never."""


def config(kind):
    if kind == "phi3":
        parameters = LONG | {"partial_rotary_factor": 1.0}
        return Phi3Config(
            **COMMON,
            max_position_embeddings=64,
            original_max_position_embeddings=LIMIT,
            rope_parameters=parameters,
        )
    if kind == "phimoe":
        parameters = LONG | {"short_mscale": 1.1, "long_mscale": 1.4}
        return PhimoeConfig(
            **COMMON,
            num_local_experts=4,
            max_position_embeddings=64,
            original_max_position_embeddings=LIMIT,
            rope_parameters=parameters,
        )
    if kind == "longrope":  # a family whose own generate does not watch for the limit
        return LlamaConfig(**COMMON, max_position_embeddings=64, rope_parameters=dict(LONG))
    parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    return LlamaConfig(**COMMON, max_position_embeddings=LIMIT, rope_parameters=parameters)


def model(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = AutoModelForCausalLM.from_config(config(kind), attn_implementation="eager").eval()
    built.generation_config.pad_token_id = 0
    return built


def forget(part, args):
    """transformers keeps the table of the longest row so far: not so for a row alone."""
    part.max_seq_len_cached, part.inv_freq = part.original_max_seq_len, part.original_inv_freq


def alone(built):
    for part in built.modules():
        if "dynamic" in str(getattr(part, "rope_type", "")):
            part.register_forward_pre_hook(forget)
    return built


KINDS = ("phi3", "phimoe", "longrope", "dynamic")


@pytest.mark.parametrize("adapter", ["lora", "prompt_tuning", "prefix_tuning"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_each_row_alone(kind, adapter):
    peft = tiny.tiny_peft_config(adapter)
    if adapter == "lora":
        peft.target_modules = {"o_proj"}
    make = lambda: tiny.tiny_peft(adapter, model=model(kind), config=peft)  # noqa: E731
    pair, warm, base = ModelPair(make()), alone(make()), alone(model(kind))
    ids, mask, rows = left_padded(LENGTHS)
    want = []
    for row in rows:
        row = row[None]
        for _ in range(STEPS):
            with torch.no_grad():
                w, b = (m(input_ids=row, use_cache=False).logits[:, -1].double() for m in (warm, base))
            token = svdk.steered_sample(w, b, strength=2.0, temperature=0.0, backend="reference")
            row = torch.cat([row, token[:, None]], dim=1)
        want.append(row[0, -STEPS:])
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        for forward in ("paired", "two_pass"):
            got = decode(pair, ids, mask, max_new_tokens=STEPS, strength=2.0, forward=forward, **options)
            assert torch.equal(got.sequences[:, ids.shape[1] :], torch.stack(want)), (options, forward)
    if adapter == "lora" and kind == "phi3":  # the warm side of the processor is transformers' own
        row = rows[0][None]
        processor = svdk.SteeringLogitsProcessor(pair._root, strength=2.0)
        got = pair._root.generate(
            input_ids=row, max_new_tokens=STEPS, eos_token_id=None, logits_processor=[processor]
        )
        assert torch.equal(got[0, row.shape[1] :], want[0])


@pytest.mark.parametrize("kind", KINDS)
def test_teacher_forced_rows_are_those_of_each_row_alone(kind):
    pair = ModelPair(tiny.tiny_peft("prompt_tuning", model=model(kind)))
    ids, mask, rows = left_padded((20, 5, 9))
    views = pair.teacher_forced(ids, mask, keep=5)
    for i, row in enumerate(rows):
        for view, single in zip(views, pair.teacher_forced(row[None], None, keep=5), strict=True):
            close(view[i], single[0])


def test_the_modules_are_as_they_were():
    built = model("longrope")
    rotary = LengthRotary(built)
    assert rotary
    with pytest.raises(RuntimeError, match="stop"), rotary.rowwise():
        raise RuntimeError("stop")
    assert not any("forward" in vars(part) for part in built.modules())
    assert not LengthRotary(tiny.tiny_model())


def test_tables():
    rotary = LengthRotary(model("longrope"))
    assert rotary.tables(torch.tensor([LIMIT, LIMIT + 1, 3, 40])).flatten().tolist() == [0, 1, 0, 1]
    rotary = LengthRotary(model("dynamic"))
    assert rotary.tables(torch.tensor([LIMIT, LIMIT + 1, 3, 40])).flatten().tolist() == [0, LIMIT + 1, 0, 40]
