"""Two views of one PEFT model on shared weights: warm (adapter on) and base (adapter off)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from svdk.errors import InputError
from svdk.models.adapter_rules import PROMPT_TYPES, WEIGHT_TYPES, check_config
from svdk.models.adapter_rules import check_type as _check_type
from svdk.models.checkpoint import check_base_view
from svdk.models.rows import Layout, check_inputs
from svdk.models.stream import Stream, ViewCache, Virtual
from svdk.models.traits import find_traits
from svdk.utils.checks import check_choice
from svdk.utils.notices import warn_once
from svdk.utils.views import BASE

CACHES = ("dynamic", "static")


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
        self.traits = find_traits(self.module)
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
        if self.is_prefix:
            self.traits = dataclasses.replace(self.traits, padding=self.traits.padding_of_prefix)
        self.stream = Stream(self.module, self.traits)
        self.config = self.module.config
        check_base_view(self.module, self.layers)

    @property
    def device(self) -> torch.device:
        """Where inputs go and logits come from."""
        return self.module.device

    @property
    def sees_whole_rows(self) -> bool:
        """Whether every layer attends to the whole row: none slides, is chunked or keeps a state."""
        config = self.config.get_text_config(decoder=True)
        # The cache does not know all windows: GPT-Neo's are in the attention mask alone.
        named = any(value for name, value in config.to_dict().items() if "window" in name)
        return not named and all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)

    @property
    def is_recurrent(self) -> bool:
        """Whether a layer keeps a state instead of keys and values."""
        cache = DynamicCache(config=self.config.get_text_config(decoder=True))
        own = bool(self.traits.arguments & {"cache_params", "state"})  # Mamba's and RWKV's
        return own or any(getattr(cache, "is_linear", ()))

    @property
    def vocab_size(self) -> int:
        """Width of a logits row (may exceed the tokenizer's)."""
        return int(self.config.get_text_config(decoder=True).vocab_size)

    def new_cache(
        self, view: str, implementation: str | None = None, max_length: int | None = None
    ) -> ViewCache:
        """An empty cache for ``view``: "warm", "base" or, for both in one forward, "paired".

        ``max_length``: real tokens a row may reach, needed by the "static" implementation.
        """
        implementation = implementation or "dynamic"
        check_choice("cache_implementation", implementation, CACHES)
        if implementation == "static" and max_length is None:
            raise InputError("max_length was None; allowed with a static cache: the longest sequence")
        if self.traits.no_cache is not None:
            name = type(self.module).__name__
            warn_once(f"svdk runs all of {name}'s tokens again at each step: {self.traits.no_cache}")
        virtual = 0 if view == BASE else self.num_virtual_tokens
        return ViewCache(implementation, None if max_length is None else max_length + virtual)

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
        return self.forward_rows(input_ids, attention_mask, cache, keep, warm=len(input_ids))

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
        with self._adapters_off():
            return self.forward_rows(input_ids, attention_mask, cache, keep, warm=0)

    def forward_rows(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        cache: ViewCache | None,
        keep: int,
        *,
        warm: int,
    ) -> Tensor:
        """Logits (R, keep, V), adapter layers as they are; the first ``warm`` rows get virtual tokens."""
        pads = None if attention_mask is None else (attention_mask == 0).sum(1)
        virtual = self.num_virtual_tokens if warm else 0
        layout = Layout(len(input_ids), pads, virtual, warm, input_ids.device)
        return self.stream.run(input_ids, layout, self._virtual if virtual else None, cache, keep)

    def _virtual(self) -> Virtual:
        """The adapter's virtual tokens, as they are now."""
        model: Any = self._prompt_model
        prompt = model.get_prompt(batch_size=1)
        if self.is_prefix:
            return Virtual(prefix=list(prompt.layers))
        return Virtual(embeddings=prompt[0], embed=model.word_embeddings)

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
