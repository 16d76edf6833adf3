"""PEFT's own mixed batches (``adapter_names``) against each row alone with its own adapter."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.generation import LogitsProcessor

import svdk
from svdk.errors import InputError
from svdk.generation.caller import mixed_batch, mixed_rows
from svdk.models.pair import ModelPair
from svdk.utils import notices
from tests.helpers import tiny
from tests.models.test_pair import left_padded

STEPS = 8
NAMES = ["default", "other", "default"]
STEERED = {"strength": 2.0, "max_new_tokens": STEPS, "eos_token_id": None}
FORWARDS = ["auto", "paired", "two_pass"]


def two_adapters(arch="llama", **options):
    def config():
        return LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=8, init_lora_weights=False,
            **{"target_modules": tiny.LORA_TARGETS.get(arch, ["q_proj", "v_proj"])} | options,
        )  # fmt: skip

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = get_peft_model(tiny.tiny_model(arch), config())
        model.add_adapter("other", config())
        for name, weight in model.named_parameters():  # a trained copy of a layer is no longer the base's
            if "modules_to_save" in name:
                weight.data += 0.3 * torch.randn_like(weight)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return two_adapters()


def through_model(model, ids, mask, **options):
    return model.generate(
        input_ids=ids, attention_mask=mask, custom_generate=svdk.generate, **STEERED | options
    )


def direct(model, ids, mask, **options):
    return svdk.generate(model, ids, attention_mask=mask, **STEERED | options)


BOTH = pytest.mark.parametrize("call", [through_model, direct])


def alone(model, rows, names, call=through_model, **options):
    """New tokens, list of (STEPS,): each row by itself, with its own adapter active."""
    found = []
    for row, name in zip(rows, names, strict=True):
        model.set_adapter(name)
        found.append(call(model, row[None], None, **options)[0, len(row) :])
    model.set_adapter("default")
    return torch.stack(found)


def no_hooks(model):
    return not any(module._forward_pre_hooks for module in model.modules())


@BOTH
@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_each_row_is_its_adapters(model, forward, call, options):
    ids, mask, rows = left_padded()
    want = alone(model, rows, NAMES)
    assert not torch.equal(want[1], alone(model, rows[1:2], ["default"])[0])
    got = call(model, ids, mask, adapter_names=NAMES, forward=forward, **options)[:, 9:]
    assert torch.equal(got, want)
    assert no_hooks(model)


@pytest.mark.parametrize("forward", FORWARDS)
def test_copies_of_a_prompt(model, forward):
    ids, mask, rows = left_padded()
    options = {"do_sample": True, "num_return_sequences": 2, "temperature": 2.0, "alpha": 0.0}
    options |= {"seed": torch.tensor([5, 6, 7]), "forward": forward}
    got = through_model(model, ids, mask, adapter_names=NAMES, **options)[:, 9:]
    for i, row in enumerate(rows):
        model.set_adapter(NAMES[i])
        seed = {"seed": torch.tensor([5 + i])}
        want = through_model(model, row[None], None, **options | seed)[:, len(row) :]
        assert torch.equal(got[2 * i : 2 * i + 2], want)
    model.set_adapter("default")
    each = [name for name in NAMES for _ in range(2)]  # as PEFT itself wants it
    assert torch.equal(through_model(model, ids, mask, adapter_names=each, **options)[:, 9:], got)


@BOTH
@pytest.mark.parametrize("forward", ["auto", "two_pass"])
def test_rows_without_an_adapter(model, forward, call):
    ids, mask, rows = left_padded()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = call(model, ids, mask, adapter_names=["other", "__base__", "default"], forward=forward)[:, 9:]
    assert torch.equal(got[::2], alone(model, rows[::2], ["other", "default"]))
    plain = tiny.tiny_model().generate(rows[1][None], max_new_tokens=STEPS, eos_token_id=None)
    assert torch.equal(got[1], plain[0, len(rows[1]) :])  # warm and base are the same: nothing to steer


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("llama", {"modules_to_save": ["lm_head"]}),
        ("gpt2", {}),
    ],
    ids=["embedding", "modules_to_save", "conv1d"],
)
@pytest.mark.parametrize("forward", ["auto", "two_pass"])
def test_what_cannot_be_paired_goes_through_pefts_hooks(arch, options, forward):
    model = two_adapters(arch, **options)
    ids, mask, rows = left_padded()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = alone(model, rows, NAMES, forward="two_pass")
        got = through_model(model, ids, mask, adapter_names=NAMES, forward=forward)[:, 9:]
    assert torch.equal(got, want)
    assert no_hooks(model)


def test_falling_back_is_said(monkeypatch):
    monkeypatch.setattr(notices, "said", set())
    model = two_adapters(modules_to_save=["lm_head"])
    ids, mask, _ = left_padded()
    with pytest.warns(UserWarning, match="svdk decodes with two forward passes a step"):
        through_model(model, ids, mask, adapter_names=NAMES)
    with pytest.raises(InputError, match="forward was 'paired'"):
        through_model(model, ids, mask, adapter_names=NAMES, forward="paired")
    assert no_hooks(model)


@pytest.mark.parametrize("forward", FORWARDS)
def test_a_single_view_goes_through_pefts_hooks(model, forward):
    ids, mask, rows = left_padded()
    vector = {"vector": torch.linspace(-2, 2, tiny.VOCAB_SIZE)}
    got = through_model(model, ids, mask, adapter_names=NAMES, forward=forward, **vector)[:, 9:]
    assert torch.equal(got, alone(model, rows, NAMES, **vector))


def test_one_artifact_an_adapter(model):
    ids, mask, rows = left_padded()
    steering = {"default": svdk.SteeringConfig(strength=2.0), "other": svdk.SteeringConfig(strength=-1.0)}
    for forward in FORWARDS:
        options = {"forward": forward, "strength": None, "steering": steering}
        got = through_model(model, ids, mask, adapter_names=NAMES, **options)[:, 9:]
        assert torch.equal(got[::2], alone(model, rows[::2], ["default"] * 2))
        assert torch.equal(got[1:2], alone(model, rows[1:2], ["other"], strength=-1.0))


class Break(LogitsProcessor):
    def __init__(self, error):
        self.error = error

    def __call__(self, input_ids, scores):
        raise self.error


@BOTH
@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 7.0},
        {"num_beams": 2},
        {"row_adapters": NAMES},
        {"adapter_names": ["default"]},
        {"streamer": object()},
        {"logits_processor": [Break(RuntimeError())]},
        {"logits_processor": [Break(KeyboardInterrupt())]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_after_an_error_the_model_is_as_before(call, forward, options):
    model = two_adapters()
    ids, mask, _ = left_padded()
    with torch.no_grad():
        want = model(ids[:2]).logits
    if call is through_model and "streamer" in options:
        return  # transformers itself puts the prompt there, before svdk is called
    with pytest.raises((InputError, RuntimeError, KeyboardInterrupt, AttributeError)):
        call(model, ids, mask, forward=forward, **{"adapter_names": NAMES} | options)
    assert no_hooks(model)
    with torch.no_grad():
        assert torch.equal(model(ids[:2]).logits, want)


def test_after_an_error_of_transformers_the_model_is_as_before():
    model = two_adapters()
    with pytest.raises(ValueError, match="typo"):
        direct(model, *left_padded()[:2], adapter_names=NAMES, typo=1)
    assert no_hooks(model)


@BOTH
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"row_adapters": NAMES}, "row_adapters was given beside adapter_names"),
        ({"adapter_names": ["default"]}, "adapter_names had 1 names; allowed: one for each of 3 prompts"),
        (
            {"adapter_names": NAMES[:2], "num_return_sequences": 2, "do_sample": True},
            "adapter_names had 2 names; allowed: one for each of 3 prompts",
        ),
    ],
)
def test_names_that_do_not_fit(model, call, options, message):
    ids, mask, _ = left_padded()
    for forward in FORWARDS:
        with pytest.raises(InputError, match=message):
            call(model, ids, mask, forward=forward, **{"adapter_names": NAMES} | options)


def test_hooks_come_back_in_their_place(model):
    """Somebody else's hooks stay, PEFT's are back afterwards, and PEFT removes them."""
    pair, seen = ModelPair(model), []
    layer = next(iter(pair.layers.values()))
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append("own"))
    with model.base_model._enable_peft_forward_hooks(adapter_names=NAMES):
        before = dict(layer._forward_pre_hooks)
        for names in (None, ["other"] * 3):
            with mixed_rows(pair, names):
                assert mixed_batch(pair) == names
            assert layer._forward_pre_hooks == before
            assert mixed_batch(pair) == NAMES
        with pytest.raises(ZeroDivisionError), mixed_rows(pair, NAMES):
            raise ZeroDivisionError
        assert mixed_batch(pair) is None
    assert list(layer._forward_pre_hooks) == [handle.id]
    handle.remove()
