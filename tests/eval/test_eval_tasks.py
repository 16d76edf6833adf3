"""The tasks: hand-written files and hub rows, what may not be in both sets, and the errors."""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace

import pytest

from svdk.errors import DataError, InputError
from svdk.eval import commonsense, truthfulqa
from svdk.eval.tasks import NAMES, load_task
from svdk.warmstart.data import Example, encode, encode_continuation, encode_prompt

DATA = os.environ.get("SVDK_EVAL_DATA")
"""A folder of the published data sets, laid out as ``svdk eval --data-dir`` wants them."""
WORDS = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay", "koi", "lark"]


def truthful_row(word, **changes):
    return {
        "question": f"What does a {word} eat?",
        "mc1_targets": {f"A {word} eats plants.": 1, "Stones.": 0, "The moon.": 0},
        # MC1's answers stand neither first nor side by side here.
        "mc2_targets": {"Stones.": 0, "Air.": 1, f"A {word} eats plants.": 1, "Sand.": 0, "The moon.": 0},
    } | changes


def choice_row(question, answer="answer2", texts=("red", "green", "blue")):
    names = [f"answer{i + 1}" for i in range(len(texts))]
    listed = " ".join(f"{name.capitalize()}: {text}" for name, text in zip(names, texts, strict=True))
    return {
        "instruction": f"Please choose the correct answer to the question: {question}\n\n{listed}\n\n"
        f"Answer format: {'/'.join(names)}",
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "truthfulqa" / "mc_task.json", [truthful_row(word) for word in WORDS])
    table = "\ufeffType,Category,Question\nAdversarial,Birds,What does a HEN eat? \n"
    (tmp_path / "truthfulqa" / "TruthfulQA.csv").write_text(table, encoding="utf-8")
    for split, words in (("train", WORDS[:8]), ("test", WORDS[8:])):
        rows = [choice_row(f"Which colour has a {word}?") for word in words]
        write(tmp_path / "commonsense" / "arc_easy" / f"{split}.json", rows)
    return tmp_path


# --- TruthfulQA ---


def test_truthfulqa_question():
    question = truthfulqa.question(truthful_row("ant"), {}, "row 0")
    assert question.prompt == "Q: What does a ant eat?\nA:"
    assert question.options == (" Stones.", " Air.", " A ant eats plants.", " Sand.", " The moon.")
    assert question.correct == (False, True, True, False, False)
    assert question.best == 2
    assert question.mc1 == (2, 0, 4)
    assert truthfulqa.asked(question) == "What does a ant eat?"


def test_folds_test_every_question_once_and_train_on_the_others(folder):
    tasks = [load_task("truthfulqa", folder, fold=fold, folds=3) for fold in range(3)]
    tested = [q.prompt for task in tasks for q in task.test]
    assert sorted(tested) == sorted(truthfulqa.PROMPT.format(question=f"What does a {w} eat?") for w in WORDS)
    for task in tasks:
        assert len(task.test) == 4
        assert {e.prompt for e in task.train} == set(tested) - {q.prompt for q in task.test}
        assert all(e.completion.endswith(" eats plants.") for e in task.train)
        assert (task.kind, task.metrics, task.left_out) == ("truthfulqa", ("mc1", "mc2", "mc3"), 0)


def test_folds_follow_from_the_texts_and_the_seed(folder):
    first = load_task("truthfulqa", folder)
    rows = [truthful_row(word) for word in reversed(WORDS)]
    write(folder / "truthfulqa" / "mc_task.json", rows)
    again = load_task("truthfulqa", folder)
    assert {q.id for q in again.test} == {q.id for q in first.test}
    assert [q.id for q in again.test] == [q.id for q in reversed(first.test)]
    others = [{q.id for q in load_task("truthfulqa", folder, seed=s).test} for s in (1, 2, 3)]
    assert any(other != {q.id for q in first.test} for other in others)


