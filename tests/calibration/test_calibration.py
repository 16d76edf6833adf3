"""Extraction and calibration on tiny models: against plain forward passes, through Python and the CLI."""

import argparse
import dataclasses
import json
import math
import shutil

import pytest
import torch

from svdk import ModelPair, Steering, calibrate, extract_steering
from svdk.calibration.calibrate import recalibrate
from svdk.calibration.kept_statistics import default_grid
from svdk.calibration.report import CalibrationConfig, make_report, saved_statistics
from svdk.cli import calibrate as command
from svdk.errors import ArtifactError, DataError, InputError, InvalidLogitsError, SvdkError
from svdk.warmstart.data import encode, load_examples
from tests.helpers import tiny

TOKENIZER = tiny.tiny_tokenizer()
# Completions of different lengths, so that rows are padded and differ in their number of labels.
EXAMPLES = [
    {"prompt": f"say {word}: ", "completion": word.upper() * (1 + i % 3)}
    for i, word in enumerate(["red", "oak sun", "fig", "ice and owl", "jam", "sky", "elm", "bee"])
]
SCALARS = ("strength", "direction", "alpha", "gain", "confidence_interval", "metrics", "data_hash")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved base model and, inside an adapter folder, calibration data."""
    root = tmp_path_factory.mktemp("calibration")
    tiny.save_tiny(root / "model")
    tiny.tiny_peft("lora").save_pretrained(root / "adapter")
    rows = "".join(json.dumps(row) + "\n" for row in EXAMPLES)
    (root / "adapter" / "calibration.jsonl").write_text(rows)
    return root


@pytest.fixture
def adapter(folders, tmp_path):
    return shutil.copytree(folders / "adapter", tmp_path / "adapter")


def labelled_logits(model, example):
    """Warm and base logits (t, V) of one example alone, unpadded, and its labels: PEFT's own forward."""
    encoded = encode(TOKENIZER, example)
    ids = torch.tensor([encoded.input_ids])
    labels = ids[0, encoded.prompt_length :]
    with torch.no_grad():
        warm = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        with model.disable_adapter():
            base = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    return warm[-len(labels) - 1 : -1], base[-len(labels) - 1 : -1], labels


@pytest.mark.parametrize("peft_type", tiny.PEFT_TYPES)
def test_statistics_are_those_of_each_example_alone(peft_type):
    model = tiny.tiny_peft(peft_type)
    statistics = extract_steering(model, EXAMPLES, tokenizer=TOKENIZER, batch_size=3)
    parts = [labelled_logits(model, example) for example in load_examples(EXAMPLES)]
    assert statistics.tokens.tolist() == [len(labels) for _, _, labels in parts]
    warm, base, labels = (torch.cat([part[i] for part in parts]) for i in range(3))
    log_p, log_q = warm.double().log_softmax(1), base.double().log_softmax(1)
    at = torch.arange(len(labels))
    assert torch.allclose(statistics.logprob_warm.double(), log_p[at, labels], atol=2e-4)
    assert torch.allclose(statistics.logprob_base.double(), log_q[at, labels], atol=2e-4)
    assert (log_p - log_q).abs().max() > 0.01  # the adapter does something

    for direction in ("kl_gradient", "log_ratio"):
        ratio = log_p - log_q
        delta = ratio - (log_p.exp() * ratio).sum(1, keepdim=True)
        delta = log_p.exp() * delta if direction == "kl_gradient" else delta
        delta = torch.where(log_p >= log_p.max(1, keepdim=True).values + math.log(0.1), delta, 0.0)
        nll = -(log_p + 0.8 * delta).log_softmax(1)[at, labels]
        view = statistics.view(direction, 0.1)
        assert view.evaluate(0.8).nll.sum() == pytest.approx(float(nll.sum()), rel=1e-4)


def test_unmasked_sweep_agrees_with_plain_forwards():
    model = tiny.tiny_peft("lora")
    statistics = extract_steering(model, EXAMPLES, tokenizer=TOKENIZER, direction="log_ratio", alpha=0.0)
    assert statistics.settings() == [("log_ratio", 0.0)]
    expected, right = 0.0, 0
    for example in load_examples(EXAMPLES):
        warm, base, labels = labelled_logits(model, example)
        steered = warm.double() + 1.1 * (warm.double().log_softmax(1) - base.double().log_softmax(1))
        expected -= float(steered.log_softmax(1)[torch.arange(len(labels)), labels].sum())
        right += int((warm.argmax(1) == labels).sum())
    view = statistics.view("log_ratio", 0.0)
    assert float(view.evaluate(1.1).nll.sum()) == pytest.approx(expected, rel=1e-5)
    assert float(view.correct(0.0).sum()) == right


def test_batching_changes_nothing():
    model = tiny.tiny_peft("lora")
    one, many = (
        extract_steering(model, EXAMPLES, tokenizer=TOKENIZER, direction="auto", batch_size=size)
        for size in (1, 8)
    )
    for name, tensor in one.tensors().items():
        assert torch.allclose(tensor.double(), many.tensors()[name].double(), atol=1e-3), name


