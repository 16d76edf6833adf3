"""The filters and the busy part: their baselines, a tiny run of each, and their tables."""

from __future__ import annotations

import copy
import json
import math
import time

import pytest
import torch

from svdk.bench import busy, cases, filter_baselines, filters, logits, readme_tables, section_tables, timing
from svdk.bench import results as bench_results
from svdk.cli import main
from svdk.errors import InputError
from tests.bench.test_bench import CPU, assert_draws
from tests.helpers import ops_cases as oc
from tests.ops.test_distribution import one_row

TINY = timing.Plan(seconds=0.01, rounds=2, fewest=2)


# --- baselines


@pytest.mark.parametrize(
    ("setting", "name"),
    [(s, name) for s, found in filter_baselines.BASELINES.items() if s != "greedy" for name in found],
)
def test_filter_baselines_draw_from_the_right_distribution(setting, name):
    options = {"top_k": {"top_k": 20}, "top_k_top_p": {"top_k": 20, "top_p": 0.9}, "min_p": {"min_p": 0.03}}
    kwargs = options.get(setting, filters.SETTINGS[setting].options)
    assert_draws(filter_baselines.BASELINES[setting][name], (one_row()[0],), kwargs)


@pytest.mark.parametrize("dtype", oc.DTYPES, ids=str)
def test_filter_baselines_take_every_type(dtype):
    z = oc.logits(16, 999, dtype)[0]
    for setting, found in filter_baselines.BASELINES.items():
        options = {k: v for k, v in filters.SETTINGS[setting].options.items() if k != "temperature"}
        for draw in found.values():
            tokens = draw(z, **options)
            assert tokens.shape == (16,) and tokens.dtype == torch.int64 and int(tokens.max()) < 999
            if setting == "greedy":
                assert torch.equal(tokens, z.argmax(1))


def test_an_inverse_cdf_never_draws_what_has_no_mass():
    p = torch.zeros(1000, 8)
    p[:, 3] = 0.1
    p[:, 6] = 1e-30
    assert set(filter_baselines.inverse_cdf(p).tolist()) == {3}
    # A sum that rounding keeps below top_p takes every token rather than one past the end.
    z = torch.zeros(50, 3)
    assert int(filter_baselines.top_p_cdf(z, top_p=1.5).max()) <= 2


def test_every_setting_has_its_baselines():
    assert filters.SETTINGS.keys() == filter_baselines.BASELINES.keys() == filter_baselines.COMPILED.keys()
    for setting, name in filter_baselines.COMPILED.items():
        assert name in filter_baselines.BASELINES[setting]
    assert busy.SETTINGS.keys() == busy.PYTORCH.keys()


# --- timing


def test_a_slow_call_is_warmed_up_once():
    seen = []
    contest = timing.Contest([0], CPU, timing.Plan(seconds=1e-9, rounds=3, slow=0.0))
    assert contest.enter("a", seen.append) > 0
    assert contest.run()["a"].count == 3 and len(seen) == 2 + 3
    contest.leave("a")
    assert contest.run() == {}


def test_the_90th_percentile():
    assert timing.summarize([[float(x) for x in range(11)]]).p90 == pytest.approx(9.0)
    assert timing.summarize([[2.0]]).p90 == 2.0


# --- the filters part


def filter_runner(**changes):
    lines = []
    options = {"memory": 1 << 30, "with_compile": False} | changes
    return filters.Runner(CPU, 1 << 20, backends=["cpu"], say=lines.append, **options), lines


def tiny_grid(**changes):
    shape = {
        "batches": (1, 2),
        "vocabs": (500,),
        "dtypes": ("float32", "bfloat16"),
        "kinds": ("flat", "zipf"),
    }
    return filters.Grid(**(shape | {"plan": TINY} | changes))