def test_categories_come_from_the_table(folder):
    tests = [q for fold in (0, 1) for q in load_task("truthfulqa", folder, fold=fold).test]
    assert {truthfulqa.asked(q): q.category for q in tests if q.category} == {"What does a hen eat?": "Birds"}
    (folder / "truthfulqa" / "TruthfulQA.csv").unlink()
    assert {q.category for q in load_task("truthfulqa", folder).test} == {""}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mc1_targets": {"a": 0}}, "0 answers of mc1_targets were true"),
        ({"mc1_targets": {"Air.": 1, "Sand.": 1}}, "2 answers of mc1_targets were true"),
        ({"mc1_targets": {"Fog.": 1, "Sand.": 0}}, "'Fog.' of mc1_targets was not in mc2_targets"),
        (
            {"mc1_targets": {"Stones.": 1, "Sand.": 0}},
            "'Stones.' of mc1_targets was not in mc2_targets",
        ),
        ({"mc2_targets": {"Air.": 1}, "mc1_targets": {"Air.": 1}}, "lacked true or false answers"),
        ({"mc2_targets": {"Air.": 2}}, "held 'Air.': 2"),
        ({"mc2_targets": ["Air."]}, "'mc2_targets' was of type list; allowed: dict"),
        ({"question": None}, "'question' was of type NoneType"),
    ],
)
def test_bad_truthfulqa_rows(changes, message):
    with pytest.raises(DataError, match=f"row 7.*{message}"):
        truthfulqa.question(truthful_row("ant", **changes), {}, "row 7")


def test_a_question_twice_is_refused(folder):
    rows = [truthful_row(word) for word in WORDS]
    twice = truthful_row("ant", question="  what does a ANT  eat?")
    write(folder / "truthfulqa" / "mc_task.json", [*rows, twice])
    for seed in range(8):  # whether the two are in different folds or in one
        with pytest.raises(DataError, match=r"'what does a ANT  eat\?' twice"):
            load_task("truthfulqa", folder, seed=seed)


# --- choice tasks ---


def test_choice_task(folder):
    task = load_task("arc_easy", folder)
    assert (task.kind, task.metrics, len(task.train), len(task.test)) == ("choice", ("accuracy",), 8, 4)
    question = task.test[0]
    assert question.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nPlease choose the correct answer to the question: Which colour has a "
        "ibis?\n\nAnswer1: red Answer2: green Answer3: blue\n\nAnswer format: answer1/answer2/answer3"
        "\n\n### Response:\n"
    )
    assert question.options == tuple(f"the correct answer is answer{i}" for i in (1, 2, 3))
    assert (question.correct, question.best, question.mc1) == ((False, True, False), 1, ())
    assert commonsense.words(question) == ("answer1", "answer2", "answer3")
    assert task.train[0].completion == "the correct answer is answer2"
    assert task.train[0].prompt == question.prompt.replace("ibis", "ant")


def test_training_rows_that_ask_a_test_question_are_left_out(folder):
    path = folder / "commonsense" / "arc_easy" / "train.json"
    other_options = choice_row("which  colour has a JAY?", "answer1", ("pink", "grey"))
    write(path, [other_options, *json.loads(path.read_text())])
    task = load_task("arc_easy", folder, limit=1)  # whichever question the limit keeps
    assert task.left_out == 1
    assert len(task.train) == 8
    assert not any("JAY" in e.prompt for e in task.train)


def test_only_test_questions_to_train_on(folder):
    for split in ("train", "test"):
        write(folder / "commonsense" / "boolq" / f"{split}.json", [choice_row("Why?")])
    with pytest.raises(DataError, match="boolq had 0 training questions"):
        load_task("boolq", folder)


def test_equal_rows_have_ids_of_their_own(folder):
    path = folder / "commonsense" / "arc_easy" / "test.json"
    write(path, [choice_row("Twice?"), choice_row("Twice?"), choice_row("Once?")])
    ids = [q.id for q in load_task("arc_easy", folder).test]
    assert len(set(ids)) == 3
    assert ids[1] == f"{ids[0]}-2"


def test_llm_adapters_folder_names(folder):
    (folder / "commonsense" / "arc_easy").rename(folder / "commonsense" / "ARC-Easy")
    assert len(load_task("arc_easy", folder).test) == 4


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"instruction": "No options."}, "did not end with 'Answer format"),
        ({"instruction": "Why?\n\nAnswer format: a/a"}, "did not end with 'Answer format: a/b', different"),
        ({"instruction": 3}, "'instruction' was of type int; allowed: str"),
        ({"answer": "answer4"}, "answer was 'answer4'.*allowed: one of answer1, answer2, answer3"),
        ({"output": "it is answer2"}, "with output 'it is answer2'"),
        ({"input": "a passage"}, "input was 'a passage'; allowed: an empty string"),
    ],
)
def test_bad_choice_rows(changes, message):
    with pytest.raises(DataError, match=f"row 7.*{message}"):
        commonsense.question("arc_easy", choice_row("Why?") | changes, "row 7")


# --- from the hub ---