def test_calibrate_chooses_and_judges(folders):
    model = tiny.tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    steering = calibrate(model, folders / "adapter", EXAMPLES, tokenizer=TOKENIZER, direction="auto")
    again = calibrate(model, folders / "adapter", EXAMPLES, tokenizer=TOKENIZER, direction="auto")
    assert [getattr(steering, n) for n in SCALARS] == [getattr(again, n) for n in SCALARS]
    after = model.state_dict()  # the adapter is taken out again
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)

    report = steering.report()
    assert steering.report() is report, "made once"
    assert len(report.settings) == 4
    best = max(report.settings, key=lambda row: row.gain)
    assert (steering.direction, steering.alpha) == (best.direction, best.alpha)
    assert (steering.strength, steering.gain) == (report.chosen.strength, report.gain)
    assert steering.confidence_interval[0] <= steering.gain <= steering.confidence_interval[1]
    assert steering.metrics["nll_steered"] < steering.metrics["nll_warm"]
    assert steering.metrics["tokens"] == int(steering.statistics["tokens"].sum())
    assert steering.helps == ("does not help" not in steering.verdict())


def test_calibrate_keeps_the_report_that_it_made(folders, monkeypatch):
    steering = calibrate(tiny.tiny_model(), folders / "adapter", EXAMPLES, tokenizer=TOKENIZER, resamples=50)
    again = Steering(**{f.name: getattr(steering, f.name) for f in dataclasses.fields(steering)})
    assert again.report().rows[0].gain == steering.report().rows[0].gain
    monkeypatch.setattr("svdk.calibration.report.make_report", lambda *_: pytest.fail("made again"))
    assert steering.report().gain == steering.gain
    with pytest.raises(ArtifactError, match="holds no calibration statistics"):
        Steering(strength=1.0).report()


def test_the_default_is_the_papers_direction(folders):
    steering = calibrate(tiny.tiny_model(), folders / "adapter", tokenizer=TOKENIZER)
    assert (steering.direction, steering.alpha, steering.estimator) == ("kl_gradient", 0.1, "optimum")
    assert steering.penalty == -math.inf
    assert steering.metrics["examples"] == len(EXAMPLES)  # calibration.jsonl of the adapter folder


def test_recalibrate_runs_no_model(folders, adapter, monkeypatch):
    original = calibrate(tiny.tiny_model(), adapter, tokenizer=TOKENIZER, direction="auto")
    original.save(adapter)
    monkeypatch.setattr(ModelPair, "teacher_forced", None)
    mean = recalibrate(adapter, estimator="mean", direction="kl_gradient", alpha=0.1)
    direct = make_report(saved_statistics(original), CalibrationConfig(estimator="mean"))
    assert mean.strength == direct.chosen.strength != original.strength
    assert recalibrate(adapter, objective="accuracy").objective == "accuracy"
    again = recalibrate(adapter, direction="auto")
    assert [getattr(again, n) for n in SCALARS] == [getattr(original, n) for n in SCALARS]
    with pytest.raises(InputError, match=r"setting was \(kl_gradient, alpha 0\.5\)"):
        recalibrate(adapter, direction="kl_gradient", alpha=0.5)


def test_accuracy_objective_finds_the_best_accuracy(folders):
    steering = calibrate(tiny.tiny_model(), folders / "adapter", tokenizer=TOKENIZER, objective="accuracy")
    report = steering.report()
    _, accuracy = report.curve(torch.linspace(-5, 5, 401).tolist())
    assert steering.metrics["accuracy_steered"] >= max(accuracy)


def test_uncalibrated_steering_has_no_report(tmp_path):
    Steering(1.0).save(tmp_path)
    with pytest.raises(ArtifactError, match="no calibration statistics"):
        recalibrate(tmp_path)


class OddPair(ModelPair):
    """A pair whose warm logits are spoilt at one place."""

    value = math.nan

    def teacher_forced(self, input_ids, attention_mask, keep):
        warm, base = super().teacher_forced(input_ids, attention_mask, keep)
        rows = (input_ids == TOKENIZER("j").input_ids[0]).any(1)  # only "say jam: JAM" has a j
        warm[rows, -1, TOKENIZER.eos_token_id] = self.value
        return warm, base


def test_invalid_logits_name_the_example():
    with pytest.raises(InvalidLogitsError, match="calibration example 4: the logits of 1 of its tokens"):
        extract_steering(OddPair(tiny.tiny_peft("lora")), EXAMPLES, tokenizer=TOKENIZER)


