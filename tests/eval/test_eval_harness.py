"""lm-evaluation-harness: what its calls score and generate is svdk's own steered distribution."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from svdk import ops
from svdk.calibration.artifact import Steering
from svdk.errors import ArtifactError, DataError, InputError, InvalidLogitsError
from svdk.ops.configs import ClassStrengths
from tests.helpers import tiny

pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed (pip install lm-eval==0.4.13)")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from svdk.calibration.option_statistics import score_options
from svdk.eval.harness import SYSTEMS, TASK_FOLDER, SteeredLM, evaluate_harness
from svdk.eval.tasks import load_task

PAIRS = [("abc", " def"), ("a longer context", " x"), ("q", " hello you"), ("zz", " d"), ("zz", " q")]
STEERINGS = {
    "kl_gradient": {"strength": 2.0},
    "log_ratio": {"strength": 0.8, "direction": "log_ratio", "alpha": 0.0},
    "kl_budget": {"strength": 0.05, "strength_mode": "kl_budget", "direction": "log_ratio"},
}
CASES = [(kind, name) for kind in tiny.PEFT_TYPES for name in ("kl_gradient", "log_ratio")]
CASES.append(("lora", "kl_budget"))  # the strength mode does not depend on the adapter
LONG = {"max_length": 2048}  # a byte-level tokenizer makes long prompts; rotary positions have no end


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """lm-eval describes the machine by running pip: seconds a call, and nothing of what is tested."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """Hand-written questions in the layout of the evaluation's data."""
    folder = tmp_path_factory.mktemp("data")
    names = ("sun", "oak", "fig", "owl", "elm", "jam")
    rows = []
    for i, name in enumerate((*names, "bee", "ice", "ivy", "ant")):
        true, false = {f"The {name} is real.": 1}, {f"The {name} is a lie.": 0, "Nobody knows": 0}
        mc1 = true | false if i % 2 else false | true  # the true answer does not always stand first
        rows.append({"question": f"What is a {name}?", "mc1_targets": mc1, "mc2_targets": mc1 | {"Yes": 1}})
    (folder / "truthfulqa").mkdir()
    (folder / "truthfulqa" / "mc_task.json").write_text(json.dumps(rows))
    for task, answers in (("arc_easy", "answer1/answer2/answer3"), ("boolq", "true/false")):
        choices = answers.split("/")
        for split in ("train", "test"):
            rows = []
            for i, name in enumerate(names):
                text = f"question: what does a {name} say in {split}?\n\nAnswer format: {answers}"
                answer = choices[i % len(choices)]
                row = {"instruction": text, "input": "", "output": f"the correct answer is {answer}"}
                rows.append(row | {"answer": answer})
            path = folder / "commonsense" / task / f"{split}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """A LoRA adapter folder for the tiny Llama, with an artifact."""
    folder = tmp_path_factory.mktemp("adapter")
    tiny.tiny_peft("lora").save_pretrained(folder)
    Steering(strength=1.5, alpha=0.2).save(folder)
    return folder


def scores(lm, pairs=PAIRS) -> list[tuple[float, bool]]:
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    return lm.loglikelihood(requests, disable_tqdm=True)


def answers(lm, prompts, **options) -> list[str]:
    settings = {"until": ["\n\n"], "max_gen_toks": 6} | options
    requests = [Instance("generate_until", {}, (p, settings), i) for i, p in enumerate(prompts)]
    return lm.generate_until(requests, disable_tqdm=True)


def generated(lm, length=8, **options):
    """Prompt of equal lengths and the ids that generation puts behind it."""
    context = torch.tensor([lm.tok_encode("abc"), lm.tok_encode("xyz")])
    out = lm._model_generate(context, context.shape[1] + length, ["\n\n"], do_sample=False, **options)
    return context.shape[1], out


@pytest.mark.parametrize(("peft_type", "name"), CASES)
def test_scores_are_those_of_the_op(peft_type, name, tiny_tokenizer):
    """A right-padded batch of five rows gives what svdk's op gives each row alone."""
    setting = STEERINGS[name]
    lm = SteeredLM(tiny.tiny_peft(peft_type), tokenizer=tiny_tokenizer, batch_size=5, **setting)
    for (prompt, tail), (found, _) in zip(PAIRS, scores(lm), strict=True):
        before, ids = lm.tok_encode(prompt), lm.tok_encode(prompt + tail)
        count = len(ids) - len(before)
        rows = lm.pair.teacher_forced(torch.tensor([ids[:-1]]), None, count)
        warm, base = (view[0] for view in rows)
        labels = torch.tensor(ids[-count:])
        mu = {"strength": setting["strength"]}
        if name == "kl_budget":
            _, info = ops.steered_sample(warm, base, return_info=True, **setting)
            mu = {"strength": info.strength}
        rest = {k: v for k, v in setting.items() if k in ("direction", "alpha")}
        expected = ops.steered_logprob(warm, base, labels, backend="reference", **mu, **rest)
        assert found == pytest.approx(float(expected.logprob.double().sum()), abs=1e-4)