HUB_ROWS = {
    "boolq": (
        {"question": "is water wet", "answer": False, "passage": "Water is a liquid."},
        "Please answer the following question with true or false, question: is water wet?"
        "\n\nAnswer format: true/false",
        "false",
    ),
    "piqa": (
        {"goal": "Open a jar.", "sol1": "Pull the lid.", "sol2": "Turn the lid.", "label": 1},
        "Please choose the correct solution to the question: Open a jar.\n\nSolution1: Pull the lid.\n\n"
        "Solution2: Turn the lid.\n\nAnswer format: solution1/solution2",
        "solution2",
    ),
    "siqa": (
        {"context": "Ann fell.", "question": "How is Ann?", "answerA": "glad", "answerB": "well",
         "answerC": "hurt", "label": "3"},
        "Please choose the correct answer to the question: Ann fell. How is Ann?\n\n"
        "Answer1: glad Answer2: well Answer3: hurt\n\nAnswer format: answer1/answer2/answer3",
        "answer3",
    ),
    "hellaswag": (
        {"activity_label": "Drums", "ctx_a": "A man sits.", "ctx_b": "he", "label": "0",
         "endings": ["plays.", "flies.", "melts.", "rains."]},
        "Please choose the correct ending to complete the given sentence: Drums: A man sits. He\n\n"
        "Ending1: plays. Ending2: flies. Ending3: melts. Ending4: rains.\n\n"
        "Answer format: ending1/ending2/ending3/ending4",
        "ending1",
    ),
    "winogrande": (
        {"sentence": "The cup broke since the _ was hard.", "option1": "floor", "option2": "cup",
         "answer": "1"},
        "Please choose the correct answer to fill in the blank to complete the given sentence: The cup broke "
        "since the _ was hard.\n\nOption1: floor Option2: cup Answer format: option1/option2",
        "option1",
    ),
    "arc_easy": (
        {"question": "What is hot?", "choices": {"text": ["ice", "fire", "fog"], "label": ["A", "B", "C"]},
         "answerKey": "B"},
        "Please choose the correct answer to the question: What is hot?\n\n"
        "Answer1: ice Answer2: fire Answer3: fog\n\nAnswer format: answer1/answer2/answer3",
        "answer2",
    ),
    "arc_challenge": (
        {"question": "What is hot?", "choices": {"text": ["ice", "fire"], "label": ["1", "2"]},
         "answerKey": "1"},
        "Please choose the correct answer to the question: What is hot?\n\n"
        "Answer1: ice Answer2: fire\n\nAnswer format: answer1/answer2",
        "answer1",
    ),
    "openbookqa": (
        {"question_stem": "The sun is", "choices": {"text": ["a", "b", "c", "d"], "label": list("ABCD")},
         "answerKey": "D "},
        "Please choose the correct answer to the question: The sun is\n\n"
        "Answer1: a Answer2: b Answer3: c Answer4: d\n\nAnswer format: answer1/answer2/answer3/answer4",
        "answer4",
    ),
}  # fmt: skip


def test_every_choice_task_has_a_hub_row_here():
    assert set(HUB_ROWS) == set(commonsense.SOURCES) == set(NAMES) - {"truthfulqa"}


@pytest.mark.parametrize("name", HUB_ROWS)
def test_hub_rows_become_the_instructions_of_llm_adapters(name):
    row, instruction, answer = HUB_ROWS[name]
    converted = commonsense.converted(commonsense.SOURCES[name], row, "row 0")
    output = f"the correct answer is {answer}"
    assert converted == {"instruction": instruction, "output": output, "answer": answer}
    question = commonsense.question(name, converted, "row 0")
    assert question.options[question.best] == output


@pytest.mark.parametrize("name", HUB_ROWS)
def test_hub_rows_without_their_fields(name):
    with pytest.raises(DataError, match="row 3 did not have the fields"):
        commonsense.converted(commonsense.SOURCES[name], {"text": "something else"}, "row 3")


def fake_hub(monkeypatch, tables):
    """``datasets`` with one function, for data sets by (name, config, split)."""

    def load_dataset(name, config=None, *, split):
        asked.append((name, config, split))
        return tables[name, config, split]

    asked = []
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_choice_task_from_the_hub(monkeypatch):
    rows = [HUB_ROWS["arc_easy"][0] | {"question": f"{word}?"} for word in WORDS]
    name = ("allenai/ai2_arc", "ARC-Easy")
    tables = {(*name, "train"): rows[:9], (*name, "test"): rows[9:]}
    asked = fake_hub(monkeypatch, tables)
    task = load_task("arc_easy")
    assert (len(task.train), len(task.test)) == (9, 3)
    assert sorted(asked) == sorted(tables)


