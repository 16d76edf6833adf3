"""``steered_logprob``: log-probabilities of labels for any number of strengths, with their derivatives.

Steps 1 to 9 and 12; nothing is drawn. Bytes moved, for B rows of V tokens of s bytes: 2 B V s. Where C has
candidates, every strength costs a pass over these only, and a finite penalty one more sweep (what lies
outside C enters as one mass). Where it has not (alpha = 0, or a nearly flat row) every strength is another
sweep, from L2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .candidates import load_token, tokens_of
from .full_sweep import fallback_token, log_outside, moments_of, partition_of
from .steering import (
    COMPACT,
    DIRECTION,
    INF,
    OUTSIDE,
    VECTOR,
    Operands,
    PerRow,
    delta_of,
    in_confidence_set,
    in_nats,
    in_unit,
    inverse_power,
    is_finite,
    log_p_of,
    log_q_of,
    row_index,
    safe_log,
    scale_strength,
    steered_inside,
    value_of,
)
from .sweep import FINISHING, make_constants, merge, slices_of_row, sweep_slice
from .token_sweep import BASE_MASKED, INVALID, Slices


class Label(NamedTuple):
    """The token of a row whose log-probability is asked for."""

    warm: Any
    other: Any
    inside: Any
    """Whether it is in C."""
    delta: Any
    """As of ``delta_of``, 0 outside C."""
    move: Any
    """What moves with mu: its delta in nats, or the penalty outside C."""


@triton.jit
def strength_at(strengths, strength, index, m):
    """The m-th strength of a row."""
    mu = value_of(strength, index)
    if strengths is not None:
        mu = tl.load(strengths + m)
    return mu


@triton.jit
def valid_parameters(valid, alpha, label, vocab, strengths, strength, index, number):
    """Step 1: ``valid``, if a row's parameters are in range too; only tensors get this far unchecked."""
    valid = valid & in_unit(alpha) & (label >= 0) & (label < vocab)
    for m in range(number):
        valid = valid & is_finite(strength_at(strengths, strength, index, m))
    return valid


@triton.jit
def describe(constants, label, moments, rows_out, batch, KIND: tl.constexpr):
    """Step 12: write a row's column of ``rows_out`` (6, B)."""
    HAS_BASE: tl.constexpr = DIRECTION & KIND < VECTOR
    nan = tl.full([], float("nan"), tl.float32)
    gain = in_nats(label.delta, KIND) - moments.mean
    tl.store(rows_out, gain.to(tl.float32))
    tl.store(rows_out + batch, moments.norm2.to(tl.float32))
    tl.store(rows_out + 2 * batch, moments.variance.to(tl.float32))
    tl.store(rows_out + 3 * batch, constants.kl.to(tl.float32) if HAS_BASE else nan)
    tl.store(rows_out + 4 * batch, log_p_of(constants, label.warm))
    tl.store(rows_out + 5 * batch, log_q_of(constants, label.other) if HAS_BASE else nan)


@triton.jit
def logprob_of(constants, strength, partition, label, KIND: tl.constexpr):
    """Step 9 of the label: its log-probability under the steered distribution."""
    w = label.warm
    z = tl.where(label.inside, steered_inside(constants, strength, w, label.delta), -INF).to(tl.float64)
    shift = partition.shift * 0.0
    if OUTSIDE & KIND:
        z = tl.where(label.inside, z, (w.to(tl.float64) - constants.max_w) * strength.scale)
        shift = tl.where(label.inside, 0.0, strength.scaled_penalty).to(tl.float64)
    above = (z - partition.max_z) + (shift - partition.shift)
    return above * inverse_power(strength.scale) - partition.log_z


@triton.jit(do_not_specialize=["batch", "number"])
def steered_logprob_kernel(
    warm, other, warm_rows, base_rows, vocab, labels, strength, strength_rows, alpha, alpha_rows, penalty,
    strengths, number, sums, counts, candidates, counters, curves_out, greedy_out, rows_out, status_out,
    warm_stride, other_stride, batch, slice_size,
    KIND: tl.constexpr, SPLITS: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program ``row * SPLITS + slice``; ``strengths`` (number,) for every row, or none and number = 1."""
    TILE: tl.constexpr = min(BLOCK, FINISHING)
    program = tl.program_id(0)
    index, part = program // SPLITS, program % SPLITS
    warm += row_index(warm_rows, index) * warm_stride
    other += row_index(base_rows, index) * other_stride
    operands = Operands(warm, other, vocab, None, None)
    slices = Slices(part, slice_size, sums, counts, candidates, counters)
    slices = slices_of_row(slices, index, SPLITS, CAP)
    alpha = value_of(PerRow(alpha, alpha_rows), index)
    log_alpha = safe_log(alpha)
    if sweep_slice(operands, slices, log_alpha, None, None, KIND, SPLITS, CAP, BLOCK, STAGES):
        swept = merge(operands, slices, log_alpha, KIND, SPLITS, CAP)
        token = tl.load(labels + index)
        mus = PerRow(strength, strength_rows)
        valid = (swept.sums.max_w > -INF) & ((swept.flags & INVALID) == 0)
        valid = valid_parameters(valid, alpha, token, vocab, strengths, mus, index, number)
        curves_out += index.to(tl.int64) * number
        greedy_out += index.to(tl.int64) * number
        size = batch.to(tl.int64) * number
        nan = tl.full([], float("nan"), tl.float32)
        if valid:
            constants = make_constants(operands, swept.sums, log_alpha, valid, KIND)
            tokens = tokens_of(operands, slices.candidates, swept.count, KIND)
            moments = moments_of(tokens, constants, KIND, TILE)
            log_mass_outside = tl.full([], -INF, tl.float64)
            if COMPACT & KIND and OUTSIDE & KIND:
                log_mass_outside = log_outside(operands, constants, TILE)
            w, o = load_token(operands, token, KIND)
            inside = in_confidence_set(w, constants.max_w, log_alpha)
            delta = tl.where(inside, delta_of(constants, w, o, KIND), 0.0)
            move = in_nats(delta, KIND)
            if OUTSIDE & KIND:
                move = tl.where(inside, move, penalty)
            label = Label(w, o, inside, delta, move)
            describe(constants, label, moments, rows_out + index, batch, KIND)
            tl.store(status_out + index, swept.flags & BASE_MASKED)
            for m in range(number):
                at = scale_strength(strength_at(strengths, mus, index, m), penalty, KIND)
                partition = partition_of(tokens, constants, at, log_mass_outside, penalty, KIND, TILE)
                logprob = logprob_of(constants, at, partition, label, KIND)
                tl.store(curves_out + m, logprob.to(tl.float32))
                slope = tl.where(logprob > -INF, label.move - partition.mean, 0.0)
                tl.store(curves_out + size + m, slope.to(tl.float32))
                tl.store(curves_out + 2 * size + m, partition.variance.to(tl.float32))
                tl.store(greedy_out + m, partition.greedy.to(tl.int64))
        else:
            fallback = fallback_token(operands, TILE).to(tl.int64)
            for column in range(6):
                tl.store(rows_out + column * batch + index, nan)
            tl.store(status_out + index, INVALID)
            for m in range(number):
                for curve in range(3):
                    tl.store(curves_out + curve * size + m, nan)
                tl.store(greedy_out + m, fallback)
