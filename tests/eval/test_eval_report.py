"""The evaluation report: it reads what it should, claims what the data show, and nothing else."""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from svdk.eval.compare import Difference, paired
from svdk.eval.report import PAPER, write_report
from svdk.eval.report_answers import answers, help_text, optimum_text
from svdk.eval.report_cells import Results, Setting
from svdk.eval.report_figures import forest, pictures, summary
from svdk.eval.report_format import (
    HEADLINES,
    Entry,
    difference,
    entries,
    listed,
    number,
    phrase,
    setting_name,
    strengths,
    table,
    thinned,
    value,
)
from svdk.eval.report_reading import read_results
from svdk.eval.report_steps import steps_text, worths
from svdk.eval.report_studies import Claim, verdict
from svdk.eval.report_tables import paper_table, table_1, table_2, table_3, table_5, table_12, tables
from tests.helpers import synthetic_results as made_up

MACHINE = {"cpu": "a machine", "threads": 1, "torch": "2", "transformers": "5", "svdk": "0"}
RESAMPLES = 2000
ENTRY = re.compile(r"\[(\S+), (\S+)\]\)?( [▲▼△▽])?")


@pytest.fixture(scope="module")
def rows():
    return made_up.study()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("study")
    made_up.write(folder / "RESULTS.jsonl", rows)
    made_up.write(folder / "CURVES.jsonl", made_up.curves())
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return replace(read_results(folder / "RESULTS.jsonl"), resamples=RESAMPLES)


@pytest.fixture(scope="module")
def written(folder):
    path = write(folder / "RESULTS.jsonl", folder / "docs", command="svdk eval")
    return path, path.read_text()


def small(rows, *, systems=("base", "warm", "steered"), task="arc_easy"):
    return [row for row in rows if row["task"] == task and row["system"] in systems]


def read(tmp_path, rows) -> Results:
    return replace(read_results(made_up.write(tmp_path / "RESULTS.jsonl", rows)), resamples=RESAMPLES)


def write(path: Path, folder: Path, command: str = "x") -> Path:
    return write_report(path, folder, command=command, machine=MACHINE, resamples=RESAMPLES)


# --- formats ---


@pytest.mark.parametrize(
    ("x", "digits", "signed", "text"),
    [
        (1.26, 1, True, "+1.3"), (-1.26, 1, True, "−1.3"), (-0.01, 1, True, "+0.0"), (0.0, 1, True, "+0.0"),
        (-0.01, 1, False, "0.0"), (-math.inf, 1, True, "−∞"), (math.inf, 2, True, "+∞"),
    ],
)  # fmt: skip
def test_numbers(x, digits, signed, text):
    assert number(x, digits, signed=signed) == text


def test_units():
    assert (value("mc1", 0.3125), value("nll", 2.5), value("nll", None)) == ("31.2", "2.500", "–")
    found = Difference(0.0123, -0.005, 0.029, 1817, False)
    assert difference("accuracy", found) == "+1.2 [−0.5, +2.9]"
    assert phrase("accuracy", found) == "+1.2 points (95 % interval −0.5 to +2.9, n = 1,817)"
    assert phrase("nll", found) == "+0.0123 nats (95 % interval −0.0050 to +0.0290, n = 1,817)"


def test_a_difference_too_small_to_matter_is_not_marked():
    sure = Difference(-0.0009, -0.0009, -0.0009, 1000, True, 0.0002)
    assert entries([Entry("nll", None, sure)]) == ["−0.0009 [−0.0009, −0.0009]"]
    sure = replace(sure, mean=-0.0011)
    assert entries([Entry("nll", None, sure)]) == ["−0.0011 [−0.0009, −0.0009] ▲"]


def test_few_questions_give_hints_only():
    sure = Difference(0.2, 0.1, 0.3, 29, True, 0.0002)
    assert entries([Entry("mc1", None, sure)]) == ["+20.0 [+10.0, +30.0] △"]
    assert entries([Entry("mc1", None, replace(sure, n=30))]) == ["+20.0 [+10.0, +30.0] ▲"]


def test_an_interval_that_excludes_zero_does_not_read_as_zero():
    assert difference("mc1", Difference(0.01, 0.0003, 0.02, 9, True)) == "+1.00 [+0.03, +2.00]"
    assert difference("mc1", Difference(0.01, 0.0, 0.02, 9, False)) == "+1.0 [+0.0, +2.0]"


