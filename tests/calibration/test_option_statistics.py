"""Option scores against plain forwards, one option at a time; what strengths and penalties do to them."""

from __future__ import annotations

import math

import pytest
import torch

from svdk import steered_logprob
from svdk.calibration.option_statistics import OptionStatistics, score_options
from svdk.errors import ArtifactError, DataError, InputError
from svdk.eval.question import Question
from svdk.models.base_cache import BaseCache
from svdk.models.pair import ModelPair
from svdk.warmstart.data import encode_prompt
from tests.helpers.tiny import PEFT_TYPES, VOCAB_SIZE

ALPHA = 0.3
GRID = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0])


def make(number, prompt, options):
    return Question(str(number), prompt, options, (True,) + (False,) * (len(options) - 1), 0)


QUESTIONS = [
    make(0, "Q: why?\nA:", (" yes", " no, never", " because of it")),
    make(1, "Q: what do ants eat when it rains?\nA:", (" a", " bread and butter")),
    make(2, "Q: x\nA:", (" b", " c", " d", " e")),
]


def alone(pair, tokenizer, direction, alpha, strength, penalty):
    """The log-probability of every option by a forward of its own, and that of the base model."""
    found, base = [], []
    for question in QUESTIONS:
        prompt = encode_prompt(tokenizer, question.prompt)
        for option in question.options:
            tokens = tokenizer(option, add_special_tokens=False).input_ids
            ids = torch.tensor([prompt + tokens[:-1]])
            warm, plain = pair.teacher_forced(ids, None, len(tokens))
            info = steered_logprob(
                warm[0], plain[0], torch.tensor(tokens), strength=strength, direction=direction, alpha=alpha,
                penalty=penalty, backend="reference",
            )  # fmt: skip
            found.append(float(info.logprob.double().sum()))
            base.append(float(info.logprob_base.double().sum()))
    return torch.tensor(found, dtype=torch.float64), torch.tensor(base, dtype=torch.float64)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return tiny_tokenizer


@pytest.fixture(scope="module")
def scored(tiny_peft, tokenizer):
    pair = ModelPair(tiny_peft("lora"))
    return pair, score_options(pair, tokenizer, QUESTIONS, alpha=ALPHA, grid=GRID)


@pytest.mark.parametrize("peft_type", PEFT_TYPES)
def test_sharing_the_prompt_changes_nothing(peft_type, tiny_peft, tokenizer):
    pair = ModelPair(tiny_peft(peft_type))
    found = score_options(pair, tokenizer, QUESTIONS, alpha=ALPHA, grid=GRID, batch_size=2)
    assert found.options.tolist() == [3, 2, 4]
    expected, base = alone(pair, tokenizer, "kl_gradient", ALPHA, 1.5, 0.0)
    view = found.statistics.view("kl_gradient", ALPHA)
    torch.testing.assert_close(found.logprobs(view, 1.5), expected, rtol=0, atol=2e-4)
    torch.testing.assert_close(found.base_logprobs(), base, rtol=0, atol=2e-4)
    assert [len(part) for part in found.by_question(expected)] == [3, 2, 4]


@pytest.mark.parametrize("penalty", [0.0, -1.0, 0.7, -math.inf])
@pytest.mark.parametrize("strength", [0.0, 1.7, -0.8])
@pytest.mark.parametrize("direction", ["kl_gradient", "log_ratio"])
def test_any_strength_and_penalty_without_the_model(scored, tokenizer, direction, strength, penalty):
    pair, found = scored
    expected, _ = alone(pair, tokenizer, direction, ALPHA, strength, penalty)
    view = found.statistics.view(direction, ALPHA, penalty)
    torch.testing.assert_close(found.logprobs(view, strength), expected, rtol=0, atol=5e-4)
    if penalty == -math.inf:
        assert expected.isinf().any()  # otherwise this says nothing about labels outside C


