"""Free answers of base, warm-started and steered models to the questions of a task, and their scores."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from svdk.calibration.artifact import Steering
from svdk.errors import InputError
from svdk.eval.commonsense import words
from svdk.eval.judge import Judge, OverlapJudge, judge_answers
from svdk.eval.question import Question
from svdk.generation.generate import decode
from svdk.generation.logits_processor import SteeringLogitsProcessor
from svdk.models.pair import ModelPair
from svdk.utils.checks import check_count
from svdk.utils.tokens import eos_ids, pad
from svdk.utils.views import BASE, STEERED, WARM
from svdk.warmstart.data import encode_prompt

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

DECODINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sample": {"do_sample": True},
    "top_k": {"do_sample": True, "top_k": 50},
    "top_p": {"do_sample": True, "top_p": 0.9},
    "min_p": {"do_sample": True, "min_p": 0.1},
    "beam": {"num_beams": 4},
}
OPTIONS = ("do_sample", "temperature", "top_k", "top_p", "min_p", "num_beams")
# LLM-Adapters looks for all five, however many a question has.
_ANSWERS = tuple(f"answer{i}" for i in range(1, 6))


def generate_answers(
    peft_model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    steering: Steering | str | None = None,
    max_new_tokens: int = 32,
    batch_size: int = 16,
    decoding: str | Mapping[str, Any] = "greedy",
    seed: int = 0,
    advance: Callable[[int], Any] = lambda count: None,
) -> list[str]:
    """What one system writes after each prompt: one line, without white space around it.

    An answer ends at EOS, at the first newline after some text, or after ``max_new_tokens``. All systems
    sample with the same uniforms, which follow from the seed and the question alone, not from the batch.

    Args:
        peft_model: base model with its adapter.
        tokenizer: its tokenizer, with a pad token.
        questions: in any order; prompts of like length are run together.
        steering: a calibrated artifact (the steered system), None (the warm start) or ``"base"``.
        max_new_tokens: at least 1.
        batch_size: prompts a forward, at least 1.
        decoding: a name in :data:`DECODINGS`, or options: any of :data:`OPTIONS`. Beam search is slower: the
            steering is then a logits processor.
        seed: of the sampling.
        advance: told how many questions each batch has finished.

    Raises:
        InputError: a bad argument.
        ArtifactError: ``steering`` was made for another kind of model.

    """
    options = _options(decoding)
    if isinstance(steering, str) and steering != BASE:
        raise InputError(f"steering was {steering!r}; allowed: a Steering, None for the warm start, {BASE!r}")
    check_count("batch_size", batch_size)
    pair = ModelPair(peft_model)
    prompts = [encode_prompt(tokenizer, question.prompt) for question in questions]
    answers = [""] * len(questions)
    order = sorted(range(len(questions)), key=lambda index: len(prompts[index]), reverse=True)
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        rows, mask = pad([prompts[index] for index in members], tokenizer.pad_token_id, device=pair.device)
        inputs = {"input_ids": rows, "attention_mask": mask}
        common = {
            "max_new_tokens": max_new_tokens,
            "eos_token_id": eos_ids(peft_model, tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "stopping_criteria": StoppingCriteriaList([_LineEnd(tokenizer, rows.shape[1])]),
        }
        if options.get("num_beams", 1) > 1:
            ids = _beams(peft_model, inputs, steering, **common, **options)
        else:
            seeds = torch.tensor([_row_seed(seed, questions[index]) for index in members])
            view = BASE if steering == BASE else WARM if steering is None else STEERED
            artifact = steering if isinstance(steering, Steering) else None
            ids = decode(
                pair, rows, mask, steering=artifact, view=view, seed=seeds,
                **common, **options,
            ).sequences  # fmt: skip
        texts = tokenizer.batch_decode(ids[:, rows.shape[1] :], skip_special_tokens=True)
        for index, text in zip(members, texts, strict=True):
            answers[index] = first_line(text)
        advance(len(members))
    return answers


def first_line(text: str) -> str:
    """The first line of ``text`` that is not empty, without white space around it."""
    return text.strip().partition("\n")[0].strip()


def predicted_option(question: Question, answer: str) -> int | None:
    """The option whose word ("answer2", "true") comes first in the answer, or None: LLM-Adapters' rule.

    As there, letters must agree in case, the word may stand inside another, and of "answer1" to "answer5" the
    first one counts, even one that the question does not have (which is then no option).
    """
    mine = words(question)
    known = _ANSWERS if mine[0] == _ANSWERS[0] else mine
    found = re.search("|".join(map(re.escape, known)), answer)
    return mine.index(found[0]) if found and found[0] in mine else None


def score_answers(
    kind: str,
    questions: Sequence[Question],
    answers: Sequence[str],
    *,
    judge: Judge | None = None,
    workers: int = 1,
) -> dict[str, Tensor]:
    """Scores of free answers, float64 (Q,) by name.

    Args:
        kind: :attr:`svdk.eval.tasks.Task.kind`. "choice" gives ``generated_accuracy`` (the option by
            :func:`predicted_option` is the gold one); "truthfulqa" gives ``truthful`` and, from a judge that
            looks at it, ``informative`` and ``truthful_informative``, their product.
        questions: the questions.
        answers: one a question, from :func:`generate_answers`.
        judge: for "truthfulqa" (default: :class:`svdk.eval.judge.OverlapJudge`).
        workers: requests at a time to the judge.

    Raises:
        InputError: an unknown kind, or another number of answers.

    """
    if len(answers) != len(questions):
        raise InputError(f"answers held {len(answers)}; allowed: one a question, {len(questions)}")
    if kind == "choice":
        right = [predicted_option(q, text) == q.best for q, text in zip(questions, answers, strict=True)]
        return {"generated_accuracy": torch.tensor(right, dtype=torch.float64)}
    if kind != "truthfulqa":
        raise InputError(f"kind was {kind!r}; allowed: 'choice', 'truthfulqa'")
    verdicts = judge_answers(judge or OverlapJudge(), questions, answers, workers=workers)
    scores = {"truthful": torch.tensor([v.truthful for v in verdicts], dtype=torch.float64)}
    informative = [v.informative for v in verdicts]
    if None not in informative:
        scores["informative"] = torch.tensor(informative, dtype=torch.float64)
        scores["truthful_informative"] = scores["truthful"] * scores["informative"]
    return scores


class _LineEnd(StoppingCriteria):
    """A row ends at the first newline that follows some text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, start: int) -> None:
        self._tokenizer = tokenizer
        self._start = start

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        texts = self._tokenizer.batch_decode(input_ids[:, self._start :], skip_special_tokens=True)
        return torch.tensor(["\n" in text.lstrip() for text in texts], device=input_ids.device)


