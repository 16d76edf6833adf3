"""Steps 7, 11 and the sums of step 12: what goes over all tokens of a row once its constants are known.

The tokens are the row's candidates or the whole row (see ``candidates``). Two sweeps are always of the whole
row: the mass outside C, and the token of an invalid row.
"""

# A condition known at compile time and one known at run time must not share an `if`.
# ruff: noqa: SIM102

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .candidates import load_tile
from .filters import kept_by
from .steering import (
    COMPACT,
    DIRECTION,
    FILTERS,
    INF,
    INFO,
    MAX_ID,
    OUTSIDE,
    VECTOR,
    Moments,
    adjusted,
    best_of,
    delta_of,
    in_confidence_set,
    in_nats,
    inverse_power,
    log_p_of,
    or_zero,
    steered_inside,
    steered_logits,
)

CLEAR = tl.constexpr(0.03)  # a mass that is known well enough as what lacks to 1


class Partition(NamedTuple):
    """The steered distribution of a row for one strength; all but the last float64."""

    max_z: Any
    """Z is relative to ``max_z + shift``, a scaled steered logit."""
    shift: Any
    """The strength's ``scaled_penalty`` where the tokens outside C have the mass, else 0."""
    log_z: Any
    mean: Any
    """Of what moves with mu: delta in C, the penalty outside."""
    variance: Any
    greedy: Any
    """The argmax over C."""


class Drawn(NamedTuple):
    """The draw of a row; all but the token before filters."""

    token: Any
    """MAX_ID if nothing can be drawn."""
    mu: Any
    max_z: Any
    """The largest scaled steered logit; from here on with INFO only."""
    log_z: Any
    """Log of the sum of exp() relative to it."""
    size: Any
    """How many tokens are in C."""


