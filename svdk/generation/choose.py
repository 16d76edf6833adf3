"""Answering with one of several given texts: the most likely one, steered as calibrated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svdk.calibration.artifact import Steering
from svdk.calibration.choices import encode_choice, without_end
from svdk.calibration.option_statistics import OptionRuns, total_logprob
from svdk.calibration.positions import strengths_at
from svdk.errors import InputError
from svdk.generation.sampler import Sampler, check_fit, make_sampler
from svdk.models.adapter_scale import adapter_scale
from svdk.models.pair import ModelPair
from svdk.utils.views import STEERED
from svdk.warmstart.data import check_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from svdk.ops.configs import SteeringConfig


@dataclass(frozen=True, eq=False)
class ChoiceResult:
    """An answer, and what it was chosen among."""

    options: tuple[str, ...]
    logprobs: Tensor
    """(O,) float64, nats: of all tokens of each option, with its bias where the steering is one."""

    @property
    def probabilities(self) -> Tensor:
        """(O,) float64: shares among the options; they add up to 1."""
        return self.logprobs.softmax(0)

    @property
    def label(self) -> int:
        """The place of the answer; of equally likely ones, the first."""
        return int(self.logprobs.argmax())

    @property
    def option(self) -> str:
        """The answer."""
        return self.options[self.label]


def choose(
    model: Any,
    prompt: str | Sequence[str],
    options: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    steering: SteeringConfig | None = None,
    strength: float | None = None,
    direction: str | None = None,
    alpha: float | None = None,
    strength_scale: float = 1.0,
    view: str = STEERED,
    batch_size: int = 16,
    backend: str = "auto",
) -> Any:
    """Which of ``options`` comes after ``prompt``, by the log-probability of all tokens of each.

    The numbers are those of ``calibrate(objective="choice")``: tokens outside the confidence set keep their
    probability (lambda = 0), and no end of text is scored unless one option begins another.

    Args:
        model: a PEFT model, or a :class:`svdk.ModelPair`.
        prompt: as the model sees it (of a chat: rendered by the chat template); or several.
        options: at least two different texts, exactly as they follow the prompt (" yes", with its space).
        tokenizer: the model's tokenizer.
        steering: a calibrated artifact or a config; None: the model as it is. A bias needs its own options.
        strength: overrides the steering's, its strengths by position too.
        direction: overrides the steering's.
        alpha: overrides the steering's.
        strength_scale: a dial, as in :func:`svdk.generate`; a bias is multiplied, too.
        view: "steered", or "warm" or "base" for one model's own answer.
        batch_size: prompts in one forward pass.
        backend: of the ops.

    Returns:
        A :class:`ChoiceResult`; for several prompts a list of them.

    Raises:
        InputError, DataError: an argument that cannot be used.
        ArtifactError: ``steering`` was made for another kind of model.
        InvalidLogitsError: NaN or +inf logits.

    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise InputError("prompt held 0 prompts; allowed: at least 1")
    texts = check_options(options, tokenizer)
    pair = model if isinstance(model, ModelPair) else ModelPair(model)
    bias = torch.zeros(len(texts), dtype=torch.float64)
    if isinstance(steering, Steering) and steering.lever == "bias":
        if view == STEERED:
            bias = strength_scale * _bias(steering, texts)
        check_fit(steering, pair)
        steering = None
    overrides = {"strength": strength, "direction": direction, "alpha": alpha}
    given = {name: value for name, value in overrides.items() if value is not None}
    if steering is None and not given:
        view = "warm" if view == STEERED else view
    sampler = make_sampler(
        pair, 1, steering=steering, view=view, strength_scale=strength_scale, backend=backend, **given
    )
    used = sampler.steering
    if used.strength_mode != "constant" or any(
        isinstance(x, Tensor) for x in (used.strength, used.positions)
    ):
        raise InputError("steering had a KL budget or a tensor of strengths; allowed to choose: one strength")
    encoded = [encode_choice(tokenizer, f"prompt {i}", text, texts) for i, text in enumerate(prompts)]
    found = torch.zeros(len(prompts), len(texts), dtype=torch.float64)
    runs = OptionRuns(pair, encoded, batch_size=batch_size)
    with torch.inference_mode(), adapter_scale(pair, sampler.steering.scale):
        for question, option, logits, labels, rows in runs.rows(sampler.views):
            found[question, option] = completion_logprob(sampler, logits, labels, rows, f"prompt {question}")
    results = [ChoiceResult(tuple(texts), row + bias) for row in found]
    return results[0] if isinstance(prompt, str) else results


def check_options(options: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """``options`` without what ends an answer; ``InputError`` unless there are two, all different."""
    if isinstance(options, str) or len(options) < 2:
        raise InputError(f"options was {options!r}; allowed: at least two texts")
    texts = [without_end(tokenizer, check_text(f"option {i}", x)) for i, x in enumerate(options)]
    if not all(texts) or len(set(texts)) < len(texts):
        raise InputError(f"options was {list(options)!r}; allowed: different texts, none empty")
    return texts


def _bias(steering: Steering, texts: list[str]) -> Tensor:
    """(O,) of ``texts``, which must be those that the bias is about, in any order."""
    known = dict(zip(steering.options, steering.bias, strict=True))
    if set(texts) != set(known):
        raise InputError(
            f"options was {texts!r}; allowed with this steering, a bias on them: {list(known)!r}"
        )
    return torch.tensor([known[text] for text in texts], dtype=torch.float64)


def completion_logprob(
    sampler: Sampler, logits: tuple[Tensor, ...], labels: Tensor, rows: Tensor, name: str
) -> float:
    """Nats: of all tokens of one option or completion, with lambda = 0.

    ``logits``: (R, V) of each of the sampler's views; ``rows`` (t,): those of the ``labels`` (t,).
    """
    steering, warm = sampler.steering, logits[0]
    values: dict[str, Any] = {"strength": 0.0}
    if len(logits) == 2 or sampler.vector is not None:
        place = torch.arange(len(labels))
        assert isinstance(steering.positions, tuple) and not isinstance(steering.strength, Tensor)
        mu = strengths_at(place, steering.positions, steering.strength)
        if steering.classes is not None:
            mu = steering.classes.of(warm[rows], steering.strength)
        values |= {"strength": mu.float().to(warm.device), "alpha": steering.alpha, "penalty": 0.0}
        if sampler.vector is not None:
            values["vector"] = sampler.vector
        else:
            values |= {"base_logits": logits[1], "base_rows": rows, "direction": steering.direction}
    return total_logprob(warm, labels, rows, name, backend=sampler.backend, **values)
