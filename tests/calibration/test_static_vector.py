"""Static steering vectors: the average is the average, its strength the optimum, and no base model is run."""

from __future__ import annotations

import json
import math

import pytest
import torch

from svdk import Steering, generate
from svdk.calibration.estimators import split_folds
from svdk.calibration.static_vector import logit_bias, static_steering, static_vector
from svdk.errors import ArtifactError, DataError, InputError, InvalidLogitsError
from svdk.models.pair import ModelPair
from svdk.warmstart.data import encode, load_examples
from tests.helpers import tiny

ROWS = tiny.tiny_examples(10)
# One long completion among short ones, so that the weightings differ.
ROWS[3] = {"prompt": "say: ", "completion": "A LONG ANSWER OF MANY LETTERS"}


def labelled(model, tokenizer, rows=ROWS):
    """Warm logits, base logits (t, V) float64 and labels (t,) of every example, one forward each."""
    pair = ModelPair(model)
    for example in load_examples(rows):
        found = encode(tokenizer, example)
        count = len(found.input_ids) - found.prompt_length
        warm, base = pair.teacher_forced(torch.tensor([found.input_ids[:-1]]), None, count)
        yield warm[0].double(), base[0].double(), torch.tensor(found.input_ids[-count:])


def delta(warm, base, direction, alpha):
    """Design section 2, written out."""
    log_p, log_q = warm.log_softmax(-1), base.log_softmax(-1)
    p, ratio = log_p.exp(), log_p - log_q
    found = ratio - (p * ratio).sum(-1, keepdim=True)
    found = p * found if direction == "kl_gradient" else found
    return torch.where(p >= alpha * p.amax(-1, keepdim=True), found, 0.0)


def nll(model, tokenizer, vector, strength, rows=ROWS):
    """Summed over tokens, example by example."""
    return [
        -float((warm + strength * vector.double()).log_softmax(-1).gather(1, labels[:, None]).sum())
        for warm, _, labels in labelled(model, tokenizer, rows)
    ]


@pytest.mark.parametrize("weighting", ["token", "example"])
@pytest.mark.parametrize(
    ("direction", "alpha"), [("log_ratio", 0.0), ("kl_gradient", 0.0), ("log_ratio", 0.2)]
)
@pytest.mark.parametrize("peft_type", tiny.PEFT_TYPES)
def test_is_the_average_over_labelled_positions(peft_type, direction, alpha, weighting, tiny_tokenizer):
    model = tiny.tiny_peft(peft_type)
    found = static_vector(
        model,
        ROWS,
        tokenizer=tiny_tokenizer,
        direction=direction,
        alpha=alpha,
        weighting=weighting,
        batch_size=4,
    )
    steps = [delta(warm, base, direction, alpha) for warm, base, _ in labelled(model, tiny_tokenizer)]
    if weighting == "token":
        expected = torch.cat(steps).mean(0)
    else:
        expected = torch.stack([step.mean(0) for step in steps]).mean(0)
    assert found.shape == (tiny.VOCAB_SIZE,)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert expected.abs().max() > 1e-3


def test_batches_and_chunks_do_not_matter(tiny_tokenizer, monkeypatch):
    model = tiny.tiny_peft("lora")
    expected = static_vector(ModelPair(model), ROWS, tokenizer=tiny_tokenizer, batch_size=10)
    monkeypatch.setattr("svdk.calibration.averages.MAX_OP", 3 * tiny.VOCAB_SIZE)
    for batch_size in (1, 3):
        found = static_vector(model, ROWS, tokenizer=tiny_tokenizer, batch_size=batch_size)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("direction", ["log_ratio", "kl_gradient"])
def test_strength_minimises_the_loss(direction, folder, tiny_tokenizer):
    base = tiny.tiny_model()
    steering = static_steering(
        base, folder, ROWS, tokenizer=tiny_tokenizer, direction=direction, resamples=50
    )
    assert not hasattr(base, "peft_config")
    assert (steering.direction, steering.alpha, steering.estimator) == ("vector", 0.0, "optimum")
    assert float(steering.vector.abs().max()) == 1.0
    model = tiny.tiny_peft("lora")
    losses = {
        d: sum(nll(model, tiny_tokenizer, steering.vector, steering.strength + d)) for d in (-0.1, 0, 0.1)
    }
    assert losses[0] < min(losses[-0.1], losses[0.1])
    tokens = steering.metrics["tokens"]
    assert steering.metrics["nll_steered"] == pytest.approx(losses[0] / tokens, abs=1e-4)
    warm = sum(nll(model, tiny_tokenizer, steering.vector, 0.0)) / tokens
    assert steering.metrics["nll_warm"] == pytest.approx(warm, abs=1e-5)
    # A shifted and scaled average: the direction is still that of static_vector.
    plain = static_vector(model, ROWS, tokenizer=tiny_tokenizer, direction=direction)
    plain = plain - plain.median()
    torch.testing.assert_close(steering.vector, plain / plain.abs().max(), rtol=1e-4, atol=1e-5)


