"""The views of a pair one after the other: the plain way, and the way of one model alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from svdk.models.cpu_linear import fast_linears, replaced
from svdk.models.pair import ModelPair
from svdk.models.stream import ViewCache


class TwoPass:
    """The views that a step needs, one forward each, each with its own cache."""

    def __init__(self, pair: ModelPair, names: tuple[str, ...]) -> None:
        """``names``: "warm", "base" or both."""
        self._pair = pair
        self._names = names
        self._forwards = fast_linears(pair.module)

    def new_cache(
        self, implementation: str | None = None, max_length: int | None = None
    ) -> tuple[ViewCache, ...]:
        """One cache a view; see :meth:`ModelPair.new_cache`."""
        return tuple(self._pair.new_cache(v, implementation, max_length) for v in self._names)

    def __call__(self, input_ids: Tensor, mask: Tensor | None, *, cache: Any = None) -> tuple[Tensor, ...]:
        """Logits (B, 1, V) a view; see :meth:`ModelPair.warm`."""
        caches = cache or [None] * len(self._names)
        views = (getattr(self._pair, name) for name in self._names)
        with replaced(self._forwards):
            return tuple(view(input_ids, mask, cache=c) for view, c in zip(views, caches, strict=True))