def _beams(
    peft_model: PeftModel, inputs: Mapping[str, Tensor], steering: Steering | str | None, **options: Any
) -> Tensor:
    processors = []
    if isinstance(steering, Steering):
        mask = inputs["attention_mask"]
        processors = [SteeringLogitsProcessor(peft_model, steering, attention_mask=mask)]
    adapter = peft_model.disable_adapter() if steering == BASE else nullcontext()
    with adapter, torch.inference_mode():
        return peft_model.generate(**inputs, do_sample=False, logits_processor=processors, **options)


def _options(decoding: str | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(decoding, str):
        if decoding not in DECODINGS:
            raise InputError(
                f"decoding was {decoding!r}; allowed: {', '.join(DECODINGS)}, or a dict of options"
            )
        return DECODINGS[decoding]
    unknown = sorted(set(decoding) - set(OPTIONS))
    if unknown:
        raise InputError(f"decoding held {', '.join(unknown)}; allowed: {', '.join(OPTIONS)}")
    beams = decoding.get("num_beams", 1)
    check_count("num_beams", beams)
    if beams > 1 and decoding.get("do_sample"):
        raise InputError("decoding held num_beams and do_sample; allowed: one of them")
    return {name: value for name, value in decoding.items() if name != "num_beams" or value > 1}


def _row_seed(seed: int, question: Question) -> int:
    digest = hashlib.sha256(f"{seed}\0{question.id}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
