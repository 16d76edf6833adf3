"""Families that need to be run in a way of their own, or cannot be: named, and said once."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BertConfig, GenerationConfig

import svdk
from svdk.errors import InputError
from svdk.models.pair import ModelPair
from svdk.utils import notices
from tests.helpers import families, tiny


def bert(**config):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = AutoModelForCausalLM.from_config(BertConfig(vocab_size=tiny.VOCAB_SIZE, **sizes, **config))
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["query"])).eval()


def test_an_encoder_is_no_decoder():
    with pytest.raises(InputError, match="whose tokens see later ones without is_decoder=True"):
        ModelPair(bert())
    assert ModelPair(bert(is_decoder=True))


def test_running_all_tokens_again_is_said_once(monkeypatch):
    monkeypatch.setattr(notices, "said", set())
    model, row = families.family_adapters("zamba2", "lora"), families.prompts()[2][0]
    options = {"custom_generate": svdk.generate, "max_new_tokens": 2, "do_sample": False}
    with pytest.warns(UserWarning, match="runs all of Zamba2ForCausalLM's tokens again") as said:
        model.generate(input_ids=row[None], **options)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.generate(input_ids=row[None], **options)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_the_processor_refuses_padding_behind_virtual_tokens(kind):
    """Where PEFT puts it; windows then reach fewer tokens than in the row alone."""
    model, (ids, mask, rows) = families.family_adapters("phi3", kind), families.prompts()
    options = {"logits_processor": [svdk.SteeringLogitsProcessor(model)], "max_new_tokens": 2}
    with pytest.raises(InputError, match=r"attention_mask had padding with .*custom_generate=svdk.generate"):
        model.generate(input_ids=ids, attention_mask=mask, **options)
    options["logits_processor"][0].reset()
    model.generate(input_ids=rows[0][None], **options)


@pytest.mark.parametrize(
    ("family", "kind", "reason"),
    [
        ("roberta", "lora", "positions that start at 0"),
        ("recurrent_gemma", "ia3", "states in its own modules"),
        ("mamba", "prompt", "loses count of the virtual tokens"),
        ("bamba", "prompt", "loses count of the virtual tokens"),
    ],
)
def test_the_processor_refuses_what_a_plain_generate_does_wrong(family, kind, reason):
    with pytest.raises(InputError, match=f"allowed: custom_generate=svdk.generate.*{reason}"):
        svdk.SteeringLogitsProcessor(families.family_adapters(family, kind))


def test_a_padded_row_is_refused_before_anything_runs():
    model = families.family_adapters("roberta", "lora")
    ids, mask, rows = families.prompts()
    with pytest.raises(InputError, match="attention_mask had padding; allowed for RobertaForCausalLM"):
        svdk.generate(model, ids, attention_mask=mask, generation_config=GenerationConfig(max_new_tokens=2))
    same = torch.stack([rows[0], rows[0]])
    out = svdk.generate(model, same, generation_config=GenerationConfig(max_new_tokens=2))
    assert torch.equal(out[0], out[1])
