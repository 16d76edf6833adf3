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

from svdk.errors import InputError
from svdk.generation.caller import mixed_batch, mixed_rows, pair_of, running_generate, unmixed_after_errors
from svdk.generation.loop import Call, ForwardOptions, SteeredOutput, run
from svdk.generation.options import (
    Stream,
    check_inputs_given,
    check_mode,
    check_options,
    check_positions,
    direct_arguments,
    ending,
    given_inputs,
    stop_criteria,
)
from svdk.generation.processors import split_processors
from svdk.generation.sampler import SteeringOptions, build_sampler, split_options
from svdk.models.pair import ModelPair
from svdk.models.paired_forward import FORWARDS, say_two_passes, why_not_paired
from svdk.models.rows import check_inputs
from svdk.utils.checks import check_choice, check_count
from svdk.utils.tokens import id_list

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
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
    strength_scale: float = 1.0,
    seed: int | Tensor | None = None,
    streamer: BaseStreamer | None = None,
    text_streamer: BaseStreamer | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
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
    ``output_logits``, ``cache_implementation="static"``, ``use_cache=False``, ``streamer``,
    ``prefix_allowed_tokens_fn`` and, with PEFT, ``adapter_names``. Called directly, with a PEFT model and
    the same arguments, it goes through ``model.generate`` itself.

    Differences from a plain ``generate``: logits processors (repetition penalty and the like) run on
    the warm logits before steering, and what they change is carried over to the base logits;
    the temperature, top-k, top-p and min-p of the generation config apply to the steered logits. For
    ``stop_strings`` call this function directly, with ``tokenizer``: ``model.generate`` keeps the tokenizer
    from a custom callable and says that there is none (or pass it a ``StopStringCriteria``).

    Args:
        model: what transformers hands over, or a PEFT model.
        input_ids: (B, T), left-padded.
        logits_processor: as prepared by transformers.
        stopping_criteria: as prepared by transformers.
        generation_config: as prepared by transformers.
        steering: a calibrated artifact or a :class:`svdk.SteeringConfig`; the next six override its fields
            (``strength`` its strengths by position, too). With ``row_adapters`` also one artifact an
            adapter, by name.
        strength: mu (default 1), or the budget in nats for ``strength_mode="kl_budget"``; (B,) allowed.
        strength_mode: "constant" or "kl_budget".
        direction: "kl_gradient" (default), "log_ratio" or "vector".
        alpha: confidence threshold in [0, 1] (default 0.1); (B,) allowed.
        penalty: lambda outside the confidence set: finite, or -inf (default).
        vector: a fixed steering vector (V,) in logits; the base model is not run.
        strength_scale: a dial: all strengths are multiplied by it, and so is what an adapter's calibrated
            scale adds to 1. 1 is as calibrated, 0 the warm start, behind the mask where there is one.
        seed: an integer (spread over the rows as in :func:`svdk.steered_sample`), a (B,) tensor (a row's
            tokens then do not depend on the batch around it), or None: from torch's global generator.
        streamer: gets the prompt, then each token; it is ended also where an error is raised.
        text_streamer: another name for ``streamer``.
        tokenizer: for ``stop_strings``, in a direct call.
        output_steering: with ``return_dict_in_generate``, also return ``steering_info``.
        check: raise on NaN or infinite logits instead of marking the row (synchronises every step).
        backend: as in :func:`svdk.steered_sample`.
        forward: "auto" runs both models in one forward over 2B rows where the adapter allows it, and says
            once why not where it does not; "paired" raises then; "two_pass" is the slower plain way.
        row_adapters: an adapter's name for each prompt: rows with different LoRA adapters in one
            batch. ``strength``, ``alpha``, ``temperature`` and so on may then be (B,) tensors. PEFT's own
            ``adapter_names`` mean the same, with any ``forward``.
        verify_forward: at the first step, compare the paired forward with each model's own and raise
            :class:`svdk.BackendError` if they differ; a debugging aid.
        model_kwargs: what else transformers prepared; in a direct call, what else ``generate`` takes.

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
        strength_scale,
        seed,
        check=check,
        backend=backend,
    )
    paths = ForwardOptions(forward, row_adapters, verify_forward)
    streams = [Stream(given) for given in (streamer, text_streamer) if given is not None]
    with ending(streams), unmixed_after_errors(model):
        criteria = stopping_criteria if stopping_criteria is not None else StoppingCriteriaList()
        # What transformers prepares always has an end, and says whether there is a cache.
        ends = any(isinstance(criterion, MaxLengthCriteria) for criterion in criteria)
        is_prepared = ends and "use_cache" in model_kwargs
        if input_ids is None or logits_processor is None or generation_config is None or not is_prepared:
            is_prepared, caller = False, {}
        else:
            caller = running_generate(model, input_ids, generation_config) or {}
        if (hidden := caller.get("streamer")) is not None:
            streams.append(Stream(hidden, has_prompt=True))
        prepared = functools.partial(
            _generate_prepared,
            pair=pair_of(model),
            options=options,
            paths=paths,
            streamer=_only(streams),
            output_steering=output_steering,
        )
        if is_prepared:
            assert input_ids is not None and logits_processor is not None and generation_config is not None
            check_options(caller or model_kwargs)
            criteria = stop_criteria(generation_config.stop_strings, tokenizer, criteria)
            return prepared(model, input_ids, logits_processor, criteria, generation_config, **model_kwargs)
        # Called directly: transformers prepares the arguments, and calls the other function.
        given: dict[str, Any] = {
            "input_ids": input_ids,
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "generation_config": generation_config,
        }
        given = {name: value for name, value in given.items() if value is not None} | model_kwargs
        given = direct_arguments(model, tokenizer, given)
        return cast("Any", model).generate(custom_generate=prepared, **given)