def test_marks_follow_interval_and_family():
    sure = Difference(-0.2, -0.3, -0.1, 100, True, 0.0002)
    hint = Difference(0.2, 0.1, 0.3, 100, True, 0.04)
    none = Difference(0.2, -0.1, 0.5, 100, False, 0.4)
    shown = entries(
        [Entry("nll", 1.0, sure), Entry("mc1", 0.5, sure), Entry("mc1", None, hint), Entry("nll", 1, none)]
    )
    assert shown == [
        "1.000 (−0.2000 [−0.3000, −0.1000]) ▲",  # less is better
        "50.0 (−20.0 [−30.0, −10.0]) ▼",
        "+20.0 [+10.0, +30.0] △",  # 0.04 alone would do, not among four
        "1.000 (+0.2000 [−0.1000, +0.5000])",
    ]
    assert entries([Entry("nll", None, hint)]) == ["+0.2000 [+0.1000, +0.3000] ▼"]


def test_small_helpers():
    assert (listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])) == ("a", "a and b", "a, b and c")
    assert thinned([4, 8, 16, 32, 64, 128]) == [4, 32, 128]
    assert (thinned([4]), thinned([4, 8]), thinned([])) == ([4], [4, 8], [])
    assert (strengths([0.5, 0.5]), strengths([0.512345, -2.0])) == ("0.5", "0.512 / −2")
    assert strengths([64.0, -64.0]) == "≥ 64 / ≤ −64"
    usual = Setting("log_ratio", 0.0, 0.0, "constant", "optimum", "nll")
    assert setting_name(usual) == "`log_ratio`, no mask, `optimum`"
    odd = usual._replace(penalty=None, mode="kl_budget", objective="accuracy")
    assert setting_name(odd) == "`log_ratio`, no mask, λ = −∞, `kl_budget`, `optimum`, for accuracy"
    assert setting_name(odd, "greedy") == "`log_ratio`, no mask, `kl_budget`, `optimum`, for accuracy"


# --- sentences ---


def claim(mean: float, width: float = 0.1, *, metric: str = "nll", holds: bool | None = None) -> Claim:
    found = Difference(mean, mean - width, mean + width, 100, abs(mean) > width, 0.001)
    return Claim(f"task {mean:+}", metric, found, found.significant if holds is None else holds)


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ([], "NLL: not measured."),
        ([claim(-0.05), claim(0.02)], "NLL: no demonstrable difference between X and Y in 2 comparisons."),
        ([claim(0.0)], "NLL: no demonstrable difference between X and Y in 1 comparison."),
        (
            [claim(-0.5), claim(-0.3), claim(0.02)],
            "NLL: X is better than Y in 2 of 3 comparisons (most: NLL −0.5000 nats (95 % interval −0.6000 to "
            "−0.4000, n = 100), task -0.5), demonstrably worse in none.",
        ),
        (
            [claim(0.5), claim(0.02)],
            "NLL: X is worse than Y in 1 of 2 comparisons (most: NLL +0.5000 nats (95 % interval +0.4000 to "
            "+0.6000, n = 100), task +0.5), demonstrably better in none.",
        ),
        (
            [claim(0.5), claim(-0.4)],
            "NLL: mixed. Of 2 comparisons, X is better than Y in 1 (most: NLL −0.4000 nats (95 % interval "
            "−0.5000 to −0.3000, n = 100), task -0.4) and worse in 1 (most: NLL +0.5000 nats (95 % interval "
            "+0.4000 to +0.6000, n = 100), task +0.5).",
        ),
        (
            [claim(0.5, holds=False), claim(-0.4, holds=False), claim(-0.3, holds=False)],
            "NLL: no demonstrable difference between X and Y in 3 comparisons. Hints (intervals that exclude "
            "0, uncorrected): 2 better, 1 worse.",
        ),
    ],
)  # fmt: skip
def test_verdicts(found, text):
    assert verdict("X", "Y", "NLL", found) == text


def test_more_accuracy_is_better():
    text = verdict("X", "Y", "Answers", [claim(0.5, metric="accuracy")])
    assert text.startswith("Answers: X is better than Y in 1 of 1 comparison (most: accuracy +50.0 points")


def without_effect(rows):
    """A study in which steering only turns the answers to a few questions, to and fro."""
    scored = [row for row in rows if row["decoding"] == "likelihood"]
    warm = {(r["task"], r["peft"], r["steps"]): r["scores"] for r in scored if r["system"] == "warm"}
    found = []
    for row in scored:
        if row["system"] == "steered":
            scores = dict(warm[row["task"], row["peft"], row["steps"]])
            turned = (made_up.noise(row["cell"], row["test_questions"]).abs() > 2).tolist()
            name = "accuracy" if "accuracy" in scores else "mc1"
            scores[name] = [1 - x if t else x for x, t in zip(scores[name], turned, strict=True)]
            row = {**row, "scores": scores}
        found.append(row)
    return found


