"""``steered_logprob``: log-probabilities of labels for any number of strengths, with their derivatives.

Bytes moved, for B rows of V tokens of s bytes: 2 B V s. Where C was listed, every strength costs a pass
over the list only, and a finite penalty one more sweep (what lies outside C enters as one mass). Where it
was not (alpha = 0, or a nearly flat row) every strength is another sweep, from L2.
"""

# A condition known at compile time and one known at run time must not share an `if`.

from __future__ import annotations

import triton
import triton.language as tl

from .candidates import in_play, load_token
from .full_sweep import finite_argmax, log_outside, moments, partition
from .steering import (
    DIRECTION,
    INF,
    LISTS,
    OUTSIDE,
    VECTOR,
    Row,
    delta_of,
    in_nats,
    in_unit,
    inside_of,
    inverse_power,
    is_finite,
    row_index,
    safe_log,
    scaled_strength,
    steered_inside,
    value_of,
)
from .sweep import BASE_MASKED, COUNTS, INVALID, SUMS, divergence, merge, sweep_slice


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
        1.0, 0.0, 1.0, True, 0, 0, KIND, False, True, SPLITS, CAP, BLOCK, STAGES,
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
            log_zw, log_zb, kl, gap = divergence(
                warm, other, vocab, max_w, max_b, zw, zb, usable, cross, valid, HAS_BASE
            )
            in_c = in_play(count, vocab, KIND)
            row = Row(
                warm, other, listed, count >= 0, in_c, max_w, log_zw, max_b, gap, log_alpha, 1.0, 0.0, 0.0,
            )  # fmt: skip
            mean, norm2, variance = moments(row, vocab, KIND, BLOCK)
            outside = tl.full([], -INF, tl.float64)
            if LISTS & KIND and OUTSIDE & KIND:
                outside = log_outside(warm, vocab, max_w, log_alpha, BLOCK)
            w, o = load_token(row, label, KIND)
            inside = inside_of(w, max_w, log_alpha)
            delta = tl.where(inside, delta_of(row, w, o, KIND), 0.0)
            move = in_nats(delta, KIND)
            tl.store(rows_out + index, (move - mean).to(tl.float32))
            tl.store(rows_out + batch + index, norm2.to(tl.float32))
            tl.store(rows_out + 2 * batch + index, variance.to(tl.float32))
            tl.store(rows_out + 3 * batch + index, kl.to(tl.float32) if HAS_BASE else nan)
            tl.store(rows_out + 4 * batch + index, w - max_w - log_zw)
            log_q = nan
            if HAS_BASE:
                log_q = tl.where(o > -INF, o - max_b - log_zb, -INF)
            tl.store(rows_out + 5 * batch + index, log_q)
            tl.store(status_out + index, flags & BASE_MASKED)
            if OUTSIDE & KIND:
                move = tl.where(inside, move, penalty)
            for m in range(number):
                mu = strength_at(strengths, strength_rows, strength, index, m)
                scale, push, lift = scaled_strength(mu, penalty, KIND)
                at = Row(
                    warm, other, listed, count >= 0, in_c, max_w, log_zw, max_b, gap, log_alpha, scale, push,
                    lift,
                )  # fmt: skip
                high, shift, log_z, mean_m, variance_m, greedy = partition(at, outside, penalty, KIND, BLOCK)
                z = tl.where(inside, steered_inside(at, w, delta), -INF).to(tl.float64)
                z_shift = shift * 0.0
                if OUTSIDE & KIND:
                    z = tl.where(inside, z, (w.to(tl.float64) - max_w) * scale)
                    z_shift = tl.where(inside, 0.0, lift).to(tl.float64)
                logprob = ((z - high) + (z_shift - shift)) * inverse_power(scale) - log_z
                tl.store(curves_out + m, logprob.to(tl.float32))
                slope = tl.where(logprob > -INF, move - mean_m, 0.0)
                tl.store(curves_out + size + m, slope.to(tl.float32))
                tl.store(curves_out + 2 * size + m, variance_m.to(tl.float32))
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
