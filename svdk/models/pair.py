"""Two views of one PEFT model on shared weights: warm (adapter on) and base (adapter off)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from svdk.errors import InputError
from svdk.models.adapter_rules import PROMPT_TYPES, WEIGHT_TYPES, check_config
from svdk.models.adapter_rules import check_type as _check_type
from svdk.models.checkpoint import check_base_view
from svdk.utils.checks import check_choice
from svdk.utils.views import WARM

CACHES = ("dynamic", "static")


@dataclass
class ViewCache:
    """The key-value cache of one view, and how many real (not virtual) tokens it holds."""

    kv: Cache
    seen: int = 0


class ModelPair:
    """The warm-started and the base view of one model; each forward runs under ``torch.no_grad``.

    ``model`` is a ``PeftModel``, a transformers model with adapters inside it, or the inner model
    that PEFT's ``generate`` hands to a ``custom_generate`` callable. Left padding and virtual tokens
    change neither view: every row's logits are those of the row alone, without padding. The base view
    flips a flag on the adapter layers for the length of a forward, so a pair must not run in two
    threads at once.

    Raises:
        InputError: no adapter, an unknown PEFT type, or an adapter that the base view cannot leave out
            (merged, already disabled, or one that changed the base weights).

    """

    def __init__(self, model: nn.Module) -> None:
        """Find the adapter and its layers; nothing is copied and nothing is changed."""
        owner = _peft_owner(model)
        if owner is not None:  # an unknown type is named as such, whatever it put into the model
            _check_type(owner.active_peft_config)
        self.module = cast("PreTrainedModel", model if owner is None else owner.get_base_model())
        self._root = self.module if owner is None else owner
        self._prompt_model: PeftModel | None = None
        # modules() once: PEFT's disable_adapter() walks them all on every entry and exit, 30 ms a token.
        kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        self.layers: dict[str, nn.Module] = {
            name: cast(nn.Module, m) for name, m in self.module.named_modules() if isinstance(m, kinds)
        }
        """Adapter layers by name, fixed when the pair is made."""
        self._configs = getattr(self.module, "peft_config", None) or getattr(owner, "peft_config", {})
        if owner is not None and owner.active_peft_config.is_prompt_learning:
            self._prompt_model = owner
            configs = [owner.active_peft_config]
            disabled = owner._adapters_disabled
        else:
            configs = self._layer_configs()
            disabled = any(layer.disable_adapters for layer in self.layers.values())
        if disabled:
            raise InputError("adapter was disabled; allowed: an enabled one (leave disable_adapter() first)")
        for config in configs:
            check_config(config)
        self.peft_type = "+".join(sorted({config.peft_type.value for config in configs}))
        self.num_virtual_tokens: int = 0 if self._prompt_model is None else configs[0].num_virtual_tokens
        self.is_prefix = self.peft_type == "PREFIX_TUNING"

        self.config = self.module.config
        self._arguments = set(inspect.signature(self.module.forward).parameters)
        if self.config.is_encoder_decoder or "past_key_values" not in self._arguments:
            name = type(self.module).__name__
            raise InputError(f"model was {name}; allowed: a decoder-only model with a key-value cache")
        check_base_view(self.module, self.layers)

    @property
    def device(self) -> torch.device:
        """Where inputs go and logits come from."""
        return self.module.device

    @property
    def vocab_size(self) -> int:
        """Width of a logits row (may exceed the tokenizer's)."""
        return int(self.config.get_text_config(decoder=True).vocab_size)

    def new_cache(
        self, view: str, batch_size: int, implementation: str | None = None, max_length: int | None = None
    ) -> ViewCache:
        """An empty cache for ``view`` ("warm" or "base"); a tuned prefix is already in the warm one.

        ``max_length``: real tokens a row may reach, needed by the "static" implementation.
        """
        implementation = implementation or "dynamic"
        check_choice("cache_implementation", implementation, CACHES)
        prefix = self.prefix_cache(batch_size) if view == WARM and self.is_prefix else None
        if implementation == "dynamic":
            return ViewCache(DynamicCache(config=self.config) if prefix is None else prefix)
        if max_length is None:
            raise InputError("max_length was None; allowed with a static cache: the longest sequence")
        virtual = self.num_virtual_tokens if view == WARM else 0
        static = StaticCache(config=self.config, max_cache_len=max_length + virtual)
        layers: list[Any] = [] if prefix is None else prefix.layers
        for index, layer in enumerate(layers):
            if layer.is_initialized:
                static.update(layer.keys, layer.values, index)
        return ViewCache(static)

    @torch.no_grad()
    def warm(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cache: ViewCache | None = None,
        keep: int = 1,
    ) -> Tensor:
        """Logits (B, keep, V) of the warm-started model at the last ``keep`` positions.

        ``input_ids`` (B, T): the tokens that ``cache`` does not hold yet. ``attention_mask``
        (B, seen + T): 1 for real tokens of the whole row, None when there is no padding.
        """
        seen = cache.seen if cache else 0
        kv = cache.kv if cache else None
        positions = row_positions(input_ids, attention_mask, seen)
        inputs: dict[str, Any] = {"input_ids": input_ids}
        virtual = self.num_virtual_tokens
        if virtual:
            batch = input_ids.shape[0]
            positions = positions + virtual
            if attention_mask is not None:
                attention_mask = torch.cat([attention_mask.new_ones(batch, virtual), attention_mask], dim=1)
            if self.is_prefix:
                kv = self.prefix_cache(batch) if kv is None else kv
            elif seen == 0:
                inputs = {"inputs_embeds": self.prompt_embeddings(input_ids)}
                first = torch.arange(virtual, device=positions.device).expand(batch, -1)
                positions = torch.cat([first, positions], dim=1)
        logits = self.forward_rows(inputs, attention_mask, positions, kv, keep)
        if cache:
            cache.seen += input_ids.shape[1]
        return logits

    @torch.no_grad()
    def base(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cache: ViewCache | None = None,
        keep: int = 1,
    ) -> Tensor:
        """Logits (B, keep, V) of the base model; arguments as in :meth:`warm`."""
        positions = row_positions(input_ids, attention_mask, cache.seen if cache else 0)
        with self._adapters_off():
            logits = self.forward_rows(
                {"input_ids": input_ids}, attention_mask, positions, cache.kv if cache else None, keep
            )
        if cache:
            cache.seen += input_ids.shape[1]
        return logits

    def teacher_forced(
        self, input_ids: Tensor, attention_mask: Tensor | None, keep: int
    ) -> tuple[Tensor, Tensor]:
        """Warm and base logits, each (B, keep, V), at the last ``keep`` positions of left-padded rows.

        Args:
            input_ids: (B, T)
            attention_mask: (B, T), or None when nothing is padded
            keep: positions from the right, 1 to T; virtual tokens do not count

        Raises:
            InputError: wrong shapes, padding on the right, or ``keep`` out of range.

        """
        attention_mask = check_inputs(input_ids, attention_mask)
        length = input_ids.shape[1]
        if not 1 <= keep <= length:
            raise InputError(f"keep was {keep}; allowed: 1 to the row length {length}")
        with self.evaluating():
            warm = self.warm(input_ids, attention_mask, keep=keep)
            return warm, self.base(input_ids, attention_mask, keep=keep)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode (no dropout) inside; every module gets its own mode back, also after an error."""
        training = [module for module in self._root.modules() if module.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True

    @contextmanager
    def _adapters_off(self) -> Iterator[None]:
        # The flag itself, past nn.Module.__setattr__: enable_adapters() would also walk the parameters
        # and change requires_grad, and the base view is entered once a token.
        layers = list(self.layers.values())
        flags = [vars(layer).get("_disable_adapters", False) for layer in layers]
        try:
            for layer in layers:
                vars(layer)["_disable_adapters"] = True
            yield
        finally:
            for layer, flag in zip(layers, flags, strict=True):
                vars(layer)["_disable_adapters"] = flag

    def forward_rows(
        self,
        inputs: dict[str, Any],
        attention_mask: Tensor | None,
        positions: Tensor,
        kv: Cache | None,
        keep: int,
    ) -> Tensor:
        """One call of the model with the adapters as they are; the views prepare the arguments."""
        if "position_ids" in self._arguments:  # models with ALiBi count from the mask themselves
            inputs["position_ids"] = positions
        if "logits_to_keep" in self._arguments:
            inputs["logits_to_keep"] = keep
        output = self.module(
            **inputs,
            attention_mask=attention_mask,
            past_key_values=kv,
            use_cache=kv is not None,
            return_dict=True,
        )
        return output.logits[:, -keep:]

    def prompt_embeddings(self, input_ids: Tensor) -> Tensor:
        """Virtual and real embeddings, (B, virtual + T, hidden)."""
        model: Any = self._prompt_model
        embedded, prompt = model.word_embeddings(input_ids), model.get_prompt(batch_size=input_ids.shape[0])
        return torch.cat([prompt.to(embedded.dtype), embedded], dim=1)

    @torch.no_grad()
    def prefix_cache(self, batch_size: int) -> Cache:
        """A cache that holds the tuned prefix for ``batch_size`` rows and nothing else."""
        model: Any = self._prompt_model
        return model.get_prompt(batch_size=batch_size)

    def _layer_configs(self) -> list[Any]:
        """The configs of the adapters that are active inside the layers."""
        tuners = [layer for layer in self.layers.values() if isinstance(layer, BaseTunerLayer)]
        if not tuners:
            raise InputError(
                f"model was {type(self.module).__name__} without a PEFT adapter that generates; allowed: "
                f"a PeftModel of type {', '.join((*WEIGHT_TYPES, *PROMPT_TYPES))}"
            )
        if any(layer.merged for layer in tuners):
            raise InputError(
                "adapter was merged into the base weights; allowed: unmerged (unmerge_adapter())"
            )
        active = {name for layer in tuners for name in layer.active_adapters}
        present = {name for layer in tuners for name in layer._get_available_adapters()}
        if not active or active - present:
            allowed = f"one or more of {sorted(present)} (set_adapter())"
            raise InputError(f"active adapter was {sorted(active)}; allowed: {allowed}")
        return [self._configs[name] for name in sorted(active)]

    def check_adapters(self, names: Sequence[str]) -> None:
        """Refuse adapters, active or not, whose type or settings do not leave the base model as it is."""
        for name in names:
            check_config(self._configs[name])


def check_inputs(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """The mask of left-padded rows (B, T), or None when nothing is padded (attention is faster then).

    Raises:
        InputError: wrong shape or type, an empty row, or padding that is not on the left.

    """
    if input_ids.dim() != 2 or input_ids.shape[1] == 0 or input_ids.is_floating_point():
        found = f"{tuple(input_ids.shape)} {input_ids.dtype}"
        raise InputError(f"input_ids was {found}; allowed: integers of shape (B, T), T at least 1")
    if attention_mask is None:
        return None
    if attention_mask.shape != input_ids.shape:
        had, wanted = tuple(attention_mask.shape), tuple(input_ids.shape)
        raise InputError(f"attention_mask had shape {had}; allowed: that of input_ids, {wanted}")
    mask = attention_mask != 0
    if bool(mask.all()):
        return None
    if not bool(mask[:, -1].all()) or bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise InputError(
            "attention_mask had a 0 after a 1 or an empty row; allowed: padding on the left only"
        )
    return mask.long()


def row_positions(input_ids: Tensor, attention_mask: Tensor | None, seen: int) -> Tensor:
    """Position ids (B, T) that padding does not shift."""
    batch, length = input_ids.shape
    if attention_mask is None:
        return torch.arange(seen, seen + length, device=input_ids.device).expand(batch, -1)
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -length:]


def _peft_owner(model: nn.Module) -> PeftModel | None:
    """The PeftModel around ``model``, when it is one or when PEFT's ``generate`` is running it.

    Prompt learning leaves no trace in the inner model except that, for the length of a call,
    ``PeftModelForCausalLM.generate`` puts its own bound method in place of the inner model's.
    """
    if isinstance(model, PeftModel):
        return model
    bound = getattr(model, "prepare_inputs_for_generation", None)
    owner = getattr(bound, "__self__", None)
    return owner if isinstance(owner, PeftModel) else None
