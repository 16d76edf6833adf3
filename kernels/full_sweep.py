"""Sweeps over the tokens in play, or over the whole row, once the sums of the row are known."""

# A condition known at compile time and one known at run time must not share an `if`.
# ruff: noqa: SIM102

from __future__ import annotations

import triton
import triton.language as tl

from .candidates import load_tile
from .filters import ordered_key
from .philox import block_bits, gumbel, token_bits
from .steering import (
    CLEAR,
    DIRECTION,
    INF,
    LISTS,
    MAX_ID,
    OUTSIDE,
    VECTOR,
    best_of,
    delta_of,
    in_nats,
    inside_of,
    inverse_power,
    or_zero,
    steered_inside,
    steered_of,
)


@triton.jit
def log_outside(warm, vocab, max_w, log_alpha, BLOCK: tl.constexpr):
    """Log of the sum of exp(w - max_w) over the tokens outside C, float64; -inf if there are none.

    Summed about each lane's own maximum: a strength can bring back what would underflow next to max_w.
    """
    top, mass = tl.full([BLOCK], -INF, tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        w = tl.load(warm + ids, mask=ids < vocab, other=-INF).to(tl.float32)
        w = tl.where(inside_of(w, max_w, log_alpha), -INF, w)
        new_top = tl.maximum(top, w)
        mass = mass * tl.exp(top - or_zero(new_top)) + tl.exp(w - or_zero(new_top))
        top = new_top
    highest = tl.max(top, 0)
    mass = tl.sum(mass * tl.exp(top - or_zero(highest)), 0)
    some = mass > 0.0
    log_mass = highest.to(tl.float64) - max_w + tl.log(tl.where(some, mass, 1.0))
    return tl.where(some, log_mass, -INF)


@triton.jit
def entry_at_top(row, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """A vector's entry at the likeliest token (the lowest id of them), float64."""
    found = tl.full([BLOCK], MAX_ID, tl.int32)
    for start in range(0, row.count, BLOCK):
        ids, w, _ = load_tile(row, start, KIND, BLOCK)
        found = tl.minimum(found, tl.where(w == row.max_w, ids, MAX_ID))
    return tl.load(row.other + tl.min(found, 0)).to(tl.float64)


@triton.jit
def moments(row, vocab, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """``(sum p delta, ||delta||^2, Var_p delta)``, delta 0 outside C; float64 (squares may pass float32).

    About 0, the variance of a vector with a common offset, or in a confident row, would be lost in rounding:
    a vector is summed about its entry at the likeliest token.
    """
    pivot = tl.full([], 0.0, tl.float64)
    if DIRECTION & KIND == VECTOR:
        pivot = entry_at_top(row, KIND, BLOCK)
    mass, norm2 = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    first, second = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for start in range(0, row.count, BLOCK):
        _, w, other = load_tile(row, start, KIND, BLOCK)
        inside = inside_of(w, row.max_w, row.log_alpha)
        delta = in_nats(tl.where(inside, delta_of(row, w, other, KIND), 0.0), KIND)
        p = tl.exp(w - row.max_w - row.log_zw).to(tl.float64)
        mass += p
        first += p * (delta - pivot)
        second += p * (delta - pivot) * (delta - pivot)
        norm2 += delta * delta
    mean, square = tl.sum(first, 0), tl.sum(second, 0)
    if DIRECTION & KIND == VECTOR:
        total = tl.sum(mass, 0)
        if LISTS & KIND:
            if row.from_list:  # what is not listed does not move
                rest = 1.0 - total
                if (rest < CLEAR) & (pivot != 0.0):
                    rest = tl.exp(log_outside(row.warm, vocab, row.max_w, row.log_alpha, BLOCK) - row.log_zw)
                mean -= rest * pivot
                square += rest * pivot * pivot
                total += rest
        mean = mean / total
        square = square / total
    return pivot + mean, tl.sum(norm2, 0), tl.maximum(square - mean * mean, 0.0)


@triton.jit
def finite_argmax(warm, vocab, BLOCK: tl.constexpr):
    """Lowest id of the largest finite logit of a row, 0 if there is none: the token of an invalid row."""
    best, best_id = tl.full([BLOCK], -INF, tl.float32), tl.full([BLOCK], MAX_ID, tl.int32)
    for start in range(0, vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        w = tl.load(warm + ids, mask=ids < vocab, other=-INF).to(tl.float32)
        better = (w < INF) & (w > best)
        best, best_id = tl.where(better, w, best), tl.where(better, ids, best_id)
    _, token = best_of(best, best_id)
    return tl.where(token == MAX_ID, 0, token)


@triton.jit
def rise(z_sum, first, second, keep, shift):
    """The sums of :func:`partition` times ``keep``, and about a pivot that is ``shift`` lower."""
    second = keep * (second + shift * (2.0 * first + shift * z_sum))
    return keep * z_sum, keep * (first + shift * z_sum), second


@triton.jit
def partition(row, outside, penalty, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """``(max, shift, log Z, mean, variance, greedy)`` of a steered row, all but the last float64.

    Z is relative to ``max + shift``, a steered logit as of ``steered_inside``; shift is ``row.outside`` where
    the tokens outside C have the mass, else 0. Mean and variance are those of what moves with mu (delta in C,
    the penalty outside) under the steered distribution; greedy is the argmax over C. ``outside``: the log of
    the warm mass outside C, relative to ``max_w``.

    The sums are about the move of the largest steered logit so far: about 0, the variance of a row with one
    likely token would be rounding noise.
    """
    z_sum, first = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    second = tl.zeros([BLOCK], tl.float64)
    best, best_id = tl.full([BLOCK], -INF, tl.float32), tl.full([BLOCK], MAX_ID, tl.int32)
    high, pivot = tl.full([], -INF, tl.float32), tl.full([], 0.0, tl.float64)
    nats = inverse_power(row.scale)
    for start in range(0, row.count, BLOCK):
        ids, w, other = load_tile(row, start, KIND, BLOCK)
        inside = inside_of(w, row.max_w, row.log_alpha)
        delta = tl.where(inside, delta_of(row, w, other, KIND), 0.0)
        z = tl.where(inside, steered_inside(row, w, delta), -INF)
        better = z > best
        best, best_id = tl.where(better, z, best), tl.where(better, ids, best_id)
        top = tl.max(z, 0)
        if top > high:
            keep = tl.exp((high - top) * nats).to(tl.float64)
            new_pivot = tl.max(tl.where(z == top, delta, -INF), 0).to(tl.float64)
            z_sum, first, second = rise(z_sum, first, second, keep, pivot - new_pivot)
            high, pivot = top, new_pivot
        e = tl.exp((z - or_zero(high)) * nats).to(tl.float64)
        d = delta.to(tl.float64) - pivot
        z_sum += e
        first += e * d
        second += e * d * d
    total, mean, square = tl.sum(z_sum, 0), tl.sum(first, 0), tl.sum(second, 0)
    unit = in_nats(tl.full([], 1.0, tl.float64), KIND)
    pivot, mean, square = pivot * unit, mean * unit, square * unit * unit
    high_z = high.to(tl.float64)
    high_shift = high_z * 0.0
    if OUTSIDE & KIND:
        if outside > -INF:  # all tokens outside as one, of the logit that they have together
            z, shift = outside * row.scale, row.outside.to(tl.float64)
            move = tl.full([], 0.0, tl.float64) + penalty
            if z + shift > high_z:
                keep = tl.exp((high_z - (z + shift)) * nats)
                total, mean, square = rise(total, mean, square, keep, pivot - move)
                high_z, high_shift, pivot = z, shift, move
            e, d = tl.exp(((z - high_z) + (shift - high_shift)) * nats), move - pivot
            total += e
            mean += e * d
            square += e * d * d
    mean = mean / total
    variance = tl.maximum(square / total - mean * mean, 0.0)
    _, greedy = best_of(best, best_id)
    return high_z, high_shift, tl.log(total), pivot + mean, variance, greedy


@triton.jit
def draw(
    row, values, ranked, filtered, top, top_id, floor, last_tie, lowest, inverse, temperature, greedy,
    seed, offset, KIND: tl.constexpr, FILTERS: tl.constexpr, INFO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Greedy or perturbed argmax over the tokens in play that the filters keep.

    Returns (token or MAX_ID, the largest steered logit, log of the sum of exp() relative to it, size of C),
    the last three before filters and with INFO only. Scores are scale * temperature times the perturbed
    logits: a low temperature cannot make them overflow.
    """
    best, best_id = tl.full([BLOCK], -INF, tl.float32), tl.full([BLOCK], MAX_ID, tl.int32)
    inside_count = tl.zeros([BLOCK], tl.int32)
    high, partition = tl.full([], -INF, tl.float32), tl.full([], 0.0, tl.float32)
    nats, heat = inverse_power(row.scale), row.scale * temperature
    for start in range(0, row.count, BLOCK):
        ids, w, other = load_tile(row, start, KIND, BLOCK)
        z = steered_of(row, w, delta_of(row, w, other, KIND), KIND)
        if INFO:
            inside_count += inside_of(w, row.max_w, row.log_alpha).to(tl.int32)
            new_high = tl.maximum(high, tl.max(z, 0))
            partition = partition * tl.exp((high - or_zero(new_high)) * nats)
            partition += tl.sum(tl.exp((z - or_zero(new_high)) * nats), 0)
            high = new_high
        keep = z > -INF
        if FILTERS:
            if filtered:
                if ranked:
                    place = start + tl.arange(0, BLOCK)
                    keep = keep & (tl.load(values + place, mask=place < row.count, other=-INF) > -INF)
                else:
                    key = ordered_key(z)
                    keep = keep & ((key > floor) | ((key == floor) & (ids <= last_tie)) | (ids == top_id))
                    keep = keep & ((z - top) * inverse >= lowest)
        score = z
        if not greedy:
            if LISTS & KIND:
                if row.from_list:
                    bits = token_bits(ids, seed, offset)
                else:
                    bits = block_bits(start, seed, offset, BLOCK)
            else:
                bits = block_bits(start, seed, offset, BLOCK)
            score = z + heat * gumbel(bits)
        better = keep & (score > best)
        best, best_id = tl.where(better, score, best), tl.where(better, ids, best_id)
    _, token = best_of(best, best_id)
    return token, high, tl.log(tl.where(partition > 0.0, partition, 1.0)), tl.sum(inside_count, 0)
