"""The model's forward over left-padded rows, step by step, as its own ``generate`` would call it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.generation.utils import ALL_CACHE_NAMES

from svdk.errors import InputError
from svdk.models.rows import Layout
from svdk.models.traits import Traits


@dataclass
class ViewCache:
    """The rows that a view has seen, and what the model keeps of them."""

    implementation: str = "dynamic"
    max_length: int | None = None
    """Columns that a static cache has room for, virtual tokens included."""
    kept: dict[str, Any] = field(default_factory=dict)
    """The model's own cache, by the name of its argument; empty before the first forward."""
    ids: Tensor | None = None
    """(R, virtual + seen)"""
    seen: int = 0
    """Real (not virtual) tokens of a row."""
    tables: Tensor | None = None
    """The rotary tables of the keys; see :class:`svdk.models.rotary.LengthRotary`."""

    @property
    def kv(self) -> Any:
        """The model's own cache object, None before the first forward."""
        return next(iter(self.kept.values()), None)

    def reorder(self, rows: Tensor) -> None:
        """Row i goes on from what was row ``rows[i]``; as many rows as before."""
        if self.kv is not None:
            self.kv.reorder_cache(rows)
        self.ids = None if self.ids is None else self.ids[rows]
        self.tables = None if self.tables is None else self.tables[rows]

    def select(self, rows: Tensor) -> ViewCache:
        """A cache of these rows, each as often as it is named; this one keeps its own tensors."""
        kv = copy.copy(self.kv)
        kv.layers = [copy.copy(layer) for layer in kv.layers]
        kv.batch_select_indices(rows)  # puts new tensors in place of the old ones
        ids = None if self.ids is None else self.ids[rows]
        tables = None if self.tables is None else self.tables[rows]
        kept = dict.fromkeys(self.kept, kv)
        return ViewCache(self.implementation, self.max_length, kept, ids, self.seen, tables)


@dataclass(frozen=True)
class Virtual:
    """The virtual tokens of a prompt-learning adapter: their embeddings, or their keys and values."""

    embeddings: Tensor | None = None
    """(virtual, hidden)"""
    embed: Callable[[Tensor], Tensor] | None = None
    """The model's word embeddings."""
    prefix: list[Any] | None = None
    """Layers of a cache that holds keys and values (1, heads, virtual or fewer, size)."""


