"""Scoring answer options by likelihood: both models once over all of them, any strength afterwards."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from svdk.calibration.kept_statistics import DIRECTIONS, Statistics, below, default_grid
from svdk.calibration.loss_views import MaskedView, View
from svdk.calibration.sweep import MAX_FORWARD, Part, Sweep, add_rows, assemble, check_grid, check_rows
from svdk.errors import ArtifactError, DataError
from svdk.models.base_cache import BaseCache
from svdk.models.pair import ModelPair
from svdk.models.stream import ViewCache
from svdk.ops.api import steered_logprob
from svdk.utils.checks import check_count
from svdk.utils.tokens import pad
from svdk.warmstart.data import Example, encode_continuation, encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOTH = ("warm", "base")


class Scored(Protocol):
    """What of a question is scored."""

    @property
    def id(self) -> str:
        """For error messages."""

    @property
    def prompt(self) -> str:
        """As the model sees it."""

    @property
    def options(self) -> tuple[str, ...]:
        """Continuations, exactly as scored after the prompt."""


@dataclass(frozen=True)
class EncodedQuestion:
    """Token ids of a prompt and its options."""

    name: str
    """For error messages."""
    prompt: list[int]
    options: list[list[int]]


@dataclass(frozen=True, eq=False, repr=False)
class OptionStatistics:
    """Statistics whose "examples" are the options of Q questions, question by question."""

    statistics: Statistics
    options: Tensor
    """(Q,) int64: options of each question."""
    impossible: Tensor
    """(O,) bool: options with a token that the warm model rules out; no strength can change that."""

    def logprobs(self, view: View, strength: float | Tensor) -> Tensor:
        """(O,) float64: log-probability of every option (sum over its tokens) at mu = ``strength``."""
        # One strength a token is for the mode kl_budget, which has a mask.
        curve = view.evaluate(strength) if isinstance(view, MaskedView) else view.evaluate(float(strength))
        return torch.where(self.impossible, -torch.inf, -curve.nll)

    def base_logprobs(self) -> Tensor:
        """(O,) float64: log-probability of every option under the base model."""
        s = self.statistics
        option = torch.repeat_interleave(torch.arange(s.examples), s.tokens)
        sums = torch.zeros(s.examples, dtype=torch.float64)
        # Of a token that the warm model rules out, nothing was kept: the base model's sum is unknown there.
        return torch.where(self.impossible, -torch.inf, sums.index_add_(0, option, s.logprob_base.double()))

    def by_question(self, values: Tensor) -> list[Tensor]:
        """(O,) -> one (options,) tensor a question."""
        return list(values.split(self.options.tolist()))

    def tensors(self) -> dict[str, Tensor]:
        """Flat tensors by name, for a safetensors file."""
        own = {"options": self.options, "impossible": self.impossible}
        return own | {f"statistics.{name}": x for name, x in self.statistics.tensors().items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> OptionStatistics:
        """The inverse of :meth:`tensors`; ``ArtifactError`` when shapes or values do not fit together."""
        statistics = Statistics.from_tensors(below(tensors, "statistics."))
        try:
            options, impossible = tensors["options"], tensors["impossible"]
        except KeyError as error:
            raise ArtifactError(f"the option statistics are incomplete: {error}") from error
        fits = impossible.shape == (statistics.examples,) and int(options.sum()) == statistics.examples
        if not fits or options.dim() != 1 or int(options.min()) < 1:
            raise ArtifactError("the option statistics are inconsistent: options do not add up")
        return cls(statistics, options, impossible.bool())


def score_options(
    model: ModelPair,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Scored],
    *,
    alpha: float = 0.1,
    directions: Sequence[str] = DIRECTIONS,
    vector: Tensor | None = None,
    grid: Tensor | None = None,
    batch_size: int = 16,
    base_cache: BaseCache | None = None,
    progress: bool = False,
) -> OptionStatistics:
    """Run both models once over the options of ``questions`` and keep what any strength needs.

    The prompt of a question is read once for all its options. Options are tokenised as
    :func:`svdk.warmstart.data.encode` tokenises completions, without an end-of-text token.

    Args:
        model: the pair.
        tokenizer: the model's tokenizer.
        questions: what to score.
        alpha: mask of the exact view, in (0, 1]; 0 keeps the unmasked views only.
        directions: to evaluate without mask on ``grid``.
        vector: (V,) static steering vector, scored on ``grid`` too.
        grid: (M,) ascending strengths with 0 among them; exact there, interpolated between.
        batch_size: questions whose prompts share a forward pass.
        base_cache: shared by calls with the same base model and questions, which it makes faster.
        progress: show a progress bar on standard error.

    Raises:
        InputError, DataError: an argument or a question that cannot be used.
        InvalidLogitsError: NaN or +inf logits; the message names the question.

    """
    if not questions:
        raise DataError("questions held 0 questions; allowed: at least 1")
    full = (*directions, *(("vector",) if vector is not None else ()))
    grid = default_grid(25) if grid is None else check_grid(grid)
    sweep = Sweep(alpha, full, grid, "auto", None if vector is None else vector.to(model.device))
    encoded = [encode_question(tokenizer, f"question {q.id}", q.prompt, q.options) for q in questions]
    runs = OptionRuns(model, encoded, batch_size=batch_size, base_cache=base_cache, progress=progress)
    return runs.statistics(sweep)


def encode_question(
    tokenizer: PreTrainedTokenizerBase, name: str, prompt: str, options: Sequence[str]
) -> EncodedQuestion:
    """Token ids of one question; ``DataError`` where the prompt or an option has none."""
    ids = encode_prompt(tokenizer, prompt)
    found = [encode_continuation(tokenizer, Example(prompt, text), ids) for text in options]
    if not ids or not all(found):
        raise DataError(f"{name} had an empty prompt or option; allowed: at least 1 token")
    return EncodedQuestion(name, ids, found)


@dataclass(frozen=True)
class OptionRuns:
    """Forward passes over the options of questions, each prompt read once for all of its options."""

    pair: ModelPair
    questions: Sequence[EncodedQuestion]
    batch_size: int = 16
    """Questions whose prompts share a forward pass."""
    base_cache: BaseCache | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        """Check what would fail halfway."""
        check_count("batch_size", self.batch_size)

    def statistics(self, sweep: Sweep) -> OptionStatistics:
        """What any strength needs."""
        parts = [[Part() for _ in one.options] for one in self.questions]
        for question, option, (warm, base), labels, rows in self.rows():
            name = self.questions[question].name
            add_rows(parts[question][option], sweep, warm, base, labels, rows, name)
        flat = [part for question in parts for part in question]
        return OptionStatistics(
            assemble(sweep, flat),
            torch.tensor([len(question) for question in parts]),
            torch.tensor([part.excluded > 0 for part in flat]),
        )

    def rows(
        self, views: Sequence[str] = BOTH, title: str = "scoring"
    ) -> Iterator[tuple[int, int, tuple[Tensor, ...], Tensor, Tensor]]:
        """Question and option number, the logits (R, V) of each view, labels (t,) and their rows (t,)."""
        if self.base_cache is not None:
            asked = [(one.prompt, one.options) for one in self.questions]
            self.base_cache.bind(
                self.pair, hashlib.sha256(repr((self.batch_size, asked)).encode()).hexdigest()
            )

        from tqdm.auto import tqdm  # here: importing it costs more than the rest of this module

        with tqdm(total=len(self.questions), desc=title, unit="question", disable=not self.progress) as bar:
            for members in _batches(self.questions, self.batch_size):
                for member, option, logits, labels, rows in self._batch(members, views):
                    yield members[member], option, logits, labels, rows
                bar.update(len(members))

    def _batch(
        self, members: list[int], views: Sequence[str]
    ) -> Iterator[tuple[int, int, tuple[Tensor, ...], Tensor, Tensor]]:
        """Some questions: prompts first, then every option on a copy of its prompt's cache."""
        pair, questions = self.pair, [self.questions[i] for i in members]
        options = [(owner, place) for owner, one in enumerate(questions) for place in range(len(one.options))]
        tokens = [questions[owner].options[place] for owner, place in options]
        caches = {"base": self.base_cache}
        with pair.evaluating():
            models = [_View(pair, name, questions, caches.get(name), members[0]) for name in views]
            for number, group in enumerate(_groups(list(map(len, tokens)), pair.vocab_size)):
                owners = torch.tensor([options[i][0] for i in group], device=pair.device)
                logits = [view.rows(number, owners, [tokens[i][:-1] for i in group]) for view in models]
                longest = logits[0].shape[1]
                flat = tuple(x.flatten(0, 1) for x in logits)
                for place, index in enumerate(group):
                    start, labels = place * longest, torch.tensor(tokens[index], device=pair.device)
                    rows = torch.arange(start, start + len(labels), device=pair.device)
                    yield *options[index], flat, labels, rows