def test_expected_gain_is_out_of_fold(folder, tiny_tokenizer):
    """Vector and strength of a fold's examples come from the other fold, made here by separate calls."""
    rows = [ROWS[i] for i in range(8)]
    steering = static_steering(
        tiny.tiny_model(), folder, rows, tokenizer=tiny_tokenizer, folds=2, seed=3, resamples=50
    )
    model, fold = tiny.tiny_peft("lora"), split_folds(8, 2, 3).tolist()
    total = 0.0
    for k in range(2):
        train = [row for row, f in zip(rows, fold, strict=True) if f != k]
        held = [row for row, f in zip(rows, fold, strict=True) if f == k]
        other = static_steering(
            tiny.tiny_model(), folder, train, tokenizer=tiny_tokenizer, folds=2, resamples=1
        )
        before, after = (
            sum(nll(model, tiny_tokenizer, other.vector, mu, held)) for mu in (0.0, other.strength)
        )
        total += before - after
    assert steering.gain == pytest.approx(total / steering.metrics["tokens"], abs=1e-4)
    in_sample = steering.metrics["nll_warm"] - steering.metrics["nll_steered"]
    assert steering.gain < in_sample


def test_decodes_without_the_base_model(folder, tiny_tokenizer, monkeypatch):
    steering = static_steering(tiny.tiny_model(), folder, ROWS, tokenizer=tiny_tokenizer, resamples=10)
    steering.save(folder)
    model = tiny.tiny_peft("lora")
    loaded = Steering.load(folder, model=model, tokenizer=tiny_tokenizer)
    assert torch.equal(loaded.vector, steering.vector)
    assert loaded.verdict() == steering.verdict()

    monkeypatch.setattr(ModelPair, "base", lambda *_, **__: pytest.fail("the base model was run"))
    inputs = tiny_tokenizer(["say red oak: ", "say: "], return_tensors="pt", padding=True)
    steering = Steering(strength=8.0, direction="vector", alpha=0.0, vector=loaded.vector)
    out = model.generate(**inputs, custom_generate=generate, steering=steering, max_new_tokens=6)
    plain = model.generate(**inputs, max_new_tokens=6)
    pair, ids, mask = ModelPair(model), inputs["input_ids"], inputs["attention_mask"]
    for _ in range(6):
        token = (pair.warm(ids, mask)[:, -1] + 8.0 * loaded.vector).argmax(-1)
        ids = torch.cat([ids, token[:, None]], dim=1)
        mask = torch.cat([mask, torch.ones_like(token)[:, None]], dim=1)
    assert torch.equal(out, ids), "no row of the test reaches its end"
    assert not torch.equal(out, plain)

    tiny.tiny_peft("lora", seed=1).save_pretrained(folder)
    with pytest.raises(ArtifactError, match="adapter does not match"):
        Steering.load(folder)


def test_adapter_without_effect(tmp_path, tiny_tokenizer):
    """Both models alike: nothing to average, no strength, no gain, and nothing undefined."""
    model = tiny.tiny_peft("lora")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    model.save_pretrained(tmp_path)
    steering = static_steering(tiny.tiny_model(), tmp_path, ROWS, tokenizer=tiny_tokenizer, resamples=10)
    assert (steering.strength, steering.gain, steering.helps) == (0.0, 0.0, False)
    assert logit_bias(steering) == {}


