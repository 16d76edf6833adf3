"""The benchmark suite: its baselines do what svdk does, and its arithmetic and reports are right."""

from __future__ import annotations

import copy
import json
import math
import shutil
import time

import pytest
import torch

import svdk
from svdk.bench import (
    baselines,
    cases,
    end_to_end,
    figures,
    logits,
    machine,
    micro,
    readme_tables,
    tables,
    timing,
)
from svdk.bench import results as bench_results
from svdk.bench.goodness import chi_square_p_value
from svdk.cli import main
from svdk.errors import InputError
from tests.helpers import ops_cases as oc
from tests.ops.test_distribution import VOCAB, one_row

CPU = torch.device("cpu")
DRAWS = 200_000


def expected(args, kwargs):
    """(V,) probabilities of the first row, by the reference."""
    *_, masses = svdk.reference.steered_rows(*oc.flat_arguments(args, kwargs))
    return masses[0] / masses[0].sum()


def assert_draws(function, args, kwargs):
    """``function`` draws from the reference's distribution, and nothing outside its support."""
    torch.manual_seed(0)
    want = expected(args, kwargs)
    tokens = function(*(x.expand(DRAWS, -1) for x in args), **kwargs)
    counts = torch.bincount(tokens, minlength=VOCAB).double()
    assert counts[want == 0].sum() == 0
    assert chi_square_p_value(counts, want * DRAWS) > 1e-4


# --- baselines


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"alpha": 0.0, "strength": -1.5},
        {"direction": "log_ratio", "alpha": 0.0},
        {"penalty": -1.0, "strength": 2.0},
        {"strength_mode": "kl_budget", "strength": 0.1},
        {"strength_mode": "label", "labels": torch.tensor([3, 1, 4, 1])},
    ],
    ids=["default", "no_mask", "log_ratio", "penalty", "kl_budget", "label"],
)
def test_eager_steering_equals_the_reference(kwargs):
    warm, base = oc.logits(4, 999)
    *_, want, _ = svdk.reference.steered_rows(*oc.flat_arguments((warm, base), kwargs))
    got = baselines.steered_logits(warm, base, **kwargs)
    torch.testing.assert_close(got.log_softmax(-1).double(), want.log_softmax(-1), rtol=1e-4, atol=1e-4)


