"""Choices among options: what the data asks, what is kept of it, and a bias a label as the control."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from svdk.calibration.choice_view import ChoiceView, choice_hits, choice_loss
from svdk.calibration.estimators import Judged, fit
from svdk.calibration.kept_statistics import NO_SCALES, below
from svdk.calibration.label_bias import fit_bias
from svdk.calibration.option_statistics import (
    EncodedQuestion,
    OptionRuns,
    OptionStatistics,
    encode_question,
    total_logprob,
)
from svdk.calibration.sweep import Sweep
from svdk.errors import ArtifactError, DataError, InputError
from svdk.utils.checks import check_choice
from svdk.warmstart.data import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from svdk.models.pair import ModelPair

MOST_OPTIONS = 16
"""Completions that differ, at most, for them to be a closed set ..."""
LEAST_USES = 5
"""... in which each is given this often, on average."""


@dataclass(frozen=True)
class Choice:
    """A prompt, what can be answered, and the place of the right answer."""

    prompt: str
    options: tuple[str, ...]
    label: int


def choices_of(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[Choice] | None:
    """The choices that examples with options are, or examples whose completions are a small closed set.

    None where they are neither. What ends an answer (an end of turn, say) is no part of an option. Options
    that are the same for all stand in the same order for all.
    """
    closed = () if any(e.options for e in examples) else _closed_set([e.completion for e in examples])
    if not closed and not all(e.options for e in examples):
        if any(e.options for e in examples):
            raise DataError("some examples had options and some none; allowed: all of them or none")
        return None
    found = []
    for number, example in enumerate(examples):
        options = [without_end(tokenizer, text) for text in example.options or closed]
        label = (example.options or closed).index(example.completion)
        if not all(options) or len(set(options)) < len(options):
            raise DataError(f"example {number}: options were {options}; allowed: different texts, none empty")
        found.append(Choice(example.prompt, tuple(options), label))
    common = found[0].options
    if any(set(one.options) != set(common) for one in found):
        return found
    return [Choice(one.prompt, common, common.index(one.options[one.label])) for one in found]


def _closed_set(completions: list[str]) -> tuple[str, ...]:
    count = Counter(completions)
    few = 2 <= len(count) <= MOST_OPTIONS and len(completions) >= LEAST_USES * len(count)
    return tuple(sorted(count)) if few else ()


def without_end(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """``text`` up to the first special token in it."""
    places = [text.find(token) for token in tokenizer.all_special_tokens]
    return text[: min([len(text), *(at for at in places if at >= 0)])]


def encode_choice(
    tokenizer: PreTrainedTokenizerBase, name: str, prompt: str, options: Sequence[str]
) -> EncodedQuestion:
    """Token ids of a question; each option ends with EOS where one of them begins another.

    ("yes" would always be more likely than "yes, but", and never less.)
    """
    found = encode_question(tokenizer, name, prompt, options)
    for i, one in enumerate(found.options):
        for j, other in enumerate(found.options):
            if i != j and one == other:
                raise DataError(
                    f"{name}: options {options[i]!r} and {options[j]!r} had the same tokens; allowed: others"
                )
    ids = found.options
    if not any(one == other[: len(one)] for one in ids for other in ids if one is not other):
        return found
    return dataclasses.replace(found, options=[[*one, _eos(tokenizer)] for one in found.options])


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise InputError("tokenizer had no EOS token; needed where one option begins another")
    return int(tokenizer.eos_token_id)


@dataclass(frozen=True, eq=False, repr=False)
class ChoiceStatistics:
    """What calibration keeps of Q questions: statistics of their options, and which are right."""

    options: OptionStatistics
    labels: Tensor
    """(Q,) int64: place of the right option in its question."""
    texts: tuple[str, ...] = ()
    """The options, where they are the same for all questions, in the same order."""
    scales: Tensor | None = None
    """(S,) float64, ascending, 1 among them; None when the adapter's scale was not tried."""
    scale_logprobs: Tensor | None = None
    """(O, S) float64: of each option at each scale of the adapter, unsteered."""

    @property
    def examples(self) -> int:
        """The number of questions, Q."""
        return len(self.labels)

    @property
    def tokens(self) -> Tensor:
        """(Q,): ones; a question is one decision."""
        return torch.ones(self.examples, dtype=torch.int64)

    def examples_of_tokens(self) -> Tensor:
        """(Q,) int64."""
        return torch.arange(self.examples)

    @property
    def question(self) -> Tensor:
        """(O,) int64: the question of each option."""
        return torch.repeat_interleave(torch.arange(self.examples), self.options.options)

    @property
    def gold(self) -> Tensor:
        """(Q,) int64: the right options, counted over all."""
        return self.options.options.cumsum(0) - self.options.options + self.labels

    def settings(self) -> list[tuple[str, float]]:
        """The (direction, alpha) settings that can be evaluated."""
        return self.options.statistics.settings()

    def view(self, direction: str, alpha: float) -> ChoiceView:
        """The view of one of :meth:`settings`; ``InputError`` for another."""
        view = self.options.statistics.view(direction, alpha)
        return ChoiceView(view, self.options.impossible, self.question, self.gold)

    @cached_property
    def logprobs(self) -> Tensor:
        """(O,) float64: log-probability of every option, unsteered."""
        view = self.options.statistics.view(*self.settings()[0])
        return self.options.logprobs(view, 0.0)

    @cached_property
    def unsteered(self) -> tuple[Tensor, Tensor]:
        """NLL and hits (Q,) of the warm start."""
        return self.loss(self.logprobs)

    def bias(self, keep: Tensor) -> Tensor:
        """(K,) the biases of least loss on the questions ``keep`` (Q,) bool."""
        if not self.texts:
            raise InputError(
                "lever was 'bias' with options that differ from question to question; allowed: "
                "none, scale, constant"
            )
        return fit_bias(self.logprobs.view(self.examples, -1)[keep], self.labels[keep])

    def vocabulary_strength(self, view: Judged, keep: Tensor) -> float:
        """Mu of least NLL of the right options' tokens over the whole vocabulary, of questions ``keep``."""
        assert isinstance(view, ChoiceView)
        right = torch.zeros(len(self.question), dtype=torch.bool)
        right[self.gold[keep]] = True
        return fit(view.view, keep=right & ~self.options.impossible).strength

    def of_options(self, bias: Sequence[float]) -> Tensor:
        """(O,) float64: one number a label, laid out over all options."""
        return torch.tensor(bias, dtype=torch.float64).repeat(self.examples)

    def loss(self, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """NLL and hits (Q,) of choosing by log-probabilities (O,)."""
        loss, _ = choice_loss(logprobs, self.question, self.gold)
        return loss, choice_hits(logprobs, self.question, self.gold)

    def scale_curves(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scales (S,), losses and hits (Q, S), float64; ``InputError`` where they were not tried."""
        if self.scales is None or self.scale_logprobs is None:
            raise InputError(NO_SCALES)
        found = [self.loss(column) for column in self.scale_logprobs.unbind(1)]
        return self.scales, torch.stack([x for x, _ in found], 1), torch.stack([x for _, x in found], 1)

    def metrics(self, view: Judged, strength: float) -> dict[str, float]:
        """What an artifact records: losses and accuracies over the options, in nats a choice and shares."""
        (warm, hits), steered = self.unsteered, view.evaluate(strength).nll
        base, base_hits = self.loss(self.options.base_logprobs())
        return {
            "examples": self.examples,
            "tokens": self.examples,
            "excluded": int(self.options.impossible.sum()),
            "nll_base": float(base.mean()),
            "nll_warm": float(warm.mean()),
            "nll_steered": float(steered.mean()),
            "accuracy_base": float(base_hits.mean()),
            "accuracy_warm": float(hits.mean()),
            "accuracy_steered": float(view.correct(strength).mean()),
            "accuracy_random": float((1.0 / self.options.options.double()).mean()),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Flat tensors by name, for the artifact."""
        out = {f"choice.{name}": x for name, x in self.options.tensors().items()}
        out["labels"] = self.labels
        out["texts"] = torch.tensor(list(json.dumps(self.texts).encode()), dtype=torch.uint8)
        if self.scales is not None and self.scale_logprobs is not None:
            out |= {"scales": self.scales, "scale_logprobs": self.scale_logprobs}
        return out

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> ChoiceStatistics:
        """The inverse of :meth:`tensors`; ``ArtifactError`` when shapes or values do not fit together."""
        options = OptionStatistics.from_tensors(below(tensors, "choice."))
        try:
            labels, texts = tensors["labels"], json.loads(bytes(tensors["texts"].tolist()))
            scales, logprobs = tensors.get("scales"), tensors.get("scale_logprobs")
            counts, fits = options.options, isinstance(texts, list) and all(isinstance(x, str) for x in texts)
            fits &= labels.shape == counts.shape and bool(((labels >= 0) & (labels < counts)).all())
            fits &= not texts or bool((counts == len(texts)).all())
            fits &= (scales is None) == (logprobs is None)
            if scales is not None and logprobs is not None:
                fits &= logprobs.shape == (int(counts.sum()), len(scales)) and bool((scales == 1).any())
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise ArtifactError(f"the choice statistics are incomplete: {error}") from error
        if not fits:
            raise ArtifactError("the choice statistics are inconsistent: labels, texts and scales do not fit")
        return cls(options, labels.long(), tuple(texts), scales, logprobs)


def choice_statistics(
    pair: ModelPair,
    tokenizer: PreTrainedTokenizerBase,
    choices: Sequence[Choice],
    sweep: Sweep,
    *,
    scales: Sequence[float] = (),
    batch_size: int = 8,
    limit: tuple[int, str] = (512, "error"),
    progress: bool = False,
) -> ChoiceStatistics:
    """Both models once over all options of ``choices``, each prompt read once, and the adapter's scales.

    ``limit``: tokens of a prompt and its longest option, and what to do with more: ``error`` or ``skip``.

    Raises:
        DataError: a question that cannot be used, or all of them too long.
        InvalidLogitsError: NaN or +inf logits; the message names the question.

    """
    from svdk.models.adapter_scale import adapter_scale

    encoded = [
        encode_choice(tokenizer, f"calibration example {i}", one.prompt, one.options)
        for i, one in enumerate(choices)
    ]
    max_length, too_long = limit
    check_choice("too_long", too_long, ("error", "skip"))
    length = [len(one.prompt) + max(map(len, one.options)) for one in encoded]
    kept = [i for i, tokens in enumerate(length) if tokens <= max_length]
    if len(kept) < len(encoded) and (too_long == "error" or len(kept) < 2):
        raise DataError(
            f"{len(encoded) - len(kept)} of {len(encoded)} questions had more than max_length = {max_length} "
            f"tokens (the longest: {max(length)}); allowed: a larger max_length, or too_long='skip' to leave "
            "them out"
        )
    encoded, choices = [encoded[i] for i in kept], [choices[i] for i in kept]
    runs = OptionRuns(pair, encoded, batch_size=batch_size, progress=progress)
    options = runs.statistics(sweep)
    labels = torch.tensor([one.label for one in choices])
    same = all(one.options == choices[0].options for one in choices)
    found = ChoiceStatistics(options, labels, choices[0].options if same else ())
    if not scales:
        return found
    start = options.options.cumsum(0) - options.options
    every = sorted({1.0, *map(float, scales)})
    logprobs = torch.zeros(int(options.options.sum()), len(every), dtype=torch.float64)
    for column, scale in enumerate(every):
        with adapter_scale(pair, scale):
            for question, option, (warm,), ids, rows in runs.rows(("warm",), f"scale {scale:g}"):
                name = f"{encoded[question].name} at scale {scale:g}"
                value = total_logprob(warm, ids, rows, name, backend=sweep.backend)
                logprobs[int(start[question]) + option, column] = value
    tried = torch.tensor(every, dtype=torch.float64)
    return dataclasses.replace(found, scales=tried, scale_logprobs=logprobs)
