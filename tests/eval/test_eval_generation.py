"""Free answers: which model writes them, that batches do not matter, where they end, how they are scored."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from svdk.calibration.artifact import Steering
from svdk.errors import ArtifactError, InputError
from svdk.eval.generation import (
    DECODINGS,
    _LineEnd,
    first_line,
    generate_answers,
    predicted_option,
    score_answers,
)
from svdk.eval.judge import OverlapJudge, Verdict
from svdk.eval.question import Question
from svdk.warmstart.data import encode_prompt
from tests.helpers.tiny import tiny_model

PROMPTS = ["Q: Why?\nA:", "Q: What does an ant eat, and when?\nA:", "say", "### Response:\n", "Q: Who?\nA:"]
TOKENS = 6


def make(prompt, options=(" yes", " no"), best=0):
    correct = tuple(i == best for i in range(len(options)))
    return Question(f"id of {prompt}", prompt, tuple(options), correct, best)


QUESTIONS = [make(prompt) for prompt in PROMPTS]


def numbered(count, name="answer", best=0):
    return make("?", [f"the correct answer is {name}{i + 1}" for i in range(count)], best)


@pytest.fixture(scope="module")
def peft_model(tiny_peft):
    return tiny_peft("lora")


def answers(peft_model, tokenizer, questions=QUESTIONS, **options):
    return generate_answers(peft_model, tokenizer, questions, **({"max_new_tokens": TOKENS} | options))


def one_by_one(model, tokenizer, **options):
    """Greedy answers by plain ``generate``, one prompt at a time."""
    texts = []
    for prompt in PROMPTS:
        ids = torch.tensor([encode_prompt(tokenizer, prompt)])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **options,
        )  # fmt: skip
        texts.append(first_line(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)))
    return texts


@pytest.mark.parametrize("beams", [1, 3])
def test_base_and_warm_are_what_each_model_writes_alone(peft_model, tiny_tokenizer, beams):
    decoding = {"num_beams": beams}
    base = answers(peft_model, tiny_tokenizer, steering="base", decoding=decoding)
    warm = answers(peft_model, tiny_tokenizer, decoding=decoding)
    assert base == one_by_one(tiny_model("llama"), tiny_tokenizer, **decoding)
    assert warm == one_by_one(peft_model, tiny_tokenizer, **decoding)
    assert base != warm


@pytest.mark.parametrize("decoding", ["greedy", "sample", "top_k", "top_p", "min_p", {"num_beams": 2}])
def test_no_strength_is_the_warm_start_and_strength_is_not(peft_model, tiny_tokenizer, decoding):
    options = {"decoding": decoding, "seed": 3}
    warm = answers(peft_model, tiny_tokenizer, **options)
    zero = Steering(0.0, "log_ratio", alpha=0.0)
    assert answers(peft_model, tiny_tokenizer, steering=zero, **options) == warm
    strong = Steering(4.0, "log_ratio", alpha=0.0)
    assert answers(peft_model, tiny_tokenizer, steering=strong, **options) != warm


@pytest.mark.parametrize("decoding", ["greedy", {"do_sample": True, "temperature": 2.0}])
@pytest.mark.parametrize("peft_type", ["lora", "prompt_tuning"])
def test_batches_and_their_order_do_not_matter(tiny_peft, tiny_tokenizer, peft_type, decoding):
    model = tiny_peft(peft_type)
    options = {"steering": Steering(1.0), "decoding": decoding, "seed": 5}
    expected = answers(model, tiny_tokenizer, batch_size=1, **options)
    assert len(set(expected)) > 1
    for batch_size in (2, 16):
        assert answers(model, tiny_tokenizer, batch_size=batch_size, **options) == expected
    turned = answers(model, tiny_tokenizer, QUESTIONS[::-1], batch_size=2, **options)
    assert turned[::-1] == expected


def test_sampling_follows_its_seed(peft_model, tiny_tokenizer):
    first, same, other = (
        answers(peft_model, tiny_tokenizer, decoding="sample", seed=seed) for seed in (1, 1, 2)
    )
    assert first == same != other


def test_questions_have_uniforms_of_their_own(peft_model, tiny_tokenizer):
    same_prompt = [replace(QUESTIONS[0], id=f"id {i}") for i in range(4)]
    decoding = {"do_sample": True, "temperature": 2.0}
    assert len(set(answers(peft_model, tiny_tokenizer, same_prompt, decoding=decoding))) > 1


def test_beam_search_does_not_sample_where_the_model_would(tiny_peft, tiny_tokenizer):
    model = tiny_peft("lora")
    expected = answers(model, tiny_tokenizer, decoding="beam")
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    assert answers(model, tiny_tokenizer, decoding="beam") == expected


def test_progress_is_told(peft_model, tiny_tokenizer):
    told = []
    answers(peft_model, tiny_tokenizer, batch_size=2, max_new_tokens=1, advance=told.append)
    assert told == [2, 2, 1]
    assert answers(peft_model, tiny_tokenizer, []) == []


def test_a_line_ends_after_text_not_before(tiny_tokenizer):
    texts = ["\n\n ab", "ab\n", "ab", "\nab\ncd", "", "\n \n"]
    prompt = encode_prompt(tiny_tokenizer, "a\nb:")
    rows = [prompt + tiny_tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    ids = tiny_tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")["input_ids"]
    found = _LineEnd(tiny_tokenizer, len(prompt))(ids, None)
    assert found.tolist() == [False, True, False, True, False, False]


@pytest.mark.parametrize("steering", [None, "base", Steering(1.0)], ids=["warm", "base", "steered"])
@pytest.mark.parametrize("decoding", ["greedy", "beam"])
def test_decoding_stops_at_the_end_of_the_line(tiny_peft, tiny_tokenizer, steering, decoding):
    model = tiny_peft("lora", model=alternating(tiny_tokenizer))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight *= 0.01  # so that the adapter changes the logits and not the text
    steps = []
    model.get_base_model().register_forward_hook(lambda *_: steps.append(1))
    written = answers(
        model, tiny_tokenizer, [make("x"), make("xx"), make("\n")], steering=steering, decoding=decoding,
        max_new_tokens=40,
    )  # fmt: skip
    assert written == ["x", "x", "x"]
    assert len(steps) < 40, "stopped early"


def alternating(tokenizer):
    """A model that writes a newline after "x" and "x" after anything else."""
    x, newline = (tokenizer(t, add_special_tokens=False).input_ids[0] for t in ("x", "\n"))
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding.zero_()
        embedding[:, 0] = 1.0
        embedding[x] = 0.0
        embedding[x, 1] = 1.0
        head.zero_()
        head[x, 0] = 10.0
        head[newline, 1] = 10.0
    return model


@pytest.mark.parametrize(
    "text, line",
    [("\n\n  a b \nc", "a b"), ("a", "a"), (" a\r\nb", "a"), ("\n", ""), ("", "")],
)
def test_first_line(text, line):
    assert first_line(text) == line


@pytest.mark.parametrize(
    "question, answer, expected",
    [
        (numbered(4), "the correct answer is answer3", 2),
        (numbered(4), "answer2, not answer1", 1),
        (numbered(4), "xanswer4y", 3),
        (numbered(4), "Answer1", None),  # letters agree in case
        (numbered(4), "answer5 or answer1", None),  # the first word counts, an option or not
        (numbered(5), "answer5 or answer1", 4),
        (numbered(3, "ending"), "ending9 ending2", 1),
        (numbered(2, "solution"), "no idea", None),
        (numbered(2, "solution"), "", None),
        (make("?", ["the correct answer is true", "the correct answer is false"]), "untrue? false", 0),
    ],
)
def test_predicted_option(question, answer, expected):
    assert predicted_option(question, answer) == expected


def test_scores_of_a_choice_task():
    questions = [numbered(4, best=1), numbered(4, best=2), numbered(4, best=3)]
    found = score_answers("choice", questions, ["answer2", "answer2", "?"])
    assert list(found) == ["generated_accuracy"]
    assert found["generated_accuracy"].tolist() == [1, 0, 0]
    assert found["generated_accuracy"].dtype == torch.float64


def test_scores_of_truthfulqa():
    class Both:
        def judge(self, question, answer):
            return Verdict(float("t" in answer), float("i" in answer))

    questions = QUESTIONS[:4]
    found = score_answers("truthfulqa", questions, ["t", "ti", "i", ""], judge=Both())
    assert {name: values.tolist() for name, values in found.items()} == {
        "truthful": [1, 1, 0, 0],
        "informative": [0, 1, 1, 0],
        "truthful_informative": [0, 1, 0, 0],
    }
    for judge in (None, OverlapJudge()):
        found = score_answers("truthfulqa", questions, ["yes", "no", "I have no comment", ""], judge=judge)
        assert {name: values.tolist() for name, values in found.items()} == {"truthful": [1, 0, 1, 0]}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"decoding": "nucleus"}, "decoding was 'nucleus'; allowed: greedy, sample"),
        ({"decoding": {"topp": 1, "seed": 2}}, "decoding held seed, topp; allowed: do_sample"),
        ({"decoding": {"num_beams": 0}}, "num_beams was 0"),
        ({"decoding": {"num_beams": 2, "do_sample": True}}, "num_beams and do_sample; allowed: one"),
        ({"decoding": {"do_sample": True, "top_p": 2.0}}, "top_p was 2.0"),
        ({"steering": "warm"}, "steering was 'warm'; allowed: a Steering, None for the warm start, 'base'"),
        ({"batch_size": 0}, "batch_size was 0"),
        ({"max_new_tokens": 0}, "max_new_tokens was 0"),
    ],
)
def test_bad_arguments_are_named(peft_model, tiny_tokenizer, options, message):
    with pytest.raises(InputError, match=message):
        answers(peft_model, tiny_tokenizer, **options)


@pytest.mark.parametrize("decoding", ["greedy", "beam"])
def test_an_artifact_of_another_model_is_refused(peft_model, tiny_tokenizer, decoding):
    with pytest.raises(ArtifactError, match="peft_type does not match"):
        answers(peft_model, tiny_tokenizer, steering=Steering(1.0, peft_type="IA3"), decoding=decoding)


def test_bad_scores_input():
    with pytest.raises(InputError, match="answers held 0; allowed: one a question, 5"):
        score_answers("choice", QUESTIONS, [])
    with pytest.raises(InputError, match="kind was 'qa'"):
        score_answers("qa", [], [])


def test_named_decodings_are_valid(peft_model, tiny_tokenizer):
    for name in DECODINGS:
        written = answers(peft_model, tiny_tokenizer, QUESTIONS[:2], decoding=name, max_new_tokens=2)
        assert len(written) == 2