def test_a_study_without_effect_names_no_winner(tmp_path, rows):
    found = read(tmp_path, without_effect(rows))
    text = "\n".join(text for _, text in answers(found))
    assert "no demonstrable difference between steering and the warm start" in text
    for line in text.split("\n"):
        if line.lstrip().startswith("- "):
            assert " is better than " not in line, line
            assert "mixed" not in line, line
    assert "▲" not in text


def test_planted_effects_are_found(results):
    text = dict(answers(results))
    helps = text["Does steering help?"]
    paper, default, ratio = re.split(r"\n- ", helps.split("\n\n")[0])
    assert "NLL: steering is worse than the warm start in 10 of 10 comparisons" in paper
    assert re.search(r"NLL: steering is better than the warm start in [5-8] of 10 comparisons", default)
    assert "NLL: steering is better than the warm start in 10 of 10 comparisons" in ratio
    assert "`kl_gradient`, α = 0.1, `mean`" in paper
    assert (
        "Better by length: 0 of 4 (4 worse) at 4 steps, 0 of 2 (2 worse) at 16 steps and 0 of 4 (4" in paper
    )
    assert "Better by length: 4 of 4 at 4 steps, 2 of 2 at 16 steps and " in ratio
    estimator = text["The paper's mean of per-token optima, or the minimiser of the NLL?"]
    assert "- NLL: `optimum` is better than `mean` in 12 of 12 comparisons" in estimator
    assert "- NLL: the mask is worse than no mask in 6 of 6" in text["Mask or none?"]
    assert "- NLL: the KL budget is worse" in text["A constant μ, or a KL budget?"]
    assert "- NLL: mixed." in text["One static vector, or a vector for each step?"]
    objective = text["Calibrate for NLL or for token accuracy?"]
    assert "- Token accuracy: a strength calibrated for NLL is better than the warm start in" in objective
    assert "- NLL: calibrating for token accuracy is worse than calibrating for NLL in" in objective


def test_differences_are_those_of_the_file(results, rows):
    wanted = {"task": "openbookqa", "peft": "lora", "steps": 64, "estimator": "optimum", "objective": "nll"}
    wanted |= {"direction": "log_ratio", "alpha": 0.0, "strength_mode": "constant"}
    steered = next(r for r in rows if all(r[k] == v for k, v in wanted.items()))
    warm = next(
        r for r in rows if r["system"] == "warm" and all(r[k] == wanted[k] for k in ("task", "peft", "steps"))
    )
    scores = [torch.tensor(row["scores"]["accuracy"]) for row in (warm, steered)]
    found = paired(*scores, resamples=RESAMPLES)
    shown = table_2(results)
    line = next(x for x in shown.split("\n") if re.match(r"\| LoRA +\| 64 +\| log-ratio", x))
    mean = sum(steered["scores"]["accuracy"])  # of 100 questions: percent
    assert f"{mean:.1f} ({difference('accuracy', found)})" in line


def test_optimum_away_from_zero(results):
    text = optimum_text(results)
    assert (
        "- **svdk's default**: the optimum is away from 0 at 4 of 4 warm starts of 4 steps, 0 of 2 warm "
        "starts of 16 steps and 0 of 4 warm starts of 64 steps. Of 4 series from the shortest to the longest "
        "warm start, it is away from 0 at the shortest only in 4, at both ends in 0, at the longest only in "
        "0, at neither in 0; |μ| is smaller at the longest in 4. It is negative at 5 of 10 warm starts."
    ) in text
    assert "at both ends in 4" in text  # the log-ratio
    assert re.search(r"\| ARC-e +\| LoRA \| svdk's default +\| 0.327 ● +\| 0.18 +\| 0.0163 ", text)


def test_worth_in_steps(results):
    found = worths(results)
    key = ("truthfulqa", "lora", 4, "log_ratio", "nll")
    ratio = next(w for w in found if (w.test.task, *w.start[:2], w.headline.key, w.metric) == key)

    def warm(steps):  # as made up
        return 1 + 1.6 * math.exp(-steps / 24)

    target = warm(4) - made_up.EFFECT["log_ratio"] * math.exp(-4 / 20)
    assert ratio.steps == pytest.approx(4 * 4 ** ((warm(4) - target) / (warm(4) - warm(16))), rel=0.02)
    assert ratio.low < ratio.steps < ratio.high
    assert ratio.sign == 1
    assert not any(w.start.steps == 64 for w in found)  # nothing longer to compare with
    text = steps_text(results)
    assert "log-ratio, no mask, by NLL: of 6 warm starts, 6 demonstrably worth more steps than" in text
    assert re.search(r"worth 1\d\.\d \[1\d\.\d, 1\d\.\d\]\), 0 fewer\.", text)