def total_logprob(warm: Tensor, labels: Tensor, rows: Tensor, name: str, **steering: Any) -> float:
    """Nats: log-probability of the tokens ``labels`` (t,), at ``rows`` (t,) of logits (R, V), all together.

    ``steering``: as in :func:`svdk.steered_logprob`. ``InvalidLogitsError`` names the question ``name``.
    """
    info = steered_logprob(warm, labels=labels, warm_rows=rows, **steering)
    check_rows(info.status, name)
    return float(info.logprob.double().sum())


def _batches(questions: Sequence[EncodedQuestion], batch_size: int) -> Iterator[list[int]]:
    """Question numbers, longest prompts first: little padding, and the largest memory need shows at once."""
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].prompt), reverse=True)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _groups(lengths: list[int], vocab: int) -> Iterator[list[int]]:
    """Option numbers of like length, shortest first, each group within ``MAX_FORWARD`` logits a model.

    Answers to one question differ in length by a factor of three; padded to the longest, half of the work
    would be done on padding.
    """
    members: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        longest = lengths[members[0]] * 5 // 4 + 1 if members else 0
        if members and (
            lengths[index] > longest or (len(members) + 1) * lengths[index] * vocab > MAX_FORWARD
        ):
            yield members
            members = []
        members.append(index)
    if members:
        yield members


