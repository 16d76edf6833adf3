"""Rotary tables that depend on a row's length: each row gets the table that it has alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

SCALED = ("dynamic", "longrope")
"""The types of rotary embeddings whose frequencies follow the longest row of the batch."""


class LengthRotary:
    """The rotary embeddings of a model whose frequencies depend on how long a row is.

    transformers chooses one table a forward, by the largest position of the batch. Inside :meth:`rowwise`
    every row gets its own. Keys in a cache have the table of the length at which they were made: where
    :meth:`tables` changes, a cache has to be made anew.
    """

    def __init__(self, module: nn.Module) -> None:
        """Find the modules; nothing is changed."""
        self._modules: list[tuple[Any, int]] = []
        for part in module.modules():
            kinds = getattr(part, "rope_type", None)
            kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
            if any(isinstance(kind, str) and kind.startswith(SCALED) for kind in kinds):
                self._modules.append((part, _limit(part)))
        self._grows = any("dynamic" in str(part.rope_type) for part, _ in self._modules)

    def __bool__(self) -> bool:
        """Whether the model has any."""
        return bool(self._modules)

    def tables(self, lengths: Tensor) -> Tensor:
        """(R, modules) which table each row has at ``lengths`` (R,); equal numbers are equal tables."""
        columns = [_tables(lengths, limit, self._grows) for _, limit in self._modules]
        return torch.stack(columns, dim=1)

    @contextmanager
    def rowwise(self) -> Iterator[None]:
        """Each row has its own table inside; the modules' own forward comes back at the end."""
        try:
            for part, limit in self._modules:
                vars(part)["forward"] = _rowwise(part, limit, self._grows)
            yield
        finally:
            for part, _ in self._modules:
                vars(part).pop("forward", None)


def _limit(part: Any) -> int:
    """The length up to which the unscaled table holds (the smallest one, for several kinds of layers)."""
    if "dynamic" in str(part.rope_type):
        return int(part.original_max_seq_len)
    settings = getattr(part.config, "rope_parameters", None) or {}
    nested = [value for value in settings.values() if isinstance(value, dict)] or [settings]
    limits = [value.get("original_max_position_embeddings") for value in nested]
    known = [int(limit) for limit in limits if limit is not None]
    return min(known, default=int(part.original_max_seq_len))


def _tables(lengths: Tensor, limit: int, grows: bool) -> Tensor:
    beyond = lengths > limit
    return torch.where(beyond, lengths, 0) if grows else beyond.long()


def _reset(part: Any) -> None:
    """Forget the longest row so far, whose table would stay for rows that are shorter but scaled too."""
    for name in [name for name in vars(part) if name.endswith("max_seq_len_cached")]:
        setattr(part, name, part.original_max_seq_len)
    for name, table in [*vars(part).items(), *part.named_buffers(recurse=False)]:
        if name.endswith("original_inv_freq"):
            setattr(part, name.replace("original_", ""), table)


def _rowwise(part: Any, limit: int, grows: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    run = type(part).forward

    def alone(x: Tensor, positions: Tensor, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
        if grows:
            _reset(part)
        return run(part, x, positions, *args, **kwargs)

    def forward(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        tables = _tables(position_ids.amax(-1) + 1, limit, grows)
        kinds = tables.unique()
        if len(kinds) == 1:
            return alone(x, position_ids, args, kwargs)
        cos = sin = torch.empty(0)
        for kind in kinds:
            rows = (tables == kind).nonzero()[:, 0]
            mine = alone(x, position_ids[rows], args, kwargs)
            if not cos.numel():
                cos, sin = (one.new_empty(len(tables), *one.shape[1:]) for one in mine)
            cos[rows], sin[rows] = mine
        return cos, sin

    return forward
