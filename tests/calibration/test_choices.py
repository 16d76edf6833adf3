"""Choices: rows with options, the loss over them along mu, a bias a label, and their calibration."""

from __future__ import annotations

import math

import pytest
import torch

from svdk import adapter_scale, calibrate, choose, generate, recalibrate
from svdk.calibration.artifact import Steering
from svdk.calibration.choice_view import choice_hits, choice_loss
from svdk.calibration.choices import ChoiceStatistics, choices_of, encode_choice
from svdk.calibration.label_bias import fit_bias
from svdk.calibration.option_statistics import OptionStatistics
from svdk.calibration.report import CalibrationConfig, make_report, saved_statistics
from svdk.errors import ArtifactError, DataError, InputError
from svdk.models.loading import load_model
from svdk.models.pair import ModelPair
from svdk.warmstart.data import Example, encode_prompt, load_examples, save_examples
from tests.calibration.test_estimators import statistics_of_rows
from tests.helpers import tiny

OPTIONS = (" yes", " no, never")
ROWS = [
    {"prompt": f"Q: {'abcdefgh'[i % 8]} {i}?\nA:", "options": list(OPTIONS), "label": i % 3 == 0}
    for i in range(24)
]
ROWS = [row | {"label": int(row["label"])} for row in ROWS]


# Rows


def test_options_and_a_label_take_the_place_of_a_completion(tmp_path):
    found = load_examples([ROWS[0], ROWS[1] | {"label": " yes"}, ROWS[2] | {"completion": " yes"}])
    assert [e.completion for e in found] == [" no, never", " yes", " yes"]
    assert all(e.options == OPTIONS for e in found)
    save_examples(found, tmp_path / "kept.jsonl")
    assert load_examples(tmp_path / "kept.jsonl") == found


def test_options_are_another_column_where_the_completion_is_none_of_them():
    row = {"prompt": "a", "completion": "c", "options": ["x", "y"]}
    with pytest.warns(UserWarning, match="'options' is ignored"):
        assert load_examples([row]) == [Example("a", "c")]
    with pytest.warns(UserWarning, match="'label' is ignored"):
        assert load_examples([{"prompt": "a", "completion": "c", "label": 3}]) == [Example("a", "c")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": [" yes"]}, "at least two texts"),
        ({"options": [" yes", ""]}, "at least two texts"),
        ({"options": [" yes", 3]}, "at least two texts"),
        ({"options": " yes or no"}, "at least two texts"),
        ({"options": [" yes", " yes"]}, "different texts"),
        ({"label": 2}, "its place, 0 to 1"),
        ({"label": -1}, "its place, 0 to 1"),
        ({"label": True}, "its place, 0 to 1"),
        ({"label": "perhaps"}, "one of the options"),
        ({"completion": " perhaps"}, "completion was ' perhaps' with label 1"),
        ({"prompt": " "}, "prompt was empty"),
        ({"prompt": None}, "needed: 'prompt'"),
    ],
)
def test_rows_that_ask_nothing_are_refused(change, message):
    with pytest.raises(DataError, match=f"example 0.*{message}"):
        load_examples([ROWS[0] | change])


def test_chats_have_options_too(tiny_tokenizer):
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    row = {"messages": [{"role": "user", "content": "a?"}], "options": ["yes", "no"], "label": "no"}
    (example,) = load_examples([row], tokenizer)
    assert example.prompt.endswith("<assistant>") and example.completion == f"no{tokenizer.eos_token}"
    (choice,) = choices_of([example], tokenizer)
    assert (choice.options, choice.label) == (("yes", "no"), 1)  # without what ends the turn


def test_a_small_closed_set_is_a_choice(tiny_tokenizer):
    few = [Example(f"p{i}", (" b", " a")[i % 2]) for i in range(12)]
    found = choices_of(few, tiny_tokenizer)
    assert {one.options for one in found} == {(" a", " b")}
    assert [one.label for one in found] == [1, 0] * 6
    assert choices_of([Example(f"p{i}", f" {i}") for i in range(12)], tiny_tokenizer) is None  # all differ
    assert (
        choices_of([Example(f"p{i}", " a") for i in range(12)], tiny_tokenizer) is None
    )  # nothing to choose
    assert choices_of(few[:9], tiny_tokenizer) is None  # less than five of each
    with pytest.raises(DataError, match="some examples had options and some none"):
        choices_of([*few, Example("p", " a", (" a", " b"))], tiny_tokenizer)


