"""Results files and reports as files: all cells are read, complaints say where, no report is lost."""

from __future__ import annotations

import json

import pytest

from svdk.errors import DataError, InputError
from svdk.eval import report
from svdk.eval.report_format import setting_name
from svdk.eval.report_reading import read_results
from svdk.eval.report_tables import table_5
from tests.eval.test_eval_report import read, small, write
from tests.helpers import synthetic_results as made_up


@pytest.fixture(scope="module")
def rows():
    return made_up.study()


@pytest.fixture(scope="module")
def results(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("study")
    made_up.write(folder / "RESULTS.jsonl", rows)
    made_up.write(folder / "CURVES.jsonl", made_up.curves())
    return read_results(folder / "RESULTS.jsonl")


def test_every_cell_is_read(results, rows):
    assert len(results.cells) == len(rows)
    assert [cell.id for cell in results.cells] == [row["cell"] for row in rows]
    assert [results.label(test) for test in results.tests] == ["TruthfulQA", "ARC-e", "OBQA", "TruthfulQA"]
    assert len(results.curves) == len(made_up.curves())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version was 2; allowed: 1"),
        ({"format_version": None}, "format_version was None; allowed: 1"),
        ({"system": "stirred"}, "system was 'stirred'; allowed: base, warm, steered"),
        ({"steps": "4"}, "steps was '4'; allowed: an integer"),
        ({"steps": True}, "steps was True; allowed: an integer"),
        ({"test_questions": 0}, "test_questions was 0; allowed: at least 1"),
        ({"metrics": {"nll": "low"}}, "metrics.nll was 'low'; allowed: a number or null"),
        ({"scores": {"nll": [1.0]}}, "scores.nll was '1 numbers'; allowed: 120"),
        ({"scores": {"nll": ["x"] * 120}}, "scores.nll was .*allowed: a list of numbers"),
        ({"alpha": "0.1"}, "alpha was '0.1'; allowed: a number or null"),
        ({"calibration": {"interval": [[0.0]]}}, "calibration.interval was '1 numbers'; allowed: 2"),
        ({"calibration": []}, r"calibration was \[\]; allowed: an object or null"),
        ({"estimator": None, "strength": None}, "strength was None"),
    ],
)
def test_unusable_lines_are_refused_by_name(tmp_path, rows, change, message):
    steered = small(rows)
    steered[-1] = {**steered[-1], **change}
    with pytest.raises(DataError, match=f"RESULTS.jsonl:{len(steered)}: {message}"):
        read(tmp_path, steered)


@pytest.mark.parametrize(
    "field", ["cell", "model", "task", "folds", "scores", "decoding", "strength", "seconds"]
)
def test_missing_fields_are_named(tmp_path, rows, field):
    broken = {name: x for name, x in rows[0].items() if name != field}
    with pytest.raises(DataError, match=f"RESULTS.jsonl:1: {field} was missing"):
        read(tmp_path, [broken])


def test_duplicates_are_refused(tmp_path, rows):
    with pytest.raises(DataError, match=r"RESULTS.jsonl:3: cell \w+ was already on line 1"):
        read(tmp_path, [rows[0], rows[1], rows[0]])
    with pytest.raises(DataError, match=r"RESULTS.jsonl:3: cell other was already on line 2"):
        read(tmp_path, [rows[0], rows[1], {**rows[1], "cell": "other"}])


def test_questions_of_one_test_have_one_number(tmp_path, rows):
    part = small(rows)
    part[1] = {**part[1], "test_questions": 2, "scores": {}}
    with pytest.raises(DataError, match=r"RESULTS.jsonl:2: test_questions was 2; allowed: 120"):
        read(tmp_path, part)


def test_given_strengths_tell_cells_apart(tmp_path, rows):
    like = {**small(rows, systems=("steered",))[0], "estimator": None}
    given = [{**like, "cell": f"c{mu}", "strength": [mu]} for mu in (0.5, -1.0)]
    found = read(tmp_path, given)
    assert [setting_name(c.setting) for c in found.cells] == [
        "`kl_gradient`, α = 0.1, μ = 0.5",
        "`kl_gradient`, α = 0.1, μ = −1",
    ]


def test_cut_last_line_is_reported(tmp_path, rows):
    path = made_up.write(tmp_path / "RESULTS.jsonl", small(rows))
    whole = path.read_text()
    path.write_text(whole[: len(whole) - 50])
    found = read_results(path)
    assert len(found.cells) == len(small(rows)) - 1
    assert found.notes == (f"Line {len(small(rows))} of RESULTS.jsonl was cut short and is left out.",)


@pytest.mark.parametrize("line", ['{"cell": ', "[1, 2]", "none"])
def test_broken_lines_are_refused(tmp_path, rows, line):
    path = made_up.write(tmp_path / "RESULTS.jsonl", rows[:1])
    path.write_text(path.read_text() + line + "\n" + json.dumps(rows[1]) + "\n")
    with pytest.raises(DataError, match=r"RESULTS.jsonl:2 was not a JSON object"):
        read_results(path)


def test_unreadable_files_are_refused(tmp_path):
    path = tmp_path / "RESULTS.jsonl"
    with pytest.raises(DataError, match="does not exist; make one with svdk eval"):
        read_results(path)
    path.write_text("\n\n")
    with pytest.raises(DataError, match="held 0 cells; allowed: at least 1"):
        read_results(path)
    path.write_bytes(b"\xff")
    with pytest.raises(DataError, match="was not UTF-8"):
        read_results(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_results(tmp_path)


def test_scores_that_are_null_are_not_compared(tmp_path, rows):
    part = [json.loads(json.dumps(row)) for row in small(rows)]
    broken = [row for row in part if row["system"] == "steered" and row["direction"] != "vector"]
    for row in broken:
        row["scores"]["nll"][3] = None
    found = read(tmp_path, part)
    test, start = found.tests[0], found.starts(found.tests[0])[0]
    warm, steered = found.warm(test, start), found.steered(test, start)[0]
    assert set(found.differences(warm, steered)) == {"accuracy", "token_accuracy", "exact"}
    lines = [line for line in table_5(found).split("\n") if line.startswith("| `")]
    assert sum(line.endswith("| –                            |") for line in lines) == len(lines) - 1


def test_a_failure_leaves_the_old_report(tmp_path, rows, monkeypatch):
    path = made_up.write(tmp_path / "RESULTS.jsonl", small(rows, systems=("base", "warm")))
    old = write(path, tmp_path / "docs", "old").read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(report, "render", fail)
    with pytest.raises(OSError, match="disk full"):
        write(path, tmp_path / "docs", "new")
    assert (tmp_path / "docs" / "evaluation.md").read_bytes() == old
    assert not [p for p in (tmp_path / "docs").iterdir() if p.name.startswith(".")]


def test_output_must_be_a_folder(tmp_path, rows):
    path = made_up.write(tmp_path / "RESULTS.jsonl", rows[:1])
    with pytest.raises(InputError, match=r"RESULTS.jsonl, which is a file; allowed: a folder"):
        write(path, path)