def _only(streams: list[Stream]) -> Stream | None:
    if len(streams) > 1:
        raise InputError("streamer was given beside text_streamer; allowed: one of them")
    return streams[0] if streams else None


def _generate_prepared(
    model: nn.Module,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    pair: ModelPair,
    options: SteeringOptions,
    paths: ForwardOptions,
    streamer: BaseStreamer | None = None,
    output_steering: bool = False,
    **model_kwargs: Any,
) -> Tensor | SteeredOutput:
    """:func:`generate` with the arguments that transformers has prepared: processors, criteria, config."""
    config = generation_config
    check_mode(config)
    inputs = given_inputs(running_generate(model, input_ids, config), model_kwargs)
    check_inputs_given(inputs, config)
    input_ids = input_ids.to(pair.device)
    mask = model_kwargs.get("attention_mask")
    mask = check_inputs(input_ids, None if mask is None else mask.to(pair.device))
    if inputs.get("position_ids") is not None:
        check_positions(model_kwargs.get("position_ids"), input_ids, mask)
    copies, names = config.num_return_sequences or 1, mixed_batch(pair)
    if names is not None and paths.row_adapters is not None:
        raise InputError("row_adapters was given beside adapter_names; allowed: one of them")
    kernel = ("temperature", "top_k", "top_p", "min_p")
    filters = {name: x for name in kernel if (x := getattr(config, name)) is not None}
    given = options.spread(pair, names or paths.row_adapters)
    sampler = build_sampler(pair, input_ids.shape[0], given, filters if config.do_sample else None, copies)
    if names is not None:
        names = _row_names(names, input_ids.shape[0], copies)
        paths, names = _mixed_paths(pair, paths, names, input_ids, both=len(sampler.views) == 2)
    elif paths.row_adapters is not None:
        adapters = [name for name in paths.row_adapters for _ in range(copies)]
        paths = dataclasses.replace(paths, row_adapters=adapters)
    in_dict = bool(config.return_dict_in_generate)
    call = Call(
        criteria=stopping_criteria,
        processors=split_processors(logits_processor, config),
        pad_token_id=_padding(config, stopping_criteria),
        streamer=streamer,
        cache_implementation=config.cache_implementation,
        use_cache=config.use_cache is not False,
        max_length=config.max_length,
        scores=in_dict and bool(config.output_scores),
        logits=in_dict and bool(config.output_logits),
        steering=in_dict and output_steering,
    )
    with mixed_rows(pair, names):
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
            ``vector``, ``strength_scale``, ``seed``, ``check``, ``backend`` as in :func:`generate`;
            ``do_sample``, ``temperature``, ``top_k``, ``top_p``, ``min_p`` as in transformers, but without
            its default ``top_k=50``; ``view="warm"`` or ``"base"`` (default "steered") for one model's
            own answer with the same filters and uniforms.

    Raises:
        InputError, ArtifactError: as :func:`generate`.

    """
    streams = [] if text_streamer is None else [Stream(text_streamer)]
    with ending(streams):
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
            streamer=streams[0] if streams else None,
            cache_implementation=cache_implementation,
            use_cache=use_cache,
            max_length=max_length,
            scores=output_scores,
            logits=output_logits,
            steering=output_steering,
        )
        return run(pair, input_ids, mask, sampler, call, paths)


def _row_names(names: list[str], rows: int, copies: int) -> list[str]:
    """PEFT's ``adapter_names``, a name a row: one for each prompt, or for each of its copies as in PEFT."""
    if len(names) * copies == rows:
        return [name for name in names for _ in range(copies)]
    if len(names) != rows:
        raise InputError(
            f"adapter_names had {len(names)} names; allowed: one for each of {rows // copies} prompts"
        )
    return names


def _mixed_paths(
    pair: ModelPair, paths: ForwardOptions, names: list[str], input_ids: Tensor, *, both: bool
) -> tuple[ForwardOptions, list[str] | None]:
    """How a mixed batch of PEFT is run: as rows of the paired forward, else through PEFT's hooks."""
    check_choice("forward", paths.forward, FORWARDS)
    if paths.forward == "two_pass" or not both:
        return paths, names
    with mixed_rows(pair, None):
        reason = why_not_paired(pair, input_ids, names)
    if reason is not None and paths.forward == "auto":
        say_two_passes(reason)
        return dataclasses.replace(paths, forward="two_pass"), names
    return dataclasses.replace(paths, row_adapters=names), None


def _padding(config: GenerationConfig, criteria: StoppingCriteriaList) -> int | None:
    """The padding id, else the first EOS id, as transformers has it."""
    eos = [criterion.eos_token_id for criterion in criteria if hasattr(criterion, "eos_token_id")]
    if config.pad_token_id is not None or not eos:
        return config.pad_token_id
    return int(torch.as_tensor(eos[0]).flatten()[0])