def test_data_defaults_to_the_folders(folder, tiny_tokenizer):
    with pytest.raises(DataError, match=r"calibration\.jsonl does not exist"):
        static_steering(tiny.tiny_model(), folder, tokenizer=tiny_tokenizer)
    (folder / "calibration.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    given = static_steering(tiny.tiny_model(), folder, ROWS, tokenizer=tiny_tokenizer, resamples=5)
    found = static_steering(tiny.tiny_model(), folder, tokenizer=tiny_tokenizer, resamples=5)
    assert (found.strength, found.gain, found.data_hash) == (given.strength, given.gain, given.data_hash)


def bias_of(values, strength=1.0, **options):
    vector = torch.tensor(values)
    return logit_bias(Steering(strength=strength, direction="vector", alpha=0.0, vector=vector), **options)


def test_logit_bias_takes_the_largest_about_the_median():
    found = bias_of([5.0, 3.0, 3.0, 3.0, 2.0, 9.0, 3.0], strength=2.0, top=2)
    assert list(found.items()) == [(5, 12.0), (0, 4.0)]
    assert found.kept == pytest.approx(16 / 18)
    assert found.clipped == 0
    assert json.loads(json.dumps(found)) == {"5": 12.0, "0": 4.0}
    everything = bias_of([5.0, 3.0, 3.0, 3.0, 2.0, 9.0, 3.0], strength=2.0)
    assert list(everything) == [5, 0, 4], "zeros need no entry"
    assert everything.kept == 1.0


def test_logit_bias_clips_and_breaks_ties_by_id():
    found = bias_of([0.0, 1.0, -1.0, 0.0, 0.0, 1.0, 0.0], strength=150.0, top=2)
    assert list(found.items()) == [(1, 100.0), (2, -100.0)]
    assert found.clipped == 2
    assert found.kept == pytest.approx(2 / 3)


def test_whole_logit_bias_is_the_steered_distribution(folder, tiny_tokenizer):
    steering = static_steering(tiny.tiny_model(), folder, ROWS, tokenizer=tiny_tokenizer, resamples=5)
    found = logit_bias(steering, tiny_tokenizer, top=tiny.VOCAB_SIZE)
    row = torch.linspace(-3, 3, tiny.VOCAB_SIZE).double()
    biased = row.clone()
    for token, bias in found.items():
        biased[token] += bias
    steered = row + steering.strength * steering.vector.double()
    torch.testing.assert_close(biased.softmax(0), steered.softmax(0))
    sizes = [abs(bias) for bias in found.values()]
    assert sizes == sorted(sizes, reverse=True)


def test_logit_bias_leaves_out_ids_that_the_tokenizer_lacks(tiny_tokenizer):
    values = torch.zeros(tiny.VOCAB_SIZE + 8)
    values[tiny.VOCAB_SIZE + 2], values[4] = 9.0, 1.0
    found = bias_of(values.tolist(), tokenizer=tiny_tokenizer)
    assert (found, found.kept) == ({4: 1.0}, 1.0)


def test_bad_arguments(folder, tiny_tokenizer):
    model = tiny.tiny_peft("lora")
    for wanted, arguments in {
        "direction was 'vector'; allowed: kl_gradient, log_ratio": {"direction": "vector"},
        "alpha was 2": {"alpha": 2},
        "weighting was 'row'; allowed: token, example": {"weighting": "row"},
        "batch_size was 0": {"batch_size": 0},
    }.items():
        with pytest.raises(InputError, match=wanted):
            static_vector(model, ROWS, tokenizer=tiny_tokenizer, **arguments)
        with pytest.raises(InputError, match=wanted):
            static_steering(model, folder, ROWS, tokenizer=tiny_tokenizer, **arguments)
    for wanted, arguments in {
        "estimator was 'best'": {"estimator": "best"},
        "folds was 1": {"folds": 1},
        "more than max_length = 4 tokens": {"max_length": 4},
    }.items():
        with pytest.raises(InputError, match=wanted):
            static_steering(model, folder, ROWS, tokenizer=tiny_tokenizer, **arguments)
    with pytest.raises(DataError, match="held 1 usable example; allowed: at least 2"):
        static_steering(model, folder, ROWS[:1], tokenizer=tiny_tokenizer)
    listed = Steering(direction="vector", vector=torch.ones(4), positions=(1.0,))
    with pytest.raises(InputError, match="1 strengths by position; allowed: direction vector"):
        logit_bias(listed)
    with pytest.raises(InputError, match=r"steering had direction kl_gradient.*allowed: direction vector"):
        logit_bias(Steering(strength=1.0))
    with pytest.raises(InputError, match="top was 0"):
        bias_of([1.0, 2.0], top=0)


def test_nan_logits_name_the_example(tiny_tokenizer):
    model = tiny.tiny_peft("lora")
    model.get_base_model().lm_head.weight.data[7] = math.nan
    with pytest.raises(InvalidLogitsError, match="calibration example"):
        static_vector(model, ROWS, tokenizer=tiny_tokenizer)
