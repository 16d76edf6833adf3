"""What the filters leave of rows of probabilities: one boundary for all of ``svdk.sampling``.

Probabilities are compared as float32, never by their logarithms, of which several have the same. What is no
probability (negative, infinite) becomes NaN. Every mask here says what is cut, by ``<``: NaN never is, so
whatever is made of a row with NaN has it too.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from svdk.ops import arguments
from svdk.ops.schema import PARAMETER, PerRow

FIRST_LOOKS = (1 << 10, 1 << 14)
"""So many of the likeliest tokens mostly hold top-p's mass; finding them is cheaper than sorting the row."""


def probabilities(name: str, x: Any) -> Tensor:
    """Float32 (N, V) of an argument that should be probabilities."""
    p = arguments.logits(name, x).float()
    if arguments.host_values(p) and p.numel():
        low, high = p.aminmax()
        if low >= 0 and high < math.inf:  # not so with NaN
            return p
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
    for name, outside in (("top_k", outside_top_k), ("top_p", outside_top_p), ("min_p", outside_min_p)):
        if name in cuts:
            left = left.masked_fill(outside(p if joint else left, cuts[name]), 0.0)
    return left


def outside_top_k(x: Tensor, top_k: PerRow) -> Tensor:
    """Bool (N, V): less than the k-th greatest of the row, so ties with it stay; k = 0 cuts nothing."""
    vocab, (number, rows) = x.shape[1], top_k
    if rows is None:
        return x < (x.topk(int(number), 1).values[:, -1:] if 0 < number < vocab else -math.inf)
    on = (rows > 0) & (rows < vocab)
    place = rows.where(on, 1)
    most = int(place.max()) if arguments.host_values(rows) and len(rows) else vocab
    kth = x.topk(most, 1).values.gather(1, place[:, None] - 1)
    return x < kth.where(on[:, None], -math.inf)


def outside_top_p(p: Tensor, top_p: PerRow) -> Tensor:
    """Bool (N, V): not of the fewest tokens that hold ``top_p`` of the row, at least one.

    Ties: the lower ids are of them. Masses are summed in double and compared as float32, so that three of ten
    equal tokens hold .3 of them.
    """
    host, vocab, limit = arguments.host_values(p), p.shape[1], _column(top_p, p)
    total = p.sum(1, keepdim=True, dtype=torch.float64)
    for width in (*(look for look in FIRST_LOOKS if host and look < vocab), vocab):
        values = p.topk(width, 1).values
        mass = values.cumsum(1, dtype=torch.float64)
        count = ((((mass - values) / total).float() < limit) & (limit < 1)).sum(1, keepdim=True)
        if width < vocab and not bool((count == width).any()):
            break
    count = count.clamp(min=1)
    last = values.gather(1, count - 1)
    outside = p < last
    if not host or bool((vocab - outside.sum(1, keepdim=True) > count).any()):
        ties = p == last
        room = count - (p > last).sum(1, keepdim=True)
        outside = outside | (ties & (ties.cumsum(1) > room))
    return outside & (limit < 1)


def outside_min_p(p: Tensor, min_p: PerRow) -> Tensor:
    """Bool (N, V): less than ``min_p`` times as likely as the likeliest."""
    return p < _column(min_p, p) * p.amax(1, keepdim=True)


def log_of(p: Tensor) -> Tensor:
    """Logits of probabilities; the logarithm of a zero is an order of magnitude slower than of a one."""
    zero = p == 0
    return p.masked_fill(zero, 1.0).log_().masked_fill_(zero, -math.inf)


def normalised(p: Tensor) -> Tensor:
    """``p`` (N, V) over the sums of its rows; zeros stay zeros, and a row with NaN is NaN throughout."""
    total = p.sum(1, keepdim=True)
    return p / total.where(total != 0, 1.0)


def _column(parameter: PerRow, like: Tensor) -> Tensor:
    """A parameter as float32, (N, 1) or (1, 1)."""
    number, rows = parameter
    return like.new_full((1, 1), number) if rows is None else rows[:, None]
