"""Steering through an unmodified ``generate``, against a slow processor on the reference, without cache."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import DynamicCache
from transformers.generation import LogitsProcessor

import svdk
from svdk import SteeringLogitsProcessor
from svdk.errors import InputError, InvalidLogitsError
from svdk.ops.api import steered_logits
from tests.helpers import tiny
from tests.models.test_pair import left_padded

STEPS = 7
STEERING = {"strength": 2.0, "direction": "log_ratio"}


class SlowSteering(LogitsProcessor):
    """No cache, one row at a time without its padding, every label scored by the float64 reference."""

    def __init__(self, plain, mask, **steering):
        self.plain, self.mask, self.steering = plain, mask, steering

    def __call__(self, input_ids, scores):
        copies = input_ids.shape[0] // self.mask.shape[0]
        steered = torch.empty_like(scores)
        for i, row in enumerate(input_ids):
            padding = int((self.mask[i // copies] == 0).sum())
            with torch.no_grad():
                base = self.plain(row[None, padding:]).logits[:, -1]
            vocab = scores.shape[1]
            steered[i] = svdk.steered_logprob(
                scores[i].expand(vocab, -1), base.expand(vocab, -1), torch.arange(vocab), backend="reference",
                penalty=-math.inf, **self.steering,
            ).logprob  # fmt: skip
        return steered


@pytest.fixture(scope="module")
def lora():
    return tiny.tiny_peft("lora")


@pytest.fixture(scope="module")
def plain():
    return tiny.tiny_model()


def run(model, processor, ids, mask, **options):
    torch.manual_seed(0)
    options = {"max_new_tokens": STEPS, "return_dict_in_generate": True, "output_scores": True} | options
    return model.generate(input_ids=ids, attention_mask=mask, logits_processor=[processor], **options)


@pytest.mark.parametrize("kind", ["lora", "prompt_tuning"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 4, "num_return_sequences": 3},
        {"num_beams": 4, "do_sample": True, "top_k": 0},
        {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
        {"do_sample": True, "top_p": 0.8},
        {},
    ],
    ids=["beam", "beam_sampling", "top_k", "top_p", "greedy"],
)
def test_generate_equals_the_slow_processor(kind, options, plain):
    model = tiny.tiny_peft(kind)
    ids, mask, _ = left_padded()
    fast = run(model, SteeringLogitsProcessor(model, attention_mask=mask, **STEERING), ids, mask, **options)
    slow = run(model, SlowSteering(plain, mask, **STEERING), ids, mask, **options)
    assert torch.equal(fast.sequences, slow.sequences)
    if "num_beams" in options:
        torch.testing.assert_close(fast.sequences_scores, slow.sequences_scores, rtol=1e-4, atol=1e-4)
    unsteered = run(model, SteeringLogitsProcessor(model, strength=0.0, alpha=0.0), ids, mask, **options)
    assert not torch.equal(fast.sequences, unsteered.sequences)
    assert torch.equal(unsteered.sequences, run(model, LogitsProcessor_(), ids, mask, **options).sequences)


class LogitsProcessor_(LogitsProcessor):  # noqa: N801 - the plain one may not be called
    def __call__(self, input_ids, scores):
        return scores.log_softmax(-1)


def test_beams_are_reordered_in_the_base_cache(lora, monkeypatch):
    orders = []
    reorder = DynamicCache.reorder_cache

    def record(self, order):
        orders.append(order.tolist())
        return reorder(self, order)

    ids, mask, _ = left_padded()
    processor = SteeringLogitsProcessor(lora, attention_mask=mask, **STEERING)
    monkeypatch.setattr(DynamicCache, "reorder_cache", record)
    run(lora, processor, ids, mask, num_beams=4)
    assert any(order != sorted(order) for order in orders)


def test_equal_tokens_behind_different_padding_are_different_rows(lora, plain):
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
    fast = SteeringLogitsProcessor(lora, attention_mask=mask, **STEERING)
    slow = SlowSteering(plain, mask, **STEERING)
    ids = torch.tensor([[9, 9, 40]] * 4)  # two beams each of two prompts that only padding tells apart
    scores = torch.randn(4, tiny.VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    fast(ids, scores)
    for parents, tokens in (([0, 1, 2, 3], [5, 6, 5, 6]), ([1, 0, 3, 2], [7, 7, 7, 7])):
        ids = torch.cat([ids[parents], torch.tensor(tokens)[:, None]], dim=1)
        torch.testing.assert_close(fast(ids, scores), slow(ids, scores), rtol=1e-4, atol=1e-4)


def test_greedy_equals_custom_generate(lora):
    ids, mask, _ = left_padded()
    options = {"max_new_tokens": STEPS}
    for steering in (
        {"strength": 2.0},
        {"strength": 0.3, "strength_mode": "kl_budget", "alpha": 0.0, "direction": "log_ratio"},
        {"vector": torch.linspace(-9, 9, tiny.VOCAB_SIZE), "penalty": -1.0},
    ):
        want = lora.generate(
            input_ids=ids, attention_mask=mask, custom_generate=svdk.generate, **steering, **options
        )
        processor = SteeringLogitsProcessor(lora, attention_mask=mask, **steering)
        got = lora.generate(input_ids=ids, attention_mask=mask, logits_processor=[processor], **options)
        assert torch.equal(got, want)


@pytest.mark.parametrize("direction", ["kl_gradient", "log_ratio", "vector"])
@pytest.mark.parametrize("mode", ["constant", "kl_budget"])
@pytest.mark.parametrize("penalty", [-math.inf, -0.7])
@pytest.mark.parametrize("alpha", [0.0, 0.2])
def test_steered_logits_are_the_references(direction, mode, penalty, alpha):
    generator = torch.Generator().manual_seed(1)
    warm, base = 3 * torch.randn(2, 4, 50, generator=generator)
    warm[0, 7] = base[1, 3] = -math.inf
    strength = torch.tensor([0.0, 0.5, 1.0, 2.0])
    options = {"strength": strength, "strength_mode": mode, "alpha": alpha, "penalty": penalty}
    options |= {"vector": base.clamp(-3, 3)} if direction == "vector" else {"direction": direction}
    other = None if direction == "vector" else base
    got = steered_logits(warm, other, **options)
    _, info = svdk.steered_sample(
        warm, other, return_info=True, temperature=0.0, backend="reference", **options
    )
    del options["strength_mode"]
    options["strength"] = info.strength
    for token in range(50):
        want = svdk.steered_logprob(
            warm, other, torch.full((4,), token), backend="reference", **options
        ).logprob
        torch.testing.assert_close(got.log_softmax(-1)[:, token], want, rtol=1e-4, atol=1e-4)


def test_invalid_rows(lora):
    warm = torch.randn(2, 10)
    warm[1, 3] = math.nan
    assert steered_logits(warm, torch.randn(2, 10)).isnan().any(1).tolist() == [False, True]
    with pytest.raises(InvalidLogitsError, match="rows 1"):
        steered_logits(warm, torch.randn(2, 10), check=True)


def test_padding_is_worked_out_as_transformers_does(lora):
    ids, mask, _ = left_padded()
    want = run(lora, SteeringLogitsProcessor(lora, attention_mask=mask, **STEERING), ids, mask).sequences
    got = run(lora, SteeringLogitsProcessor(lora, **STEERING), ids, None).sequences
    assert torch.equal(got, want)


def test_padding_that_cannot_be_worked_out(lora):
    model = tiny.tiny_peft("lora")
    model.generation_config.pad_token_id = 2
    model.base_model.model.generation_config.pad_token_id = 2
    ids, mask, _ = left_padded()
    ids[mask == 0] = 2
    with pytest.raises(InputError, match="attention_mask was None, and a prompt starts with the padding"):
        run(model, SteeringLogitsProcessor(model), ids, mask)
    run(model, SteeringLogitsProcessor(model, attention_mask=mask), ids, mask)


@pytest.mark.parametrize("wrong", [torch.ones(3, 4), torch.ones(2, 9), torch.ones(9)])
def test_wrong_attention_mask(lora, wrong):
    ids, mask, _ = left_padded()
    with pytest.raises(InputError, match="attention_mask had shape"):
        run(lora, SteeringLogitsProcessor(lora, attention_mask=wrong), ids, mask)


def test_assisted_decoding_is_refused(lora):
    ids = left_padded((9,))[0]
    with pytest.raises(InputError, match="assisted decoding is not supported"):
        run(lora, SteeringLogitsProcessor(lora), ids, None, assistant_model=tiny.tiny_model(seed=3))
    ids = torch.tensor([[7, 8, 9, 7, 8, 9, 7, 8]])
    with pytest.raises(InputError, match="assisted decoding is not supported"):
        run(lora, SteeringLogitsProcessor(lora), ids, None, prompt_lookup_num_tokens=3)


def test_one_object_one_call_unless_reset(lora):
    ids, mask, _ = left_padded()
    processor = SteeringLogitsProcessor(lora, attention_mask=mask, **STEERING)
    first = run(lora, processor, ids, mask).sequences
    with pytest.raises(InputError, match=r"call reset\(\)"):
        run(lora, processor, ids, mask)
    processor.reset()
    assert torch.equal(run(lora, processor, ids, mask).sequences, first)


def test_bad_arguments_before_anything_runs(lora):
    with pytest.raises(InputError, match=r"alpha was 1\.5"):
        SteeringLogitsProcessor(lora, alpha=1.5)
    with pytest.raises(InputError, match="without a PEFT adapter"):
        SteeringLogitsProcessor(tiny.tiny_model())
