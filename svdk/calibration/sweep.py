"""One teacher-forced sweep of both models over labelled data: the statistics that calibration needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svdk.calibration.estimators import split_folds
from svdk.calibration.kept_statistics import DIRECTIONS, GridSums, Statistics, default_grid
from svdk.errors import DataError, InputError, InvalidLogitsError
from svdk.ops.api import extract, steered_logprob
from svdk.ops.results import Status
from svdk.utils.checks import check_choice, check_count, check_number
from svdk.utils.tokens import eos_ids, pad
from svdk.warmstart.data import Encoded, Example, encode_all, load_examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from svdk.models.pair import ModelPair

MAX_FORWARD = 1 << 25
"""Logits of one model held at once (128 MiB in float32)."""
MAX_OP = 1 << 22
"""Logits given to an op at once; the reference backend needs about 80 bytes for each."""


def extract_steering(
    model: Any,
    data: str | Path | Sequence[Mapping[str, Any] | Example],
    *,
    tokenizer: PreTrainedTokenizerBase,
    direction: str = "kl_gradient",
    alpha: float = 0.1,
    max_length: int = 512,
    too_long: str = "error",
    batch_size: int = 8,
    grid: Tensor | None = None,
    scales: Sequence[float] = (),
    vector_folds: tuple[int, int] | None = None,
    backend: str = "auto",
    progress: bool = False,
) -> Statistics:
    """Run both models once over ``data``, teacher-forced, and keep what every estimator needs.

    Args:
        model: a PEFT model, or a :class:`svdk.ModelPair`.
        data: JSONL path or rows, as :func:`svdk.warmstart.data.load_examples` takes them.
        tokenizer: the model's tokenizer.
        direction: ``kl_gradient``, ``log_ratio``, or ``auto``: both, each with mask ``alpha`` and without.
        alpha: mask threshold in [0, 1]; with 0 the losses are evaluated on ``grid`` instead.
        max_length: in tokens; longer examples are an error, or left out with ``too_long="skip"``.
        too_long: ``error`` or ``skip``.
        batch_size: examples in one forward pass (fewer when their logits would need too much memory).
        grid: (M,) ascending strengths with 0 among them, for alpha = 0.
        scales: of the adapter, to try beside its own: one more run of the warm model each.
        vector_folds: number and seed of the folds that static vectors are averaged without (as in
            :func:`svdk.static_steering`), for the loss along them: one more run of the warm model.
        backend: of the ops.
        progress: show a progress bar on standard error.

    Raises:
        InputError, DataError: an argument or an example that cannot be used.
        InvalidLogitsError: NaN or +inf logits; the message names the example.

    """
    from svdk.calibration.alone import WarmRuns  # these two build on what is below
    from svdk.calibration.averages import Averages, unit
    from svdk.models.pair import ModelPair  # heavy: PEFT and transformers

    alpha = check_number("alpha", alpha, "[0, 1]")
    check_choice("direction", direction, (*DIRECTIONS, "auto"))
    check_count("batch_size", batch_size)
    pair = model if isinstance(model, ModelPair) else ModelPair(model)
    examples = load_examples(data, tokenizer)
    encoded, _ = encode_all(tokenizer, examples, max_length, too_long)
    sweep = Sweep.of(direction, alpha, backend, grid)
    fold = None if vector_folds is None else split_folds(len(encoded), *vector_folds)
    averages = None if fold is None else Averages.without(fold, pair.vocab_size, pair.device, backend)
    parts = [Part() for _ in encoded]
    for index, warm, base, labels, rows in labelled_rows(pair, encoded, batch_size, "calibration", progress):
        add_rows(parts[index], sweep, warm, base, labels, rows, f"calibration example {index}")
        if averages is not None:
            averages.add(index, warm, base, rows)
    statistics = assemble(sweep, parts, eos_ids(pair.module, tokenizer))
    runs = WarmRuns(pair, encoded, batch_size, backend, progress)
    if fold is not None and averages is not None:
        statistics = runs.with_vectors(statistics, [unit(x) for x in averages.vectors()], fold)
    return runs.with_scales(statistics, scales) if scales else statistics


def check_grid(grid: Tensor) -> Tensor:
    """``grid`` as float64; ``InputError`` unless its strengths ascend, are finite and include 0."""
    grid = torch.as_tensor(grid, dtype=torch.float64)
    ascending = grid.dim() == 1 and len(grid) >= 3 and bool((grid.diff() > 0).all())
    if not ascending or not bool((grid == 0).any()) or not bool(torch.isfinite(grid).all()):
        raise InputError(f"grid was {grid.tolist()}; allowed: at least 3 ascending numbers, one of them 0")
    return grid


@dataclass(frozen=True)
class Sweep:
    """What to compute of every labelled row."""

    alpha: float
    full: tuple[str, ...]
    """Directions to evaluate without mask on ``grid``; "vector" needs ``vector``."""
    grid: Tensor
    backend: str
    vector: Tensor | None = None
    """(V,) a static steering vector."""

    @classmethod
    def of(cls, direction: str, alpha: float, backend: str, grid: Tensor | None = None) -> Sweep:
        """For a calibration: ``auto`` asks for both directions without mask beside the mask."""
        full = DIRECTIONS if direction == "auto" else (direction,) if alpha == 0 else ()
        return cls(alpha, full, default_grid() if grid is None else check_grid(grid), backend)


@dataclass
class Part:
    """The statistics of one example; lists have one entry a chunk of its tokens."""

    excluded: int = 0
    logprobs: list[Tensor] = field(default_factory=list)  # (2, t): warm, base
    sizes: list[Tensor] = field(default_factory=list)
    entries: list[Tensor] = field(default_factory=list)  # (2, n): p, ratio
    labels: list[Tensor] = field(default_factory=list)
    places: list[Tensor] = field(default_factory=list)  # (3, t): position, label, likeliest
    moments: dict[str, list[Tensor]] = field(default_factory=dict)  # (3, t)
    curves: dict[str, list[Tensor]] = field(default_factory=dict)  # (3, t, M)
    hits: dict[str, list[Tensor]] = field(default_factory=dict)  # (t, M)


def _batches(encoded: list[Encoded], batch_size: int, vocab: int) -> Iterator[list[int]]:
    """Example numbers, longest first (the largest memory need shows at once), within ``MAX_FORWARD``."""
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].input_ids), reverse=True)
    members: list[int] = []
    keep = 0
    for index in order:
        wider = max(keep, encoded[index].label_count)
        if members and (len(members) == batch_size or (len(members) + 1) * wider * vocab > MAX_FORWARD):
            yield members
            members, wider = [], encoded[index].label_count
        members.append(index)
        keep = wider
    if members:
        yield members


def labelled_rows(
    pair: ModelPair, encoded: list[Encoded], batch_size: int, title: str = "", progress: bool = False
) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
    """Both models once over all examples, a batch at a time.

    Yields for each example its number, the warm and base logits (R, V) of its batch, its labels (t,) and
    their rows (t,). ``title`` names the progress bar.
    """
    for index, (warm, base), labels, rows in rows_of(
        pair, encoded, batch_size, pair.teacher_forced, title, progress
    ):
        yield index, warm, base, labels, rows


def rows_of(
    pair: ModelPair,
    encoded: list[Encoded],
    batch_size: int,
    forward: Callable[[Tensor, Tensor, int], tuple[Tensor, ...]],
    title: str,
    progress: bool,
) -> Iterator[tuple[int, tuple[Tensor, ...], Tensor, Tensor]]:
    """As :func:`labelled_rows`, with the logits (B, keep, V) each of any ``forward(ids, mask, keep)``."""
    from tqdm.auto import tqdm  # here: importing it costs more than the rest of this module

    with tqdm(total=len(encoded), desc=title, unit="example", disable=not progress) as bar:
        for members in _batches(encoded, batch_size, pair.vocab_size):
            # The last token is a label only.
            ids, mask = pad([encoded[i].input_ids[:-1] for i in members], device=pair.device)
            keep = max(encoded[i].label_count for i in members)
            views = tuple(logits.flatten(0, 1) for logits in forward(ids, mask, keep))
            for row, index in enumerate(members):
                count, end = encoded[index].label_count, (row + 1) * keep
                labels = torch.tensor(encoded[index].input_ids[-count:], device=ids.device)
                yield index, views, labels, torch.arange(end - count, end, device=ids.device)
            bar.update(len(members))


def add_rows(
    part: Part,
    sweep: Sweep,
    warm: Tensor,
    base: Tensor,
    labels: Tensor,
    rows: Tensor,
    name: str,
) -> None:
    """Add the statistics of some tokens of one example to ``part``.

    ``warm``, ``base``: (R, V) logits; ``rows``, ``labels``: (t,) the rows of this example's tokens and what
    they should have predicted. ``name`` stands for the example in error messages.
    """
    chunk = max(1, MAX_OP // warm.shape[1])
    for start in range(0, len(labels), chunk):
        some, chosen = rows[start : start + chunk], labels[start : start + chunk]
        _add_chunk(part, sweep, warm, base, chosen, {"warm_rows": some, "base_rows": some}, start, name)


def _add_chunk(
    part: Part,
    sweep: Sweep,
    warm: Tensor,
    base: Tensor,
    labels: Tensor,
    where: dict[str, Any],
    start: int,
    name: str,
) -> None:
    """Tokens from the ``start``-th of an example on; ``where``: their rows in both operands."""
    setting: dict[str, Any] = {"direction": "log_ratio", "alpha": sweep.alpha, "backend": sweep.backend}
    info = steered_logprob(warm, base, labels, strength=0.0, **setting, **where)
    check_rows(info.status, name)
    # A label that the warm model rules out has infinite loss at any strength: counted, then left out.
    possible = torch.isfinite(info.logprob_warm)
    part.excluded += int((~possible).sum())
    where = {name: rows[possible] for name, rows in where.items()}
    order = torch.arange(start, start + len(labels), device=labels.device)
    places = torch.stack([order, labels, info.greedy.to(labels)])
    part.places.append(places[:, possible].int().cpu())
    labels = labels[possible]
    part.logprobs.append(torch.stack([info.logprob_warm, info.logprob_base])[:, possible].cpu())
    if not len(labels):
        return
    if sweep.alpha > 0:
        batch = extract(warm, base, **setting, **where)
        sizes = batch.row_ptr.diff()
        row = torch.repeat_interleave(torch.arange(len(labels), device=labels.device), sizes)
        hit = (batch.token_ids == labels[row]).nonzero()[:, 0]
        place = torch.full_like(labels, -1)
        place[row[hit]] = hit - batch.row_ptr[row[hit]]
        part.sizes.append(sizes.int().cpu())
        part.entries.append(torch.stack([batch.p, batch.delta]).cpu())
        part.labels.append(place.int().cpu())
    for direction in sweep.full:
        steering: dict[str, Any] = {"alpha": 0.0, "backend": sweep.backend}
        if direction == "vector":
            steering |= {"vector": sweep.vector, "warm_rows": where["warm_rows"]}
        else:
            steering |= {"base_logits": base, "direction": direction, **where}
        strengths = sweep.grid.float().to(warm.device)
        info = steered_logprob(warm, labels=labels, strengths=strengths, **steering)
        moments = torch.stack([info.gain, info.norm2, info.variance]).cpu()
        part.moments.setdefault(direction, []).append(moments)
        curves = torch.stack([-info.logprob, -info.slope, info.curvature]).cpu()
        part.curves.setdefault(direction, []).append(curves)
        part.hits.setdefault(direction, []).append((info.greedy == labels[:, None]).cpu())


def check_rows(status: Tensor, name: str) -> None:
    """``InvalidLogitsError`` when the rows of the example ``name`` with this status have no distribution."""
    bad = int((status & Status.INVALID).ne(0).sum())
    if bad:
        raise InvalidLogitsError(
            f"{name}: the logits of {bad} of its tokens hold NaN or +inf, or nothing "
            "finite; allowed: a model whose logits are finite (another dtype, or a warm start that converged)"
        )


def assemble(sweep: Sweep, parts: list[Part], stop_ids: Sequence[int] = ()) -> Statistics:
    """All examples in their order; one of which no label was possible keeps its place with 0 tokens.

    ``stop_ids``: the tokens that end a completion.
    """

    def joined(name: str, dim: int = 0) -> Tensor:
        return torch.cat([tensor for part in parts for tensor in getattr(part, name)], dim=dim)

    def by_direction(name: str, direction: str, dim: int) -> Tensor:
        return torch.cat([x for part in parts for x in getattr(part, name).get(direction, ())], dim=dim)

    tokens = torch.tensor([sum(x.shape[1] for x in part.logprobs) for part in parts])
    excluded = sum(part.excluded for part in parts)
    if not int(tokens.sum()):
        raise DataError(f"the warm model gives probability 0 to all {excluded} labels; needed: possible ones")
    logprob_warm, logprob_base = joined("logprobs", 1)
    masked: dict[str, Any] = {}
    if sweep.alpha > 0:
        p, ratio = joined("entries", 1)
        masked = {"sizes": joined("sizes"), "p": p, "ratio": ratio, "label": joined("labels")}
    full = {
        direction: GridSums(
            by_direction("moments", direction, 1),
            by_direction("curves", direction, 1),
            by_direction("hits", direction, 0),
        )
        for direction in sweep.full
    }
    position, label_ids, greedy = joined("places", 1)
    rest: dict[str, Any] = {"grid": sweep.grid.float().double()} if full else {}  # the ops saw it in float32
    rest |= {"position": position, "label_ids": label_ids, "greedy": greedy}
    rest["stop_ids"] = torch.tensor(list(stop_ids)).long()
    return Statistics(
        tokens, logprob_warm, logprob_base, excluded, alpha=sweep.alpha, full=full, **masked, **rest
    )