def test_filters_measure_every_setting_at_every_shape():
    run, _ = filter_runner()
    run.run(tiny_grid(), math.inf)
    assert run.skipped == [] and all(set(bench_results.MICRO_KEY) <= row.keys() for row in run.rows)
    cells = filters.cells(run.rows)
    assert len(cells) == len(filters.SETTINGS) * 8
    for cell in cells:
        assert cell["baseline"] in filter_baselines.BASELINES[cell["setting"]]
        assert cell["ratio"] == cell["baseline_s"] / cell["svdk_s"]
        assert cell["of_plain"] == 1 or cell["setting"] != "plain"
    # The cast is a contestant only where there is something to cast.
    casts = {row["dtype"] for row in run.rows if row["contestant"] == "float argmax"}
    assert casts == {"bfloat16"}


def test_the_compiler_competes_and_what_cannot_win_leaves(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)

    def slow(z):
        time.sleep(0.02)
        return z.argmax(-1)

    monkeypatch.setitem(filter_baselines.BASELINES["greedy"], "float argmax", slow)
    run, _ = filter_runner(with_compile=True)
    plan = timing.Plan(seconds=0.01, rounds=2, slow=0.01)
    run.run(tiny_grid(kinds=("zipf",), dtypes=("bfloat16",), plan=plan), math.inf)
    names = {(row["setting"], row["contestant"]) for row in run.rows}
    assert ("greedy", "compile: argmax") in names and ("greedy", "float argmax") not in names
    assert len(compiled) == len(filters.SETTINGS)  # once for all shapes


def test_what_filters_cannot_measure_is_skipped_by_name():
    run, lines = filter_runner()
    run.run(tiny_grid(), time.monotonic() - 1)
    assert run.rows == [] and "time budget" in run.skipped[0]["why"] and "skipped" in lines[-1]
    run, _ = filter_runner(memory=1000)
    run.run(tiny_grid(batches=(1,), dtypes=("float32",), kinds=("zipf",)), math.inf)
    assert run.rows == [] and "the budget is" in run.skipped[0]["why"]
    run, _ = filter_runner(with_baselines=False)
    run.run(tiny_grid(batches=(1,), dtypes=("float32",), kinds=("zipf",)), math.inf)
    assert {row["contestant"] for row in run.rows} == {"svdk/cpu"}
    assert filters.cells(run.rows)[0]["ratio"] is None


# --- the busy part


def test_busy_loops_run_and_are_gone_afterwards():
    with pytest.raises(KeyError), busy.loops(2) as started:
        assert [process.poll() for process in started] == [None, None]
        raise KeyError
    assert len(started) == 2 and all(process.poll() is not None for process in started)


def test_busy_measures_both_sides_quiet_and_busy(monkeypatch):
    monkeypatch.setattr(logits, "natural_source", lambda: None)
    grid = busy.Grid((2,), (500,), TINY, loops=1)
    rows, skipped = busy.measure(grid, ["cpu"], CPU, math.inf, say=lambda _: None)
    assert skipped == [] and all({*bench_results.BUSY_KEY, "p90_s", "loops"} <= row.keys() for row in rows)
    assert {(row["load"], row["loops"]) for row in rows} == {("quiet", 0), ("busy", 1)}
    found = busy.pairs(rows)
    assert {(p["setting"], p["contestant"]) for p in found} == {
        (setting, name) for setting, (baseline, _) in busy.PYTORCH.items() for name in ("svdk/cpu", baseline)
    }
    assert all(p["busy"]["p90_s"] >= p["busy"]["median_s"] for p in found)
    rows, skipped = busy.measure(grid, ["cpu"], CPU, time.monotonic() - 1, say=lambda _: None)
    assert rows == [] and "time budget" in skipped[0]["why"]


def test_the_busy_baselines_do_the_same_work():
    made = logits.make("zipf", 3, 500, torch.float32, CPU)
    for name, (_, call) in busy.PYTORCH.items():
        assert call(made).shape == cases.svdk_call(busy.SETTINGS[name], "auto", CPU)(made).shape == (3,)


