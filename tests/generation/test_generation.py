"""Steered decoding against a slow loop: whole rows, no cache, no padding, float64 reference."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import DynamicCache, TextIteratorStreamer
from transformers.generation import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TopKLogitsWarper,
)

import svdk
from svdk.calibration.artifact import Steering
from svdk.errors import ArtifactError, InputError
from svdk.generation.generate import decode
from svdk.generation.sampler import row_seeds
from svdk.models.pair import ModelPair
from tests.helpers import tiny
from tests.models.test_pair import left_padded

STEPS = 8
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.95, "min_p": 0.01}
NO_EOS = {"eos_token_id": None}


def generate(model, ids, mask=None, **options):
    options = {"max_new_tokens": STEPS, "strength": 2.0, **options}
    return model.generate(input_ids=ids, attention_mask=mask, custom_generate=svdk.generate, **options)


def slow_rows(peft_model, plain, rows, seeds=None, filters=None, **steering):
    """STEPS new tokens a row, list of (STEPS,): every step runs the whole row through both models."""
    filters = filters or {"temperature": 0.0}
    steering = {"strength": 2.0, **steering}
    found = []
    for i, row in enumerate(rows):
        ids = row[None]
        for step in range(STEPS):
            with torch.no_grad():
                warm, base = (m(input_ids=ids).logits[:, -1].double() for m in (peft_model, plain))
            seed = {} if seeds is None else {"seed": seeds[i], "offset": step}
            token = svdk.steered_sample(warm, base, backend="reference", **steering, **filters, **seed)
            ids = torch.cat([ids, token[:, None]], dim=1)
        found.append(ids[0, len(row) :])
    return torch.stack(found)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", tiny.PEFT_TYPES)
def test_greedy_and_sampling_equal_the_slow_loop(kind, arch):
    peft_model, plain = tiny.tiny_peft(kind, arch), tiny.tiny_model(arch)
    ids, mask, rows = left_padded()
    fast = generate(peft_model, ids, mask, **NO_EOS)[:, 9:]
    assert torch.equal(fast, slow_rows(peft_model, plain, rows))
    assert not torch.equal(fast, slow_rows(peft_model, plain, rows, strength=0.0))  # steering did something
    seeds = [11, 2**63 - 1, -5]
    fast = generate(peft_model, ids, mask, seed=torch.tensor(seeds), **SAMPLING, **NO_EOS)[:, 9:]
    filters = {name: value for name, value in SAMPLING.items() if name != "do_sample"}
    assert torch.equal(fast, slow_rows(peft_model, plain, rows, seeds, filters))


@pytest.mark.parametrize("direction", ["kl_gradient", "log_ratio"])
@pytest.mark.parametrize("kind", ["lora", "prefix_tuning"])
def test_directions_budgets_and_penalties_equal_the_slow_loop(kind, direction):
    peft_model, plain = tiny.tiny_peft(kind), tiny.tiny_model()
    ids, mask, rows = left_padded()
    for options in (
        {"strength": 0.3, "strength_mode": "kl_budget", "alpha": 0.0},
        {"strength": -1.0, "alpha": 0.3, "penalty": -0.5},
    ):
        fast = generate(peft_model, ids, mask, direction=direction, **options, **NO_EOS)[:, 9:]
        assert torch.equal(fast, slow_rows(peft_model, plain, rows, direction=direction, **options))


@pytest.mark.parametrize("kind", tiny.PEFT_TYPES)
@pytest.mark.parametrize("options", [{}, SAMPLING | {"seed": 3}], ids=["greedy", "sampling"])
def test_static_dynamic_and_no_cache_agree(kind, options):
    peft_model = tiny.tiny_peft(kind, "gemma2")  # every other layer has a sliding window
    ids, mask, _ = left_padded((70, 30))
    dynamic = generate(peft_model, ids, mask, **options)
    assert torch.equal(dynamic, generate(peft_model, ids, mask, cache_implementation="static", **options))
    assert torch.equal(dynamic, generate(peft_model, ids, mask, use_cache=False, **options))


def test_base_view_is_not_entered_through_peft(lora, monkeypatch):
    calls = []

    def count(*args, **kwargs):
        calls.append(args)

    monkeypatch.setattr(PeftModel, "disable_adapter", count)
    monkeypatch.setattr(BaseTunerLayer, "enable_adapters", count)
    generate(lora, *left_padded()[:2], **NO_EOS)
    assert not calls
    assert not any(m._disable_adapters for m in lora.modules() if isinstance(m, BaseTunerLayer))


@pytest.mark.parametrize(("forward", "calls"), [("auto", 1), ("paired", 1), ("two_pass", 2)])
def test_forwards_one_token_a_step(lora, forward, calls):
    lengths = []

    def record(module, args, kwargs):
        lengths.append(kwargs["input_ids"].shape[1])

    hook = lora.base_model.model.model.register_forward_pre_hook(record, with_kwargs=True)
    generate(lora, *left_padded()[:2], forward=forward, **NO_EOS)
    hook.remove()
    assert lengths == [9] * calls + [1] * calls * (STEPS - 1)


def test_rows_end_at_any_eos_and_are_padded(lora):
    ids, mask, _ = left_padded()
    free = generate(lora, ids, mask, **NO_EOS)[:, 9:]
    eos = [int(free[0, 2]), int(free[1, 4])]
    ended = generate(lora, ids, mask, eos_token_id=eos, pad_token_id=0)[:, 9:]
    longest = 0
    for row, want in zip(ended, free, strict=True):
        ends = [t for t in range(STEPS) if int(want[t]) in eos]
        end = ends[0] + 1 if ends else STEPS
        longest = max(longest, end)
        assert torch.equal(row[:end], want[:end])
        assert (row[end:] == 0).all()
    assert ended.shape[1] == longest


def test_stopping_criteria_see_the_tokens(lora):
    class Enough(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 12)

    ids, mask, _ = left_padded()
    assert generate(lora, ids, mask, stopping_criteria=[Enough()], **NO_EOS).shape == (3, 12)


def test_streamer_gets_every_token(lora, tiny_tokenizer):
    streamer = TextIteratorStreamer(tiny_tokenizer, skip_prompt=True)
    ids = left_padded((5,))[0]
    tokens = generate(lora, ids, text_streamer=streamer, **NO_EOS)
    assert "".join(streamer) == tiny_tokenizer.decode(tokens[0, 5:])


def test_scores_logits_and_info(lora, plain):
    ids, mask, rows = left_padded()
    want = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    out = generate(lora, ids, mask, output_steering=True, **want, **NO_EOS)
    assert torch.equal(torch.stack(out.scores, 1).argmax(-1), out.sequences[:, 9:])
    with torch.no_grad():
        for i, row in enumerate(rows):
            whole = torch.cat([row, out.sequences[i, 9:-1]])[None]
            warm, base = (m(input_ids=whole).logits[0, len(row) - 1 :] for m in (lora, plain))
            torch.testing.assert_close(torch.stack(out.logits, 1)[i], warm, rtol=1e-4, atol=1e-4)
            label = out.sequences[i, 9:]
            kept = svdk.steered_logprob(
                warm, base, label, strength=2.0, penalty=-math.inf, backend="reference"
            )
            scores = torch.stack(out.scores, 1)[i].log_softmax(-1)
            torch.testing.assert_close(
                scores.gather(1, label[:, None])[:, 0], kept.logprob, atol=1e-4, rtol=1e-4
            )
            info = torch.stack([step.logprob_base[i] for step in out.steering_info])
            torch.testing.assert_close(info, kept.logprob_base, atol=1e-4, rtol=1e-4)
    out = generate(lora, ids, mask, alpha=0.0, do_sample=True, top_k=3, seed=0, **want)
    assert all((scores.isfinite().sum(1) == 3).all() for scores in out.scores)
    out = generate(lora, ids, mask, return_dict_in_generate=True)
    assert out.scores is None and out.logits is None and out.steering_info is None


def test_seeds(lora):
    ids, mask, rows = left_padded()
    options = {"do_sample": True, "temperature": 2.0, "alpha": 0.0, **NO_EOS}
    seeds = row_seeds(5, 3)
    batch = generate(lora, ids, mask, seed=seeds, **options)
    assert torch.equal(batch, generate(lora, ids, mask, seed=5, **options))  # one seed is spread
    for i, row in enumerate(rows):  # a row alone draws what it drew in the batch
        alone = generate(lora, row[None], seed=seeds[i : i + 1], **options)
        assert torch.equal(alone[0, len(row) :], batch[i, 9:])
    torch.manual_seed(0)
    first = generate(lora, ids, mask, **options)
    second = generate(lora, ids, mask, **options)
    torch.manual_seed(0)
    assert torch.equal(first, generate(lora, ids, mask, **options))
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    generate(lora, ids, mask)
    assert torch.equal(state, torch.get_rng_state())  # greedy decoding draws nothing


def test_return_sequences_differ_and_the_first_is_the_single_one(lora):
    ids, mask, _ = left_padded()
    options = {"do_sample": True, "temperature": 2.0, "alpha": 0.0, "seed": torch.tensor([5, 6, 7]), **NO_EOS}
    strength = torch.tensor([0.0, 1.0, 2.0])
    many = generate(lora, ids, mask, num_return_sequences=3, strength=strength, **options)
    assert len({tuple(row.tolist()) for row in many}) == 9
    assert torch.equal(many[::3], generate(lora, ids, mask, strength=strength, **options))
    assert len(set(row_seeds(7, 6, copies=3).tolist())) == 6


def test_processors_run_before_steering_and_are_not_steered(lora, plain):
    class Bias(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, 40:80] += 3.0
            scores[:, 100:] = -math.inf
            return scores

    def biased(model):
        def forward(input_ids):
            out = model(input_ids=input_ids)
            out.logits[:, -1] = Bias()(input_ids, out.logits[:, -1])
            return out

        return forward

    ids, mask, rows = left_padded()
    bias = LogitsProcessorList([Bias()])
    fast = generate(lora, ids, mask, logits_processor=bias, direction="log_ratio", **NO_EOS)[:, 9:]
    assert torch.equal(fast, slow_rows(biased(lora), biased(plain), rows, direction="log_ratio"))
    free = generate(lora, ids, mask, direction="log_ratio", **NO_EOS)[:, 9:]
    assert not torch.equal(fast, free)
    banned = int(free[0, 0])
    again = generate(lora, ids, mask, direction="log_ratio", suppress_tokens=[banned], **NO_EOS)[:, 9:]
    assert (again != banned).all()


def test_artifact_is_used_and_overridden(lora):
    ids, mask, _ = left_padded()
    steering = Steering(strength=2.0, direction="log_ratio", alpha=0.3, peft_type="LORA")
    want = generate(lora, ids, mask, strength=2.0, direction="log_ratio", alpha=0.3)
    assert torch.equal(generate(lora, ids, mask, steering=steering, strength=None), want)
    want = generate(lora, ids, mask, strength=5.0, direction="log_ratio", alpha=0.3)
    assert torch.equal(generate(lora, ids, mask, steering=steering, strength=5.0), want)
    with pytest.raises(ArtifactError, match="peft_type does not match: the artifact was made for LORA"):
        generate(tiny.tiny_peft("ia3"), ids, mask, steering=steering)


def test_an_end_without_padding_is_refused(lora):
    ids, mask, _ = left_padded()
    ends = StoppingCriteriaList([EosTokenCriteria(2)])
    with pytest.raises(InputError, match="pad_token_id was None; allowed with an EOS criterion"):
        decode(ModelPair(lora), ids, mask, max_new_tokens=2, stopping_criteria=ends)


def test_a_direct_call_may_give_what_transformers_gives(lora):
    """Processors, criteria with an end and a config: still prepared, so that the config's EOS ids count."""
    ids, mask, _ = left_padded()
    free = generate(lora, ids, mask, **NO_EOS)
    eos = int(free[0, ids.shape[1] + 1])
    config = GenerationConfig(max_new_tokens=STEPS, eos_token_id=eos, pad_token_id=0)
    given = {"logits_processor": LogitsProcessorList(), "generation_config": config, "strength": 2.0}
    ends = StoppingCriteriaList([MaxLengthCriteria(ids.shape[1] + STEPS)])
    direct = svdk.generate(lora, ids, attention_mask=mask, stopping_criteria=ends, **given)
    assert torch.equal(direct, generate(lora, ids, mask, eos_token_id=eos, pad_token_id=0))
    assert not torch.equal(direct[0], free[0])