def test_scores_by_position_count_from_the_continuation(tiny_tokenizer):
    steering = Steering(strength=1.0, positions=(3.0, -2.0), lever="positions")
    lm = SteeredLM(tiny.tiny_peft("lora"), tokenizer=tiny_tokenizer, batch_size=5, steering=steering)
    for (prompt, tail), (found, _) in zip(PAIRS, scores(lm), strict=True):
        before, ids = lm.tok_encode(prompt), lm.tok_encode(prompt + tail)
        count = len(ids) - len(before)
        warm, base = (v[0] for v in lm.pair.teacher_forced(torch.tensor([ids[:-1]]), None, count))
        mu = torch.tensor([steering.strength_at(i) for i in range(count)])
        expected = ops.steered_logprob(warm, base, torch.tensor(ids[-count:]), strength=mu)
        assert found == pytest.approx(float(expected.logprob.double().sum()), abs=1e-4)


def test_scores_by_class_follow_the_likeliest_token(tiny_tokenizer):
    thirds = [tuple(range(i, tiny.VOCAB_SIZE, 3)) for i in (0, 1)]
    steering = Steering(strength=1.0, classes=ClassStrengths(3.0, -2.0, *thirds), lever="classes")
    lm = SteeredLM(tiny.tiny_peft("lora"), tokenizer=tiny_tokenizer, batch_size=5, steering=steering)
    for (prompt, tail), (found, _) in zip(PAIRS, scores(lm), strict=True):
        before, ids = lm.tok_encode(prompt), lm.tok_encode(prompt + tail)
        count = len(ids) - len(before)
        warm, base = (v[0] for v in lm.pair.teacher_forced(torch.tensor([ids[:-1]]), None, count))
        mu = torch.tensor([(3.0, -2.0, 1.0)[int(row.argmax()) % 3] for row in warm])
        expected = ops.steered_logprob(warm, base, torch.tensor(ids[-count:]), strength=mu)
        assert found == pytest.approx(float(expected.logprob.double().sum()), abs=1e-4)
    assert lm.get_model_info()["steering"]["classes"]["stop"] == -2.0


def test_equal_rows_with_different_continuations_are_not_guessed(tiny_tokenizer):
    steering = Steering(strength=1.0, positions=(3.0,), lever="positions")
    lm = SteeredLM(tiny.tiny_peft("lora"), tokenizer=tiny_tokenizer, steering=steering, logits_cache=False)
    with pytest.raises(InputError, match="two requests had the same tokens"):
        scores(lm, [("abc", "def"), ("ab", "cdef")])


@pytest.mark.parametrize("system", ["base", "warm"])
def test_unsteered_systems_are_lm_evals_own(system, tiny_tokenizer):
    lm = SteeredLM(tiny.tiny_peft("lora"), tokenizer=tiny_tokenizer, system=system, batch_size=3)
    model = tiny.tiny_model() if system == "base" else tiny.tiny_peft("lora")
    theirs = HFLM(model, backend="causal", tokenizer=tiny_tokenizer, batch_size=1)
    for (mine, greedy), (other, other_greedy) in zip(scores(lm), scores(theirs), strict=True):
        assert mine == pytest.approx(other, abs=1e-4)
        assert greedy == other_greedy
    prompts = ["abc", "some longer prompt", "k"]
    assert answers(lm, prompts) == answers(theirs, prompts)


