"""Decoding with levers, against a slow loop: strengths by position, the dial, the adapter's scale."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

import svdk
from svdk.errors import InputError
from svdk.generation.generate import decode
from svdk.generation.logits_processor import SteeringLogitsProcessor
from svdk.generation.sampler import make_sampler
from svdk.models.adapter_scale import adapter_scale, why_not_scaled
from svdk.models.pair import ModelPair
from tests.generation.test_generation import NO_EOS, STEPS, generate, slow_rows
from tests.generation.test_mixed_batch import NAMES, alone, through_model, two_adapters
from tests.helpers import tiny
from tests.models.test_pair import left_padded

POSITIONS = (3.0, -1.0, 0.5, 6.0)
STRENGTH = 2.0
BY_POSITION = svdk.Steering(strength=STRENGTH, positions=POSITIONS, lever="positions")


def slow_positions(peft_model, plain, rows, positions=POSITIONS, strength=STRENGTH, **steering):
    """(B, STEPS) tokens: every step runs the whole rows through both models, with its own strength."""
    rows = list(rows)
    found = []
    for step in range(STEPS):
        mu = positions[step] if step < len(positions) else strength
        tokens = []
        for i, row in enumerate(rows):
            with torch.no_grad():
                warm, base = (m(input_ids=row[None]).logits[:, -1].double() for m in (peft_model, plain))
            given = steering | {"strength": mu, "temperature": 0.0, "backend": "reference"}
            tokens.append(svdk.steered_sample(warm, base, **given))
            rows[i] = torch.cat([row, tokens[-1]])
        found.append(torch.cat(tokens))
    return torch.stack(found, 1)


@pytest.mark.parametrize(
    "options",
    [{}, {"forward": "two_pass"}, {"cache_implementation": "static"}, {"use_cache": False}],
    ids=["paired", "two_pass", "static_cache", "no_cache"],
)
def test_each_position_has_its_strength(lora, plain, options):
    ids, mask, rows = left_padded()
    fast = generate(lora, ids, mask, steering=BY_POSITION, strength=None, **NO_EOS, **options)[:, 9:]
    slow = slow_positions(lora, plain, rows)
    assert torch.equal(fast, slow)
    assert not torch.equal(slow, slow_rows(lora, plain, rows))
    direct = decode(ModelPair(lora), ids, mask, max_new_tokens=STEPS, steering=BY_POSITION).sequences[:, 9:]
    assert torch.equal(direct, slow)


def test_copies_of_a_prompt_and_scores_have_them_too(lora, plain):
    ids, mask, rows = left_padded()
    out = generate(
        lora, ids, mask, steering=BY_POSITION, strength=None, num_return_sequences=2, do_sample=True, top_k=1,
        return_dict_in_generate=True, output_scores=True, output_steering=True, **NO_EOS,
    )  # fmt: skip
    assert torch.equal(out.sequences[:, 9:], slow_positions(lora, plain, rows).repeat_interleave(2, 0))
    used = [float(info.strength[0]) for info in out.steering_info]
    assert used == [*POSITIONS, *[STRENGTH] * (STEPS - len(POSITIONS))]
    assert all(torch.equal(s.argmax(1), out.sequences[:, 9 + i]) for i, s in enumerate(out.scores))


def test_a_static_vector_by_position(lora):
    ids, mask, _ = left_padded()
    vector = torch.linspace(-1, 1, tiny.VOCAB_SIZE)
    pair = ModelPair(lora)
    common = {"max_new_tokens": STEPS, "vector": vector, "output_steering": True}
    infos = decode(pair, ids, mask, steering=BY_POSITION, **common).steering_info
    assert [float(info.strength[0]) for info in infos][: len(POSITIONS)] == list(POSITIONS)


def through_processor(model, ids, mask, beams, steering, **given):
    """(B, STEPS) tokens by transformers' own decoding."""
    processor = SteeringLogitsProcessor(model, steering, attention_mask=mask, **given)
    options = {"max_new_tokens": STEPS, "attention_mask": mask, "num_beams": beams, **NO_EOS}
    return model.generate(input_ids=ids, logits_processor=[processor], **options)[:, 9:]


@pytest.mark.parametrize("beams", [1, 3])
def test_the_logits_processor_has_them_too(lora, plain, beams):
    ids, mask, rows = left_padded()
    run = functools.partial(through_processor, lora, ids, mask, beams)
    got = run(BY_POSITION)
    if beams == 1:
        assert torch.equal(got, slow_positions(lora, plain, rows))
    flat = dataclasses.replace(BY_POSITION, positions=(STRENGTH,) * 3)
    assert torch.equal(run(flat), run(svdk.SteeringConfig(strength=STRENGTH)))
    far = dataclasses.replace(BY_POSITION, positions=(-40.0, 40.0) * 2)
    assert not torch.equal(run(far), run(flat))
    assert torch.equal(run(BY_POSITION, strength=STRENGTH), run(flat))  # it takes the place of the list