def test_a_config_works_where_an_artifact_does(lora):
    ids, mask, _ = left_padded()
    config = svdk.SteeringConfig(strength=2.0, direction="log_ratio", alpha=0.3)
    want = generate(lora, ids, mask, strength=2.0, direction="log_ratio", alpha=0.3)
    assert torch.equal(generate(lora, ids, mask, steering=config, strength=None), want)
    direct = svdk.generate(
        lora, ids, attention_mask=mask, steering=config, max_new_tokens=STEPS, eos_token_id=None
    )
    assert torch.equal(direct, want)
    processor = svdk.SteeringLogitsProcessor(lora, config, attention_mask=mask)
    options = {"max_new_tokens": STEPS, "eos_token_id": None, "logits_processor": [processor]}
    assert torch.equal(lora.generate(input_ids=ids, attention_mask=mask, **options), want)
    rows = svdk.SteeringConfig(strength=torch.tensor([2.0] * len(ids)), direction="log_ratio", alpha=0.3)
    assert torch.equal(generate(lora, ids, mask, steering=rows, strength=None), want)


def test_fixed_vector_needs_no_base_forward(lora, monkeypatch):
    ids, mask, _ = left_padded()
    vector = torch.zeros(tiny.VOCAB_SIZE)
    vector[77] = 100.0
    monkeypatch.setattr(ModelPair, "base", None)
    assert (generate(lora, ids, mask, vector=vector, alpha=0.0)[:, 9:] == 77).all()
    steering = Steering(strength=1.0, direction="vector", alpha=0.0, vector=vector)
    assert (generate(lora, ids, mask, steering=steering)[:, 9:] == 77).all()