def test_the_same_options_in_another_order_are_the_same(tiny_tokenizer):
    found = choices_of([Example("p", " a", (" a", " b")), Example("q", " a", (" b", " a"))], tiny_tokenizer)
    assert [(one.options, one.label) for one in found] == [((" a", " b"), 0)] * 2


def test_an_option_that_begins_another_is_scored_with_its_end(tiny_tokenizer):
    plain = encode_choice(tiny_tokenizer, "q", "A:", (" yes", " no"))
    ended = encode_choice(tiny_tokenizer, "q", "A:", (" no", " no, never"))
    assert all(ids[-1] != tiny_tokenizer.eos_token_id for ids in plain.options)
    assert all(ids[-1] == tiny_tokenizer.eos_token_id for ids in ended.options)


# The loss


def synthetic(questions=300, options=2, length=1, truth=-0.6, lift=0.0, seed=0):
    """Choices made by a log-ratio model at strength ``truth``; ``lift``: what the warm start adds to all."""
    g = torch.Generator().manual_seed(seed)
    vocabulary, count = 30, questions * options
    base = 1.5 * torch.randn(count * length, vocabulary, generator=g, dtype=torch.float64)
    change = torch.randn(count * length, vocabulary, generator=g, dtype=torch.float64)
    labels = torch.arange(count * length) % vocabulary
    change[torch.arange(len(labels)), labels] += lift
    warm = base + change
    statistics = statistics_of_rows(warm.float(), base.float(), labels, count)
    steered = warm + truth * (warm.log_softmax(1) - base.log_softmax(1))
    value = steered.log_softmax(1).gather(1, labels[:, None]).view(questions, options, length).sum(2)
    gold = torch.multinomial(value.softmax(1), 1, generator=g)[:, 0]
    kept = OptionStatistics(
        statistics, torch.full((questions,), options), torch.zeros(count, dtype=torch.bool)
    )
    return ChoiceStatistics(kept, gold, tuple("abcdefgh"[:options]))


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("setting", [("log_ratio", 0.0), ("kl_gradient", 0.1)])
def test_the_loss_over_options_and_its_derivatives(setting, length):
    statistics = synthetic(40, 3, length)
    view = statistics.view(*setting)
    step = 1e-5
    for mu in (-1.3, 0.4):
        value = view.logprobs(mu).view(40, 3)
        expected = -value.log_softmax(1).gather(1, statistics.labels[:, None])[:, 0]
        low, here, high = (view.evaluate(mu + k * step) for k in (-1, 0, 1))
        torch.testing.assert_close(here.nll, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close((high.nll - low.nll) / (2 * step), here.slope, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            (high.slope - low.slope) / (2 * step), here.curvature, rtol=1e-3, atol=1e-5
        )
        assert view.correct(mu).tolist() == (value.argmax(1) == statistics.labels).double().tolist()


@pytest.mark.parametrize("truth", [-0.8, 0.0, 0.7])
def test_the_strength_that_made_the_choices_is_found(truth):
    view = synthetic(1500, truth=truth).view("log_ratio", 0.0)
    everything = torch.ones(1500, dtype=torch.bool)
    found, at_bound = view.minimise(everything)
    assert abs(found - truth) < 0.25 and not at_bound
    loss = [float(view.evaluate(found + step).nll.sum()) for step in (-0.01, 0.0, 0.01)]
    assert loss[1] == min(loss)


def test_the_best_strength_of_several_tokens_is_the_best_of_all():
    view = synthetic(30, 4, 3, seed=5).view("log_ratio", 0.0)
    keep = torch.arange(30) % 2 == 0
    found, _ = view.minimise(keep)
    best = min(float(view.evaluate(mu).nll[keep].sum()) for mu in torch.linspace(-8, 8, 801).tolist())
    assert float(view.evaluate(found).nll[keep].sum()) <= best + 1e-9


def test_impossible_options_are_never_chosen():
    value = torch.tensor([0.0, -math.inf, -math.inf, -math.inf], dtype=torch.float64)
    question, gold = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 3])
    loss, share = choice_loss(value, question, gold)
    assert loss.tolist() == [0.0, pytest.approx(math.log(2))] and share.tolist() == [1.0, 0.0, 0.5, 0.5]
    assert choice_hits(value, question, gold).tolist() == [1.0, 0.0]  # of equals, the first