def test_no_worth_without_a_longer_warm_start(tmp_path, rows):
    assert steps_text(read(tmp_path, [r for r in small(rows) if r["steps"] in (None, 4)])) is None


# --- tables ---


def claims_of(text: str):
    for low, high, mark in ENTRY.findall(text):
        ends = [float(x.replace("−", "-").replace("∞", "inf")) for x in (low, high)]
        yield ends, mark.strip()


def test_marks_stand_exactly_where_intervals_exclude_zero(results):
    shown = [text for title, text in tables(results) if not title.startswith("Table 12")]
    shown += [text for _, text in answers(results)[:-1]]
    found = [claim for text in shown for claim in claims_of(text)]
    assert len(found) > 200
    assert {mark for _, mark in found} == {"", "▲", "▼", "△", "▽"}
    for (low, high), mark in found:
        # Without a mark, an interval may exclude 0 only where nothing of the size of a finding is in it.
        assert (low > 0 or high < 0) if mark else low <= 0 <= high or max(-low, high) <= 0.1


def test_tables_have_their_form(results):
    assert "| PEFT | steps | system" in table_1(results)
    assert all(
        name in table_1(results) for name in ("MC1 (%)", "MC2 (%)", "MC3 (%)", "NLL (nats)", "truthful (%)")
    )
    head = table_2(results).split("\n")[2]
    assert re.fullmatch(
        r"\| PEFT \| steps \| system .*\| ARC-e \(n = 120\) .*\| OBQA \(n = 100\) .*\| mean over tasks +\|",
        head,
    )
    assert "generated, greedy" in table_3(results)
    assert "generated, sample" in table_3(results)
    assert "λ = −5" in table_5(results)
    assert "14.2" in table_12(results)  # the spread of the per-token optimum


def test_mean_over_tasks_only_where_all_were_measured(tmp_path, rows):
    part = small(rows) + [r for r in small(rows, task="openbookqa") if r["steps"] in (None, 4)]
    shown = [line for line in table_2(read(tmp_path, part)).split("\n") if line.startswith("| LoRA | 64")]
    assert shown
    assert all(line.rstrip("| ").endswith("–") for line in shown)


def test_tables_without_cells_say_so(tmp_path, rows):
    path = made_up.write(tmp_path / "RESULTS.jsonl", small(rows, systems=("base", "warm")))
    text = write(path, tmp_path / "docs").read_text()
    for name in (
        "Table 1. TruthfulQA: warm start and steering by PEFT",
        "Table 3. Decoding strategies",
        "Figure 4",
    ):
        assert f"### {name}\n\nLeft out: " in text
    assert "### Mask or none?\n\nNot answered: the results have no cells that compare this." in text
    assert "No summary figure" in text
    assert sorted(p.name for p in (tmp_path / "docs").iterdir()) == [
        "evaluation-figure-2-arc-e.png",
        "evaluation.md",
    ]


def test_results_of_the_base_model_alone(tmp_path, rows):
    path = made_up.write(tmp_path / "RESULTS.jsonl", rows[:1])
    text = write(path, tmp_path / "docs").read_text()
    assert "base model only; 1 cells" in text


def test_two_tests_of_one_task_are_told_apart(tmp_path, rows):
    part = small(rows, systems=("base", "warm"))
    other = [
        {
            **row, "cell": f"{row['cell']}-short", "question_ids_hash": "short", "test_questions": 50,
            "scores": {name: values[:50] for name, values in row["scores"].items()},
        }
        for row in part
    ]  # fmt: skip
    found = read(tmp_path, part + other)
    assert [found.label(t) for t in found.tests] == ["ARC-e, n = 120", "ARC-e, n = 50"]
    larger = [{**row, "cell": f"{row['cell']}-large", "model": "larger"} for row in part]
    found = read(tmp_path, part + larger)
    assert [found.label(t) for t in found.tests] == ["ARC-e, made-up", "ARC-e, larger"]