def test_systems_differ(tiny_tokenizer):
    model = tiny.tiny_peft("lora")
    found = [scores(SteeredLM(model, tokenizer=tiny_tokenizer, system=s, strength=3.0)) for s in SYSTEMS]
    assert len({round(one[0][0], 3) for one in found}) == 3


@pytest.mark.parametrize(("peft_type", "name"), CASES)
def test_greedy_tokens_are_the_argmax_of_scoring(peft_type, name, tiny_tokenizer):
    setting = STEERINGS[name] | {"scoring_penalty": -math.inf}
    lm = SteeredLM(tiny.tiny_peft(peft_type), tokenizer=tiny_tokenizer, **setting)
    start, out = generated(lm)
    logits = lm._model_call(out[:, :-1])[:, start - 1 :]
    done = (out[:, start:-1] == tiny_tokenizer.eos_token_id).cumsum(1).bool()
    done = torch.cat([torch.zeros_like(done[:, :1]), done], dim=1)
    assert torch.equal(logits.argmax(-1)[~done], out[:, start:][~done])
    # The default penalty of scoring changes nothing inside the confidence set, up to a constant a row.
    lm = SteeredLM(lm.model, tokenizer=tiny_tokenizer, **STEERINGS[name])
    scored = lm._model_call(out[:, :-1])[:, start - 1 :]
    assert torch.isfinite(scored).all()
    inside = logits.isfinite()
    torch.testing.assert_close(scored[inside], logits[inside])


@pytest.mark.parametrize("system", SYSTEMS)
def test_sampled_tokens_are_drawn_from_what_scoring_sees(system, tiny_tokenizer):
    """The plain sampler, given the scored rows and the same uniforms, draws the tokens of the generation."""
    setting = STEERINGS["kl_gradient"] | {"scoring_penalty": -math.inf} if system == "steered" else {}
    lm = SteeredLM(tiny.tiny_peft("lora"), tokenizer=tiny_tokenizer, system=system, **setting)
    filters = {"temperature": 1.3, "top_p": 0.95, "top_k": 40}
    context = torch.tensor([lm.tok_encode("abc"), lm.tok_encode("xyz")])
    start = context.shape[1]
    out = lm._model_generate(context, start + 6, ["\n\n"], do_sample=True, seed=7, **filters)
    logits = lm._model_call(out[:, :-1])[:, start - 1 :]
    alive = torch.ones(2, dtype=torch.bool)
    for step in range(out.shape[1] - start):
        token = ops.steered_sample(
            logits[:, step].contiguous(),
            seed=7,
            offset=step,
            **filters,
        )
        assert torch.equal(token[alive], out[alive, start + step])
        alive &= token != tiny_tokenizer.eos_token_id
    assert step >= 2


def test_sampling_repeats_with_torchs_seed(tiny_tokenizer):
    lm = SteeredLM(tiny.tiny_peft("lora"), tokenizer=tiny_tokenizer, strength=1.0, batch_size=2)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(answers(lm, ["abc", "k"], do_sample=True, temperature=1.5))
    assert found[0] == found[1] != found[2]


def test_static_vector_needs_no_base(tiny_tokenizer, monkeypatch):
    vector = torch.linspace(-2, 2, tiny.VOCAB_SIZE)
    steering = Steering(strength=1.0, direction="vector", alpha=0.0, vector=vector)
    lm = SteeredLM(tiny.tiny_peft("lora"), tokenizer=tiny_tokenizer, steering=steering)
    monkeypatch.setattr(type(lm.pair), "base", lambda *_, **__: pytest.fail("the base model was run"))
    ids = torch.tensor([lm.tok_encode("hello")])
    warm = SteeredLM(lm.model, tokenizer=tiny_tokenizer, system="warm")._model_call(ids)
    torch.testing.assert_close(lm._model_call(ids), warm + vector)
    answers(lm, ["abc"])
    assert lm.get_model_info()["steering"]["direction"] == "vector"