def test_a_bias_is_found_and_a_label_that_is_never_right_keeps_a_finite_one():
    g = torch.Generator().manual_seed(0)
    value = torch.randn(4000, 3, generator=g, dtype=torch.float64)
    truth = torch.tensor([1.0, -1.5, 0.5], dtype=torch.float64)
    labels = torch.multinomial((value + truth).softmax(1), 1, generator=g)[:, 0]
    torch.testing.assert_close(fit_bias(value, labels), truth, rtol=0, atol=0.15)
    never = fit_bias(value, labels.clamp(max=1))
    assert torch.isfinite(never).all() and never[2] < never[:2].min() - 2


# Levers and the report


def test_levers_of_choices_are_judged_out_of_fold():
    statistics = synthetic(600, truth=-2.0)
    report = make_report(statistics, CalibrationConfig("log_ratio", 0.0, objective="choice", lever="auto"))
    assert [row.fitted.lever for row in report.levers] == ["none", "bias", "constant"]
    constant = report.levers[-1]
    assert report.lever is constant and constant.fitted.strength < -0.5
    assert constant.interval[0] > 0 and constant.right_interval[0] > 0
    assert report.gain == pytest.approx(float(constant.examples.mean()), abs=1e-9)
    text = report.table()
    assert "600 questions among 'a', 'b'" in text and "points of accuracy" in text


def test_never_demonstrably_worse_than_none():
    for seed in range(3):
        statistics = synthetic(60, truth=0.0, seed=seed + 20)
        config = CalibrationConfig("auto", 0.1, objective="choice", lever="auto")
        assert make_report(statistics, config).interval[1] >= 0


def test_the_report_says_where_the_vocabulary_asks_for_something_else():
    # The warm start lifts the words, and has the choice between them wrong way round.
    report = make_report(
        synthetic(400, truth=-2.0, lift=2.0), CalibrationConfig("log_ratio", 0.0, objective="choice")
    )
    assert report.vocabulary.fitted.strength > 0 > report.chosen.strength
    assert "the two objectives disagree" in report.table()
    agreed = make_report(
        synthetic(400, truth=0.8, lift=1.0), CalibrationConfig("log_ratio", 0.0, objective="choice")
    )
    assert "disagree" not in agreed.table()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lever": "positions"}, "lever was 'positions' with objective 'choice'"),
        ({"lever": "bias", "objective": "nll"}, "lever was 'bias' with objective 'nll'"),
        ({"estimator": "mean"}, "estimator was 'mean' with objective 'choice'"),
    ],
)
def test_what_has_no_meaning_for_choices_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        CalibrationConfig(**{"objective": "choice"} | changes)


def test_statistics_survive_the_files_and_damage_is_noticed():
    statistics = synthetic(20)
    tensors = statistics.tensors()
    again = ChoiceStatistics.from_tensors(tensors)
    assert again.texts == ("a", "b") and again.labels.tolist() == statistics.labels.tolist()
    for name in ("labels", "texts", "choice.options"):
        with pytest.raises(ArtifactError):
            ChoiceStatistics.from_tensors({k: v for k, v in tensors.items() if k != name})
    for name, damaged in (("labels", tensors["labels"] + 2), ("texts", tensors["texts"][:-1])):
        with pytest.raises(ArtifactError):
            ChoiceStatistics.from_tensors(tensors | {name: damaged})
    with pytest.raises(InputError, match="statistics of choices"):
        make_report(statistics, CalibrationConfig("log_ratio", 0.0))


