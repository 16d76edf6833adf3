"""The ops under ``torch.func.vmap``: a batch of calls is one call with more rows.

A row's result does not depend on the rows around it, so this is what the calls one by one would give.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from svdk.errors import InputError
from svdk.ops.schema import EXTRACT, LIBRARY, STEERED_LOGITS, STEERED_LOGPROB, STEERED_SAMPLE, Op
from svdk.utils.checks import fail

_ROW_DIMS = {STEERED_SAMPLE: (0, 1, 1), STEERED_LOGPROB: (1, 0, 1, 0), STEERED_LOGITS: (0,)}
"""Which dimension of each result has the rows."""


class _Batch:
    """The arguments of ``size`` calls, by name, with the dimension that counts the calls (None: the same)."""

    def __init__(self, op: Op, size: int, dims: tuple[Any, ...], flat: tuple[Any, ...]):
        self.size, self.dims = size, dict(zip(op.names, dims, strict=True))
        self.given: dict[str, Any] = dict(zip(op.names, flat, strict=True))
        name = "warm" if self.given["warm_rows"] is None else "warm_rows"
        self.rows = self.each(name).shape[1]

    def each(self, name: str) -> Tensor:
        """An argument with the calls first."""
        x, dim = self.given[name], self.dims[name]
        return x.expand(self.size, *x.shape) if dim is None else x.movedim(dim, 0)

    def logits(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """``warm`` or ``base`` of all calls, and the rows of it: nothing is repeated."""
        x, rows = self.given[name], self.given[f"{name}_rows"]
        if x is None:
            return None, None
        start: int | Tensor = 0
        limit = x.shape[0]
        if self.dims[name] is not None:
            x = self.each(name)
            limit = x.shape[1]
            start = torch.arange(self.size, device=x.device)[:, None] * limit
            x = x.flatten(0, 1)
            x = x if x.stride(1) == 1 else x.contiguous()
            if rows is None:
                return x, None
        if rows is None:
            rows = torch.arange(limit, device=x.device).expand(self.size, limit)
        else:
            rows = self.each(f"{name}_rows")
        return x, (rows + start).flatten()

    def vector(self) -> Tensor | None:
        """(V,), or one a row."""
        x, dim = self.given["vector"], self.dims["vector"]
        if x is None or (dim is None and x.dim() == 1):
            return x
        x = self.each("vector")
        x = x[:, None].expand(-1, self.rows, -1) if x.dim() == 2 else x
        return x.flatten(0, 1).contiguous()

    def out(self) -> tuple[Tensor, Tensor | None]:
        """All rows to write to; if they are no view of ``out``, that is the second."""
        if self.dims["out"] is None:
            raise fail("out", "the same in all calls of torch.func.vmap", "one for each, or None")
        x = self.each("out")
        if x.stride(2) == 1 and x.stride(0) == x.shape[1] * x.stride(1):
            return x.flatten(0, 1), None
        return x.new_empty(self.size * self.rows, x.shape[2]), x

    def flat(self) -> dict[str, Any]:
        """The arguments of the one call."""
        result = dict(self.given)
        for name in ("warm", "base"):
            result[name], result[f"{name}_rows"] = self.logits(name)
        result["vector"] = self.vector()
        for name, x in self.given.items():
            if isinstance(x, Tensor) and name not in (*_OPERANDS, "strengths", "out"):
                result[name] = self.each(name).flatten().contiguous()
        return result


_OPERANDS = ("warm", "base", "vector", "warm_rows", "base_rows")


def _call(op: Op, info: Any, dims: tuple[Any, ...], *flat: Any) -> Any:
    """The rule of an op."""
    batch = _Batch(op, info.batch_size, dims, flat)
    if batch.dims.get("strengths") is not None:
        raise fail("strengths", "another one in each call of torch.func.vmap", "the same (M,) in all of them")
    given, target = batch.flat(), None
    if op is STEERED_LOGITS:
        given["out"], target = batch.out()
    results = getattr(torch.ops.svdk, op.name)(*given.values())
    if target is not None:
        target.copy_(given["out"].unflatten(0, (batch.size, batch.rows)))
    single = isinstance(results, Tensor)
    shaped, places = [], []
    for x, dim in zip((results,) if single else results, _ROW_DIMS[op], strict=True):
        absent = x.dim() <= dim  # what was not asked for
        shaped.append(x if absent else x.unflatten(dim, (batch.size, batch.rows)))
        places.append(None if absent else dim)
    return (shaped[0], places[0]) if single else (tuple(shaped), tuple(places))


def _no_extract(info: Any, dims: tuple[Any, ...], *flat: Any) -> Any:
    raise InputError(
        "svdk.extract was called under torch.func.vmap; allowed: one call with all the rows, as the number "
        "of its entries depends on the logits"
    )


for _op in _ROW_DIMS:
    torch.library.register_vmap(f"svdk::{_op.name}", functools.partial(_call, _op), lib=LIBRARY)
torch.library.register_vmap(f"svdk::{EXTRACT.name}", _no_extract, lib=LIBRARY)
