"""Steering through an unmodified ``generate``, against a slow processor on the reference, without cache."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import DynamicCache, TextIteratorStreamer
from transformers.generation import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

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


def run(model, processor, ids, mask, **options):
    torch.manual_seed(0)
    options = {"max_new_tokens": STEPS, "return_dict_in_generate": True, "output_scores": True} | options
    return model.generate(input_ids=ids, attention_mask=mask, logits_processor=[processor], **options)


@pytest.mark.parametrize("kind", ["lora", "prefix_tuning"])
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


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("lora", {}),
        ("lora", {"num_beams": 3}),
        ("lora", {"do_sample": True, "num_return_sequences": 2}),
        ("lora", {"use_cache": False}),
        ("prefix_tuning", {}),
        ("prefix_tuning", {"do_sample": True, "num_return_sequences": 2}),
    ],
)
def test_the_mask_is_that_of_generate(kind, options, plain):
    """Padding that looks like text, and text that looks like padding (its beginning): ids cannot tell."""
    model = tiny.tiny_peft(kind)
    bos = model.get_base_model().generation_config.pad_token_id = 1
    ids, mask, _ = left_padded()
    ids[mask == 0] = 77
    ids[0, 0] = bos
    slow = run(model, SlowSteering(plain, mask, **STEERING), ids, mask, **options).sequences
    assert torch.equal(run(model, SteeringLogitsProcessor(model, **STEERING), ids, mask, **options)[0], slow)
    whole = torch.ones_like(mask)
    ids[:, 0] = bos  # transformers drops a mask of ones
    slow = run(model, SlowSteering(plain, whole, **STEERING), ids, whole, **options).sequences
    for given in (whole, None) if options else (whole,):
        if given is None:  # one that transformers works out, from a padding id that nothing else is
            model.get_base_model().generation_config.pad_token_id = 0
        fast = run(model, SteeringLogitsProcessor(model, **STEERING), ids, given, **options)
        assert torch.equal(fast.sequences, slow)


def test_the_mask_is_found_through_another_processor(lora, plain):
    class Wrapped(LogitsProcessor):
        def __init__(self, inner):
            self.inner = inner

        def __call__(self, input_ids, scores):
            return self.inner(input_ids, scores)

    ids, mask, _ = left_padded()
    ids[mask == 0] = 77
    slow = run(lora, SlowSteering(plain, mask, **STEERING), ids, mask).sequences
    fast = run(lora, Wrapped(SteeringLogitsProcessor(lora, **STEERING)), ids, mask)
    assert torch.equal(fast.sequences, slow)


def test_a_mask_that_is_given_wins(lora, plain):
    ids, mask, _ = left_padded()
    other = torch.ones_like(mask)
    slow = run(lora, SlowSteering(plain, other, **STEERING), ids, mask).sequences
    fast = run(lora, SteeringLogitsProcessor(lora, attention_mask=other, **STEERING), ids, mask)
    assert torch.equal(fast.sequences, slow)


@pytest.mark.parametrize(("pad", "eos", "first"), [(0, 2, 0), (1, 2, 1), (2, 2, 2), (None, 2, 2)])
def test_outside_generate_padding_is_not_guessed(plain, pad, eos, first):
    model = tiny.tiny_peft("lora")
    for config in (model.get_base_model().generation_config, model.config):
        config.pad_token_id, config.eos_token_id = pad, eos
    ids = torch.tensor([[first, 20, 30], [40, 50, 60]])
    scores = torch.randn(2, tiny.VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="attention_mask was None outside generate"):
        SteeringLogitsProcessor(model, **STEERING)(ids, scores)
    for mask in (torch.ones_like(ids), torch.tensor([[0, 1, 1], [1, 1, 1]])):
        got = SteeringLogitsProcessor(model, attention_mask=mask, **STEERING)(ids, scores)
        want = SlowSteering(plain, mask, **STEERING)(ids, scores)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    ids[0, 0] = 10  # no padding on the left without any in the first column
    got = SteeringLogitsProcessor(model, **STEERING)(ids, scores)
    want = SlowSteering(plain, torch.ones_like(ids), **STEERING)(ids, scores)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_loop_inside_another_generate_has_no_mask(lora):
    """The surrounding call is for other tokens, or of another model."""
    scores = torch.randn(1, tiny.VOCAB_SIZE)

    class Inside(LogitsProcessor):
        def __call__(self, input_ids, outer):
            with pytest.raises(InputError, match="attention_mask was None outside generate"):
                SteeringLogitsProcessor(lora)(torch.tensor([[0, 20, 30]]), scores)
            self.called = True
            return outer

    for model in (lora, tiny.tiny_model(seed=3)):
        inside = Inside()
        model.generate(torch.tensor([[7, 8]]), max_new_tokens=1, logits_processor=[inside])
        assert inside.called


def test_a_loop_called_without_generate_has_a_mask_too(lora, plain):
    """``_sample`` by itself: its mask is one token ahead."""
    ids, mask, _ = left_padded()
    ids[mask == 0] = 77
    model = lora.get_base_model()
    config = GenerationConfig(max_length=12, do_sample=False)
    config._pad_token_tensor = torch.tensor(0)
    ends = StoppingCriteriaList([MaxLengthCriteria(12)])
    found = []
    for processor in (SteeringLogitsProcessor(lora, **STEERING), SlowSteering(plain, mask, **STEERING)):
        options = {"attention_mask": mask, "use_cache": True, "past_key_values": DynamicCache()}
        with torch.no_grad():
            found.append(model._sample(ids, LogitsProcessorList([processor]), ends, config, **options))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 5, tiny.HIDDEN)}, "generate was given inputs_embeds"),
        ({"position_ids": torch.arange(5)[None] + 1}, "position_ids counted differently"),
    ],
)
def test_what_the_base_model_would_not_see_is_refused(lora, given, message):
    with pytest.raises(InputError, match=message):
        run(lora, SteeringLogitsProcessor(lora), left_padded((5,))[0], None, **given)


def test_a_cache_that_holds_the_beginning(lora):
    """Only its end is in input_ids: the base model cannot have seen the rest."""
    ids = left_padded((9,))[0]
    cache = DynamicCache()
    with torch.no_grad():
        lora(ids[:, :4], past_key_values=cache)
    with pytest.raises(InputError, match=r"attention_mask in generate had shape \(1, 9\)"):
        run(lora, SteeringLogitsProcessor(lora), ids[:, 4:], torch.ones_like(ids), past_key_values=cache)


def test_streamers_and_stop_strings_work_as_ever(lora, tiny_tokenizer):
    ids = left_padded((5,))[0]
    options = {"suppress_tokens": tiny.ids_but_letters(tiny_tokenizer), "eos_token_id": None}
    free = run(lora, SteeringLogitsProcessor(lora, **STEERING), ids, None, **options).sequences[0, 5:]
    streamer = TextIteratorStreamer(tiny_tokenizer, skip_prompt=True, timeout=10)
    options |= {"streamer": streamer, "stop_strings": tiny_tokenizer.decode(free[2:4])}
    processor = SteeringLogitsProcessor(lora, **STEERING)
    out = run(lora, processor, ids, None, tokenizer=tiny_tokenizer, **options).sequences[0, 5:]
    assert torch.equal(out, free[:4])
    assert "".join(streamer) == tiny_tokenizer.decode(out)


def test_a_mixed_peft_model():
    model = tiny.tiny_mixed()
    ids, mask, _ = left_padded()
    options = {"max_new_tokens": STEPS, "attention_mask": mask}
    want = model.generate(input_ids=ids, custom_generate=svdk.generate, strength=2.0, **options)
    processor = SteeringLogitsProcessor(model, strength=2.0)
    assert torch.equal(model.generate(input_ids=ids, logits_processor=[processor], **options), want)


@pytest.mark.parametrize("wrong", [torch.ones(3, 4), torch.ones(2, 9), torch.ones(9)])
def test_wrong_attention_mask(lora, wrong):
    ids, mask, _ = left_padded()
    with pytest.raises(InputError, match="attention_mask had shape"):
        run(lora, SteeringLogitsProcessor(lora, attention_mask=wrong), ids, mask)


def test_assisted_decoding_is_refused(lora):
    ids = left_padded((9,))[0]
    with pytest.raises(InputError, match=r"assistant_model was given.*assisted decoding is not supported"):
        run(lora, SteeringLogitsProcessor(lora), ids, None, assistant_model=tiny.tiny_model(seed=3))
    ids = torch.tensor([[7, 8, 9, 7, 8, 9, 7, 8]])
    with pytest.raises(InputError, match=r"prompt_lookup_num_tokens was given.*assisted decoding"):
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