def test_scores_agree_with_the_other_scorer(data_dir, tiny_tokenizer):
    """lm-eval's path and svdk.eval's own (prompt cache, grid) put the options at the same distances.

    lm-eval counts the newline that ends these prompts to every option: a constant a question.
    """
    lm = SteeredLM(tiny.tiny_peft("lora"), tokenizer=tiny_tokenizer, strength=0.7, batch_size=4)
    questions = load_task("arc_easy", data_dir).test[:2]
    found = score_options(lm.pair, tiny_tokenizer, questions, alpha=0.1, directions=())
    expected = found.logprobs(found.statistics.view("kl_gradient", 0.1), 0.7)
    pairs = [(q.prompt, option) for q in questions for option in q.options]
    mine = torch.tensor([score for score, _ in scores(lm, pairs)], dtype=torch.float64)
    shift = (mine - expected).view(2, 3)
    torch.testing.assert_close(shift, shift[:, :1].expand(2, 3), atol=1e-3, rtol=0)
    assert (expected.view(2, 3).diff().abs() > 0.1).all(), "the options were all alike"


def test_context_leaves_room_for_virtual_tokens(tiny_tokenizer):
    for peft_type, room in (("lora", 512), ("prompt_tuning", 512 - tiny.VIRTUAL_TOKENS)):
        lm = SteeredLM(tiny.tiny_peft(peft_type), tokenizer=tiny_tokenizer, strength=1.0)
        assert lm.max_length == room
    assert SteeredLM(lm.model, tokenizer=tiny_tokenizer, strength=1.0, max_length=99).max_length == 99


@pytest.mark.parametrize("spelling", ["dict", "string"])
def test_simple_evaluate_by_name(spelling, tiny_folder, adapter, data_dir):
    model_args = {"pretrained": str(tiny_folder), "adapter": str(adapter), "alpha": 0.3, "penalty": -4.0}
    if spelling == "string":
        model_args = ",".join(f"{k}={v}" for k, v in model_args.items())
    manager = TaskManager(
        include_path=TASK_FOLDER, include_defaults=False, metadata={"data_dir": str(data_dir)}
    )
    found = simple_evaluate(
        model="svdk", model_args=model_args, tasks=["svdk_boolq"], num_fewshot=1, batch_size=2, limit=3,
        device="cpu", task_manager=manager, bootstrap_iters=0,
    )  # fmt: skip
    assert found["n-samples"]["svdk_boolq"]["effective"] == 3
    assert found["results"]["svdk_boolq"]["acc,none"] in (0.0, 1 / 3, 2 / 3, 1.0)
    steering = found["config"]["steering"]
    assert steering["strength"] == 1.5
    assert steering["alpha"] == 0.3
    assert (steering["scoring_penalty"], steering["generation_penalty"]) == (0.0, -4.0)
    assert found["config"]["system"] == "steered"