# A model


@pytest.fixture(scope="module")
def calibrated(tiny_folder, tmp_path_factory):
    """A tiny model, its tokenizer, an adapter calibrated for choices, and the artifact."""
    folder = tmp_path_factory.mktemp("chooser")
    model, tokenizer = load_model(tiny_folder, device="cpu")
    peft_model = tiny.tiny_peft("lora", model=model)
    peft_model.save_pretrained(folder)
    steering = calibrate(
        peft_model, folder, ROWS, tokenizer=tokenizer, direction="auto", objective="auto", lever="auto"
    )
    steering.save(folder)
    return peft_model, tokenizer, folder, steering


def by_hand(model, tokenizer, row, mu):
    """Log-probabilities of the options at a log-ratio strength, from plain forwards."""
    pair, found = ModelPair(model), []
    prompt = encode_prompt(tokenizer, row["prompt"])
    for text in row["options"]:
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        warm, base = (
            x[0].double().log_softmax(-1)
            for x in pair.teacher_forced(torch.tensor([prompt + tokens[:-1]]), None, len(tokens))
        )
        steered = (warm + mu * (warm - base)).log_softmax(-1)
        found.append(float(steered.gather(1, torch.tensor(tokens)[:, None]).sum()))
    return torch.tensor(found, dtype=torch.float64)


def test_calibration_sees_choices_and_the_artifact_keeps_them(calibrated):
    _, _, folder, steering = calibrated
    assert steering.objective == "choice"
    report = steering.report()
    assert [row.fitted.lever for row in report.levers] == ["none", "bias", "scale", "constant"]
    again = Steering.load(folder)
    assert again.report().table() == report.table() and again.verdict() == steering.verdict()
    for lever in ("none", "bias", "scale", "constant"):
        one = recalibrate(folder, lever=lever)
        row = next(row for row in report.levers if row.fitted.lever == lever)
        assert one.lever == lever and one.gain == pytest.approx(row.gain, abs=1e-12)
        assert (one.options == OPTIONS) == (lever == "bias")
        if lever == "bias":
            assert one.bias == row.fitted.bias and "a bias on the options: ' yes'" in one.verdict()
    with pytest.raises(InputError, match="objective was 'nll' with statistics of choices"):
        recalibrate(folder, objective="nll")
    with pytest.raises(ArtifactError, match="statistics of choices"):
        saved_statistics(steering)


def test_scales_are_tried_with_the_prompt_read_once(calibrated):
    model, tokenizer, _, steering = calibrated
    statistics = ChoiceStatistics.from_tensors(steering.statistics)
    column = statistics.scales.tolist().index(2.0)
    with adapter_scale(model, 2.0):
        expected = by_hand(model, tokenizer, ROWS[3], 0.0)
    torch.testing.assert_close(statistics.scale_logprobs[6:8, column], expected, rtol=0, atol=2e-4)


def test_choose_answers_with_the_numbers_of_the_calibration(calibrated):
    model, tokenizer, folder, _ = calibrated
    steering = recalibrate(folder, lever="constant", direction="log_ratio", alpha=0.0)
    rows = ROWS[:5]
    found = choose(model, [row["prompt"] for row in rows], OPTIONS, tokenizer=tokenizer, steering=steering)
    view = ChoiceStatistics.from_tensors(steering.statistics).view("log_ratio", 0.0)
    kept = view.logprobs(steering.strength).view(-1, 2)
    for i, (answer, row) in enumerate(zip(found, rows, strict=True)):
        expected = by_hand(model, tokenizer, row, steering.strength)
        torch.testing.assert_close(answer.logprobs, expected, rtol=0, atol=5e-4)
        torch.testing.assert_close(answer.logprobs, kept[i], rtol=0, atol=5e-3)  # between points of a grid
        assert answer.option == OPTIONS[int(expected.argmax())]
        assert float(answer.probabilities.sum()) == pytest.approx(1)