class _View:
    """One of the two models on a batch of prompts; the prompts run when a row of them is first needed."""

    def __init__(
        self,
        pair: ModelPair,
        view: str,
        questions: list[EncodedQuestion],
        cache: BaseCache | None = None,
        batch: int = 0,
    ) -> None:
        self._pair, self._name, self._questions = pair, view, questions
        self._forward = pair.warm if view == "warm" else pair.base
        self._base_cache, self._batch = cache, batch
        self._state: tuple[Tensor, ViewCache, Tensor] | None = None

    def rows(self, number: int, owners: Tensor, tails: list[list[int]]) -> Tensor:
        """(O, W, V) logits: for each option the last row of its prompt, then those of its own tokens."""
        first = self._cached((self._batch, "prompts"), lambda: self._prompts()[0])[owners]
        if not max(map(len, tails)):
            return first
        return torch.cat(
            [first, self._cached((self._batch, number), lambda: self._tails(owners, tails))], dim=1
        )

    def _cached(self, key: tuple, run: Callable[[], Tensor]) -> Tensor:
        if self._base_cache is None:
            return run()
        return self._base_cache.logits(key) if key in self._base_cache else self._base_cache.record(key, run)

    def _prompts(self) -> tuple[Tensor, ViewCache, Tensor]:
        """Logits (Q, 1, V) after the prompts, their cache and mask."""
        if self._state is None:
            prompts = [one.prompt for one in self._questions]
            ids, mask = pad(prompts, device=self._pair.device)
            cache = self._pair.new_cache(self._name)
            self._state = self._forward(ids, mask, cache=cache), cache, mask
        return self._state

    def _tails(self, owners: Tensor, tails: list[list[int]]) -> Tensor:
        _, cache, mask = self._prompts()
        ids, _ = pad(tails, left=False, device=self._pair.device)
        # What stands to the right of an option's last token cannot change its logits: attention is causal.
        mask = torch.cat([mask[owners], torch.ones_like(ids)], dim=1)
        return self._forward(ids, mask, cache=cache.select(owners), keep=ids.shape[1])
