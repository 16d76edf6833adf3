"""Options of transformers' ``generate`` that svdk has to see to itself: they work, or are refused by name."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor
from transformers.generation import GenerationConfig, StoppingCriteriaList, StopStringCriteria
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer

from svdk.errors import InputError
from svdk.models.rows import row_positions

_REFUSED = {
    "assistant_model": "assisted decoding is not steered; leave it out",
    "assistant_tokenizer": "assisted decoding is not steered; leave it out",
    "synced_gpus": "ranks that shard a model are not kept in step",
    "negative_prompt_ids": "guidance is not combined with steering",
    "negative_prompt_attention_mask": "guidance is not combined with steering",
}
_CACHES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")
"""Names of a model's own cache in transformers, which makes one unless the user gives one."""
_INPUTS = {"inputs", "input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep"}
"""Handled, or worked out anew for each of the two models."""


class Stream(BaseStreamer):
    """A streamer that is ended exactly once, so that an error can end it too and no reader waits for ever."""

    def __init__(self, streamer: Any, *, has_prompt: bool = False) -> None:
        """``has_prompt``: transformers has put the prompt already."""
        self._streamer = streamer
        self._skip = has_prompt
        self._ended = False

    def put(self, value: Tensor) -> None:
        """The prompt, then each token."""
        if self._skip:
            self._skip = False
            return
        self._streamer.put(value)

    def end(self) -> None:
        """No more tokens; a second time does nothing."""
        if not self._ended:
            self._ended = True
            self._streamer.end()


@contextmanager
def ending(streams: Sequence[Stream]) -> Iterator[None]:
    """End the streams when anything goes wrong inside; their readers would wait for ever."""
    try:
        yield
    except BaseException:
        for stream in streams:
            with suppress(Exception):
                stream.end()
        raise


def check_options(given: Mapping[str, Any]) -> None:
    """Refuse by name what has no meaning beside steering; None and False are as good as absent."""
    for name, why in _REFUSED.items():
        value = given.get(name)
        if value is not None and value is not False:
            raise InputError(f"{name} was given; allowed while steering: None ({why})")


def check_mode(config: GenerationConfig) -> None:
    """Refuse what is neither greedy decoding nor sampling, and outputs that two models do not have."""
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise InputError(
            f"generation mode was {mode.value}; allowed: greedy decoding and sampling, num_beams=1"
        )
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name, None):
            raise InputError(f"{name} was True; allowed while steering: False (there are two models)")


def check_inputs_given(given: Mapping[str, Any], config: GenerationConfig) -> None:
    """Refuse inputs of the model, among what the user gave, that are not tokens and their mask."""
    for name in _CACHES:
        if given.get(name) is not None:
            raise InputError(f"{name} was given; allowed: None (the two models need a cache each)")
    _refuse_others(given, config, object, "for the model")


def check_positions(given: Tensor | None, input_ids: Tensor, mask: Tensor | None) -> None:
    """Refuse position ids other than those that the mask implies, which each of the two models gets."""
    expected = row_positions(input_ids, mask)
    if given is not None and bool((given.to(expected.device) != expected).any()):
        raise InputError("position_ids counted differently from attention_mask; allowed: leave them out")


def check_tokens_only(given: Mapping[str, Any], config: GenerationConfig) -> None:
    """Refuse tensors that a plain ``generate`` hands to the model, but a logits processor does not see."""
    _refuse_others(given, config, Tensor, "with SteeringLogitsProcessor")


def _refuse_others(given: Mapping[str, Any], config: GenerationConfig, kind: type, where: str) -> None:
    other = sorted(
        name
        for name, value in given.items()
        if isinstance(value, kind) and value is not None and name not in _INPUTS and not hasattr(config, name)
    )
    if other:
        raise InputError(f"generate was given {', '.join(other)}; allowed {where}: input_ids, attention_mask")


def given_inputs(caller: Mapping[str, Any] | None, model_kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the user gave for the model, without what transformers made of it.

    ``caller``: locals of the ``generate`` that prepared ``model_kwargs``; without, they are the user's own,
    but for a cache that ``generate`` has not marked as given.
    """
    if caller is not None:
        return caller["kwargs"]
    made = {
        name
        for name in _CACHES
        if name in model_kwargs and not getattr(model_kwargs[name], "_is_user_defined", False)
    }
    return {name: value for name, value in model_kwargs.items() if name not in made}


def stop_criteria(strings: Any, tokenizer: Any, criteria: Sequence[Any] | None) -> StoppingCriteriaList:
    """``criteria`` and one for the stop strings; as in transformers, one that is there already counts.

    Raises:
        InputError: no tokenizer, or stop strings that are none.

    """
    found = StoppingCriteriaList(criteria or ())
    if strings is None or any(type(criterion) is StopStringCriteria for criterion in found):
        return found
    several = [strings] if isinstance(strings, str) else strings
    is_list = isinstance(several, (list, tuple)) and bool(several)
    if not is_list or not all(isinstance(text, str) and text for text in several):
        raise InputError(f"stop_strings was {strings!r}; allowed: a string or several, none empty")
    if not callable(getattr(tokenizer, "get_vocab", None)):
        found_type = "None" if tokenizer is None else type(tokenizer).__name__
        raise InputError(f"tokenizer was {found_type}; allowed with stop_strings: the model's tokenizer")
    found.append(StopStringCriteria(tokenizer, list(several)))
    return found


def direct_arguments(model: Any, tokenizer: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a direct call hands to ``model.generate``, where stop strings are criteria already.

    Raises:
        InputError: an option that is not steered, two prompts, or stop strings without a tokenizer.

    """
    given = dict(arguments)
    check_options(given)
    if given.pop("custom_generate", None) is not None:
        raise InputError("custom_generate was given; allowed: None (svdk.generate is one)")
    if given.get("inputs") is not None and given.get("input_ids") is not None:
        raise InputError("inputs was given beside input_ids; allowed: one of them")
    inputs = given.pop("inputs", None)
    if inputs is not None:
        given["input_ids"] = inputs
    config, own = given.get("generation_config"), getattr(model, "generation_config", None)

    def value(name: str) -> Any:  # in transformers' order
        if name in given:
            return given[name]
        first = getattr(config, name, None)
        return getattr(own, name, None) if first is None else first

    if value("token_healing"):
        raise InputError("token_healing was True; allowed while steering: False")
    if given.get("cache_implementation") == "paged":  # transformers then forgets about custom_generate
        raise InputError("cache_implementation was 'paged'; allowed: dynamic, static")
    strings = value("stop_strings")
    given["stopping_criteria"] = stop_criteria(strings, tokenizer, given.get("stopping_criteria"))
    if strings is None:
        return given
    # transformers, which keeps the tokenizer from a callable, must not look for it.
    if config is not None:
        given["generation_config"] = copy.deepcopy(config)
        given["generation_config"].stop_strings = None
    if config is None or getattr(own, "stop_strings", None) is not None or "stop_strings" in given:
        given["stop_strings"] = None
    return given