@triton.jit
def fallback_token(operands, BLOCK: tl.constexpr):
    """Lowest id of the largest finite logit of a row, 0 if there is none: the token of an invalid row."""
    best, best_id = tl.full([BLOCK], -INF, tl.float32), tl.full([BLOCK], MAX_ID, tl.int32)
    for start in range(0, operands.vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        w = tl.load(operands.warm + ids, mask=ids < operands.vocab, other=-INF).to(tl.float32)
        w = adjusted(w, operands.bias, operands.bitmask, ids, ids < operands.vocab)
        better = (w < INF) & (w > best)
        best, best_id = tl.where(better, w, best), tl.where(better, ids, best_id)
    _, token = best_of(best, best_id)
    return tl.where(token == MAX_ID, 0, token)


@triton.jit
def log_outside(operands, constants, BLOCK: tl.constexpr):
    """Log of the sum of exp(w - max_w) over the tokens outside C, float64; -inf if there are none.

    Summed about each lane's own maximum: a strength can bring back what would underflow next to max_w.
    """
    top, mass = tl.full([BLOCK], -INF, tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, operands.vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        w = tl.load(operands.warm + ids, mask=ids < operands.vocab, other=-INF).to(tl.float32)
        w = adjusted(w, operands.bias, operands.bitmask, ids, ids < operands.vocab)
        w = tl.where(in_confidence_set(w, constants.max_w, constants.log_alpha), -INF, w)
        new_top = tl.maximum(top, w)
        mass = mass * tl.exp(top - or_zero(new_top)) + tl.exp(w - or_zero(new_top))
        top = new_top
    highest = tl.max(top, 0)
    mass = tl.sum(mass * tl.exp(top - or_zero(highest)), 0)
    some = mass > 0.0
    log_mass = highest.to(tl.float64) - constants.max_w + tl.log(tl.where(some, mass, 1.0))
    return tl.where(some, log_mass, -INF)


@triton.jit
def entry_at_top(tokens, constants, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """A vector's entry at the likeliest token (the lowest id of them), float64."""
    found = tl.full([BLOCK], MAX_ID, tl.int32)
    for start in range(0, tokens.count, BLOCK):
        ids, w, _ = load_tile(tokens, start, KIND, BLOCK)
        found = tl.minimum(found, tl.where(w == constants.max_w, ids, MAX_ID))
    return tl.load(tokens.operands.other + tl.min(found, 0)).to(tl.float64)


@triton.jit
def moments_of(tokens, constants, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Step 7: the :class:`Moments` of a row.

    About 0, the variance of a vector with a common offset, or in a confident row, would be lost in rounding:
    a vector is summed about its entry at the likeliest token.
    """
    pivot = tl.full([], 0.0, tl.float64)
    if DIRECTION & KIND == VECTOR:
        pivot = entry_at_top(tokens, constants, KIND, BLOCK)
    mass, norm2 = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    first, second = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for start in range(0, tokens.count, BLOCK):
        _, w, other = load_tile(tokens, start, KIND, BLOCK)
        inside = in_confidence_set(w, constants.max_w, constants.log_alpha)
        delta = in_nats(tl.where(inside, delta_of(constants, w, other, KIND), 0.0), KIND)
        p = tl.exp(log_p_of(constants, w)).to(tl.float64)
        mass += p
        first += p * (delta - pivot)
        second += p * (delta - pivot) * (delta - pivot)
        norm2 += delta * delta
    mean, square = tl.sum(first, 0), tl.sum(second, 0)
    if DIRECTION & KIND == VECTOR:
        total = tl.sum(mass, 0)
        if COMPACT & KIND:
            if tokens.from_candidates:  # what is not a candidate does not move
                rest = 1.0 - total
                if (rest < CLEAR) & (pivot != 0.0):
                    rest = tl.exp(log_outside(tokens.operands, constants, BLOCK) - constants.log_zw)
                mean -= rest * pivot
                square += rest * pivot * pivot
                total += rest
        mean = mean / total
        square = square / total
    return Moments(pivot + mean, tl.sum(norm2, 0), tl.maximum(square - mean * mean, 0.0))


@triton.jit
def rescale(z_sum, first, second, keep, shift):
    """The sums of :func:`partition_of` times ``keep``, and about a pivot that is ``shift`` lower."""
    second = keep * (second + shift * (2.0 * first + shift * z_sum))
    return keep * z_sum, keep * (first + shift * z_sum), second


@triton.jit
def partition_of(
    tokens, constants, strength, log_mass_outside, penalty, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    """The :class:`Partition` of a row; ``log_mass_outside`` as of :func:`log_outside`.

    The sums are about the move of the largest steered logit so far: about 0, the variance of a row with one
    likely token would be rounding noise.
    """
    z_sum, first = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    second = tl.zeros([BLOCK], tl.float64)
    best, best_id = tl.full([BLOCK], -INF, tl.float32), tl.full([BLOCK], MAX_ID, tl.int32)
    high, pivot = tl.full([], -INF, tl.float32), tl.full([], 0.0, tl.float64)
    nats = inverse_power(strength.scale)
    for start in range(0, tokens.count, BLOCK):
        ids, w, other = load_tile(tokens, start, KIND, BLOCK)
        inside = in_confidence_set(w, constants.max_w, constants.log_alpha)
        delta = tl.where(inside, delta_of(constants, w, other, KIND), 0.0)
        z = tl.where(inside, steered_inside(constants, strength, w, delta), -INF)
        better = z > best
        best, best_id = tl.where(better, z, best), tl.where(better, ids, best_id)
        top = tl.max(z, 0)
        if top > high:
            keep = tl.exp((high - top) * nats).to(tl.float64)
            new_pivot = tl.max(tl.where(z == top, delta, -INF), 0).to(tl.float64)
            z_sum, first, second = rescale(z_sum, first, second, keep, pivot - new_pivot)
            high, pivot = top, new_pivot
        e = tl.exp((z - or_zero(high)) * nats).to(tl.float64)
        d = delta.to(tl.float64) - pivot
        z_sum += e
        first += e * d
        second += e * d * d
    total, mean, square = tl.sum(z_sum, 0), tl.sum(first, 0), tl.sum(second, 0)
    unit = in_nats(tl.full([], 1.0, tl.float64), KIND)
    pivot, mean, square = pivot * unit, mean * unit, square * unit * unit
    max_z = high.to(tl.float64)
    max_shift = max_z * 0.0
    if OUTSIDE & KIND:
        if log_mass_outside > -INF:  # all tokens outside as one, of the logit that they have together
            z, shift = log_mass_outside * strength.scale, strength.scaled_penalty.to(tl.float64)
            move = tl.full([], 0.0, tl.float64) + penalty
            if z + shift > max_z:
                keep = tl.exp((max_z - (z + shift)) * nats)
                total, mean, square = rescale(total, mean, square, keep, pivot - move)
                max_z, max_shift, pivot = z, shift, move
            e, d = tl.exp(((z - max_z) + (shift - max_shift)) * nats), move - pivot
            total += e
            mean += e * d
            square += e * d * d
    mean = mean / total
    variance = tl.maximum(square / total - mean * mean, 0.0)
    _, greedy = best_of(best, best_id)
    return Partition(max_z, max_shift, tl.log(total), pivot + mean, variance, greedy)


@triton.jit
def drawable(tokens, constants, strength, filter, start, end, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """``(ids, w, z, kept)`` of a row's tokens from ``start`` on; kept is z, or -inf at what is not drawn."""
    ids, w, other = load_tile(tokens, start, KIND, BLOCK)
    z = steered_logits(constants, strength, w, delta_of(constants, w, other, KIND), KIND)
    place = start + tl.arange(0, BLOCK)
    kept = tl.where(place < end, z, -INF)
    if FILTERS & KIND:
        if filter.active:
            kept = tl.where(kept_by(filter, ids, z, place, tokens.count), kept, -INF)
    return ids, w, z, kept


@triton.jit
def draw_tokens(
    tokens, constants, strength, filter, begin, end, rate, share, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    """Step 11 among a row's tokens ``begin .. end``, as :class:`Drawn`.

    The token is the first whose mass, with that of the tokens before it, exceeds ``share`` (float64) of all;
    ``rate`` as of :func:`~kernels.filters.per_scaled_logit`. A negative share: the argmax.
    """
    best, best_id = tl.full([BLOCK], -INF, tl.float32), tl.full([BLOCK], MAX_ID, tl.int32)
    n_inside, mass = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.float64)
    max_z, z_sum = tl.full([], -INF, tl.float32), tl.full([], 0.0, tl.float32)
    top = tl.full([], -INF, tl.float32)
    nats = inverse_power(strength.scale)
    for start in range(begin, end, BLOCK):
        ids, w, z, kept = drawable(tokens, constants, strength, filter, start, end, KIND, BLOCK)
        if INFO & KIND:
            n_inside += in_confidence_set(w, constants.max_w, constants.log_alpha).to(tl.int32)
            new_max = tl.maximum(max_z, tl.max(z, 0))
            z_sum = z_sum * tl.exp((max_z - or_zero(new_max)) * nats)
            z_sum += tl.sum(tl.exp((z - or_zero(new_max)) * nats), 0)
            max_z = new_max
        better = kept > best
        best, best_id = tl.where(better, kept, best), tl.where(better, ids, best_id)
        if share >= 0.0:
            high = tl.maximum(top, tl.max(kept, 0))
            mass *= tl.exp((top - or_zero(high)) * rate).to(tl.float64)
            mass += tl.exp((kept - or_zero(high)) * rate).to(tl.float64)
            top = high
    _best, token = best_of(best, best_id)
    if share >= 0.0:
        target = share * tl.sum(mass, 0)
        before, start = target * 0.0, begin
        while (start < end) & (before <= target):
            ids, w, z, kept = drawable(tokens, constants, strength, filter, start, end, KIND, BLOCK)
            m = tl.exp((kept - or_zero(top)) * rate).to(tl.float64)
            reached = before + tl.cumsum(m, 0)
            first = tl.min(tl.where((m > 0.0) & (reached > target), ids, MAX_ID), 0)
            last = tl.max(tl.where(m > 0.0, ids, -1), 0)  # where rounding leaves none
            token = tl.where(first < MAX_ID, first, tl.where(last >= 0, last, token))
            before += tl.sum(m, 0)
            start += BLOCK
    log_z = tl.log(tl.where(z_sum > 0.0, z_sum, 1.0))
    return Drawn(token, strength.mu, max_z, log_z, tl.sum(n_inside, 0))
