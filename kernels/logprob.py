"""``steered_logprob``: log-probabilities of labels for any number of strengths, with their derivatives.

Bytes moved, for B rows of V tokens of s bytes: 2 B V s. Where C was listed, every strength costs a pass
over the list only, and a finite penalty one more sweep (what lies outside C enters as one mass). Where it
was not (alpha = 0, or a nearly flat row) every strength is another sweep, from L2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .sample import in_unit, is_finite
from .steering import (
    DIRECTION,
    INF,
    LISTS,
    MAX_ID,
    OUTSIDE,
    VECTOR,
    Row,
    best_of,
    delta_of,
    finite_argmax,
    inside_of,
    load_tile,
    load_token,
    moments,
    or_zero,
    row_index,
    safe_log,
    steered_of,
    value_of,
)
from .sweep import BASE_MASKED, COUNTS, INVALID, SUMS, divergence, in_play, merge, sweep_slice


@triton.jit
def outside_mass(warm, vocab, max_w, log_alpha, BLOCK: tl.constexpr):
    """Sum of exp(w - max_w) over the tokens outside C."""
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        w = tl.load(warm + ids, mask=ids < vocab, other=-INF).to(tl.float32)
        mass += tl.where(inside_of(w, max_w, log_alpha), 0.0, tl.exp(w - max_w))
    return tl.sum(mass, 0)


@triton.jit
def partition(row, outside, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """``(max, Z, mean, variance, greedy)`` of a steered row.

    Z is relative to max; mean and variance are those of what moves with mu (delta in C, the penalty
    outside) under the steered distribution; greedy is the argmax over C. ``outside``: the warm mass outside
    C, relative to ``max_w``.
    """
    z_sum, first = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    second = tl.zeros([BLOCK], tl.float64)
    best, best_id = tl.full([BLOCK], -INF, tl.float32), tl.full([BLOCK], MAX_ID, tl.int32)
    high = tl.full([], -INF, tl.float32)
    if OUTSIDE & KIND:
        high = tl.where(outside > 0.0, row.mu * row.penalty, -INF)
    for start in range(0, row.count, BLOCK):
        ids, w, other = load_tile(row, start, KIND, BLOCK)
        inside = inside_of(w, row.max_w, row.log_alpha)
        delta = tl.where(inside, delta_of(row, w, other, KIND), 0.0)
        z = tl.where(inside, steered_of(row, w, delta, KIND), -INF)
        better = z > best
        best, best_id = tl.where(better, z, best), tl.where(better, ids, best_id)
        new_high = tl.maximum(high, tl.max(z, 0))
        ref = or_zero(new_high)
        keep = tl.exp(high - ref).to(tl.float64)
        e, d = tl.exp(z - ref).to(tl.float64), delta.to(tl.float64)
        z_sum = z_sum * keep + e
        first = first * keep + e * d
        second = second * keep + e * d * d
        high = new_high
    total, mean, square = tl.sum(z_sum, 0), tl.sum(first, 0), tl.sum(second, 0)
    if OUTSIDE & KIND:
        e = (outside * tl.exp(tl.where(outside > 0.0, row.mu * row.penalty - high, 0.0))).to(tl.float64)
        total += e
        mean += e * row.penalty
        square += e * row.penalty * row.penalty
    mean = mean / total
    variance = tl.maximum(square / total - mean * mean, 0.0)
    _, greedy = best_of(best, best_id)
    return high, total.to(tl.float32), mean.to(tl.float32), variance.to(tl.float32), greedy


@triton.jit
def steered_logprob_kernel(
    warm, other, warm_rows, other_rows, labels, sums, counts, listed, counters,
    curves_out, greedy_out, rows_out, status_out, warm_stride, other_stride, batch, vocab, slice_size,
    penalty, alpha, alpha_rows, strength, strength_rows, strengths, number,
    KIND: tl.constexpr, SPLITS: tl.constexpr,
    CAP: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program ``row * SPLITS + slice``; ``strengths`` (number,) for every row, or none and number = 1."""
    HAS_BASE: tl.constexpr = (DIRECTION & KIND) < VECTOR
    program = tl.program_id(0)
    index, part = program // SPLITS, program % SPLITS
    warm += row_index(warm_rows, index) * warm_stride
    other += row_index(other_rows, index) * other_stride
    sums += index.to(tl.int64) * (SPLITS * SUMS)
    counts += index.to(tl.int64) * (SPLITS * COUNTS)
    listed += index.to(tl.int64) * (SPLITS * CAP)
    alpha = value_of(alpha_rows, alpha, index)
    log_alpha = safe_log(alpha)
    last = sweep_slice(
        warm, other, part, slice_size, vocab, log_alpha, sums, counts, listed, counters + index,
        0.0, 1.0, True, 0, 0, KIND, False, True, SPLITS, CAP, BLOCK, STAGES,
    )  # fmt: skip
    if last:
        max_w, max_b, zw, zb, usable, cross, flags, count, _, _ = merge(
            sums, counts, listed, warm, log_alpha, SPLITS, KIND, CAP
        )
        label = tl.load(labels + index)
        valid = in_unit(alpha) & (max_w > -INF) & ((flags & INVALID) == 0) & (label >= 0) & (label < vocab)
        for m in range(number):
            valid = valid & is_finite(strength_at(strengths, strength_rows, strength, index, m))
        curves_out += index.to(tl.int64) * number
        greedy_out += index.to(tl.int64) * number
        size = batch.to(tl.int64) * number
        nan = tl.full([], float("nan"), tl.float32)
        if valid:
            log_zw, log_zb, kl = divergence(zw, zb, usable, cross, HAS_BASE)
            gap = log_zw - log_zb + kl
            in_c = in_play(count, vocab, KIND)
            row = Row(
                warm, other, listed, count >= 0, in_c, max_w, log_zw, max_b, gap, log_alpha, 0.0, penalty,
            )  # fmt: skip
            mean, norm2, variance = moments(row, KIND, BLOCK)
            outside = tl.full([], 0.0, tl.float32)
            if LISTS & KIND and OUTSIDE & KIND:
                outside = outside_mass(warm, vocab, max_w, log_alpha, BLOCK)
            w, o = load_token(row, label, KIND)
            inside = inside_of(w, max_w, log_alpha)
            delta = tl.where(inside, delta_of(row, w, o, KIND), 0.0)
            tl.store(rows_out + index, (delta.to(tl.float64) - mean).to(tl.float32))
            tl.store(rows_out + batch + index, norm2.to(tl.float32))
            tl.store(rows_out + 2 * batch + index, variance.to(tl.float32))
            tl.store(rows_out + 3 * batch + index, kl if HAS_BASE else nan)
            tl.store(rows_out + 4 * batch + index, w - max_w - log_zw)
            log_q = nan
            if HAS_BASE:
                log_q = tl.where(o > -INF, o - max_b - log_zb, -INF)
            tl.store(rows_out + 5 * batch + index, log_q)
            tl.store(status_out + index, flags & BASE_MASKED)
            move = tl.where(inside, delta, penalty if OUTSIDE & KIND else 0.0)
            for m in range(number):
                mu = strength_at(strengths, strength_rows, strength, index, m)
                at = Row(
                    warm, other, listed, count >= 0, in_c, max_w, log_zw, max_b, gap, log_alpha, mu, penalty,
                )  # fmt: skip
                high, total, mean_m, variance_m, greedy = partition(at, outside, KIND, BLOCK)
                logprob = steered_of(at, w, delta, KIND) - high - tl.log(total)
                tl.store(curves_out + m, logprob)
                tl.store(curves_out + size + m, tl.where(logprob > -INF, move - mean_m, 0.0))
                tl.store(curves_out + 2 * size + m, variance_m)
                tl.store(greedy_out + m, greedy.to(tl.int64))
        else:
            fallback = finite_argmax(warm, vocab, BLOCK).to(tl.int64)
            for column in range(6):
                tl.store(rows_out + column * batch + index, nan)
            tl.store(status_out + index, INVALID)
            for m in range(number):
                for curve in range(3):
                    tl.store(curves_out + curve * size + m, nan)
                tl.store(greedy_out + m, fallback)


@triton.jit
def strength_at(strengths, strength_rows, strength, index, m):
    """The m-th strength of a row."""
    mu = value_of(strength_rows, strength, index)
    if strengths is not None:
        mu = tl.load(strengths + m)
    return mu