def test_decode_is_generate_without_transformers(lora):
    ids, mask, _ = left_padded()
    want = generate(lora, ids, mask, seed=1, **SAMPLING)
    out = decode(
        ModelPair(lora), ids, mask, max_new_tokens=STEPS, strength=2.0, seed=1,
        eos_token_id=2, pad_token_id=0, **SAMPLING,
    )  # fmt: skip
    assert torch.equal(out.sequences, want)
    with pytest.raises(InputError, match="max_new_tokens was 0"):
        decode(ModelPair(lora), ids, mask, max_new_tokens=0)


def test_direct_call_goes_through_transformers(lora):
    ids, mask, _ = left_padded()
    direct = svdk.generate(lora, ids, attention_mask=mask, max_new_tokens=STEPS, strength=2.0)
    assert torch.equal(direct, generate(lora, ids, mask))


def test_training_mode_does_not_add_dropout():
    config = LoraConfig(
        r=2, lora_dropout=0.5, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = get_peft_model(tiny.tiny_model(), config).train()
    ids, mask, _ = left_padded()
    noisy = generate(model, ids, mask)
    assert model.training
    assert torch.equal(noisy, generate(model.eval(), ids, mask))


def test_bfloat16(lora):
    ids, mask, _ = left_padded()
    tokens = generate(tiny.tiny_peft("lora").to(torch.bfloat16), ids, mask, **NO_EOS)
    assert tokens.shape == (3, 9 + STEPS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "generation mode was beam_search"),
        ({"prompt_lookup_num_tokens": 3}, "generation mode was assisted_generation"),
        ({"past_key_values": DynamicCache()}, "past_key_values was given"),
        ({"do_sample": True, "typical_p": 0.5}, "typical_p was set"),
        ({"guidance_scale": 1.5}, "guidance_scale was set"),
        (
            {"logits_processor": LogitsProcessorList([TopKLogitsWarper(3)])},
            "TopKLogitsWarper; allowed: top_k",
        ),
        ({"output_attentions": True}, "output_attentions"),
        ({"position_ids": torch.arange(5)[None] + 1}, "position_ids"),
        ({"alpha": 1.5}, r"alpha was 1.5; allowed: a number in \[0, 1\]"),
        ({"alpha": torch.tensor([0.1, 0.2])}, "alpha was a tensor"),
        ({"strength": math.inf}, "strength was inf"),
        ({"strength": -1.0, "strength_mode": "kl_budget"}, "strength was -1.0"),
        ({"strength_mode": "label"}, "strength_mode was 'label'"),
        ({"penalty": math.nan}, "penalty was nan"),
        ({"direction": "up"}, "direction was 'up'"),
        ({"direction": "vector"}, "vector was None"),
        ({"direction": "log_ratio", "vector": torch.zeros(tiny.VOCAB_SIZE)}, "direction was 'log_ratio'"),
        ({"vector": torch.zeros(3)}, "vector was a tensor"),
        ({"seed": 1.5, "do_sample": True}, "seed was 1.5"),
        ({"seed": torch.tensor([1, 2]), "do_sample": True}, "seed was a tensor"),
        ({"backend": "gpu"}, "backend was 'gpu'"),
        ({"cache_implementation": "offloaded"}, "cache_implementation was 'offloaded'"),
    ],
)
def test_bad_arguments(lora, options, message):
    with pytest.raises(InputError, match=message):
        generate(lora, left_padded((5,))[0], **options)