@pytest.mark.parametrize("direction", ["kl_gradient", "auto"])
def test_impossible_labels_are_left_out_and_counted(monkeypatch, direction):
    monkeypatch.setattr(OddPair, "value", -math.inf)
    model = tiny.tiny_peft("lora")
    odd = extract_steering(OddPair(model), EXAMPLES, tokenizer=TOKENIZER, direction=direction)
    plain = extract_steering(model, EXAMPLES, tokenizer=TOKENIZER, direction=direction)
    assert (odd.excluded, plain.excluded) == (1, 0)
    assert (plain.tokens - odd.tokens).tolist() == [0, 0, 0, 0, 1, 0, 0, 0]
    report = make_report(odd, CalibrationConfig(direction))
    assert math.isfinite(report.gain)
    assert "1 tokens left out" in report.table()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"alpha": 1.5}, InputError, r"alpha was 1.5; allowed: a number in \[0, 1\]"),
        ({"alpha": "x"}, InputError, "alpha was 'x'"),
        ({"direction": "up"}, InputError, "direction was 'up'; allowed: kl_gradient, log_ratio, auto"),
        ({"estimator": "best"}, InputError, "estimator was 'best'; allowed: mean, median"),
        ({"objective": "bleu"}, InputError, "objective was 'bleu'; allowed: nll, accuracy"),
        ({"folds": 1}, InputError, "folds was 1; allowed: an integer of at least 2"),
        ({"seed": -1}, InputError, "seed was -1"),
        ({"batch_size": 0}, InputError, "batch_size was 0"),
        ({"tokenizer": None}, InputError, "tokenizer was None"),
        ({"data": []}, DataError, "0 examples"),
        ({"data": EXAMPLES[:1]}, DataError, "1 example; allowed: at least 2"),
        ({"data": [{"prompt": "a"}]}, DataError, "needed: 'prompt' and 'completion'"),
        ({"data": "nowhere.jsonl"}, DataError, r"nowhere\.jsonl does not exist"),
        ({"max_length": 5}, DataError, "more than max_length = 5"),
    ],
)
def test_bad_arguments(folders, arguments, error, message):
    values = {"data": EXAMPLES, "tokenizer": TOKENIZER} | arguments
    with pytest.raises(error, match=message):
        calibrate(tiny.tiny_model(), folders / "adapter", **values)


def test_adapter_without_data(adapter):
    (adapter / "calibration.jsonl").unlink()
    with pytest.raises(DataError, match=r"calibration\.jsonl does not exist"):
        calibrate(tiny.tiny_model(), adapter, tokenizer=TOKENIZER)


def test_folder_without_an_adapter(tmp_path):
    with pytest.raises(ArtifactError, match=r"has no adapter_config\.json; allowed: a PEFT adapter folder"):
        calibrate(tiny.tiny_model(), tmp_path, tokenizer=TOKENIZER)


def test_peft_model_must_carry_the_adapter_of_the_folder(folders):
    steering = calibrate(tiny.tiny_peft("lora"), folders / "adapter", EXAMPLES, tokenizer=TOKENIZER)
    assert steering.peft_type == "LORA"
    for model in (tiny.tiny_peft("lora", seed=1), tiny.tiny_peft("ia3")):
        with pytest.raises(ArtifactError, match="another adapter attached"):
            calibrate(model, folders / "adapter", EXAMPLES, tokenizer=TOKENIZER)


@pytest.mark.parametrize("grid", [[0.0, 1.0], [1.0, 2.0, 3.0], [0.0, -1.0, 2.0], [0.0, 1.0, math.inf]])
def test_bad_grid(grid):
    with pytest.raises(InputError, match="grid was"):
        extract_steering(tiny.tiny_peft(), EXAMPLES, tokenizer=TOKENIZER, alpha=0.0, grid=torch.tensor(grid))


def cli(*arguments) -> int:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["calibrate", *map(str, arguments)])
    return args.run(args)


def test_command_line(folders, adapter, capsys):
    common = ("--model", folders / "model", "--adapter", adapter)
    assert cli(*common, "--direction", "auto", "--plot") == 0
    steering = Steering.load(adapter, model=tiny.tiny_model(), tokenizer=TOKENIZER)
    printed = capsys.readouterr().out
    assert steering.verdict() in printed and "<- chosen" in printed and "settings compared" in printed
    assert (adapter / "steering.png").read_bytes().startswith(b"\x89PNG")

    assert cli("--adapter", adapter, "--reuse", "--estimator", "median") == 0
    assert Steering.load(adapter).estimator == "median"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--alpha", "1.5"), "alpha was 1.5"),
        (("--data", "nowhere.jsonl"), "does not exist"),
        (("--reuse",), "exactly one of them"),
    ],
)
def test_command_line_errors_write_nothing(folders, adapter, arguments, message):
    before = sorted(adapter.iterdir())
    with pytest.raises(SvdkError, match=message):
        cli("--model", folders / "model", "--adapter", adapter, *arguments)
    assert sorted(adapter.iterdir()) == before


def test_command_line_choices_are_those_of_the_library():
    from svdk.calibration import estimators, levers, sweep

    assert (*sweep.DIRECTIONS, "auto") == command.DIRECTIONS
    assert estimators.ESTIMATORS == command.ESTIMATORS
    assert (*estimators.OBJECTIVES, "auto") == command.OBJECTIVES
    assert (*levers.COSTS, "auto") == command.LEVERS
    assert len(default_grid()) == 49