# --- the command line, the file, the tables


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A results file of both parts, written by the command line, and its contents."""
    path = tmp_path_factory.mktemp("sections") / "small.json"
    arguments = "--quick --part filters --part busy --batch 2 --vocab 500 --logits zipf --output"
    assert main(["bench", *arguments.split(), str(path)]) == 0
    return path, json.loads(path.read_text())


def test_the_parts_are_chosen_on_the_command_line(measured):
    path, found = measured
    assert bench_results.load(path) == found and found["machine"]["cpu"]
    assert found["micro"] == found["end_to_end"] == []
    assert {(row["setting"], row["batch"], row["vocab"]) for row in found["filters"]} == {
        (name, 2, 500) for name in filters.SETTINGS
    }
    assert {row["setting"] for row in found["busy"]} == set(busy.SETTINGS)


def test_the_screen_shows_every_cell(measured):
    text = section_tables.filter_cells(measured[1])
    assert all(f"{name}  B=2 V=500 float32 zipf, cold" in text for name in filters.SETTINGS)
    text = section_tables.busy_cells(measured[1])
    assert "softmax + multinomial" in text and f"beside {busy.cores()} busy loops" in text


def test_the_readme_gets_both_tables(measured, tmp_path):
    pytest.importorskip("matplotlib")
    readme = tmp_path / "README.md"
    readme.write_text(f"{readme_tables.BEGIN}\n{readme_tables.END}\n")
    assert readme_tables.main([str(measured[0]), "--readme", str(readme)]) == 0
    lines = readme.read_text().splitlines()
    cell = next(c for c in filters.cells(measured[1]["filters"]) if c["setting"] == "top_k_top_p")
    line = next(x for x in lines if x.startswith("| top-k 50, top-p 0.9"))
    assert f"| {section_tables.microseconds(cell['svdk_s'])} " in line and "(topk)" in line
    pair = next(p for p in busy.pairs(measured[1]["busy"]) if p["contestant"] == "eager")
    line = next(x for x in lines if x.startswith("| steered"))
    assert f"| {section_tables.microseconds(pair['busy']['median_s'])} (" in line
    assert any(f"Over all {len(filters.SETTINGS)} cells" in x for x in lines)
    # Parts measured apart may stand in files of their own.
    assert readme_tables.main([str(measured[0]), str(measured[0]), "--readme", str(readme)]) == 0
    assert readme.read_text().count("**On a busy machine**") == 2


def test_tables_of_nothing_are_empty(measured):
    empty = measured[1] | {"filters": [], "busy": []}
    assert section_tables.filters_markdown(empty) == section_tables.busy_markdown(empty) == ""


def test_files_from_before_these_parts_are_read(measured, tmp_path):
    old = {k: v for k, v in measured[1].items() if k not in ("filters", "busy")}
    assert bench_results.load(bench_results.save(old, tmp_path / "old.json")) == old | {
        "filters": [],
        "busy": [],
    }


def test_filters_are_compared_and_busy_runs_are_not(measured):
    slower = copy.deepcopy(measured[1])
    for row in (*slower["filters"], *slower["busy"]):
        row["median_s"] *= 100
    changes = bench_results.compare(measured[1], slower).changes
    assert len(changes) == len(measured[1]["filters"])
    assert all(change.what.startswith("filters ") for change in changes)


def test_another_machines_results_are_not_replaced(measured, tmp_path, capsys):
    other = copy.deepcopy(measured[1])
    other["machine"]["cpu"] = "another"
    path = bench_results.save(other, tmp_path / "other.json")
    before = path.read_bytes()
    assert main(["bench", "--quick", "--part", "filters", "--output", str(path)]) == 2
    assert "another machine (cpu 'another')" in capsys.readouterr().err and path.read_bytes() == before
    bench_results.check_target(measured[0], measured[1]["machine"])
    bench_results.check_target(tmp_path / "absent.json", measured[1]["machine"])
    with pytest.raises(InputError, match="--output was"):
        bench_results.check_target(path, measured[1]["machine"])
