"""The base model's last hidden states, kept while several adapters are scored on the same questions."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from svdk.errors import InputError
from svdk.models.pair import ModelPair


class BaseCache:
    """Logits of the base model from hidden states that an earlier adapter's run has left here.

    Every adapter is compared with the same base model: of its forward pass only the output layer is done
    again. Hidden states take 4 * hidden size bytes a row where logits would take 4 * vocabulary. A model
    whose logits are not its output layer's output (a cap, a scale) is noticed and runs as if there were
    no cache.
    """

    def __init__(self) -> None:
        """Empty; bound to the first model and questions that it is used with."""
        self._hidden: dict[Hashable, Tensor] = {}
        self._bound: tuple[nn.Linear, str] | None = None
        self.usable = True
        """False when the model's logits do not follow from the output layer alone."""

    def bind(self, pair: ModelPair, signature: str) -> None:
        """Claim the cache; ``InputError`` when it already belongs to another model or other questions."""
        model: Any = pair.module
        head = model.get_output_embeddings()
        if self._bound is None:
            self._bound = (head, signature)
        # The output layer's weight stays the same tensor while adapters come and go.
        elif self._bound[0].weight is not head.weight or self._bound[1] != signature:
            raise InputError("base_cache was filled by another model or other questions; allowed: a new one")

    @property
    def _head(self) -> nn.Linear:
        if self._bound is None:
            raise ValueError("the cache was not bound to a model")
        return self._bound[0]

    def __contains__(self, key: Hashable) -> bool:
        """Whether the rows of ``key`` are known."""
        return key in self._hidden

    def logits(self, key: Hashable) -> Tensor:
        """(..., V): the logits of ``key`` again."""
        head = self._head
        with torch.no_grad():
            return head(self._hidden[key].to(head.weight.device))

    def record(self, key: Hashable, run: Callable[[], Tensor]) -> Tensor:
        """The base logits that ``run`` computes; their hidden states are kept under ``key``."""
        if not self.usable:
            return run()
        head = self._head
        seen: list[Tensor] = []
        hook = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            logits = run()
        finally:
            hook.remove()
        hidden = seen[-1][:, -logits.shape[1] :] if len(seen) == 1 else None
        with torch.no_grad():
            self.usable = hidden is not None and torch.allclose(head(hidden), logits, rtol=1e-4, atol=1e-4)
        if hidden is not None and self.usable:
            self._hidden[key] = hidden.cpu().clone()
        else:
            self._hidden.clear()
        return logits