def test_papers_column_holds_its_claims_only(results):
    text = paper_table(results, PAPER)
    column = [line.split("|")[2].strip() for line in text.split("\n")[2:]]
    assert column == [claim for _, claim in PAPER]
    figures = {x for cell in column for x in re.findall(r"\d+(?:-\d+)?", cell)}
    assert figures == {"5", "2", "1-2"}
    assert "(picked as the largest of" in text


# --- the document ---


def test_the_document_in_order(written):
    path, text = written
    heads = re.findall(r"^#+ (.+)$", text, re.M)
    assert path.name == "evaluation.md"
    assert heads[:3] == ["Evaluation", "Answers", "Does steering help?"]
    assert [h for h in heads if h.startswith(("Table ", "Figure "))] == [
        "Table 1. TruthfulQA: warm start and steering by PEFT",
        "Table 2. Commonsense accuracy by task",
        "Table 3. Decoding strategies",
        "Table 5. Every setting against the warm start",
        "Table 12. Calibrated strengths",
        "Figure 2", "Figure 3", "Figure 4",
    ]  # fmt: skip
    assert "```bash\nsvdk eval\n```" in text
    assert text.index("evaluation-summary.png") < text.index("## Answers")
    assert "Only the abstract of the paper was at hand" in text
    assert "TruthfulQA: 160 test questions, in 2 folds" in text
    assert "a machine, 1 threads, torch 2" in text
    assert "nan" not in text.lower().replace("nand", "")


def test_every_link_is_a_picture_of_900_pixels(written):
    path, text = written
    links = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert len(links) == len(set(links)) == 6
    assert {p.name for p in path.parent.iterdir()} == {*links, "evaluation.md"}
    for link in links:
        data = (path.parent / link).read_bytes()
        assert data.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", data[16:24])
        assert width == 900
        assert 300 < height < 2000


def test_same_results_same_bytes(tmp_path, rows):
    systems = ("vector", None)  # enough for each kind of figure
    part = [row for row in small(rows) if row["direction"] in systems]
    path = made_up.write(tmp_path / "RESULTS.jsonl", part)
    first, second = (write(path, tmp_path / name).parent for name in ("one", "two"))
    names = sorted(p.name for p in first.iterdir())
    assert names == sorted(p.name for p in second.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()


# --- figures ---


def drawn_markers(axes):
    lines = [line for line in axes.get_lines() if line.get_marker() in "osDv^" and len(line.get_xdata()) == 1]
    return [(float(line.get_xdata()[0]), line.get_markerfacecolor() != "white") for line in lines]


def test_summary_points_are_the_differences(results):
    figure = summary(results).figure
    answers_panel, nll_panel = figure.axes
    found = drawn_markers(nll_panel)
    assert len(found) == 10 * len(HEADLINES)
    test, start = results.tests[0], results.starts(results.tests[0])[0]
    cells = [results.find(test, start, **h.pattern) for h in HEADLINES]
    gaps = [results.differences(results.warm(test, start), cell) for cell in cells]
    assert found[:3] == [(pytest.approx(-gap["nll"].mean), gap["nll"].significant) for gap in gaps]
    points = [(pytest.approx(100 * gap["mc1"].mean), gap["mc1"].significant) for gap in gaps]
    assert drawn_markers(answers_panel)[:3] == points


def test_a_point_far_out_is_cut_off_with_its_value(tmp_path, rows):
    part = [json.loads(json.dumps(row)) for row in small(rows)]
    bad = next(row for row in part if row["estimator"] == "mean" and row["alpha"] == 0.1)
    bad["scores"]["accuracy"] = [0.0] * bad["test_questions"]
    panel = summary(read(tmp_path, part)).figure.axes[0]
    assert [text.get_text() for text in panel.texts] == ["−39.2"]
    assert panel.get_xlim()[0] > -38


def test_nothing_to_draw(tmp_path, rows):
    assert forest([], "empty") is None
    found = read(tmp_path, rows[:1])
    assert pictures(found) == (None, {"Figure 2": [], "Figure 3": [], "Figure 4": []})


def test_curves_without_results_of_their_own_are_drawn(tmp_path, rows):
    made_up.write(tmp_path / "CURVES.jsonl", made_up.curves())
    found = read(tmp_path, rows[:1])
    assert [p.name for p in pictures(found)[1]["Figure 3"]] == ["figure-3-truthfulqa-ia3"]


def test_help_is_none_without_steering(tmp_path, rows):
    assert help_text(read(tmp_path, small(rows, systems=("base", "warm")))) is None


def test_table_pads_cells():
    text = table(["a", "b"], [["x", Entry("mc1", 0.5)]])
    assert text == "| a   | b    |\n| --- | ---- |\n| x   | 50.0 |"
