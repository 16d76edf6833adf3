"""Held-out evaluation of decoding systems: answers, negative log-likelihood, time, and paired statistics."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svdk.calibration.artifact import Steering
from svdk.calibration.sweep import labelled_rows
from svdk.demo.task import Score
from svdk.generation.generate import generate
from svdk.models.pair import ModelPair
from svdk.ops.api import steered_logprob
from svdk.utils.bootstrap import bootstrap
from svdk.utils.tokens import pad
from svdk.utils.views import BASE
from svdk.warmstart.data import Example, encode, encode_prompt

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class System:
    """One way to decode: the base model, the warm start, or the warm start with a steering."""

    key: str
    """``base``, ``warm``, or a name of its own for a steered system."""
    label: str
    steering: Steering | None = None


@dataclass(frozen=True)
class Outcome:
    """What one system did on the held-out examples."""

    system: System
    answers: list[str]
    scores: list[Score]
    nll: Tensor
    """(E,) float64: summed over the tokens of each completion, in nats, with lambda = 0."""
    tokens: Tensor
    """(E,) float64: how many tokens that is."""
    seconds_per_token: float

    def values(self, measure: str) -> tuple[Tensor, Tensor]:
        """(E,) sums and weights of ``exact``, ``right``, ``valid`` or ``nll``: the mean is their ratio."""
        if measure == "nll":
            return self.nll, self.tokens
        found = torch.tensor([float(getattr(score, measure)) for score in self.scores], dtype=torch.float64)
        return found, torch.ones_like(found)


@dataclass(frozen=True)
class Interval:
    """A mean, or a difference of means, with its 95 % bootstrap interval over examples."""

    mean: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 when the whole interval lies above or below zero, else 0."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


def mean_of(outcome: Outcome, measure: str, *, resamples: int, seed: int) -> Interval:
    """The mean of a measure (see :meth:`Outcome.values`)."""
    values, weights = outcome.values(measure)
    mean, (low, high) = bootstrap(values, weights, resamples=resamples, seed=seed)
    return Interval(mean, low, high)


def difference(outcome: Outcome, other: Outcome, measure: str, *, resamples: int, seed: int) -> Interval:
    """``outcome`` minus ``other``, paired: both are judged on the same resampled examples."""
    mine, weights = outcome.values(measure)
    theirs, _ = other.values(measure)
    mean, (low, high) = bootstrap(mine - theirs, weights, resamples=resamples, seed=seed)
    return Interval(mean, low, high)


def answer(
    peft_model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    system: System,
    *,
    batch_size: int,
    max_new_tokens: int,
    advance: Callable[[int], Any] = lambda count: None,
) -> list[str]:
    """Greedy answers of ``system``; ``advance`` is told how many prompts each batch has finished."""
    answers = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        ids = _generate(peft_model, tokenizer, batch, system, max_new_tokens=max_new_tokens)
        answers += tokenizer.batch_decode(ids, skip_special_tokens=True)
        advance(len(batch))
    return answers


def seconds_per_token(
    peft_model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    systems: Sequence[System],
    *,
    tokens: int,
    rounds: int = 3,
    advance: Callable[[int], Any] = lambda count: None,
) -> dict[str, float]:
    """Median wall time a token at batch size 1, reading the prompt included; every system writes ``tokens``.

    Systems take turns within a round, so that a busy moment of the machine does not hit one of them alone.
    """
    times: dict[str, list[float]] = {system.key: [] for system in systems}
    for _ in range(rounds):
        for system in systems:
            start = time.perf_counter()
            _generate(peft_model, tokenizer, [prompt], system, max_new_tokens=tokens, min_new_tokens=tokens)
            times[system.key].append((time.perf_counter() - start) / tokens)
            advance(1)
    return {key: statistics.median(seconds) for key, seconds in times.items()}


def _generate(
    peft_model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    system: System,
    **options: Any,
) -> Tensor:
    """New token ids (B, new) by the public call that a user would make."""
    rows = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    ids, mask = pad(rows, tokenizer.pad_token_id, device=peft_model.device)
    if system.steering is not None:
        options |= {"custom_generate": generate, "steering": system.steering}
    # Entered once a call here, not once a token.
    adapter = peft_model.disable_adapter() if system.key == BASE else nullcontext()
    with adapter, torch.inference_mode():
        whole = peft_model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **options,
        )
    return whole[:, ids.shape[1] :]


def completion_nll(
    pair: ModelPair,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    systems: Sequence[System],
    *,
    batch_size: int,
    advance: Callable[[int], Any] = lambda count: None,
) -> tuple[Mapping[str, Tensor], Tensor]:
    """Teacher-forced NLL of the right completions: (E,) nats by system, and (E,) tokens, float64.

    Both models run once over the data; every steered system is scored from the same logits, with
    lambda = 0 as in calibration (with -inf one label outside C would make the mean infinite).
    """
    encoded = [encode(tokenizer, example) for example in examples]
    tokens = torch.tensor([e.label_count for e in encoded], dtype=torch.float64)
    sums = {system.key: torch.zeros(len(examples), dtype=torch.float64) for system in systems}
    for index, warm, base, labels, rows in labelled_rows(pair, encoded, batch_size):
        for system in systems:
            steering = system.steering or Steering(0.0)
            info = steered_logprob(
                warm,
                base,
                labels,
                warm_rows=rows,
                base_rows=rows,
                check=True,
                penalty=0.0,
                strength=steering.strength,
                direction=steering.direction,
                alpha=steering.alpha,
            )
            logprob = info.logprob_base if system.key == BASE else info.logprob
            sums[system.key][index] = -logprob.double().sum()
        advance(1)
    return sums, tokens