def test_evaluate_harness(adapter, data_dir, tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("dill.loads", lambda *_: pytest.fail("something was unpickled"))
    monkeypatch.setattr("dill.dumps", lambda *_, **__: pytest.fail("something was pickled"))
    model, output = tiny.tiny_model(), tmp_path / "new" / "harness.json"
    names = ["svdk_truthfulqa_mc1", "svdk_truthfulqa_mc2", "svdk_arc_easy"]
    found = evaluate_harness(
        model,
        adapter,
        names,
        tokenizer=tiny_tokenizer,
        data_dir=data_dir,
        output=output,
        resamples=50,
        **LONG,
    )
    assert json.loads(output.read_text(), parse_constant=pytest.fail) == found
    assert found["questions"] == {names[0]: 5, names[1]: 5, names[2]: 6}
    assert list(found["systems"]) == list(SYSTEMS)
    for system, run in found["systems"].items():
        assert run["model"]["system"] == system
        assert ("steering" in run["model"]) == (system == "steered")
        for name in names:
            values = run["scores"][name]["acc"]
            assert len(values) == found["questions"][name]
            assert run["results"][name]["acc"] == pytest.approx(sum(values) / len(values))
    pairs = [(d["task"], d["from"], d["to"]) for d in found["differences"]]
    assert pairs == [(n, a, b) for a, b in (("base", "warm"), ("warm", "steered")) for n in names]
    mc2 = {s: torch.tensor(run["scores"][names[1]]["acc"]) for s, run in found["systems"].items()}
    assert found["differences"][4]["mean"] == pytest.approx(float((mc2["steered"] - mc2["warm"]).mean()))
    assert found["differences"][4]["n"] == 5
    assert not hasattr(model, "peft_config"), "the adapter was left in the caller's model"


def test_evaluate_harness_generates(adapter, data_dir, tiny_tokenizer):
    found = evaluate_harness(
        tiny.tiny_model(), adapter, ["svdk_truthfulqa_gen"], tokenizer=tiny_tokenizer, data_dir=data_dir,
        systems=["warm", "steered"], limit=1, penalty=-3.0, resamples=10,
        gen_kwargs={"max_gen_toks": 4, "do_sample": True, "temperature": 0.9}, **LONG,
    )  # fmt: skip
    run = found["systems"]["steered"]
    assert 0 <= run["results"]["svdk_truthfulqa_gen"]["bleu_max"] <= 100
    assert len(run["scores"]["svdk_truthfulqa_gen"]["rougeL_acc"]) == 1
    assert run["model"]["steering"]["generation_penalty"] == -3.0
    assert found["differences"] == [], "one question says nothing of the spread"


def test_harness_asks_the_held_out_questions_in_the_order_of_limit(data_dir):
    metadata = {"data_dir": str(data_dir), "seed": 3, "fold": 1}
    manager = TaskManager(include_path=TASK_FOLDER, include_defaults=False, metadata=metadata)
    task = manager.load(["svdk_truthfulqa_mc1"])["tasks"]["svdk_truthfulqa_mc1"]
    docs = list(task.eval_docs)
    expected = load_task("truthfulqa", data_dir, fold=1, seed=3)
    assert {doc["id"] for doc in docs} == {q.id for q in expected.test}
    assert [doc["id"] for doc in docs] != [q.id for q in expected.test], "they differ in their order"
    for limit in (1, 2, 3, 4):
        kept = load_task("truthfulqa", data_dir, fold=1, seed=3, limit=limit)
        assert {doc["id"] for doc in docs[:limit]} == {q.id for q in kept.test}
    for doc in docs:
        text = task.doc_to_choice(doc)[task.doc_to_target(doc)]
        assert text == f"The {doc['question'].split()[-1].rstrip('?')} is real."
        assert task.doc_to_text(doc).endswith("\n\n" + doc["prompt"])
    manager = TaskManager(
        include_path=TASK_FOLDER, include_defaults=False, metadata=metadata | {"fold": "all"}
    )
    everything = manager.load(["svdk_truthfulqa_mc2"])["tasks"]["svdk_truthfulqa_mc2"]
    assert len(everything.eval_docs) == 10


@pytest.mark.parametrize("name", ["mc1", "mc2", "gen"])
def test_truthfulqa_prompts_are_lm_evals(name):
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    theirs = load_yaml(Path(lm_eval.tasks.__file__).parent / "truthfulqa" / f"truthfulqa_{name}.yaml")
    mine = load_yaml(TASK_FOLDER / f"truthfulqa_{name}.yaml")
    assert mine["doc_to_text"] == theirs["doc_to_text"]
    assert mine["output_type"] == theirs["output_type"]
    assert mine.get("process_results") == theirs.get("process_results")
    assert mine["metric_list"] == theirs["metric_list"]


def test_every_task_file_loads_a_task(data_dir):
    manager = TaskManager(
        include_path=TASK_FOLDER, include_defaults=False, metadata={"data_dir": str(data_dir)}
    )
    names = {f"svdk_{path.stem}" for path in TASK_FOLDER.glob("[!_]*.yaml")}
    assert set(manager.all_subtasks) == names
    assert set(manager.load(["svdk_truthfulqa"])["tasks"]) == {n for n in names if "truthfulqa" in n}
    boolq = manager.load(["svdk_boolq"])["tasks"]["svdk_boolq"]
    doc = boolq.eval_docs[0]
    assert boolq.doc_to_text(doc).startswith("Below is an instruction")
    assert boolq.doc_to_choice(doc) == ["the correct answer is true", "the correct answer is false"]


def test_calibrated_questions_are_refused(adapter, data_dir, tmp_path, tiny_tokenizer):
    for part in adapter.iterdir():
        (tmp_path / part.name).write_bytes(part.read_bytes())
    question = load_task("truthfulqa", data_dir).test[0]
    row = {"prompt": question.prompt, "completion": question.options[question.best]}
    (tmp_path / "calibration.jsonl").write_text(json.dumps(row) + "\n")
    for name in ("svdk_truthfulqa_mc1", "svdk_truthfulqa_gen"):
        with pytest.raises(DataError, match=f"{name} asks a question that the adapter was calibrated on"):
            evaluate_harness(
                tiny.tiny_model(), tmp_path, [name], tokenizer=tiny_tokenizer, data_dir=data_dir, **LONG
            )
    found = evaluate_harness(
        tiny.tiny_model(), tmp_path, ["svdk_truthfulqa_mc1"], tokenizer=tiny_tokenizer, data_dir=data_dir,
        fold=1, systems=["base"], **LONG,
    )  # fmt: skip
    assert found["calibration_prompts_checked"] == 1


def test_bad_arguments_of_the_run(adapter, data_dir, tiny_tokenizer):
    def run(tasks, **options):
        options = {"tokenizer": tiny_tokenizer, "data_dir": data_dir} | options
        return evaluate_harness(tiny.tiny_model(), adapter, tasks, **options)

    with pytest.raises(InputError, match="tasks was 'svdk_boolq'"):
        run("svdk_boolq")
    with pytest.raises(InputError, match="systems was 'other'; allowed: base, warm, steered"):
        run(["svdk_boolq"], systems=["other"])
    with pytest.raises(InputError, match="limit was 0"):
        run(["svdk_boolq"], limit=0)
    with pytest.raises(InputError, match="include_path was '/nowhere'"):
        run(["svdk_boolq"], include_path="/nowhere")
    with pytest.raises(DataError, match="data_dir was '/nowhere'"):
        run(["svdk_boolq"], data_dir="/nowhere")


def test_unknown_task_names_ours(adapter, tiny_tokenizer, monkeypatch):
    class Quick(TaskManager):  # without lm-eval's thousands of files
        def __init__(self, **options):
            super().__init__(**options | {"include_defaults": False})

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Quick)
    with pytest.raises(
        InputError, match=r"tasks held svdk_boolk; allowed: .*svdk_boolq.*, and lm-eval's own"
    ):
        evaluate_harness(tiny.tiny_model(), adapter, ["svdk_boolk"], tokenizer=tiny_tokenizer)


