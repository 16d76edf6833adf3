"""Decoding with strengths by class of token, against a slow loop."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

import svdk
from svdk.errors import InputError
from svdk.generation.generate import decode
from svdk.generation.sampler import make_sampler
from svdk.models.pair import ModelPair
from svdk.ops.configs import ClassStrengths
from tests.generation.test_generation import NO_EOS, STEPS, generate, slow_rows
from tests.generation.test_levers import through_processor
from tests.generation.test_mixed_batch import NAMES, through_model, two_adapters
from tests.helpers import tiny
from tests.models.test_pair import left_padded

CLASSES = ClassStrengths(
    -4.0, 9.0, template_ids=tuple(range(0, tiny.VOCAB_SIZE, 3)), stop_ids=tuple(range(1, tiny.VOCAB_SIZE, 3))
)
STRENGTH = 2.0
BY_CLASS = svdk.Steering(strength=STRENGTH, classes=CLASSES, lever="classes")


def slow_classes(peft_model, plain, rows, classes=CLASSES, strength=STRENGTH):
    """(B, STEPS) tokens and strengths: whole rows through both models at every step."""
    found, used = [], []
    for row in rows:
        tokens, strengths = row, []
        for _ in range(STEPS):
            with torch.no_grad():
                warm, base = (m(input_ids=tokens[None]).logits[:, -1].double() for m in (peft_model, plain))
            due = int(warm.argmax())
            mu = classes.stop if due in classes.stop_ids else strength
            mu = classes.template if due in classes.template_ids else mu
            given = {"strength": mu, "temperature": 0.0, "backend": "reference"}
            tokens = torch.cat([tokens, svdk.steered_sample(warm, base, **given)])
            strengths.append(mu)
        found.append(tokens[len(row) :])
        used.append(strengths)
    return torch.stack(found), used


@pytest.mark.parametrize(
    "options",
    [{}, {"forward": "two_pass"}, {"cache_implementation": "static"}, {"use_cache": False}],
    ids=["paired", "two_pass", "static_cache", "no_cache"],
)
def test_each_class_has_its_strength(lora, plain, options):
    ids, mask, rows = left_padded()
    fast = generate(lora, ids, mask, steering=BY_CLASS, strength=None, **NO_EOS, **options)[:, 9:]
    slow, used = slow_classes(lora, plain, rows)
    assert torch.equal(fast, slow)
    assert {mu for row in used for mu in row} == {STRENGTH, CLASSES.template, CLASSES.stop}
    assert not torch.equal(slow, slow_rows(lora, plain, rows))
    out = decode(ModelPair(lora), ids, mask, max_new_tokens=STEPS, steering=BY_CLASS, output_steering=True)
    assert torch.equal(out.sequences[:, 9:], slow)
    assert torch.stack([info.strength for info in out.steering_info], 1).tolist() == used


def test_copies_of_a_prompt_and_scores_have_them_too(lora, plain):
    ids, mask, rows = left_padded()
    out = generate(
        lora, ids, mask, steering=BY_CLASS, strength=None, num_return_sequences=2, do_sample=True, top_k=1,
        return_dict_in_generate=True, output_scores=True, **NO_EOS,
    )  # fmt: skip
    assert torch.equal(out.sequences[:, 9:], slow_classes(lora, plain, rows)[0].repeat_interleave(2, 0))
    assert all(torch.equal(s.argmax(1), out.sequences[:, 9 + i]) for i, s in enumerate(out.scores))


def test_a_static_vector_by_class(lora):
    ids, mask, rows = left_padded()
    vector = torch.linspace(-1, 1, tiny.VOCAB_SIZE)
    common = {"max_new_tokens": 1, "vector": vector, "output_steering": True}
    (info,) = decode(ModelPair(lora), ids, mask, steering=BY_CLASS, **common).steering_info
    with torch.no_grad():
        due = torch.stack([lora(input_ids=row[None]).logits[0, -1].argmax() for row in rows])
    assert torch.equal(info.strength.double(), CLASSES.of(torch.eye(tiny.VOCAB_SIZE)[due], STRENGTH))


@pytest.mark.parametrize("beams", [1, 3])
def test_the_logits_processor_has_them_too(lora, plain, beams):
    ids, mask, rows = left_padded()
    run = functools.partial(through_processor, lora, ids, mask, beams)
    got = run(BY_CLASS)
    if beams == 1:
        assert torch.equal(got, slow_classes(lora, plain, rows)[0])
    level = dataclasses.replace(CLASSES, template=STRENGTH, stop=STRENGTH)
    flat = run(svdk.SteeringConfig(strength=STRENGTH))
    assert torch.equal(run(dataclasses.replace(BY_CLASS, classes=level)), flat)
    far = dataclasses.replace(CLASSES, template=-40.0, stop=40.0)
    assert not torch.equal(run(dataclasses.replace(BY_CLASS, classes=far)), flat)
    assert torch.equal(run(BY_CLASS, strength=STRENGTH), flat)  # it takes the place of all three


@pytest.mark.parametrize("by", [-1.0, 0.5, 2.0])
def test_the_dial_multiplies_every_strength(lora, plain, by):
    ids, mask, rows = left_padded()
    got = generate(lora, ids, mask, steering=BY_CLASS, strength=None, strength_scale=by, **NO_EOS)[:, 9:]
    classes = dataclasses.replace(CLASSES, template=by * CLASSES.template, stop=by * CLASSES.stop)
    assert torch.equal(got, slow_classes(lora, plain, rows, classes, by * STRENGTH)[0])


def test_rows_of_different_adapters_cannot_have_them():
    model = two_adapters()
    ids, mask, _ = left_padded()
    steering = {"default": BY_CLASS, "other": svdk.SteeringConfig(strength=-1.0)}
    with pytest.raises(InputError, match="classes was given by an artifact; allowed with row_adapters"):
        through_model(model, ids, mask, adapter_names=NAMES, steering=steering, strength=None)
    through_model(model, ids, mask, adapter_names=NAMES, steering=steering, strength=1.0)  # in place of them


def test_one_kind_of_strengths_at_a_time():
    for other in ({"positions": (1.0,)}, {"strength_mode": "kl_budget"}):
        with pytest.raises(InputError, match="classes was given with"):
            svdk.SteeringConfig(classes=CLASSES, **other)
    with pytest.raises(InputError, match=r"classes was \{'template': 1\.0\}"):
        svdk.SteeringConfig(classes={"template": 1.0})
    with pytest.raises(InputError, match="warm was None"):
        svdk.SteeringConfig(classes=CLASSES).values(0)


def test_a_steering_of_the_other_classes_alone_steers(lora):
    rest = dataclasses.replace(BY_CLASS, strength=0.0, alpha=0.0)
    assert rest.steers and make_sampler(ModelPair(lora), 1, steering=rest).views == ("warm", "base")
    still = dataclasses.replace(rest, classes=dataclasses.replace(CLASSES, template=0.0, stop=0.0))
    assert not still.steers