def test_eager_vector_equals_the_reference():
    warm, _ = oc.logits(4, 99)
    vector = torch.linspace(-1, 1, 99)
    *_, want, _ = svdk.reference.steered_rows(*oc.flat_arguments((warm,), {"vector": vector}))
    got = baselines.steered_logits(warm, vector=vector)
    torch.testing.assert_close(got.log_softmax(-1).double(), want.log_softmax(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", oc.DTYPES, ids=str)
def test_eager_greedy_equals_the_reference(dtype):
    args, kwargs = oc.logits(16, 999, dtype), {"temperature": 0.0, "strength": 3.0}
    oc.assert_same_tokens(baselines.eager(*args, **kwargs), args, kwargs)


SAMPLERS = {
    "eager": (baselines.eager, True, {"strength": 2.0, "alpha": 0.05}),
    "race": (baselines.eager_race, True, {"strength": 2.0, "alpha": 0.05, "temperature": 1.5}),
    "multinomial": (baselines.multinomial, False, {"temperature": 1.5}),
    "one_uniform": (baselines.one_uniform, False, {"temperature": 1.5}),
    "top_k_top_p": (baselines.filtered, False, {"top_k": 20, "top_p": 0.9}),
    "top_p": (baselines.filtered, False, {"top_p": 0.9}),
    "min_p": (baselines.filtered, False, {"min_p": 0.03}),
    "exponential_race": (baselines.exponential_race, False, {"temperature": 0.8}),
    "warpers": (baselines.warpers, True, {"alpha": 0.0, "top_k": 20, "top_p": 0.9}),
    "plain_warpers": (baselines.warpers, False, {"top_k": 20, "min_p": 0.03, "temperature": 1.5}),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_baselines_draw_from_the_right_distribution(name):
    function, steered, kwargs = SAMPLERS[name]
    warm, base = one_row()
    assert_draws(function, (warm, base) if steered else (warm,), kwargs)


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("setting", ["sample", "plain"])
def test_the_compiled_baselines_draw_from_the_right_distribution(setting):
    torch._dynamo.reset()
    warm, base = one_row()
    call = cases.compiled(cases.SETTINGS[setting], "default", CPU)

    def function(*args, **_):
        x = args[0]
        return call(logits.Operands(x, args[-1], x[:, 0].long(), x[:, 0].long()))

    assert_draws(function, (warm, base) if setting == "sample" else (warm,), {})


@pytest.mark.gpu
@pytest.mark.parametrize("kwargs", [{}, {"top_k": 20, "top_p": 0.9}], ids=["plain", "top_k_top_p"])
def test_flashinfer_draws_from_the_right_distribution(kwargs):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if reason := baselines.why_not_flashinfer(device):
        pytest.skip(reason)
    warm = one_row()[0].to(device)
    assert_draws(lambda *a, **k: baselines.flashinfer(*a, **k).cpu(), (warm,), kwargs)


@pytest.mark.parametrize("penalty", [0.0, -1.0])
def test_eager_logprob_equals_the_reference(penalty):
    warm, base = oc.logits(5, 999)
    labels, strengths = torch.tensor([1, 2, 3, 4, 998]), torch.tensor([-1.0, 0.0, 0.7])
    got = baselines.logprob(warm, base, labels, strengths=strengths, penalty=penalty)
    want = svdk.steered_logprob(warm, base, labels, strengths=strengths, penalty=penalty, backend="reference")
    for x, name in zip(got, ("logprob", "slope", "curvature", "greedy"), strict=True):
        oc.assert_close(x, getattr(want, name), name)


@pytest.mark.parametrize("alpha", [0.1, 0.0])
def test_eager_extract_equals_the_reference(alpha):
    warm, base = oc.logits(5, 999)
    got = baselines.extract(warm, base, alpha=alpha)
    want = svdk.extract(warm, base, alpha=alpha, backend="reference")
    for x, name in zip(got, ("row_ptr", "token_ids", "p", "delta", "kl"), strict=True):
        oc.assert_close(x, getattr(want, name), name)


def test_naive_decoding_equals_steered_greedy_decoding(tiny_peft):
    from svdk.generation.generate import decode
    from svdk.models.pair import ModelPair

    model = tiny_peft("lora")
    ids = torch.randint(5, 200, (2, 6), generator=torch.Generator().manual_seed(1))
    want = decode(ModelPair(model), ids, max_new_tokens=8, strength=2.0).sequences
    assert torch.equal(end_to_end.naive(model, ids, 8, strength=2.0, temperature=0.0), want)


@pytest.mark.parametrize("name", cases.SETTINGS)
def test_every_setting_runs_on_both_sides(name):
    setting, made = cases.SETTINGS[name], logits.make("zipf", 3, 500, torch.float32, CPU)
    ours = cases.svdk_call(setting, "auto", CPU)(made)
    for baseline in set(setting.baselines) - {"compile", "flashinfer"}:
        theirs = cases.baseline_call(setting, baseline, CPU)(made)
        if setting.op == "steered_sample":
            assert theirs.shape == ours.shape and theirs.dtype == ours.dtype
            assert int(theirs.max()) < 500
        elif setting.op == "steered_logprob":
            oc.assert_close(theirs[0], ours.logprob, baseline)
        else:
            oc.assert_close(theirs[2], ours.p, baseline)


def test_bytes_count_each_logit_once():
    count = cases.bytes_moved
    assert count(cases.SETTINGS["sample"], 8, 1000, torch.float32) == 8 * (2 * 4 * 1000 + 8)
    assert count(cases.SETTINGS["plain"], 8, 1000, torch.bfloat16) == 8 * (2 * 1000 + 8)


# --- inputs


def test_kinds_of_logits_are_what_they_say(monkeypatch):
    recorded = (oc.logits(4, 300, scale=4.0)[0], torch.zeros(4, 300))
    monkeypatch.setattr(logits, "recorded", lambda: recorded)
    size = {}
    for kind in logits.KINDS:
        made = logits.make(kind, 6, 2000, torch.float32, CPU)
        assert made.warm.shape == made.base.shape == (6, 2000) and bool(made.warm.isfinite().all())
        info = svdk.steered_sample(made.warm, made.base, return_info=True)[1]
        size[kind] = info.candidates.float().mean()
    assert size["flat"] == 2000 and size["peaked"] == 1 and 1 < size["zipf"] < 20
    # Stretched to another vocabulary, the head of a natural row keeps its values and its pairs.
    top = logits.make("natural", 6, 2000, torch.float32, CPU).warm.max(1).values
    torch.testing.assert_close(top, recorded[0].max(1).values[torch.arange(6) % 4], rtol=0, atol=0.01)
    assert torch.equal(logits.make("natural", 5, 300, torch.float32, CPU).warm[4], recorded[0][0])


def test_cold_operands_outgrow_the_cache():
    made = logits.make("zipf", 2, 1000, torch.float32, CPU)
    assert logits.rotation(made, False, 1 << 20, 1 << 30) == [made]
    sets = logits.rotation(made, True, 100_000, 1 << 30)
    assert len({x.warm.data_ptr() for x in sets}) * 2 * made.warm.nbytes > 8 * 100_000
    assert len(logits.rotation(made, True, 1 << 30, 10 * 2 * made.warm.nbytes)) == 10


@pytest.mark.real_model
def test_recorded_logits_are_two_related_distributions(real_model):
    warm, base = logits.recorded()
    assert warm.shape == base.shape == (logits.RECORDED_ROWS, 49152)
    info = svdk.steered_sample(warm, base, return_info=True)[1]
    assert bool((info.status == 0).all()) and 0.01 < float(info.kl.mean()) < 5


# --- timing


def test_summary_and_noise():
    t = timing.summarize([[1.0, 2.0, 3.0], [2.0, 2.0], [9.0]])
    assert (t.median, t.minimum, t.count) == (2.0, 1.0, 6)
    assert t.rounds == (2.0, 2.0, 9.0)
    quiet = timing.Timing(1.0, 0.9, 1.1, 0.9, 9, (1.0, 1.0, 1.0))
    drifting = timing.Timing(1.0, 0.9, 1.1, 0.9, 9, (0.5, 1.0, 1.5))
    assert quiet.noise == pytest.approx(0.1) and drifting.noise == pytest.approx(0.74)
    assert timing.summarize([[2.0], [2.0]]).noise == 2.0


def test_a_contest_takes_turns_and_rotates_operands():
    seen = {"a": [], "b": []}
    plan = timing.Plan(seconds=0.01, rounds=3, most=5)
    contest = timing.Contest([0, 1, 2], CPU, plan)
    contest.enter("a", seen["a"].append)
    contest.enter("b", lambda x: (time.sleep(0.001), seen["b"].append(x)))
    timings = contest.run()
    assert set(seen["a"]) == set(seen["b"]) == {0, 1, 2}
    assert timings["b"].minimum >= 0.001 > timings["a"].median
    assert timings["a"].count == 15 and len(timings["a"].rounds) == 3


def test_a_slow_contestant_is_left_out():
    contest = timing.Contest([0], CPU, timing.Plan(limit=0.001))
    with pytest.raises(timing.TooSlowError, match="the limit is"):
        contest.enter("slow", lambda _: time.sleep(0.003))
    assert contest.run() == {}


def test_launches_count_operators_but_not_views():
    x = torch.randn(4, 8)
    assert timing.launches(lambda x: x.view(8, 4).exp().sum(), x, CPU) == 2


def test_bandwidth_is_measured():
    found = machine.bandwidth(CPU, size=8 << 20, seconds=0.02)
    assert 1e8 < found["read"] < 1e13 and 1e8 < found["copy"] < 1e13
    slower = found | {"read": 1.0, "reader": "other", "copy": 1e15}
    assert machine.better(slower, found) == found | {"copy": 1e15}


# --- running a grid


def runner(**changes):
    lines = []
    plan = timing.Plan(seconds=0.01, rounds=2)
    options = {"memory": 1 << 30, "deadline": time.monotonic() + 60, "backends": ["cpu"]} | changes
    return micro.Runner(CPU, 1 << 20, plan, say=lines.append, **options), lines


def test_a_grid_gives_a_row_for_each_contestant():
    run, _ = runner(with_compile=False)
    run.run(micro.points((micro.Block(("sample",), (2,), (500,), kinds=("zipf",), caches=("hot", "cold")),)))
    found = [(row["cache"], row["contestant"]) for row in run.rows]
    assert found == [(cache, name) for cache in ("hot", "cold") for name in ("svdk/cpu", "eager", "race")]
    assert all(row["q1_s"] <= row["median_s"] <= row["q3_s"] for row in run.rows)


def test_what_does_not_fit_is_skipped_by_name():
    point = micro.points((micro.Block(("plain",), (2,), (500,), kinds=("zipf",)),))
    run, lines = runner(memory=1000)
    run.run(point)
    assert run.rows == [] and "the budget is" in run.skipped[0]["why"] and "skipped" in lines[-1]
    run, lines = runner(memory=40_000)
    run.run(point)
    assert {row["contestant"] for row in run.rows} == {"svdk/cpu"}
    assert "baselines" in run.skipped[0]["what"]
    run, lines = runner(deadline=time.monotonic() - 1)
    run.run(point)
    assert run.rows == [] and "time budget" in run.skipped[0]["why"]


def test_grids_name_known_settings_and_are_complete():
    for grid in micro.GRIDS.values():
        assert all(point.setting in cases.SETTINGS for point in micro.points(grid))
    full = micro.points(micro.GRIDS["full"])
    assert {(p.batch, p.vocab) for p in full} == {(b, v) for b in micro.BATCHES for v in micro.VOCABS}
    assert {p.setting for p in micro.points(micro.GRIDS["default"])} == set(cases.SETTINGS)


def test_end_to_end_measures_all_contestants(tiny_folder):
    rows, skipped = end_to_end.measure(
        str(tiny_folder), (2,), 3, 2, CPU, time.monotonic() + 60, say=lambda _: None
    )
    assert [row["contestant"] for row in rows] == ["plain PEFT", "naive SVDecode", "svdk", "svdk two_pass"]
    assert skipped == [] and all(row["n"] == 2 and row["median_s"] > 0 for row in rows)


def test_end_to_end_skips_a_shape_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(end_to_end, "free_memory", lambda _: 1 << 30)
    rows, skipped = end_to_end.measure("8b", (1,), 3, 1, CPU, math.inf, say=lambda _: None)
    assert rows == [] and "needs 38.5 GB" in skipped[0]["why"]


# --- results, comparison, reports


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A results file written by the command line, and its contents."""
    path = tmp_path_factory.mktemp("bench") / "small.json"
    arguments = (
        "--part micro --setting sample plain greedy --batch 1 2 --vocab 500 --logits zipf --no-compile"
    )
    assert main(["bench", *arguments.split(), "--budget", "1", "--memory", "1", "--output", str(path)]) == 0
    return path, json.loads(path.read_text())


def test_the_command_writes_what_a_reader_needs(measured):
    path, found = measured
    assert bench_results.load(path) == found
    assert found["format"] == 1 and found["end_to_end"] == [] and found["bandwidth"]["read"] > 0
    assert {"cpu", "cores", "threads", "torch", "svdk", "commit"} <= found["machine"].keys()
    assert {(row["setting"], row["batch"]) for row in found["micro"]} == {
        (setting, batch) for setting in ("sample", "plain", "greedy") for batch in (1, 2)
    }
    text = tables.micro(found)
    assert "sample  B=2 V=500 float32 zipf, cold" in text and "GB/s read" in text


def test_the_results_of_another_machine_are_not_overwritten(measured, tmp_path, capsys):
    path = tmp_path / "theirs.json"
    theirs = copy.deepcopy(measured[1])
    theirs["machine"]["cpu"] = "another"
    bench_results.save(theirs, path)
    before = path.read_bytes()
    assert main(["bench", "--quick", "--output", str(path)]) == 2
    assert "holds results of another machine (cpu 'another')" in capsys.readouterr().err
    assert path.read_bytes() == before
    bench_results.check_target(measured[0], measured[1]["machine"])  # its own


def changed(found, factor, noise=0.0):
    """The same results with svdk's times multiplied."""
    other = copy.deepcopy(found)
    for row in (*found["micro"], *other["micro"]):
        row["noise_s"] = noise * row["median_s"]
    for row in other["micro"]:
        if row["contestant"].startswith("svdk"):
            row["median_s"] *= factor
    return other


@pytest.mark.parametrize(
    ("factor", "noise", "verdict"),
    [(1.3, 0.0, "slower"), (0.7, 0.0, "faster"), (1.3, 0.2, "same"), (1.04, 0.0, "same")],
)
def test_compare_flags_changes_beyond_the_noise(measured, factor, noise, verdict):
    found = copy.deepcopy(measured[1])
    other = changed(found, factor, noise)
    comparison = bench_results.compare(found, other)
    ours = [c for c in comparison.changes if c.ours]
    assert ours and {c.verdict for c in ours} == {verdict}
    assert len(comparison.regressions) == (len(ours) if verdict == "slower" else 0)
    assert comparison.drift == 1.0 and comparison.warnings == []


def test_compare_on_the_command_line(measured, tmp_path, capsys):
    found = copy.deepcopy(measured[1])
    slower = changed(found, 2.0)
    slower["machine"]["cpu"] = "another"
    old = bench_results.save(found, tmp_path / "old.json")
    new = bench_results.save(slower, tmp_path / "new.json")
    assert main(["bench", "--compare", str(old), str(old)]) == 0
    assert main(["bench", "--compare", str(old), str(new)]) == 1
    shown = capsys.readouterr().out
    assert "REGRESSION" in shown and "warning: cpu differs" in shown


def test_damaged_results_are_refused(measured, tmp_path):
    path = tmp_path / "bad.json"
    for text, said in (
        ("{", "is damaged"),
        ("[]", "no JSON object"),
        ("{}", "format None"),
        ('{"format": 9}', "format 9"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=said):
            bench_results.load(path)
    broken = copy.deepcopy(measured[1])
    del broken["micro"][0]["noise_s"]
    with pytest.raises(InputError, match="noise_s"):
        bench_results.load(bench_results.save(broken, path))
    with pytest.raises(InputError, match="does not exist"):
        bench_results.load(tmp_path / "absent.json")
    with pytest.raises(InputError, match="no measurement in common"):
        bench_results.compare(measured[1], measured[1] | {"micro": []})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--setting", "nonsense"], "--setting was nonsense"),
        (["--batch", "0"], "--batch was"),
        (["--threads", "-1"], "--threads was -1"),
        (["--budget", "nan"], "--budget was nan"),
        (["--backend", "nonsense"], "backend was 'nonsense'"),
        (["--quick", "--grid", "full"], "--grid was full"),
        (["--output", "."], "--output was"),
    ],
)
def test_bad_options_are_refused_before_measuring(arguments, said, capsys):
    assert main(["bench", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_difference_within_the_noise_is_called_the_same():
    ours = {"contestant": "svdk/cpu", "median_s": 1.0, "q1_s": 0.9, "q3_s": 1.1, "noise_s": 0.1}
    near = {"contestant": "eager", "median_s": 1.15, "q1_s": 1.1, "q3_s": 1.2, "noise_s": 0.1}
    assert tables.versus(near, ours) == "same"
    assert tables.versus(near | {"median_s": 20.0, "q1_s": 18.0, "q3_s": 22.0}, ours) == "x20 (16-24)"


def test_readme_gets_the_numbers_of_the_file(measured, tmp_path):
    pytest.importorskip("matplotlib")
    source = bench_results.save(measured[1], tmp_path / "results" / "small.json")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{readme_tables.BEGIN}\nold\n{readme_tables.END}\nafter\n")
    assert readme_tables.main([str(source), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "\nold\n" not in text
    row = next(r for r in measured[1]["micro"] if r["contestant"] == "svdk/cpu" and r["batch"] == 2)
    line = next(x for x in text.splitlines() if x.startswith("| 2 "))
    assert f"| {tables.milliseconds(row['median_s'])} " in line
    for name in ("speedup", "roofline", "batch"):
        assert f"(results/small-{name}.png)" in text
        assert (tmp_path / f"results/small-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_readme_without_markers_is_left_alone(measured, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("nothing here\n")
    assert readme_tables.main([str(measured[0]), "--readme", str(readme)]) == 2
    assert "bench:begin" in capsys.readouterr().err and readme.read_text() == "nothing here\n"


def test_figures_need_rows(tmp_path, measured):
    pytest.importorskip("matplotlib")
    assert figures.draw(measured[1] | {"micro": []}, tmp_path) == []
