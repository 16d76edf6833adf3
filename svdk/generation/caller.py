"""What the code that runs svdk knows and does not hand on.

transformers keeps ``streamer`` and ``assistant_model`` from a ``custom_generate``, and the attention mask
from a logits processor: they are read from the frame of the running ``generate``. PEFT leaves the
``adapter_names`` of a mixed batch in hooks on the layers.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftMixedModel, PeftModel
from torch import Tensor, nn
from transformers.generation.configuration_utils import GenerationMode

from svdk.errors import InputError
from svdk.models.pair import ModelPair
from svdk.models.rows import check_inputs

if TYPE_CHECKING:
    from transformers.generation import GenerationConfig, LogitsProcessor

_MODULE = "transformers.generation.utils"
_BY_PEFT = {"adapter_names", "alora_offsets"}
"""What PEFT hands to its layers through forward hooks."""


def inner_model(model: Any) -> Any:
    """The transformers model inside PEFT's wrappers; anything else as it is."""
    if isinstance(model, PeftModel):
        return model.get_base_model()
    return model.base_model.model if isinstance(model, PeftMixedModel) else model


def pair_of(model: Any) -> ModelPair:
    """The two views of a model that generates.

    Raises:
        InputError: no model that generates, or none that can be steered; no argument beside it is blamed.

    """
    inner = inner_model(model)
    if not isinstance(inner, nn.Module) or not callable(getattr(inner, "generate", None)):
        raise InputError(
            f"model was {type(inner).__name__}, which has no generate; allowed: a PeftModel around a "
            "decoder-only transformers model"
        )
    return ModelPair(inner if isinstance(model, PeftMixedModel) else model)


def running_generate(model: nn.Module, input_ids: Tensor, config: GenerationConfig) -> dict[str, Any] | None:
    """Locals of the ``GenerationMixin.generate`` that called a ``custom_generate`` with these arguments.

    None: no such call (svdk was called by hand, or from another thread). A ``generate`` of another model, or
    of this one for another call, is told apart by the objects that it prepared.
    """
    mine = inner_model(model)

    def called(values: Mapping[str, Any]) -> bool:
        prepared = values.get("input_ids") is input_ids or values["generation_config"] is config
        return prepared and inner_model(values["self"]) is mine

    return _find(called, "generate")


def decoding_call(model: nn.Module, processor: LogitsProcessor, ids: Tensor) -> dict[str, Any] | None:
    """Locals of what runs ``processor`` on its first ``ids`` (N, T): ``generate``, else a loop by itself.

    None: a loop of the user's own, also one inside a ``generate`` of something else.
    """
    mine = inner_model(model)

    def runs(values: Mapping[str, Any]) -> bool:
        lists = (values.get(name) or () for name in ("prepared_logits_processor", "logits_processor"))
        listed = any(one is processor for processors in lists for one in processors)
        if listed or inner_model(values["self"]) is not mine:
            return listed
        prompts = values.get("input_ids")  # the processor may be wrapped in another one
        return isinstance(prompts, Tensor) and torch.equal(prompts.to(ids.device), ids)

    return _find(runs, "generate") or _find(runs)


def assisted_by(call: Mapping[str, Any]) -> str | None:
    """The argument that made ``generate`` decode with an assistant, or None."""
    config = call["generation_config"]
    assisted = call.get("generation_mode") == GenerationMode.ASSISTED_GENERATION
    if not assisted and not getattr(config, "is_assistant", False):
        return None
    for name in ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"):
        if getattr(config, name, None):
            return name
    return "assistant_model"


def mask_of(call: Mapping[str, Any], ids: Tensor) -> Tensor | None:
    """The mask (N, T) that a call of ``generate`` has for its prompts ``ids``; None: nothing is padded.

    Raises:
        InputError: the mask is for other tokens than these.

    """
    rows, length = ids.shape
    mask = call["model_kwargs"].get("attention_mask")
    if mask is None:  # transformers drops a mask of ones, and writes down how long it was
        shape = (rows, getattr(call["generation_config"], "_mask_length", length))
    else:
        mask = mask if "inputs_tensor" in call else mask[:, :length]  # a loop is one token ahead
        shape = tuple(mask.shape)
    if shape != (rows, length):
        raise InputError(
            f"attention_mask in generate had shape {shape} for input_ids of {(rows, length)}; allowed with "
            "SteeringLogitsProcessor: the same shape (the base model has to see the whole prompt)"
        )
    return None if mask is None else check_inputs(ids, mask.to(ids.device))


def mixed_batch(pair: ModelPair) -> list[str] | None:
    """The ``adapter_names`` that PEFT's ``generate`` was given, a name a row; None without."""
    for layer in pair.layers.values():
        for hook in reversed(_hooks(layer).values()):  # the last one registered has the last word
            if "adapter_names" in hook.keywords:
                return list(hook.keywords["adapter_names"])
    return None


@contextmanager
def mixed_rows(pair: ModelPair, names: list[str] | None) -> Iterator[None]:
    """PEFT's hooks with these ``adapter_names`` instead of their own; None: no hooks.

    They come back at the end, but not after an error: PEFT would leave them in the model for ever.
    """
    taken = {layer: hooks for layer in pair.layers.values() if (hooks := _hooks(layer))}
    handles = []
    try:
        for layer, hooks in taken.items():
            _remove_hooks(layer)
            for hook in hooks.values() if names is not None else ():
                given = {"adapter_names": names} if "adapter_names" in hook.keywords else hook.keywords
                new = functools.partial(hook.func, **given)
                handles.append(layer.register_forward_pre_hook(new, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
    for layer, hooks in taken.items():  # under their old keys, by which PEFT removes them
        layer._forward_pre_hooks.update(hooks)
        layer._forward_pre_hooks_with_kwargs.update(dict.fromkeys(hooks, True))


@contextmanager
def unmixed_after_errors(model: Any) -> Iterator[None]:
    """Remove PEFT's hooks of a mixed batch when anything goes wrong inside, as PEFT itself does not."""
    try:
        yield
    except BaseException:
        _remove_hooks(model)
        raise


def _remove_hooks(model: Any) -> None:
    for module in model.modules() if isinstance(model, nn.Module) else ():
        for key in _hooks(module):
            module._forward_pre_hooks.pop(key, None)
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _hooks(module: nn.Module) -> dict[int, functools.partial[Any]]:
    return {
        key: hook
        for key, hook in module._forward_pre_hooks.items()
        if isinstance(hook, functools.partial)
        and _BY_PEFT & hook.keywords.keys()
        and hook.func.__module__.startswith("peft.")
    }


def _find(wanted: Callable[[Mapping[str, Any]], bool], function: str | None = None) -> dict[str, Any] | None:
    """Locals of the innermost frame of transformers' decoding (a ``function`` of it) that is ``wanted``."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        ours = frame.f_globals.get("__name__") == _MODULE and code.co_flags & inspect.CO_OPTIMIZED
        if ours and function in (None, code.co_name):
            view = frame.f_locals
            values = dict(view)
            if isinstance(view, dict):
                # Until Python 3.12 the frame keeps this copy, and so every tensor in it, while it runs.
                view.clear()
            if {"self", "generation_config", "model_kwargs"} <= values.keys() and wanted(values):
                return values
        frame = frame.f_back  # type: ignore[assignment]
    return None
