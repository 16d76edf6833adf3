"""A steered twin of one of vLLM's model classes: every token runs as a warm and as a base row.

Only three things of the class are touched, none of them particular to it: ``forward`` runs over twice the
rows, each ``Attention`` gets a partner with a cache of its own for the base rows, and ``compute_logits``
steers. Weights are read once for both rows; the scheduler sees more layers, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionType

from svdk.errors import InputError
from svdk.vllm.lora import attach
from svdk.vllm.pairing import DIGITS, Pairing


class PairedAttention(Attention):
    """An attention layer whose second half of rows, where there is one, goes to its partner."""

    pairing: Pairing
    partner: Attention

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        """(n, ...) as vLLM's own; (2n, ...) when the forward has base rows."""
        if not self.pairing.runs_base:
            return super().forward(query, key, value, *args, **options)
        n = query.shape[0] // 2
        warm = super().forward(query[:n], key[:n], value[:n], *args, **options)
        base = self.partner(query[n:], key[n:], value[n:], *args, **options)
        return torch.cat([warm, base])


@contextmanager
def _recorded() -> Iterator[dict[int, tuple[tuple[Any, ...], dict[str, Any]]]]:
    """The constructor arguments of every ``Attention`` made inside, by the layer's identity."""
    made: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    plain = Attention.__init__

    def record(self: Attention, *args: Any, **options: Any) -> None:
        made.setdefault(id(self), (args, options))
        plain(self, *args, **options)

    Attention.__init__ = record
    try:
        yield made
    finally:
        Attention.__init__ = plain


def _check_layers(model: nn.Module, layers: dict[str, Any]) -> None:
    """``InputError`` with the name of the first layer that keeps a state and has no twin."""
    found = {name: layer for name, layer in layers.items() if isinstance(layer, AttentionLayerBase)}
    found |= {n: m for n, m in model.named_modules() if isinstance(m, AttentionLayerBase)}
    for name, layer in found.items():
        why = None
        if type(layer) is not Attention:
            why = f"is a {type(layer).__name__}"
        elif layer.attn_type != AttentionType.DECODER:
            why = f"has attention of type {layer.attn_type}"
        elif layer.kv_sharing_target_layer_name is not None:
            why = f"shares the cache of {layer.kv_sharing_target_layer_name}"
        if why is not None:
            raise InputError(
                f"layer {name} of {type(model).__name__} {why}; allowed when steering: decoder attention "
                "with a cache of its own, which can be run twice"
            )


def _pair_attention(model: nn.Module, made: dict[int, Any], pairing: Pairing) -> None:
    for name, layer in list(model.named_modules()):
        if type(layer) is not Attention:
            continue
        args, options = made[id(layer)]
        if "prefix" not in options:
            raise InputError(f"layer {name} was made without a name; allowed when steering: layers with one")
        partner = Attention(*args, **options | {"prefix": f"{options['prefix']}.base_rows"})
        layer.__class__ = PairedAttention
        layer.pairing, layer.partner = pairing, partner


def twin(model_class: type[nn.Module]) -> type[nn.Module]:
    """The steered twin of a causal language model of vLLM's.

    ``InputError`` at construction names a layer that has no twin.
    """
    parent: Any = model_class

    class Twin(parent):
        """A base and an adapted row a token where a request is steered, else as the class it twins."""

        # Adapters on the embedding or the head are refused: both rows share them.
        embedding_modules: dict[str, str] = {}  # noqa: RUF012 - vLLM reads it from the class

        def __init__(self, *, vllm_config: Any, prefix: str = "", **options: Any) -> None:
            known = set(vllm_config.compilation_config.static_forward_context)
            with _recorded() as made:
                super().__init__(vllm_config=vllm_config, prefix=prefix, **options)
            context = vllm_config.compilation_config.static_forward_context
            _check_layers(self, {name: layer for name, layer in context.items() if name not in known})
            config = vllm_config.model_config.hf_text_config
            self.pairing = Pairing(vllm_config, config.hidden_size, config.vocab_size)
            self.svdk_config = vllm_config
            _pair_attention(self, made, self.pairing)

        @property
        def lora_manager(self) -> Any:
            """vLLM's, which introduces itself to its model."""
            return self.__dict__.get("svdk_lora_manager")

        @lora_manager.setter
        def lora_manager(self, manager: Any) -> None:
            self.__dict__["svdk_lora_manager"] = manager
            attach(manager, self.pairing)

        def forward(
            self,
            input_ids: Tensor | None,
            positions: Tensor,
            intermediate_tensors: Any = None,
            inputs_embeds: Tensor | None = None,
            **options: Any,
        ) -> Tensor:
            if input_ids is None or inputs_embeds is not None or intermediate_tensors is not None:
                raise InputError("inputs were embeddings or states; allowed when steering: token ids")
            tokens, places = self.pairing.open(input_ids, positions)
            hidden = super().forward(tokens, places, None, None, **options)
            return self.pairing.close(hidden)

        def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
            size = self.pairing.hidden_size
            if hidden_states.shape[1] == size:
                return super().compute_logits(hidden_states)
            rows = self.pairing.rows(hidden_states[:, -DIGITS:])
            warm, base = hidden_states[:, :size], hidden_states[:, size:-DIGITS]
            paired = base.shape[1] > 0
            logits = super().compute_logits(torch.cat([warm, base]) if paired else warm.contiguous())
            if logits is None:  # of another tensor-parallel rank
                return None
            n = hidden_states.shape[0]
            return self.pairing.table.steer(logits[:n], logits[n:] if paired else None, rows)

        def compute_logits_local(self, hidden_states: Tensor) -> Tensor:
            raise InputError("logits were asked for by shard; allowed when steering: whole rows")

    Twin.__name__ = Twin.__qualname__ = f"Svdk{model_class.__name__}"
    Twin.__doc__ = f"vLLM's {model_class.__name__}, steered where a request names a calibrated adapter."
    return Twin
