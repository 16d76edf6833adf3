"""A whole study on a tiny model: what is kept, what is run again, and what the cells hold."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from svdk.calibration.estimators import fit_kl_budget, kl_budget_strength
from svdk.cli import main
from svdk.errors import ArtifactError, DataError, InputError
from svdk.eval import runner
from svdk.eval.cells import write_cells
from svdk.eval.question import Question
from svdk.eval.report_reading import read_results
from svdk.eval.runner import check_disjoint, run_models
from svdk.eval.spec import FOLDER, Run, Study, load_study
from svdk.eval.systems import scoring_systems
from tests.calibration.test_estimators import problem, statistics_of


def truthfulqa_row(number):
    best = f"it is {number}"
    false = {f"it is {number + k}": 0 for k in (1, 2)}
    return {
        "question": f"What comes after {number - 1}?",
        "mc1_targets": {best: 1, **false},
        "mc2_targets": {best: 1, f"{number}, I think": 1, **false},
    }


def choice_row(number, split):
    answer = f"answer{1 + number % 2}"
    instruction = f"Please choose the correct answer to the question: {split} {number}?\n\nAnswer1: a "
    instruction += "Answer2: b\n\nAnswer format: answer1/answer2"
    output = f"the correct answer is {answer}"
    return {"instruction": instruction, "input": "", "output": output, "answer": answer}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "truthfulqa").mkdir()
    rows = [truthfulqa_row(number) for number in range(1, 13)]
    (folder / "truthfulqa" / "mc_task.json").write_text(json.dumps(rows))
    choice = folder / "commonsense" / "openbookqa"
    choice.mkdir(parents=True)
    for split, count in (("train", 12), ("test", 5)):
        rows = [choice_row(number, split) for number in range(count)]
        (choice / f"{split}.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def study(tiny_folder):
    options = {"learning_rate": 1e-2, "calibration": 4, "batch_size": 2}
    return Study(
        model=str(tiny_folder),
        runs=(
            Run("truthfulqa", "lora", (1, 3), folds=2, **options),
            Run("openbookqa", "ia3", (2,), limit=4, generate=2, **options),
        ),
        penalties=(0.0, -1.0, -math.inf),
        estimators=("mean", "optimum"),
    )


@pytest.fixture(scope="module")
def output(study, data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    run_models(study, folder, data_dir)
    write_cells(study, folder, data_dir)
    return folder


def read(folder, name="RESULTS.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def no_model(*args, **options):
    raise AssertionError("the model was loaded")


def test_every_setting_becomes_a_cell(study, output):
    cells = read(output)
    scored = [cell for cell in cells if cell["decoding"] == "likelihood"]
    # Both tasks have one base model; each adapter has all other systems.
    assert len(scored) == 2 + 3 * (len(scoring_systems(study)) - 1)
    answered = [cell for cell in cells if cell["decoding"] == "greedy"]
    assert {cell["task"] for cell in answered} == {"openbookqa"}
    assert all(cell["test_questions"] == 2 for cell in answered)
    assert all(len(cell["scores"]["generated_accuracy"]) == 2 for cell in answered)
    for cell in scored:
        folds, questions = (2, 12) if cell["task"] == "truthfulqa" else (1, 4)
        assert (cell["folds"], cell["test_questions"]) == (folds, questions)
        assert all(len(values) == questions for values in cell["scores"].values())
        for name, values in cell["scores"].items():
            assert cell["metrics"][name] == pytest.approx(sum(values) / questions, abs=1e-4)
        assert (cell["strength"] is None) == (cell["system"] != "steered")
        if cell["strength"] is not None:
            assert len(cell["strength"]) == folds
    assert len({cell["cell"] for cell in cells}) == len(cells)


def test_a_penalty_of_minus_infinity_rules_labels_out(output):
    ruled = [c for c in read(output) if c["system"] == "steered" and c["penalty"] is None]
    scored = [c for c in ruled if c["decoding"] == "likelihood"]
    assert scored and all("nll" not in cell["metrics"] for cell in scored)


def test_the_report_reads_what_the_study_writes(output):
    results = read_results(output / "RESULTS.jsonl")
    assert len(results.cells) == len(read(output)) and not results.notes
    assert len(results.curves) == 3 * 4


def test_curves_pass_through_the_cells(output):
    cells = read(output)
    for curve in read(output, "CURVES.jsonl"):
        at = curve["mu"].index(0.0)
        warm = next(
            c for c in cells
            if c["system"] == "warm" and c["decoding"] == "likelihood"
            and (c["task"], c["steps"]) == (curve["task"], curve["steps"])
        )  # fmt: skip
        assert curve["nll"][at] == pytest.approx(warm["metrics"]["nll"], rel=1e-5)
        assert curve["metrics"]["token_accuracy"][at] == pytest.approx(warm["metrics"]["token_accuracy"])


def test_a_second_run_needs_no_model(study, output, data_dir, monkeypatch):
    monkeypatch.setattr(runner, "load_model", no_model)
    before = (output / "RESULTS.jsonl").read_bytes()
    run_models(study, output, data_dir)
    scored = []
    write_cells(study, output, data_dir, advance=scored.append)
    assert (output / "RESULTS.jsonl").read_bytes() == before and not scored


def test_other_estimators_and_penalties_need_no_model(study, output, data_dir, monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "load_model", no_model)
    before = (output / "RESULTS.jsonl").read_bytes()
    more = replace(study, estimators=(*study.estimators, "median", "newton"), penalties=(0.0, -2.5))
    run_models(more, output, data_dir)
    try:
        write_cells(more, output, data_dir)
        cells = read(output)
        assert {c["estimator"] for c in cells} >= {"median", "newton"}
        assert {c["penalty"] for c in cells if c["decoding"] == "likelihood" and c["penalty"]} == {-2.5}
    finally:
        write_cells(study, output, data_dir)
    again = {c["cell"]: c["scores"] for c in read(output)}
    assert again == {c["cell"]: c["scores"] for c in map(json.loads, before.splitlines())}


def test_an_unfinished_line_is_written_again(study, output, data_dir):
    path = output / "RESULTS.jsonl"
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    write_cells(study, output, data_dir)
    keep = [{k: v for k, v in cell.items() if k != "seconds"} for cell in read(output)]
    assert keep == [
        {k: v for k, v in json.loads(line).items() if k != "seconds"} for line in whole.splitlines()
    ]


def test_other_test_questions_are_scored_anew(study, output, data_dir):
    fewer = replace(study, runs=(replace(study.runs[1], limit=3, generate=0),))
    with pytest.raises(ArtifactError, match="needed: run the models"):
        write_cells(fewer, output, data_dir)


def test_calibration_on_test_questions_is_refused():
    question = Question("1", "Q: a\nA:", (" b", " c"), (True, False), 0)
    check_disjoint(["Q: b\nA:"], [question], "calibration")
    with pytest.raises(DataError, match="calibration data held 1 test questions, 'Q: a"):
        check_disjoint(["Q: b\nA:", "Q: a\nA:"], [question], "calibration")


def test_a_calibration_file_that_was_swapped_is_noticed(study, data_dir, tmp_path, monkeypatch):
    """The adapter's own calibration data are checked against the test questions, not only the task's."""
    small = replace(study, runs=(Run("openbookqa", "lora", (1,), calibration=2, batch_size=2),))
    train = runner._train

    def train_and_swap(base, tokenizer, task, place, study):
        train(base, tokenizer, task, place, study)
        row = {"prompt": task.test[0].prompt, "completion": task.test[0].options[0]}
        (place.adapter / "calibration.jsonl").write_text(json.dumps(row) + "\n")

    monkeypatch.setattr(runner, "_train", train_and_swap)
    with pytest.raises(DataError, match="calibration data held 1 test questions"):
        run_models(small, tmp_path, data_dir)


def test_kl_budget_strengths_follow_the_formula_and_the_fit_is_the_best_of_its_grid():
    view = statistics_of(*problem()).view("kl_gradient", 0.1)
    mu = kl_budget_strength(view, 0.3)
    torch.testing.assert_close(mu**2 * view.variance / 2, torch.full_like(mu, 0.3))
    best = fit_kl_budget(view)
    losses = {
        kappa: float(view.evaluate(kl_budget_strength(view, kappa)).nll.sum())
        for kappa in (0.0, best / 1.5, best, best * 1.5)
    }
    assert best > 0 and min(losses, key=losses.__getitem__) == best
    # A strength of its own for each token: as if each were an example of its own.
    single = replace(view, example=torch.arange(len(mu)), examples=len(mu))
    for token in (0, 7):
        alone = single.evaluate(float(mu[token]))
        assert single.evaluate(mu).nll[token] == pytest.approx(float(alone.nll[token]))


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.json")))
def test_shipped_studies_load(name):
    assert load_study(name).runs


RUN = {"task": "openbookqa", "peft": "lora", "steps": [2]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runs": []}, "were empty"),
        ({"runs": "all"}, "runs was missing or not a list"),
        ({"stranger": 1}, "study had the field 'stranger'"),
        ({"runs": [{"task": "openbookqa"}]}, r"runs\[0\] lacked the field 'peft'"),
        ({"runs": [RUN | {"task": "squad"}]}, "task was 'squad'"),
        ({"runs": [RUN | {"peft": "full"}]}, "peft was 'full'"),
        ({"runs": [RUN | {"steps": [0]}]}, r"steps\[0\] was 0"),
        ({"runs": [RUN | {"steps": [4, 4]}]}, "allowed: one or more different"),
        ({"runs": [RUN | {"folds": 2}]}, "folds was 2 for openbookqa"),
        ({"runs": [RUN | {"task": "truthfulqa"}]}, "folds was 1 for truthfulqa"),
        ({"runs": [RUN | {"learning_rate": 0}]}, "learning_rate was 0"),
        ({"runs": [RUN | {"generate_steps": [3]}]}, r"generate_steps was \[3\]; allowed: some of steps"),
        ({"alpha": 0}, "alpha was 0"),
        ({"penalties": ["inf"]}, "penalties held 'inf'"),
        ({"directions": ["up"]}, "directions was 'up'"),
        ({"estimators": ["best"]}, "estimators was 'best'"),
        ({"decoding": ["loud"]}, "decoding was 'loud'"),
    ],
)
def test_bad_studies_name_the_field(tmp_path, change, message):
    path = tmp_path / "study.json"
    path.write_text(json.dumps({"runs": [RUN]} | change))
    with pytest.raises(InputError, match=message):
        load_study(path)


def test_an_unknown_study_names_those_there_are(tmp_path):
    with pytest.raises(InputError, match="allowed: laptop, paper, smoke, or a JSON file"):
        load_study("desktop")
    (tmp_path / "s.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        load_study(tmp_path / "s.json")


def test_command_line(study, output, data_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runner, "load_model", no_model)
    record = {
        "model": study.model,
        "runs": [
            {"task": "truthfulqa", "peft": "lora", "steps": [1, 3], "folds": 2},
            {"task": "openbookqa", "peft": "ia3", "steps": [2], "limit": 4, "generate": 2},
        ],
        "penalties": [0.0, -1.0, "-inf"],
        "estimators": ["mean", "optimum"],
    }
    for run in record["runs"]:
        run |= {"learning_rate": 1e-2, "calibration": 4, "batch_size": 2}
    path = tmp_path / "study.json"
    path.write_text(json.dumps(record))
    command = ["eval", str(path), "--output", str(output), "--data-dir", str(data_dir)]
    report = tmp_path / "report"
    assert main([*command, "--score-only", "--report", str(report)]) == 0
    assert "wrote" in capsys.readouterr().out
    assert "TruthfulQA" in (report / "evaluation.md").read_text() and list(report.glob("*.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "neither a study nor --harness"),
        (["smoke", "--harness", "x"], "a study and --harness"),
        (["smoke", "--only", "piqa"], "--only was piqa; allowed, the tasks of the study: truthfulqa"),
        (["smoke", "--threads", "0"], "--threads was 0"),
        (["smoke", "--judge-url", "http://localhost"], "not both given"),
        (["--harness", "svdk_boolq"], "--model was absent"),
    ],
)
def test_command_line_errors(arguments, message, capsys):
    assert main(["eval", *arguments]) == 2
    assert message in capsys.readouterr().err
