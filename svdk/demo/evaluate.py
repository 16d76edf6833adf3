"""Held-out evaluation of decoding systems: answers, negative log-likelihood, time, and paired statistics."""

from __future__ import annotations

import dataclasses
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
from svdk.generation.choose import completion_logprob
from svdk.generation.generate import generate
from svdk.generation.sampler import FIELDS, make_sampler
from svdk.models.adapter_scale import adapter_scale
from svdk.models.pair import ModelPair
from svdk.utils.bootstrap import bootstrap
from svdk.utils.tokens import pad
from svdk.utils.views import BASE, STEERED, WARM
from svdk.warmstart.data import Example, encode, encode_prompt

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


AS_IT_IS = Steering(0.0, alpha=0.0, lever="none")
"""The adapter alone, by the same code that steers."""


@dataclass(frozen=True)
class System:
    """One way to decode: the base model, the warm start, or the warm start with a steering."""

    key: str
    """``base``, ``warm``, or a name of its own."""
    label: str
    steering: Steering | None = None
    view: str = WARM
    """Without ``steering``: the model that answers, ``warm`` or ``base``."""
    shots: tuple[Example, ...] = ()
    """Solved examples in front of the question; the answer then ends with its line."""

    def prompt(self, question: str) -> str:
        """What the model is asked."""
        return "".join(f"{one.prompt}{one.completion}\n\n" for one in self.shots) + question

    def same_as(self, other: System) -> bool:
        """Whether both decode alike, whatever they are called."""
        if self.steering is None or other.steering is None:
            return (self.steering, self.view, self.shots) == (other.steering, other.view, other.shots)
        mine, theirs = self.steering, other.steering
        vectors = mine.vector is theirs.vector is None or (
            mine.vector is not None and theirs.vector is not None and torch.equal(mine.vector, theirs.vector)
        )
        return vectors and all(getattr(mine, name) == getattr(theirs, name) for name in FIELDS)

    def how(self) -> Steering | None:
        """What :func:`svdk.generate` is told; None for the base model, which transformers runs."""
        return AS_IT_IS if self.steering is None and self.view == WARM else self.steering


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
        found = tokenizer.batch_decode(ids, skip_special_tokens=True)
        answers += [text.split("\n")[0] for text in found] if system.shots else found
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
    rows = [encode_prompt(tokenizer, system.prompt(prompt)) for prompt in prompts]
    ids, mask = pad(rows, tokenizer.pad_token_id, device=peft_model.device)
    steering = system.how()
    if steering is not None:
        options |= {"custom_generate": generate, "steering": steering}
    # Entered once a call here, not once a token.
    adapter = peft_model.disable_adapter() if steering is None else nullcontext()
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


def _view(system: System) -> str:
    return system.view if system.steering is None else STEERED


def completion_nll(
    pair: ModelPair,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    systems: Sequence[System],
    *,
    batch_size: int,
    advance: Callable[[int], Any] = lambda count: None,
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Teacher-forced NLL of the right completions by system: (E,) nats and (E,) tokens, float64.

    With lambda = 0 as in calibration (with -inf one label outside C would make the mean infinite). Both
    models run once over the data for all systems that read the same prompts with the same adapter scale.
    """
    passes: dict[tuple, list[System]] = {}
    for system in systems:
        scale = 1.0 if system.steering is None else system.steering.scale
        passes.setdefault((scale, system.shots), []).append(system)
    sums = {system.key: torch.zeros(len(examples), dtype=torch.float64) for system in systems}
    tokens = {system.key: torch.zeros(len(examples), dtype=torch.float64) for system in systems}
    for (scale, _), group in passes.items():
        asked = [dataclasses.replace(e, prompt=group[0].prompt(e.prompt)) for e in examples]
        encoded = [encode(tokenizer, example) for example in asked]
        samplers = [make_sampler(pair, 1, steering=one.steering, view=_view(one)) for one in group]
        with adapter_scale(pair, scale):
            for index, warm, base, labels, rows in labelled_rows(pair, encoded, batch_size):
                views = {WARM: warm, BASE: base}
                for system, sampler in zip(group, samplers, strict=True):
                    logits = tuple(views[view] for view in sampler.views)
                    found = completion_logprob(sampler, logits, labels, rows, f"held-out example {index}")
                    sums[system.key][index], tokens[system.key][index] = -found, len(labels)
                advance(1)
    return sums, tokens