def test_slopes_with_a_penalty_are_derivatives(scored):
    view = scored[1].statistics.view("log_ratio", ALPHA, -1.5)
    step = 1e-5
    for mu in (-0.7, 0.0, 1.2):
        low, here, high = (view.evaluate(mu + k * step) for k in (-1, 0, 1))
        torch.testing.assert_close((high.nll - low.nll) / (2 * step), here.slope, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            (high.slope - low.slope) / (2 * step), here.curvature, rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("direction", ["kl_gradient", "log_ratio"])
def test_without_mask_the_grid_is_exact_and_its_gaps_are_close(scored, tokenizer, direction):
    pair, found = scored
    view = found.statistics.view(direction, 0.0)
    for strength, tolerance in ((1.0, 2e-4), (-0.75, 2e-3)):
        expected, _ = alone(pair, tokenizer, direction, 0.0, strength, 0.0)
        torch.testing.assert_close(found.logprobs(view, strength), expected, rtol=0, atol=tolerance)


def test_log_ratio_at_minus_one_is_the_base_model(scored):
    found = scored[1]
    view = found.statistics.view("log_ratio", 0.0)
    torch.testing.assert_close(found.logprobs(view, -1.0), found.base_logprobs(), rtol=0, atol=2e-4)


def test_a_static_vector_is_a_bias(tiny_peft, tokenizer):
    pair = ModelPair(tiny_peft("lora"))
    vector = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    found = score_options(pair, tokenizer, QUESTIONS, alpha=ALPHA, vector=vector, grid=GRID)
    values = found.logprobs(found.statistics.view("vector", 0.0), 1.5)
    prompt = encode_prompt(tokenizer, QUESTIONS[1].prompt)
    tokens = tokenizer(QUESTIONS[1].options[1], add_special_tokens=False).input_ids
    warm, _ = pair.teacher_forced(torch.tensor([prompt + tokens[:-1]]), None, len(tokens))
    steered = (warm[0].double() + 1.5 * vector.double()).log_softmax(-1)
    expected = steered.gather(1, torch.tensor(tokens)[:, None]).sum()
    torch.testing.assert_close(found.by_question(values)[1][1], expected, rtol=0, atol=2e-4)


class CountingPair(ModelPair):
    """Counts forwards of the base model."""

    base_calls = 0

    def base(self, *args, **options):
        self.base_calls += 1
        return super().base(*args, **options)


def test_the_base_model_runs_once_for_several_adapters(tiny_peft, tokenizer):
    model = tiny_peft("lora")
    pair, cache = CountingPair(model), BaseCache()
    first = score_options(pair, tokenizer, QUESTIONS, alpha=ALPHA, grid=GRID, base_cache=cache)
    assert cache.usable and pair.base_calls > 0
    pair.base_calls = 0
    with torch.no_grad():  # another adapter on the same base model
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.mul_(-2)
    second = score_options(pair, tokenizer, QUESTIONS, alpha=ALPHA, grid=GRID, base_cache=cache)
    assert pair.base_calls == 0
    torch.testing.assert_close(second.base_logprobs(), first.base_logprobs(), rtol=0, atol=1e-4)
    view = second.statistics.view("kl_gradient", ALPHA)
    expected, _ = alone(pair, tokenizer, "kl_gradient", ALPHA, 1.0, 0.0)
    torch.testing.assert_close(second.logprobs(view, 1.0), expected, rtol=0, atol=2e-4)


def test_a_model_that_caps_its_logits_is_run_every_time(tiny_peft, tokenizer):
    pair, cache = CountingPair(tiny_peft("lora", "gemma2")), BaseCache()
    score_options(pair, tokenizer, QUESTIONS, alpha=ALPHA, grid=GRID, base_cache=cache)
    calls, pair.base_calls = pair.base_calls, 0
    again = score_options(pair, tokenizer, QUESTIONS, alpha=ALPHA, grid=GRID, base_cache=cache)
    assert not cache.usable and pair.base_calls == calls
    _, base = alone(pair, tokenizer, "kl_gradient", ALPHA, 0.0, 0.0)
    torch.testing.assert_close(again.base_logprobs(), base, rtol=0, atol=2e-4)


def test_a_cache_belongs_to_its_questions(scored, tokenizer):
    pair, cache = scored[0], BaseCache()
    score_options(pair, tokenizer, QUESTIONS, alpha=ALPHA, grid=GRID, base_cache=cache)
    with pytest.raises(InputError, match="other questions"):
        score_options(pair, tokenizer, QUESTIONS[:2], alpha=ALPHA, grid=GRID, base_cache=cache)


def test_impossible_options_stay_impossible(tiny_peft, tokenizer):
    model = tiny_peft("lora")
    banned = tokenizer("z", add_special_tokens=False).input_ids[0]
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(
        lambda module, args, out: out.index_fill(-1, torch.tensor([banned]), -math.inf)
    )
    try:
        question = make(9, "Q: ?\nA:", (" az", " ab"))
        found = score_options(ModelPair(model), tokenizer, [question], alpha=ALPHA, grid=GRID)
    finally:
        hook.remove()
    values = found.logprobs(found.statistics.view("log_ratio", 0.0), 1.0)
    assert values[0] == -math.inf and values[1].isfinite()
    assert found.base_logprobs()[0] == -math.inf


def test_statistics_survive_their_file_form(scored):
    found = scored[1]
    again = OptionStatistics.from_tensors(found.tensors())
    view, other = (x.statistics.view("kl_gradient", ALPHA) for x in (found, again))
    assert torch.equal(found.logprobs(view, 0.9), again.logprobs(other, 0.9))
    tensors = found.tensors()
    for name in ("options", "impossible"):
        with pytest.raises(ArtifactError, match="incomplete"):
            OptionStatistics.from_tensors({k: v for k, v in tensors.items() if k != name})
    with pytest.raises(ArtifactError, match="do not add up"):
        OptionStatistics.from_tensors(tensors | {"options": torch.tensor([3, 2, 3])})


def test_empty_input_is_refused(scored, tokenizer):
    with pytest.raises(DataError, match="0 questions"):
        score_options(scored[0], tokenizer, [])
    with pytest.raises(DataError, match="question 5 had an empty"):
        score_options(scored[0], tokenizer, [make(5, "Q:", (" a", ""))])