def test_right_padding_is_refused(lora):
    ids, mask, _ = left_padded()
    with pytest.raises(InputError, match="padding on the left only"):
        generate(lora, ids.flip(1), mask.flip(1))


def test_models_without_an_adapter_are_refused(plain):
    with pytest.raises(InputError, match="without a PEFT adapter"):
        generate(plain, left_padded((5,))[0])


@pytest.mark.parametrize("kind", tiny.PEFT_TYPES)
def test_one_view_alone_is_that_models_own_answer(kind):
    peft_model, plain = tiny.tiny_peft(kind), tiny.tiny_model()
    ids, mask, rows = left_padded()
    for view, model in (("warm", peft_model), ("base", plain)):
        out = decode(ModelPair(peft_model), ids, mask, max_new_tokens=STEPS, view=view, output_scores=True)
        assert torch.equal(torch.stack(out.scores, 1).argmax(-1), out.sequences[:, 9:])
        for i, row in enumerate(rows):
            whole = torch.cat([row, out.sequences[i, 9:-1]])[None]
            want = model(input_ids=whole).logits[0, -STEPS:].argmax(-1)
            assert torch.equal(out.sequences[i, 9:], want)
    with pytest.raises(InputError, match="view was 'both'"):
        decode(ModelPair(peft_model), ids, mask, max_new_tokens=1, view="both")
