"""From a base model, an adapter and labelled data to a calibrated :class:`svdk.Steering`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from svdk.calibration.artifact import Steering
from svdk.calibration.choices import ChoiceStatistics, choice_statistics, choices_of
from svdk.calibration.costs import decoding_costs
from svdk.calibration.estimators import OBJECTIVES
from svdk.calibration.kept_statistics import Statistics
from svdk.calibration.report import CalibrationConfig, judged_statistics, make_report
from svdk.calibration.sweep import Sweep, extract_steering
from svdk.errors import ArtifactError, DataError, InputError
from svdk.utils.checks import check_choice
from svdk.warmstart.data import CALIBRATION_FILE, Example, data_hash, load_examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from svdk.models.pair import ModelPair


def calibrate(
    model: Any,
    adapter: str | Path,
    data: str | Path | Sequence[Mapping[str, Any] | Example] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    direction: str = "kl_gradient",
    alpha: float = 0.1,
    estimator: str = "optimum",
    objective: str = "nll",
    lever: str = "constant",
    seed: int = 0,
    folds: int = 5,
    resamples: int = 2000,
    max_length: int = 512,
    too_long: str = "error",
    batch_size: int = 8,
    backend: str = "auto",
    progress: bool = False,
) -> Steering:
    """Find the steering strength of an adapter on labelled data; both models run over the data once.

    The expected gain is out of fold (the strength for an example is fitted without its fold, and so is the
    choice of the setting with ``direction="auto"``); its interval is a bootstrap over examples. The same
    arguments give the same result. Nothing is written: see :meth:`svdk.Steering.save`.

    Args:
        model: hub name, folder or file (see :func:`svdk.load_model`), a base model, or a PEFT model that
            already has this adapter.
        adapter: PEFT adapter folder.
        data: JSONL path or rows (prompt and completion, or messages, or prompt, options and label); default:
            the ``calibration.jsonl`` that the warm start left in the adapter folder.
        tokenizer: needed when ``model`` is not a name.
        direction: ``kl_gradient`` (the paper's), ``log_ratio``, or ``auto``: the best by cross-validation of
            both directions, each with mask ``alpha`` and without mask.
        alpha: confidence mask in [0, 1].
        estimator: ``mean`` (the paper's), ``median``, ``trimmed_mean``, ``ratio``, ``newton``, ``optimum``.
        objective: ``nll``, ``accuracy`` (greedy tokens) or ``choice``: what ``optimum`` and ``auto`` optimise
            and what the gain is measured in. ``choice`` is the NLL over the options of each question, each
            scored by the log-probability of all its tokens; data without options must have completions that
            form a small closed set. ``auto``: ``choice`` for such data, else ``nll``.
        lever: ``constant`` (one strength), ``positions`` (one for each of the first output positions, shrunk
            towards the single one), ``classes`` (likewise one each for content, template and stop), ``scale``
            (the adapter's own scale, found with six more runs of it; no base row in decoding), ``vector`` (a
            static vector as of :func:`svdk.static_steering`, one more run; no base row), ``none``, or
            ``auto``: the cheapest in decoding that is not demonstrably worse than the best. For choices among
            the same options also ``bias`` (one number an option, used by :func:`svdk.choose` alone), and no
            ``vector``, ``positions`` or ``classes``.
        seed: of the folds and the bootstrap.
        folds: of the cross-validation, at least 2.
        resamples: of the bootstrap, at least 1.
        max_length: in tokens, as in :func:`svdk.extract_steering`.
        too_long: ``error`` or ``skip``, for examples of more tokens.
        batch_size: examples in one forward pass.
        backend: of the ops.
        progress: show a progress bar on standard error.

    Raises:
        InputError, DataError, ArtifactError, InvalidLogitsError: naming the argument, example or file.

    """
    check_choice("objective", objective, (*OBJECTIVES, "auto"))
    # What stays open with "auto" is checked once the data is known.
    open_objective = "choice" if lever == "bias" else "nll"
    asked = open_objective if objective == "auto" else objective
    config = CalibrationConfig(direction, alpha, estimator, asked, seed, folds, resamples, lever)
    # Before a large model is loaded: what can be seen without it.
    if not Path(adapter, "adapter_config.json").is_file():
        raise ArtifactError(f"adapter {adapter} has no adapter_config.json; allowed: a PEFT adapter folder")
    if data is None:
        data = Path(adapter) / CALIBRATION_FILE
        if not data.exists():
            raise DataError(f"data was not given and {data} does not exist; needed: labelled examples")
    elif isinstance(data, (str, Path)) and not Path(data).is_file():
        raise DataError(f"data file {data} does not exist")
    with attached_pair(model, adapter, tokenizer) as (pair, peft_model, tokenizer):
        examples = load_examples(data, tokenizer)
        if len(examples) < 2:
            raise DataError(f"calibration data held {len(examples)} example; allowed: at least 2")
        choices = choices_of(examples, tokenizer) if objective in ("choice", "auto") else None
        if objective == "choice" and choices is None:
            raise DataError(
                f"objective was 'choice' and the {len(examples)} completions are no small closed set; "
                "needed: rows with options and label"
            )
        if objective == "auto":
            config = config.override(objective="nll" if choices is None else "choice")
        statistics: Statistics | ChoiceStatistics
        if choices is None:
            statistics = extract_steering(
                pair,
                examples,
                tokenizer=tokenizer,
                direction=direction,
                alpha=alpha,
                max_length=max_length,
                too_long=too_long,
                scales=_scales(pair, lever),
                vector_folds=(folds, seed) if lever in ("vector", "auto") else None,
                batch_size=batch_size,
                backend=backend,
                progress=progress,
            )
        else:
            statistics = choice_statistics(
                pair,
                tokenizer,
                choices,
                Sweep.of(direction, alpha, backend),
                scales=_scales(pair, lever),
                batch_size=batch_size,
                limit=(max_length, too_long),
                progress=progress,
            )
        costs = decoding_costs(pair) if lever == "auto" else None
        origin = origin_of(pair, peft_model, adapter, tokenizer, examples)
    return make_report(statistics, config, costs).steering(statistics=statistics.tensors(), **origin)


def _scales(pair: ModelPair, lever: str) -> tuple[float, ...]:
    """The scales of the adapter to try; none where it has none, unless they were asked for by name."""
    if lever not in ("scale", "auto"):
        return ()
    from svdk.calibration.alone import SCALES
    from svdk.models.adapter_scale import why_not_scaled

    reason = why_not_scaled(pair)
    if reason is not None and lever == "scale":
        raise InputError(f"lever was 'scale'; allowed with this adapter: the others, because {reason}")
    return () if reason is not None else SCALES


def recalibrate(
    folder: str | Path,
    *,
    direction: str | None = None,
    alpha: float | None = None,
    estimator: str | None = None,
    objective: str | None = None,
    lever: str | None = None,
    seed: int = 0,
    folds: int = 5,
    resamples: int = 2000,
) -> Steering:
    """Estimate anew from the statistics saved in ``folder``; no model runs, and nothing is written.

    What is None stays as saved. Raises ``InputError`` for a setting that was not extracted and
    ``ArtifactError`` when the artifact is damaged or has no statistics.
    """
    old = Steering.load(folder)
    statistics, saved = judged_statistics(old), CalibrationConfig.of(old)
    kept = saved.direction if old.direction == "vector" else old.direction
    config = saved.override(direction=direction or kept, alpha=alpha)
    config = config.override(
        estimator=estimator, objective=objective, lever=lever, seed=seed, folds=folds, resamples=resamples
    )
    names = ("peft_type", "base_model_fingerprint", "adapter_fingerprint", "tokenizer_fingerprint")
    origin = {name: getattr(old, name) for name in (*names, "vocab_size", "data_hash", "statistics")}
    costs = {name: value for name, value in old.metrics.items() if name.startswith("ms_rows_")}
    return make_report(statistics, config, costs).steering(**origin)


def origin_of(
    pair: ModelPair,
    peft_model: Any,
    adapter: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
) -> dict[str, Any]:
    """The fields of :class:`svdk.Steering` that say what it was made from."""
    from svdk.models.fingerprints import adapter_fingerprint, model_fingerprint, tokenizer_fingerprint

    return {
        "peft_type": pair.peft_type,
        "base_model_fingerprint": model_fingerprint(peft_model),
        "adapter_fingerprint": adapter_fingerprint(adapter),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "vocab_size": pair.vocab_size,
        "data_hash": data_hash(examples),
    }


@contextmanager
def attached_pair(
    model: Any, adapter: str | Path, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[tuple[ModelPair, Any, PreTrainedTokenizerBase]]:
    """The pair, the PEFT model and the tokenizer; a base model has the adapter inside the block only."""
    from peft import PeftModel

    from svdk.models.loading import detach, load_adapter, load_model
    from svdk.models.pair import ModelPair

    if isinstance(model, (str, Path)):
        model, loaded = load_model(model)
        tokenizer = tokenizer or loaded
    if tokenizer is None:
        raise InputError("tokenizer was None; allowed with a loaded model: its tokenizer")
    if isinstance(model, PeftModel):
        _check_attached(model, adapter)
        yield ModelPair(model), model, tokenizer
        return
    peft_model = load_adapter(model, adapter)
    try:
        yield ModelPair(peft_model), peft_model, tokenizer
    finally:
        detach(peft_model)


def _check_attached(model: Any, adapter: str | Path) -> None:
    """``ArtifactError`` unless the active adapter of ``model`` is the one in the folder ``adapter``."""
    from peft import get_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(adapter) / "adapter_model.safetensors"
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"adapter {path} cannot be read: {error}") from error
    attached: dict[str, Any] = get_peft_model_state_dict(
        model, adapter_name=model.active_adapter, save_embedding_layers=False
    )
    for name in sorted(saved.keys() | attached.keys()):
        ours, theirs = cast("Any", attached.get(name)), cast("Any", saved.get(name))
        same = ours is not None and theirs is not None and ours.shape == theirs.shape
        # Not exact: the model may have been loaded in another dtype than the adapter was saved in.
        if not same or not ours.float().cpu().allclose(theirs.float(), rtol=1e-2, atol=1e-3):
            raise ArtifactError(
                f"model had another adapter attached than the one in {adapter} (tensor {name} differs); "
                "allowed: that adapter, or the base model alone"
            )