def test_rows_of_different_adapters_have_their_own_lists():
    model = two_adapters()
    ids, mask, rows = left_padded()
    steering = {"default": BY_POSITION, "other": svdk.SteeringConfig(strength=-1.0)}
    for forward in ("auto", "two_pass"):
        options = {"forward": forward, "strength": None}
        got = through_model(model, ids, mask, adapter_names=NAMES, steering=steering, **options)[:, 9:]
        mine = alone(model, rows[::2], ["default"] * 2, steering=BY_POSITION, strength=None)
        assert torch.equal(got[::2], mine)
        assert torch.equal(got[1:2], alone(model, rows[1:2], ["other"], strength=-1.0))


@pytest.mark.parametrize("by", [-1.0, 0.5, 2.0])
def test_the_dial_multiplies_every_strength(lora, plain, by):
    ids, mask, rows = left_padded()
    got = generate(lora, ids, mask, steering=BY_POSITION, strength=None, strength_scale=by, **NO_EOS)[:, 9:]
    assert torch.equal(got, slow_positions(lora, plain, rows, [by * mu for mu in POSITIONS], by * STRENGTH))


def test_the_dial_from_the_base_model_to_the_adapter(lora, plain):
    """Strength -1 of the unmasked log-ratio is the base model, 0 the adapter."""
    ids, mask, _ = left_padded()
    pair = ModelPair(lora)
    steering = svdk.SteeringConfig(strength=1.0, direction="log_ratio", alpha=0.0)
    common = {"max_new_tokens": STEPS}
    for by, view in ((-1.0, "base"), (0.0, "warm")):
        got = decode(pair, ids, mask, steering=steering, strength_scale=by, **common).sequences
        assert torch.equal(got, decode(pair, ids, mask, view=view, **common).sequences)


def test_a_kl_budget_goes_with_the_square_of_the_dial(lora):
    given = {"strength": 0.2, "strength_mode": "kl_budget"}
    assert make_sampler(ModelPair(lora), 1, strength_scale=3.0, **given).steering.strength == pytest.approx(
        1.8
    )


@pytest.mark.parametrize("by", [float("nan"), "much", None])
def test_a_bad_dial_is_refused(lora, by):
    with pytest.raises(InputError, match="strength_scale was"):
        make_sampler(ModelPair(lora), 1, strength_scale=by)


@pytest.mark.parametrize("positions", [[1.0], (float("nan"),), ("a",), torch.ones(3)])
def test_bad_positions_are_refused(positions):
    with pytest.raises(InputError, match="positions was"):
        svdk.SteeringConfig(positions=positions)


# --- the adapter's scale


def weights(model):
    return {name: dict(layer.scaling) for name, layer in model.named_modules() if hasattr(layer, "lora_A")}


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, -1.0])
def test_the_scale_multiplies_what_the_adapter_adds(lora, plain, scale):
    ids = left_padded()[2][0][None]
    before, was = lora(input_ids=ids).logits, weights(lora)
    changed = tiny.tiny_peft("lora")
    for name, weight in changed.named_parameters():
        if "lora_B" in name:
            weight.data *= scale
    with svdk.adapter_scale(lora, scale):
        got = lora(input_ids=ids).logits
    torch.testing.assert_close(got, changed(input_ids=ids).logits)
    if scale == 0:
        assert torch.equal(got, plain(input_ids=ids).logits)
    assert weights(lora) == was and torch.equal(lora(input_ids=ids).logits, before)


def test_after_an_error_inside_the_scale_is_as_before(lora):
    was = weights(lora)
    with pytest.raises(RuntimeError, match="inside"), adapter_scale(ModelPair(lora), 3.0):
        raise RuntimeError("inside")
    assert weights(lora) == was


def test_the_lever_scale_runs_one_row_a_step(lora, monkeypatch):
    ids, mask, _ = left_padded()
    steering = svdk.Steering(strength=0.0, alpha=0.0, lever="scale", scale=1.5)
    with svdk.adapter_scale(lora, 1.5):
        expected = lora.generate(input_ids=ids, attention_mask=mask, max_new_tokens=STEPS, **NO_EOS)
    monkeypatch.setattr(ModelPair, "base", lambda *_, **__: pytest.fail("the base model ran"))
    was = weights(lora)
    got = generate(lora, ids, mask, steering=steering, strength=None, **NO_EOS)
    assert torch.equal(got, expected) and weights(lora) == was
    assert make_sampler(ModelPair(lora), 1, steering=steering, strength_scale=2.0).steering.scale == 2.0
    none = svdk.Steering(strength=0.0, alpha=0.0, lever="none")
    unsteered = lora.generate(input_ids=ids, attention_mask=mask, max_new_tokens=STEPS, **NO_EOS)
    assert torch.equal(generate(lora, ids, mask, steering=none, strength=None, **NO_EOS), unsteered)


def test_adapters_without_a_scale_say_so():
    pair = ModelPair(tiny.tiny_peft("ia3"))
    assert "IA3" in why_not_scaled(pair)
    for scale, message in (
        (2.0, r"scale was 2\.0; allowed: 1, because an adapter of type IA3"),
        ("x", "scale was 'x'"),
    ):
        with pytest.raises(InputError, match=message), adapter_scale(pair, scale):
            pass


def test_the_logits_processor_refuses_a_scale(lora):
    with pytest.raises(InputError, match=r"scale of the steering was 2; allowed .* svdk\.adapter_scale"):
        SteeringLogitsProcessor(lora, svdk.Steering(strength=0.0, alpha=0.0, lever="scale", scale=2.0))