def test_bad_arguments_of_the_model(adapter, tiny_folder, tiny_tokenizer, tmp_path):
    model = tiny.tiny_peft("lora")
    for wanted, arguments in {
        "system was 'both'": {"system": "both"},
        "adapter and strength were None": {},
        "alpha must|alpha was": {"strength": 1.0, "alpha": 1.5},
        "penalty": {"strength": 1.0, "penalty": math.nan},
        "direction": {"strength": 1.0, "direction": "sideways"},
        "tokenizer was None": {"strength": 1.0, "tokenizer": None},
    }.items():
        with pytest.raises(InputError, match=wanted):
            SteeredLM(model, **{"tokenizer": tiny_tokenizer} | arguments)
    with pytest.raises(InputError, match="adapter was None"):
        SteeredLM(str(tiny_folder))
    with pytest.raises(InputError, match="tokenizer was given"):
        SteeredLM(str(tiny_folder), adapter, tokenizer=tiny_tokenizer)
    with pytest.raises(ArtifactError, match="does not exist: run `svdk calibrate`"):
        tiny.tiny_peft("lora").save_pretrained(tmp_path)
        SteeredLM(str(tiny_folder), tmp_path)
    assert SteeredLM(str(tiny_folder), tmp_path, strength=1.0).system == "steered"
    lm = SteeredLM(model, tokenizer=tiny_tokenizer, strength=1.0)
    with pytest.raises(InputError, match="generation_kwargs held repetition_penalty; allowed: do_sample"):
        answers(lm, ["abc"], repetition_penalty=1.2)
    assert answers(lm, ["abc"], num_beams=1) == answers(lm, ["abc"])


@pytest.mark.parametrize("system", SYSTEMS)
def test_nan_logits_are_an_error(system, tiny_tokenizer):
    model = tiny.tiny_peft("lora")
    model.get_base_model().lm_head.weight.data[7] = math.nan
    lm = SteeredLM(model, tokenizer=tiny_tokenizer, system=system, strength=1.0)
    with pytest.raises(InvalidLogitsError, match="rows"):
        scores(lm)