@pytest.mark.parametrize(("options", "mu"), [({"view": "base"}, -1.0), ({"view": "warm"}, 0.0), ({}, 0.0)])
def test_choose_for_one_model(calibrated, options, mu):
    model, tokenizer, *_ = calibrated
    answer = choose(model, ROWS[1]["prompt"], OPTIONS, tokenizer=tokenizer, **options)
    torch.testing.assert_close(answer.logprobs, by_hand(model, tokenizer, ROWS[1], mu), rtol=0, atol=5e-4)


def test_choose_by_scale_dial_strength_and_bias(calibrated):
    model, tokenizer, *_ = calibrated
    call = {"tokenizer": tokenizer}
    prompt = ROWS[2]["prompt"]
    scaled = Steering(strength=0.0, alpha=0.0, lever="scale", scale=1.5)
    with adapter_scale(model, 1.5):
        expected = by_hand(model, tokenizer, ROWS[2], 0.0)
    answer = choose(model, prompt, OPTIONS, steering=scaled, **call)
    torch.testing.assert_close(answer.logprobs, expected, rtol=0, atol=5e-4)
    answer = choose(
        model, prompt, OPTIONS, strength=1.0, direction="log_ratio", alpha=0.0, strength_scale=0.5, **call
    )
    torch.testing.assert_close(answer.logprobs, by_hand(model, tokenizer, ROWS[2], 0.5), rtol=0, atol=5e-4)
    biased = Steering(strength=0.0, alpha=0.0, lever="bias", options=OPTIONS, bias=(3.0, -3.0))
    plain = choose(model, prompt, OPTIONS, **call).logprobs
    answer = choose(model, prompt, OPTIONS[::-1], steering=biased, strength_scale=0.5, **call)
    expected = plain.flip(0) + torch.tensor([-1.5, 1.5])
    torch.testing.assert_close(answer.logprobs, expected.double(), rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="allowed with this steering, a bias"):
        choose(model, prompt, (" yes", " maybe"), steering=biased, **call)


def test_a_bias_does_not_pretend_to_steer_text(calibrated):
    model = calibrated[0]
    biased = Steering(strength=0.0, alpha=0.0, lever="bias", options=OPTIONS, bias=(3.0, -3.0))
    with pytest.raises(InputError, match=r"allowed: svdk\.choose"):
        generate(model, torch.tensor([[5, 6]]), steering=biased, max_new_tokens=2)
    for wrong in (
        {"bias": (1.0,)},
        {"options": ("a", "a")},
        {"lever": "constant"},
        {"bias": (1.0, math.inf)},
    ):
        with pytest.raises(InputError, match=r"(bias|options) was"):
            Steering(**{"lever": "bias", "options": ("a", "b"), "bias": (1.0, 2.0)} | wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((" yes",), "at least two"),
        (" yes", "at least two"),
        ((" a", " a"), "different texts"),
        ((" a", ""), "empty"),
    ],
)
def test_options_that_are_none(calibrated, options, message):
    model, tokenizer, *_ = calibrated
    with pytest.raises((InputError, DataError), match=message):
        choose(model, "a", options, tokenizer=tokenizer)


def test_asking_for_a_choice_where_there_is_none(calibrated):
    model, tokenizer, folder, _ = calibrated
    free = [{"prompt": f"p{i}", "completion": f" {i}"} for i in range(12)]
    with pytest.raises(DataError, match="no small closed set"):
        calibrate(model, folder, free, tokenizer=tokenizer, objective="choice")
    assert calibrate(model, folder, free, tokenizer=tokenizer, objective="auto").objective == "nll"
    with pytest.raises(InputError, match="batch_size was 0"):
        calibrate(model, folder, ROWS, tokenizer=tokenizer, objective="choice", batch_size=0)
    with pytest.raises(DataError, match="24 of 24 questions had more than max_length = 3"):
        calibrate(model, folder, ROWS, tokenizer=tokenizer, objective="choice", max_length=3)
    steering = calibrate(model, folder, ROWS, tokenizer=tokenizer)
    assert steering.objective == "nll"  # the labels, as any completion