class Stream:
    """Runs a model with the arguments that its own methods prepare, at each step.

    ``module``: the model, with whatever adapter state it has at the time of a call.
    """

    def __init__(self, module: PreTrainedModel, traits: Traits) -> None:
        """Nothing runs yet."""
        self._module: Any = module
        self._traits = traits
        self.columns = 0
        """Columns of the forward that is running, or ran last."""

    def run(
        self,
        input_ids: Tensor,
        layout: Layout,
        virtual: Callable[[], Virtual] | None,
        cache: ViewCache | None,
        keep: int,
    ) -> Tensor:
        """Logits (R, keep, V) at the last ``keep`` positions of rows (R, T) that follow those in ``cache``.

        ``virtual``: makes the virtual tokens that ``layout`` has room for, where they are needed.

        Raises:
            InputError: what this model cannot do rightly, with the reason.

        """
        traits, new = self._traits, input_ids.shape[1]
        caching = cache is not None and traits.cache is not None
        if layout.leads is not None and traits.padding is not None:
            raise InputError(
                f"attention_mask had padding; allowed for {type(self._module).__name__}: rows of one length, "
                f"without padding, because {traits.padding}"
            )
        first = cache is None or cache.ids is None
        ids = layout.ids(input_ids) if first else torch.cat([cache.ids, input_ids], dim=1)  # type: ignore
        tables = None
        if traits.rotary:
            tables = traits.rotary.tables(layout.positions(ids.shape[1])[:, -1] + 1)
        kept = {} if cache is None else cache.kept
        if cache is not None and cache.tables is not None and not torch.equal(cache.tables, tables):  # type: ignore
            kept = {}  # its keys were made with other tables
        inputs = self._prepare(ids, new, layout, kept, caching) if kept else None
        with traits.rotary.rowwise() if traits.rotary else nullcontext():
            if inputs is None:  # every token of the row: the first time, or where a cache cannot go on
                tokens = Virtual() if virtual is None else virtual()
                kept = self._new_cache(cache, tokens)
                inputs = self._prepare(ids, new, layout, kept, caching, tokens)
                assert inputs is not None
                with nullcontext() if tokens.prefix is None else _planted(kept, tokens.prefix, layout):
                    output = self._module(**self._accepted(inputs, keep))
            else:
                output = self._module(**self._accepted(inputs, keep))
        if cache is not None:
            if caching:
                after = self._module._update_model_kwargs_for_generation(output, dict(kept))
                kept = {name: after[name] for name in ALL_CACHE_NAMES if after.get(name) is not None}
            cache.kept, cache.ids, cache.tables = kept, ids, tables
            cache.seen += new
        return output.logits[:, -keep:]

    def _prepare(
        self,
        ids: Tensor,
        new: int,
        layout: Layout,
        kept: dict[str, Any],
        caching: bool,
        virtual: Virtual | None = None,
    ) -> dict[str, Any] | None:
        """The arguments of a forward over the last ``new`` columns; None: the model gave up its cache.

        ``virtual``: given where all columns run.
        """
        width = ids.shape[1]
        given: dict[str, Any] = {"attention_mask": layout.mask(width), "use_cache": caching or bool(kept)}
        given |= kept
        if self._traits.positions:
            given["position_ids"] = layout.positions(width)
        if virtual is not None and virtual.embeddings is not None:
            given["inputs_embeds"] = _embedded(ids, layout, virtual)
        # The class's own: PEFT's generate puts a method of its own in the object.
        prepare = type(self._module).prepare_inputs_for_generation
        inputs = prepare(
            self._module,
            ids,
            next_sequence_length=None if virtual is not None else new,
            is_first_iteration=virtual is not None,
            **given,
        )
        if any(inputs.get(name) is None for name in kept):
            if virtual is None:
                return None
            inputs |= kept  # an empty cache, which loses nothing
        columns = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        if columns.shape[1] not in (new, width):
            name = type(self._module).__name__
            raise InputError(
                f"model was {name}, which predicts by adding tokens of its own to the row; allowed: a model "
                "whose last logits are those of the next token"
            )
        self.columns = columns.shape[1]
        return inputs

    def _accepted(self, inputs: dict[str, Any], keep: int) -> dict[str, Any]:
        """Arguments that the forward takes, with what this library wants of it."""
        inputs = inputs | {"return_dict": True}
        if inputs.get("inputs_embeds") is not None:  # some prepare both, and take one
            inputs.pop("input_ids", None)
        if "logits_to_keep" in self._traits.arguments:
            inputs["logits_to_keep"] = keep
        return {name: x for name, x in inputs.items() if self._traits.accepts(name)}

    def _new_cache(self, cache: ViewCache | None, virtual: Virtual) -> dict[str, Any]:
        """An empty cache of the kind that the model wants; none where nothing is to be kept."""
        name, kind = self._traits.cache, type(self._module).__name__
        if name is None and virtual.prefix is not None:
            raise InputError(f"adapter was PREFIX_TUNING; allowed for {kind}: those that need no cache")
        if name is None or (cache is None and virtual.prefix is None):
            return {}
        static = cache is not None and cache.implementation == "static"
        if not self._module._supports_default_dynamic_cache():
            if static or virtual.prefix is not None:
                what = "cache_implementation was 'static'" if static else "adapter was PREFIX_TUNING"
                raise InputError(f"{what}; {kind} has a cache of its own kind")
            return {}  # it makes one itself
        config = self._module.config.get_text_config(decoder=True)
        if static and cache is not None and cache.max_length is not None:
            return {name: StaticCache(config=config, max_cache_len=cache.max_length)}
        kv = DynamicCache(config=config)
        if virtual.prefix is not None and any(getattr(kv, "is_linear", ())):
            raise InputError(
                f"adapter was PREFIX_TUNING on {kind}, whose recurrent layers have no "
                "keys; allowed: models with attention in every layer"
            )
        return {name: kv}


def _embedded(ids: Tensor, layout: Layout, virtual: Virtual) -> Tensor:
    """(R, width, hidden), the virtual tokens in their places."""
    assert virtual.embed is not None and virtual.embeddings is not None
    embedded = virtual.embed(ids)
    embedded[layout.spots()] = virtual.embeddings.to(embedded.dtype)
    return embedded


@contextmanager
def _planted(kept: dict[str, Any], layers: list[Any], layout: Layout) -> Iterator[None]:
    """The tuned prefix's keys and values take the place of those of the virtual columns, layer by layer.

    So the prefix stands in the columns right before the row's own tokens, whatever the padding.
    """
    (kv,), (rows, columns) = kept.values(), layout.spots()

    def placed(states: Tensor, source: Tensor) -> Tensor:
        states = states.clone()
        # A sliding layer's prefix may hold the last virtual tokens only: the others are out of its window.
        last = columns[:, columns.shape[1] - source.shape[-2] :]
        states[rows, :, last] = source[0].transpose(0, 1).to(states.dtype)
        return states

    def update(keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        source = layers[layer_idx] if layer_idx < len(layers) else None
        if source is None or not source.is_initialized:
            raise InputError(
                f"adapter was PREFIX_TUNING, and PEFT gives no prefix to layer {layer_idx} of this model; "
                "allowed: models whose layers all get one"
            )
        keys, values = placed(keys, source.keys), placed(values, source.values)
        return type(kv).update(kv, keys, values, layer_idx, *args, **kwargs)

    vars(kv)["update"] = update
    try:
        yield
    finally:
        del vars(kv)["update"]
