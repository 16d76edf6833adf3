"""Measurements of adaptation: their tasks are what they say, and their numbers follow from plain parts."""

from __future__ import annotations

import json

import pytest

from svdk.bench import levers, schedules, tasks
from svdk.demo.evaluate import System, answer, completion_nll
from svdk.errors import DataError
from svdk.models.loading import load_adapter
from svdk.models.pair import ModelPair
from svdk.utils.views import WARM
from svdk.warmstart.api import warm_start
from tests.helpers import tiny

SMALL = {"train": 8, "calibration": 6, "test": 5}


@pytest.fixture
def reviews(tmp_path):
    for name, count in (("movie_train", 60), ("movie_test", 40), ("amazon_test", 40)):
        rows = [
            {
                "text": f"{name} {i} " + "x" * (500 if i % 7 == 0 else 5),
                "label": ("negative", "positive")[i % 2],
            }
            for i in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize("task", schedules.TASKS)
def test_tasks_follow_from_their_seed_and_share_nothing(task, reviews):
    first, again, other = (tasks.make(task, seed, reviews, SMALL) for seed in (1, 1, 2))
    assert first == again and first.train != other.train and first.test == other.test
    parts = [first.train, first.calibration, *first.test.values()]
    assert [len(part) for part in parts[:2]] == [8, 6] and all(len(part) == 5 for part in parts[2:])
    prompts = [example.prompt for part in parts for example in part]
    assert len(set(prompts)) == len(prompts)
    assert first.choice == (task == "sentiment") == (len(first.test) == 2)
    assert all(example.completion in example.options for part in parts for example in part if first.choice)


def test_a_record_states_what_the_sentence_says():
    source = tasks.records(3)
    for example in (next(source) for _ in range(100)):
        text = example.prompt.split("\n")[0]
        fields = example.completion.strip().split(" | ")
        assert len(fields) == 4 and all(field in text for field in fields)


def test_sentiment_needs_its_files(tmp_path):
    for folder in (None, tmp_path):
        with pytest.raises(DataError, match=r"needs movie_test\.jsonl"):
            tasks.make("sentiment", 0, folder)


def tiny_data() -> tasks.Data:
    rows = [tasks.Example(row["prompt"], row["completion"]) for row in tiny.tiny_examples(22)]
    return tasks.Data(rows[:8], rows[8:16], {"letters": rows[16:]})


def test_a_schedule_is_measured_on_the_test_examples(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(schedules, "STEPS", 2)
    data, settings = tiny_data(), {"lr_scheduler": "constant", "learning_rate": 1e-2}
    found = schedules.run(tiny.tiny_model(), tiny_tokenizer, data, 3, **settings)
    base = tiny.tiny_model()
    folder = warm_start(
        base, data.train, tokenizer=tiny_tokenizer, calibration=data.calibration, output_dir=tmp_path / "a",
        batch_size=8, seed=3, progress=False, **settings,
    )  # fmt: skip
    model, system = load_adapter(base, folder), System(WARM, "warm start")
    nll, tokens = completion_nll(
        ModelPair(model), tiny_tokenizer, data.test["letters"], [system], batch_size=3
    )
    assert found["nll letters"] == pytest.approx(float(nll[WARM].sum() / tokens[WARM].sum()), rel=1e-4)
    prompts = [example.prompt for example in data.test["letters"]]
    answers = answer(model, tiny_tokenizer, prompts, system, batch_size=3, max_new_tokens=24)
    right = [a.strip() == e.completion.strip() for a, e in zip(answers, data.test["letters"], strict=True)]
    assert found["right letters"] == sum(right) / len(right)


def test_every_lever_is_judged_on_the_test_examples(tiny_tokenizer, tmp_path):
    found = levers.run(tiny.tiny_model(), tiny_tokenizer, tiny_data(), 0)
    names = ["none", "scale", "vector", "constant", "classes", "positions"]
    assert list(found["fitted"]) == names and found["chosen"] in names
    test = found["letters"]
    assert len(test["tokens"]) == 6 and set(test) == {"tokens", *names}
    assert all(len(test[name]["nats"]) == len(test[name]["exact"]) == 6 for name in names)
    assert not any(test["none"]["nats"])
    one = {name: {"nats": [1.0, 0.0], "hits": [0.0, 0.0], "exact": [1.0, 0.0]} for name in names}
    one["none"] = {"nats": [0.0, 0.0], "hits": [0.0, 0.0], "exact": [0.0, 0.0]}
    runs = [{"task": "dates", "seed": s, "dates": {"tokens": [2, 2]} | one} for s in (0, 1)]
    text = levers.table(runs)
    assert "| dates | `scale` | +0.2500 (+0.0000 to +0.5000) | +50.0 (+0.0 to +100.0) | +50.0 +50.0 |" in text
    assert "`none`" not in text
