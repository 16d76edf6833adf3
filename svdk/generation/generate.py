"""Steered decoding, both models in one forward where possible; :func:`generate` is a ``custom_generate``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers.generation import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)
from transformers.generation.configuration_utils import GenerationMode

from svdk.errors import InputError
from svdk.generation.loop import Call, ForwardOptions, SteeredOutput, run
from svdk.generation.processors import split_processors
from svdk.generation.sampler import SteeringOptions, build_sampler, split_options
from svdk.models.pair import ModelPair
from svdk.models.rows import check_inputs, row_positions
from svdk.utils.checks import check_count
from svdk.utils.tokens import id_list

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

    from svdk.ops.configs import SteeringConfig


def generate(
    model: nn.Module,
    input_ids: Tensor | None = None,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    steering: SteeringConfig | Mapping[str, SteeringConfig] | None = None,
    strength: float | Tensor | None = None,
    strength_mode: str | None = None,
    direction: str | None = None,
    alpha: float | Tensor | None = None,
    penalty: float | None = None,
    vector: Tensor | None = None,
    seed: int | Tensor | None = None,
    text_streamer: BaseStreamer | None = None,
    output_steering: bool = False,
    check: bool = False,
    backend: str = "auto",
    forward: str = "auto",
    row_adapters: Sequence[str] | None = None,
    verify_forward: bool = False,
    **model_kwargs: Any,
) -> Tensor | SteeredOutput:
    """Steered greedy decoding or sampling, as ``model.generate(..., custom_generate=svdk.generate)``.

    ``model`` is a PEFT model (or a transformers model with adapters in it); everything that
    ``generate`` takes for greedy decoding and sampling works: ``max_new_tokens``, ``do_sample``,
    ``temperature``, ``top_k``, ``top_p``, ``min_p``, several EOS ids, ``num_return_sequences``,
    stopping criteria, logits processors, ``return_dict_in_generate``, ``output_scores``,
    ``output_logits``, ``cache_implementation="static"``, ``use_cache=False``. Called directly, with
    a PEFT model and the same arguments, it goes through ``model.generate`` itself.

    Differences from a plain ``generate``: logits processors (repetition penalty and the like) run on
    the warm logits before steering, and what they change is carried over to the base logits;
    the temperature, top-k, top-p and min-p of the generation config apply to the steered logits; a
    streamer goes by ``text_streamer`` and a tokenizer cannot be given (transformers keeps both from
    a custom callable: for stop strings pass a ``StopStringCriteria``).

    Args:
        model: what transformers hands over, or a PEFT model.
        input_ids: (B, T), left-padded.
        logits_processor: as prepared by transformers.
        stopping_criteria: as prepared by transformers.
        generation_config: as prepared by transformers.
        steering: a calibrated artifact or a :class:`svdk.SteeringConfig`; the next six override its fields.
            With ``row_adapters`` also one artifact an adapter, by name.
        strength: mu (default 1), or the budget in nats for ``strength_mode="kl_budget"``; (B,) allowed.
        strength_mode: "constant" or "kl_budget".
        direction: "kl_gradient" (default), "log_ratio" or "vector".
        alpha: confidence threshold in [0, 1] (default 0.1); (B,) allowed.
        penalty: lambda outside the confidence set: finite, or -inf (default).
        vector: a fixed steering vector (V,) in logits; the base model is not run.
        seed: an integer (row r draws with ``seed + r``), a (B,) tensor (a row's tokens then do not
            depend on the batch around it), or None: from torch's global generator.
        text_streamer: gets the prompt, then each token.
        output_steering: with ``return_dict_in_generate``, also return ``steering_info``.
        check: raise on NaN or infinite logits instead of marking the row (synchronises every step).
        backend: as in :func:`svdk.steered_sample`.
        forward: "auto" runs both models in one forward over 2B rows where the adapter allows it, and says
            once why not where it does not; "paired" raises then; "two_pass" is the slower plain way.
        row_adapters: an adapter's name for each prompt: rows with different LoRA adapters in one
            batch. ``strength``, ``alpha``, ``temperature`` and so on may then be (B,) tensors.
        verify_forward: at the first step, compare the paired forward with each model's own and raise
            :class:`svdk.BackendError` if they differ; a debugging aid.
        model_kwargs: what else transformers prepared.

    Returns:
        (B, T + new) token ids, prompt included, or a :class:`SteeredOutput`.

    Raises:
        InputError: a bad argument, a model without a usable adapter, or a mode that is not steered
            (beam search, assisted decoding, input embeddings, an own cache).
        ArtifactError: ``steering`` was made for another kind of model.

    """
    options = SteeringOptions(
        steering,
        strength,
        strength_mode,
        direction,
        alpha,
        penalty,
        vector,
        seed,
        check=check,
        backend=backend,
    )
    paths = ForwardOptions(forward, row_adapters, verify_forward)
    prepared = functools.partial(
        _generate_prepared,
        options=options,
        paths=paths,
        text_streamer=text_streamer,
        output_steering=output_steering,
    )
    criteria = stopping_criteria if stopping_criteria is not None else StoppingCriteriaList()
    # What transformers prepares always has an end, and says whether there is a cache.
    ends = any(isinstance(criterion, MaxLengthCriteria) for criterion in criteria)
    is_prepared = ends and "use_cache" in model_kwargs
    if input_ids is None or logits_processor is None or generation_config is None or not is_prepared:
        # Called directly: transformers prepares the arguments, and calls the other function.
        return cast("Any", model).generate(
            input_ids,
            generation_config=generation_config,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            custom_generate=prepared,
            **model_kwargs,
        )
    return prepared(model, input_ids, logits_processor, criteria, generation_config, **model_kwargs)


def _generate_prepared(
    model: nn.Module,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    options: SteeringOptions,
    paths: ForwardOptions,
    text_streamer: BaseStreamer | None = None,
    output_steering: bool = False,
    **model_kwargs: Any,
) -> Tensor | SteeredOutput:
    """:func:`generate` with the arguments that transformers has prepared: processors, criteria, config."""
    config = generation_config
    _check_mode(config, model_kwargs)
    pair = ModelPair(model)
    input_ids = input_ids.to(pair.device)
    mask = model_kwargs.get("attention_mask")
    mask = check_inputs(input_ids, None if mask is None else mask.to(pair.device))
    _check_positions(model_kwargs.get("position_ids"), input_ids, mask)
    copies = config.num_return_sequences or 1
    names = ("temperature", "top_k", "top_p", "min_p")
    filters = {name: x for name in names if (x := getattr(config, name)) is not None}
    given = options.spread(pair, paths.row_adapters)
    sampler = build_sampler(pair, input_ids.shape[0], given, filters if config.do_sample else None, copies)
    if paths.row_adapters is not None:
        adapters = [name for name in paths.row_adapters for _ in range(copies)]
        paths = dataclasses.replace(paths, row_adapters=adapters)
    in_dict = bool(config.return_dict_in_generate)
    call = Call(
        criteria=stopping_criteria,
        processors=split_processors(logits_processor, config),
        pad_token_id=_padding(config, stopping_criteria),
        streamer=text_streamer,
        cache_implementation=config.cache_implementation,
        use_cache=config.use_cache is not False,
        max_length=config.max_length,
        scores=in_dict and bool(config.output_scores),
        logits=in_dict and bool(config.output_logits),
        steering=in_dict and output_steering,
    )
    output = run(pair, input_ids, mask, sampler, call, paths)
    return output if in_dict else output.sequences


def decode(
    pair: ModelPair,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    logits_processor: LogitsProcessorList | None = None,
    text_streamer: BaseStreamer | None = None,
    cache_implementation: str | None = None,
    use_cache: bool = True,
    output_scores: bool = False,
    output_logits: bool = False,
    output_steering: bool = False,
    forward: str = "auto",
    row_adapters: Sequence[str] | None = None,
    verify_forward: bool = False,
    **options: Any,
) -> SteeredOutput:
    """Steered decoding without ``model.generate``: one loop over a :class:`svdk.ModelPair`.

    Args:
        pair: the two views.
        input_ids: (B, T), left-padded.
        attention_mask: (B, T), or None when nothing is padded.
        max_new_tokens: at least 1.
        eos_token_id: one or more ids that end a row; None: rows end at ``max_new_tokens``.
        pad_token_id: what follows the end of a row (default: the first EOS id).
        stopping_criteria: more reasons to stop.
        logits_processor: run on the warm logits before steering; no temperature or filters.
        text_streamer: gets the prompt, then each token.
        cache_implementation: "dynamic" (default) or "static".
        use_cache: False runs every token of the row again at each step.
        output_scores: steered logits a step, float32 (B, V).
        output_logits: the warm model's (or the chosen view's) logits a step, float32 (B, V).
        output_steering: :class:`svdk.SampleInfo` a step.
        forward: "auto", "paired" or "two_pass", as in :func:`generate`.
        row_adapters: an adapter's name for each row, as in :func:`generate`.
        verify_forward: check the paired forward at the first step.
        options: ``steering``, ``strength``, ``strength_mode``, ``direction``, ``alpha``, ``penalty``,
            ``vector``, ``seed``, ``check``, ``backend`` as in :func:`generate`; ``do_sample``,
            ``temperature``, ``top_k``, ``top_p``, ``min_p`` as in transformers, but without its
            default ``top_k=50``; ``view="warm"`` or ``"base"`` (default "steered") for one model's
            own answer with the same filters and noise.

    Raises:
        InputError, ArtifactError: as :func:`generate`.

    """
    check_count("max_new_tokens", max_new_tokens)
    mask = check_inputs(input_ids, attention_mask)
    input_ids = input_ids.to(pair.device)
    mask = None if mask is None else mask.to(pair.device)
    paths = ForwardOptions(forward, row_adapters, verify_forward)
    given, filters = split_options(options)
    sampler = build_sampler(pair, input_ids.shape[0], given.spread(pair, row_adapters), filters)
    max_length = input_ids.shape[1] + max_new_tokens
    criteria = StoppingCriteriaList([MaxLengthCriteria(max_length)])
    if eos := id_list(eos_token_id):
        criteria.append(EosTokenCriteria(torch.tensor(eos, device=pair.device)))
        pad_token_id = eos[0] if pad_token_id is None else pad_token_id
    processors = logits_processor if logits_processor is not None else LogitsProcessorList()
    call = Call(
        criteria=StoppingCriteriaList([*criteria, *(stopping_criteria or ())]),
        processors=split_processors(processors, GenerationConfig(do_sample=False)),
        pad_token_id=pad_token_id,
        streamer=text_streamer,
        cache_implementation=cache_implementation,
        use_cache=use_cache,
        max_length=max_length,
        scores=output_scores,
        logits=output_logits,
        steering=output_steering,
    )
    return run(pair, input_ids, mask, sampler, call, paths)


def _check_mode(config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise InputError(
            f"generation mode was {mode.value}; allowed: greedy decoding and sampling, num_beams=1"
        )
    cache = model_kwargs.get("past_key_values")
    if getattr(cache, "_is_user_defined", False):
        raise InputError("past_key_values was given; allowed: None (the two models need a cache each)")
    # Recomputed for each of the two models, or made by transformers for one.
    known = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
    other = sorted(name for name, value in model_kwargs.items() if name not in known and value is not None)
    if other:
        raise InputError(
            f"generate was given {', '.join(other)}; allowed for the model: input_ids, attention_mask"
        )


def _check_positions(given: Tensor | None, input_ids: Tensor, mask: Tensor | None) -> None:
    expected = row_positions(input_ids, mask)
    if given is not None and bool((given.to(expected.device) != expected).any()):
        raise InputError("position_ids counted differently from attention_mask; allowed: leave them out")


def _padding(config: GenerationConfig, criteria: StoppingCriteriaList) -> int | None:
    """The padding id, else the first EOS id, as transformers has it."""
    eos = [criterion.eos_token_id for criterion in criteria if hasattr(criterion, "eos_token_id")]
    if config.pad_token_id is not None or not eos:
        return config.pad_token_id
    return int(torch.as_tensor(eos[0]).flatten()[0])
