"""Static steering vectors: the per-step vectors averaged over labelled data, for use without the base model.

The averaged vector is a bias on the logits: direction ``vector`` of every operation, and, cut to its largest
entries, the ``logit_bias`` that other engines take.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svdk.calibration.artifact import Steering
from svdk.calibration.averages import Averages, Averaging, unit, without_folds
from svdk.calibration.calibrate import attached_pair, origin_of
from svdk.calibration.estimators import Gains, fit, gains_at, split_folds
from svdk.calibration.kept_statistics import DIRECTIONS, default_grid
from svdk.calibration.loss_views import View
from svdk.calibration.report import CalibrationConfig, metrics_of
from svdk.calibration.sweep import Part, Sweep, add_rows, assemble, labelled_rows
from svdk.errors import DataError, InputError
from svdk.models.pair import ModelPair
from svdk.utils.bootstrap import bootstrap
from svdk.utils.checks import check_choice, check_count, check_number
from svdk.utils.tokens import eos_ids
from svdk.warmstart.data import CALIBRATION_FILE, Encoded, Example, encode_all, load_examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WEIGHTINGS = ("token", "example")
MAX_BIAS = 100.0
"""What OpenAI's and vLLM's ``logit_bias`` accept, either sign."""


def static_vector(
    model: Any,
    data: str | Path | Sequence[Mapping[str, Any] | Example],
    *,
    tokenizer: PreTrainedTokenizerBase,
    direction: str = "log_ratio",
    alpha: float = 0.1,
    weighting: str = "token",
    max_length: int = 512,
    too_long: str = "error",
    batch_size: int = 8,
    backend: str = "auto",
    progress: bool = False,
) -> Tensor:
    """The steering vectors of all labelled positions of ``data``, averaged: float32 (V,), in logits.

    At a position, a token outside the confidence set counts as 0, it is not left out: the average of a token
    is then small unless it is a candidate often, as its effect should be. With ``log_ratio`` and ``alpha=0``
    the result is the difference of the mean log-probabilities of both models, less the mean KL. Memory is
    bounded: a batch of logits and a float64 row.

    Args:
        model: a PEFT model, or a :class:`svdk.ModelPair`.
        data: JSONL path or rows, as :func:`svdk.warmstart.data.load_examples` takes them.
        tokenizer: the model's tokenizer.
        direction: ``log_ratio`` or ``kl_gradient`` (whose average is concentrated on few tokens, since every
            entry is weighted with its probability).
        alpha: confidence mask in [0, 1]; 0 keeps every token. With ``log_ratio`` and 0 the largest entries
            are tokens that are never likely. A mask of 0.1 was better on the tasks it was tried on
            (SmolLM2-135M, held-out NLL in nats a token: TruthfulQA 1.678 warm, 1.671 with 0, 1.664 with 0.1;
            the demo's dates 0.301, 0.245, 0.190), and then 300 entries are enough for :func:`logit_bias`.
        weighting: ``token``: every labelled position counts the same; ``example``: every example does, long
            or short.
        max_length: in tokens; longer examples are an error, or left out with ``too_long="skip"``.
        too_long: ``error`` or ``skip``.
        batch_size: examples in one forward pass (fewer when their logits would need too much memory).
        backend: of the ops.
        progress: show a progress bar on standard error.

    Raises:
        InputError, DataError: an argument or an example that cannot be used.
        InvalidLogitsError: NaN or +inf logits; the message names the example.

    """
    _check_vector(direction, alpha, weighting, batch_size)
    pair = model if isinstance(model, ModelPair) else ModelPair(model)
    encoded, _ = encode_all(tokenizer, load_examples(data, tokenizer), max_length, too_long)
    rows = LabelledRows(pair, encoded, batch_size, progress)
    everything = torch.ones(len(encoded), dtype=torch.bool)
    return _averages(rows, [everything], Averaging(direction, alpha, weighting, backend))[0]


def static_steering(
    model: Any,
    adapter: str | Path,
    data: str | Path | Sequence[Mapping[str, Any] | Example] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    direction: str = "log_ratio",
    alpha: float = 0.1,
    weighting: str = "token",
    estimator: str = "optimum",
    objective: str = "nll",
    seed: int = 0,
    folds: int = 5,
    resamples: int = 2000,
    max_length: int = 512,
    too_long: str = "error",
    batch_size: int = 8,
    backend: str = "auto",
    progress: bool = False,
) -> Steering:
    """A static vector with its calibrated strength: a :class:`svdk.Steering` of direction ``vector``.

    Decoding with it runs the warm-started model alone. The vector is shifted (a constant changes nothing) and
    scaled so that its median is 0 and its largest entry +-1: the strength is the largest change of a logit.
    Both models run over the data twice: for the vector, then for its loss along the strength. The expected
    gain is out of fold in all of it: for the examples of a fold, vector and strength come from the other
    folds. No mask applies when decoding (``alpha`` is that of the averaging).

    Args:
        model: hub name, folder or file (see :func:`svdk.load_model`), a base model, or a PEFT model that
            already has this adapter.
        adapter: PEFT adapter folder.
        data: JSONL path or rows; default: the ``calibration.jsonl`` in the adapter folder.
        tokenizer: needed when ``model`` is not a name.
        direction, alpha, weighting: of the vector, as in :func:`static_vector`.
        estimator, objective, seed, folds, resamples: of the strength, as in :func:`svdk.calibrate`.
        max_length, too_long, batch_size, backend, progress: as in :func:`static_vector`.

    Raises:
        InputError, DataError, ArtifactError, InvalidLogitsError: naming the argument, example or file.

    """
    _check_vector(direction, alpha, weighting, batch_size)
    CalibrationConfig("log_ratio", alpha, estimator, objective, seed, folds, resamples)
    data = Path(adapter) / CALIBRATION_FILE if data is None else data
    with attached_pair(model, adapter, tokenizer) as (pair, peft_model, tokenizer):
        examples = load_examples(data, tokenizer)
        encoded, _ = encode_all(tokenizer, examples, max_length, too_long)
        if len(encoded) < 2:
            raise DataError(f"calibration data held {len(encoded)} usable example; allowed: at least 2")
        fold = split_folds(len(encoded), folds, seed)
        # The last one is the result; the others leave a fold out each.
        groups = without_folds(fold)
        rows = LabelledRows(pair, encoded, batch_size, progress)
        vectors = [unit(v) for v in _averages(rows, groups, Averaging(direction, alpha, weighting, backend))]
        sweeps = [Sweep(0.0, ("vector",), default_grid(), backend, v.to(pair.device)) for v in vectors]
        parts = [[Part() for _ in encoded] for _ in sweeps]
        stop_ids = eos_ids(pair.module, tokenizer)
        for index, warm, base, labels, places in rows:
            for sweep, found in zip(sweeps, parts, strict=True):
                add_rows(found[index], sweep, warm, base, labels, places, f"calibration example {index}")
        statistics = [assemble(sweep, found, stop_ids) for sweep, found in zip(sweeps, parts, strict=True)]
        origin = origin_of(pair, peft_model, adapter, tokenizer, examples)
    views = [one.view("vector", 0.0) for one in statistics]
    gains = _out_of_fold(views[:-1], groups[:-1], estimator, objective)
    gain, interval = bootstrap(gains.of(objective), views[-1].tokens, resamples=resamples, seed=seed)
    best = fit(views[-1], estimator, objective)
    metrics = metrics_of(statistics[-1], views[-1], best.strength)
    return Steering(
        strength=best.strength,
        direction="vector",
        alpha=0.0,
        lever="vector",
        estimator=estimator,
        objective=objective,
        gain=gain,
        confidence_interval=interval,
        at_bound=best.at_bound,
        vector=vectors[-1],
        metrics=metrics | {"seed": seed, "folds": folds, "settings": 1, "vector_alpha": alpha},
        **origin,
    )


class LogitBias(dict[int, float]):
    """Token id -> bias in logits, largest first; a plain dict to ``json.dump`` (which writes string keys).

    Attributes:
        kept: the share of the whole vector's sum of absolute values that the entries hold, in [0, 1].
        clipped: entries that were cut to +-100.

    """

    kept: float = 1.0
    clipped: int = 0


def logit_bias(
    steering: Steering, tokenizer: PreTrainedTokenizerBase | None = None, *, top: int = 300
) -> LogitBias:
    """``mu * vector`` as the ``logit_bias`` of OpenAI-like APIs and vLLM, for an engine with the warm model.

    A constant on all tokens changes nothing, so the median is subtracted first: tokens without an entry,
    whose bias is 0, are then the typical ones. Entries are clipped to +-100.

    Args:
        steering: of direction ``vector`` and constant strength.
        tokenizer: leaves out ids that it does not have (padded vocabularies); servers refuse those.
        top: how many entries, the largest absolute values first (OpenAI takes 300); zeros are left out.

    Raises:
        InputError: a steering without a static vector, or a bad ``top``.

    """
    if steering.vector is None or steering.strength_mode != "constant" or len(steering.positions):
        have = f"{steering.direction}, strength mode {steering.strength_mode}"
        have += f", {len(steering.positions)} strengths by position" if len(steering.positions) else ""
        raise InputError(f"steering had direction {have}; allowed: direction vector, constant strength")
    check_count("top", top)
    bias = steering.strength * steering.vector.double().cpu()
    bias = bias - bias.median()
    known = torch.ones(len(bias), dtype=torch.bool)
    if tokenizer is not None:
        ids = torch.tensor(sorted(set(tokenizer.get_vocab().values())))
        known[:] = False
        known[ids[ids < len(bias)]] = True
    bias = torch.where(known, bias, 0.0)
    total = float(bias.abs().sum())
    order = bias.abs().sort(descending=True, stable=True).indices[:top]  # ties: the lower id first
    order = order[bias[order] != 0]
    chosen = bias[order]
    result = LogitBias(zip(order.tolist(), chosen.clamp(-MAX_BIAS, MAX_BIAS).tolist(), strict=True))
    result.kept = float(chosen.abs().sum()) / total if total else 1.0
    result.clipped = int((chosen.abs() > MAX_BIAS).sum())
    return result


class LabelledRows:
    """The logits of the labelled positions, example by example; each iteration runs both models anew."""

    def __init__(self, pair: ModelPair, encoded: list[Encoded], batch_size: int, progress: bool) -> None:
        """Nothing runs yet."""
        self.pair, self.encoded = pair, encoded
        self._batch_size, self._progress = batch_size, progress

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
        """Example number, warm and base logits (R, V) of its batch, its labels (t,) and their rows (t,)."""
        return labelled_rows(self.pair, self.encoded, self._batch_size, "static vector", self._progress)


def _averages(rows: LabelledRows, groups: list[Tensor], how: Averaging) -> list[Tensor]:
    """The average vector, float32 (V,) on the CPU, of each group of examples (E,) bool, in one run."""
    averages = Averages(torch.stack(groups, dim=1), rows.pair.vocab_size, rows.pair.device, how)
    for index, warm, base, _, places in rows:
        averages.add(index, warm, base, places)
    return averages.vectors()


def _out_of_fold(views: list[View], train: list[Tensor], estimator: str, objective: str) -> Gains:
    """Gain of every example under the vector and strength of the examples in ``train`` (without its fold)."""
    nll, correct = torch.zeros(2, views[0].examples, dtype=torch.float64)
    for view, keep in zip(views, train, strict=True):
        gains = gains_at(view, fit(view, estimator, objective, keep).strength)
        nll[~keep], correct[~keep] = gains.nll[~keep], gains.correct[~keep]
    return Gains(nll, correct)


def _check_vector(direction: str, alpha: float, weighting: str, batch_size: int) -> None:
    check_choice("direction", direction, DIRECTIONS)
    check_number("alpha", alpha, "[0, 1]")
    check_choice("weighting", weighting, WEIGHTINGS)
    check_count("batch_size", batch_size)
