"""What the filters leave of rows of probabilities: one boundary for all of ``svdk.sampling``.

Probabilities are compared as float32, never by their logarithms, of which several have the same. A row of
zeros keeps nothing. What is no probability (negative, infinite) becomes NaN, and a row with NaN keeps all it
has, NaN too, so that whatever is made of it shows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from svdk.ops import arguments
from svdk.ops.schema import PARAMETER, PerRow

FIRST_LOOK = 1024
"""So many of the likeliest tokens nearly always hold top-p's mass; finding them is cheaper than sorting."""


def probabilities(name: str, x: Any) -> Tensor:
    """Float32 (N, V) of an argument that should be probabilities."""
    p = arguments.logits(name, x).float()
    return p.where((p >= 0) & (p < math.inf), math.nan)


def cut(name: str, value: Any, x: Tensor) -> PerRow:
    """A filter's parameter, a number or (N,): one a row of ``x`` (N, V)."""
    return PerRow(*arguments.checked(name, value, x.shape[0], x))


def marked(x: Tensor, **cuts: PerRow) -> Tensor:
    """``x`` with NaN in rows whose parameter is out of range: those on a device get this far unchecked."""
    for name, (_, rows) in cuts.items():
        if rows is not None and not arguments.host_values(rows):
            allowed = (rows >= PARAMETER[name].low) & (rows <= PARAMETER[name].high)
            x = x.where(allowed[:, None], math.nan)
    return x


def filtered(p: Tensor, *, joint: bool = False, **cuts: PerRow) -> Tensor:
    """``p`` (N, V) of :func:`probabilities` with 0 for what top_k, top_p and min_p cut, not normalised.

    Each works on what the one before it left, in this order; ``joint``: each on the whole row.
    """
    p = left = marked(p, **cuts)
    for name, inside in (("top_k", in_top_k), ("top_p", in_top_p), ("min_p", in_min_p)):
        if name in cuts:
            left = left.where(inside(p if joint else left, cuts[name]), 0.0)
    return left.where(p.isnan().any(1, keepdim=True).logical_not(), p)


def in_top_k(x: Tensor, top_k: PerRow) -> Tensor:
    """Bool (N, V): at least the k-th greatest of the row, so ties with it stay; k = 0 keeps all."""
    vocab, (number, rows) = x.shape[1], top_k
    if rows is None:
        return x >= x.topk(int(number), 1).values[:, -1:] if 0 < number < vocab else torch.ones_like(x).bool()
    on = (rows > 0) & (rows < vocab)
    place = rows.where(on, 1)
    most = int(place.max()) if arguments.host_values(rows) and len(rows) else vocab
    kth = x.topk(most, 1).values.gather(1, place[:, None] - 1)
    return (x >= kth) | ~on[:, None]


def in_top_p(p: Tensor, top_p: PerRow) -> Tensor:
    """Bool (N, V): the fewest tokens that hold ``top_p`` of the row, at least one; ties: the lower id first.

    Masses are summed in double and compared as float32, so that ten equal tokens hold .3 with three of them.
    """
    limit = _column(top_p, p)
    total = p.sum(1, keepdim=True, dtype=torch.float64)

    def look(width: int) -> tuple[Tensor, Tensor]:
        """The ``width`` likeliest, and how many of them it takes, (N, 1)."""
        values = p.topk(width, 1).values
        mass = values.cumsum(1, dtype=torch.float64)
        before = ((mass - values) / total).float()
        return values, ((before < limit) & (limit < 1)).sum(1, keepdim=True)

    vocab = p.shape[1]
    width = min(vocab, FIRST_LOOK) if arguments.host_values(p) else vocab
    values, count = look(width)
    if width < vocab and bool((count == width).any()):
        values, count = look(vocab)
    last = values.gather(1, (count - 1).clamp(min=0))
    above, equal = p > last, p == last
    room = count.clamp(min=1) - above.sum(1, keepdim=True)
    return above | (equal & (equal.cumsum(1) <= room)) | (limit >= 1)


def in_min_p(p: Tensor, min_p: PerRow) -> Tensor:
    """Bool (N, V): at least ``min_p`` times as likely as the likeliest, that is ``p >= min_p * max p``."""
    return p >= _column(min_p, p) * p.amax(1, keepdim=True)


def normalised(p: Tensor) -> Tensor:
    """``p`` (N, V) over the sums of its rows; zeros stay zeros, and a row with NaN is NaN throughout."""
    total = p.sum(1, keepdim=True)
    return p / total.where(total != 0, 1.0)


def _column(parameter: PerRow, like: Tensor) -> Tensor:
    """A parameter as float32, (N, 1) or (1, 1)."""
    number, rows = parameter
    return like.new_full((1, 1), number) if rows is None else rows[:, None]