def test_truthfulqa_from_the_hub_is_the_same_as_from_files(folder, monkeypatch):
    def targets(mapping):
        return {"choices": list(mapping), "labels": list(mapping.values())}

    rows = [
        {"question": row["question"], **{k: targets(row[k]) for k in ("mc1_targets", "mc2_targets")}}
        for row in map(truthful_row, WORDS)
    ]
    categories = [{"question": row["question"], "category": ""} for row in rows]
    categories[WORDS.index("hen")]["category"] = "Birds"
    name = "truthfulqa/truthful_qa"
    fake_hub(
        monkeypatch,
        {(name, "multiple_choice", "validation"): rows, (name, "generation", "validation"): categories},
    )
    assert load_task("truthfulqa") == load_task("truthfulqa", folder)


def test_without_datasets_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets, or a local folder as data_dir"):
        load_task("piqa")


def test_a_hub_that_cannot_be_reached(monkeypatch):
    fake_hub(monkeypatch, {})
    with pytest.raises(DataError, match=r"dataset baber/piqa \(default, train\).*KeyError"):
        load_task("piqa")


# --- arguments and files ---


def test_limit_keeps_a_seeded_choice_and_the_training_set(folder):
    full = load_task("truthfulqa", folder)
    chosen = {}
    for limit in (1, 3, 5, 100):
        task = load_task("truthfulqa", folder, limit=limit)
        assert task.train == full.train
        chosen[limit] = [q.id for q in task.test]
        assert chosen[limit] == [q.id for q in full.test if q.id in chosen[limit]], "order of the data set"
    assert set(chosen[1]) < set(chosen[3]) < set(chosen[5]) < set(chosen[100]) == {q.id for q in full.test}
    firsts = {load_task("arc_easy", folder, limit=1, seed=seed).test[0].id for seed in range(12)}
    assert len(firsts) > 1, "not always the first of the file"


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("arc", {}, "task was 'arc'; allowed: truthfulqa, boolq"),
        ("truthfulqa", {"fold": 2}, r"fold was 2; allowed: an integer in \[0, 2\)"),
        ("truthfulqa", {"fold": -1}, "fold was -1; allowed: an integer of at least 0"),
        ("truthfulqa", {"folds": 1}, "folds was 1; allowed: an integer of at least 2"),
        ("truthfulqa", {"folds": 13}, "12 questions; allowed: at least folds = 13"),
        ("truthfulqa", {"limit": 0}, "limit was 0; allowed: an integer of at least 1"),
        ("truthfulqa", {"seed": True}, "seed was True"),
        ("arc_easy", {"fold": 1}, "fold was 1; allowed for arc_easy, which has a training split: 0"),
    ],
)
def test_bad_arguments_are_named(folder, name, options, message):
    with pytest.raises(InputError, match=message):
        load_task(name, folder, **options)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "mc_task.json does not exist"),
        (b"[", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"\xff\xfe", "not UTF-8 text"),
        (b"{}", "not a list of objects"),
        (b"[]", "not a list of objects"),
        (b"[1]", "not a list of objects"),
    ],
    ids=["absent", "cut", "deep", "latin", "object", "empty", "numbers"],
)
def test_bad_files_are_named(folder, content, message):
    path = folder / "truthfulqa" / "mc_task.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_task("truthfulqa", folder)


def test_a_table_that_is_none(folder):
    (folder / "truthfulqa" / "TruthfulQA.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="was not TruthfulQA's table"):
        load_task("truthfulqa", folder)


def test_no_such_folder(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        load_task("boolq", tmp_path / "nowhere")


# --- tokens ---


def test_options_are_tokenised_as_training_completions_are(folder, tiny_tokenizer):
    for name in ("truthfulqa", "arc_easy"):
        for question in load_task(name, folder).test:
            example = Example(question.prompt, question.options[question.best])
            encoded = encode(tiny_tokenizer, example)
            prompt = encode_prompt(tiny_tokenizer, question.prompt)
            option = encode_continuation(tiny_tokenizer, example, prompt)
            assert encoded.input_ids == [*prompt, *option, tiny_tokenizer.eos_token_id]


# --- the real files, where they are ---


@pytest.mark.parametrize(
    "name, train, test, left_out",
    [
        ("truthfulqa", 408, 409, 0),
        ("boolq", 9427, 3270, 0),
        ("openbookqa", 4934, 500, 23),
        ("arc_easy", 2243, 2376, 8),
    ],
)
@pytest.mark.skipif(not DATA, reason="the variable SVDK_EVAL_DATA does not name a folder of data sets")
def test_real_files(name, train, test, left_out):
    task = load_task(name, DATA)
    assert (len(task.train), len(task.test), task.left_out) == (train, test, left_out)
    assert len({q.id for q in task.test}) == test
    assert not {e.prompt for e in task.train} & {q.prompt for q in task.test}
    if name == "truthfulqa":
        assert all(q.category for q in task.test)
