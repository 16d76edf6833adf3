"""``steered_sample``: softmax of both rows, steering, filters and the draw, in one launch (steps 1 to 12).

Bytes moved, for B rows of V tokens of s bytes: 2 B V s with a base model (B V s without), each logit read
from memory once. That is all when the row's candidates fit (CAP a slice; any alpha > 0 with penalty -inf
on a row that is not nearly flat), or when no sums are needed first (plain sampling; ``log_ratio`` and
``vector`` with alpha = 0 at a given strength). Otherwise (alpha = 0 with ``kl_gradient``, a finite
penalty, filters over the whole vocabulary) the finishing program reads its row again, from L2; a filter
then takes up to 20 such sweeps, and with few rows these do not use the whole GPU. A draw that needs no sums
reads one slice again, that where the row's uniform lands, and the whole row where the first sweep rounded.
"""

# A condition known at compile time and one known at run time must not share an `if`.

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .candidates import load_token, tokens_of
from .filters import RANK_LIMIT, Limits, make_filter, per_scaled_logit
from .full_sweep import Drawn, draw_tokens, fallback_token, moments_of
from .philox import Draw, row_uniform
from .steering import (
    CONSTANT,
    DIRECT,
    DIRECTION,
    INF,
    INFO,
    KL_BUDGET,
    LABEL,
    MAX_ID,
    PLAIN,
    VECTOR,
    Operands,
    PerRow,
    adjusted,
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
    steered_logits,
    strength_of,
    value_of,
)
from .sweep import FINISHING, make_constants, merge, slice_of_draw, slices_of_row, sweep_slice
from .token_sweep import BASE_MASKED, FAR_APART, INVALID, Slices, Sums

LOUD_FROM = tl.constexpr(1024.0)  # nats from here up are rounded by 3e-5 and more


class Parameters(NamedTuple):
    """What a caller asked for a row."""

    strength: Any
    """mu, or the budget of KL."""
    label: Any
    """For LABEL."""
    alpha: Any
    penalty: Any
    limits: Limits
    draw: Draw


@triton.jit
def valid_parameters(parameters, vocab, KIND: tl.constexpr, MODE: tl.constexpr):
    """Step 1: whether a row's parameters are in range; only tensors get this far unchecked."""
    limits, temperature = parameters.limits, parameters.draw.temperature
    valid = is_finite(parameters.strength)
    if DIRECTION & KIND != PLAIN:
        valid = valid & in_unit(parameters.alpha)
    valid = valid & is_finite(temperature) & (temperature >= 0.0) & (limits.top_k >= 0)
    valid = valid & in_unit(limits.top_p) & in_unit(limits.min_p)
    if MODE == KL_BUDGET:
        valid = valid & (parameters.strength >= 0.0)
    if MODE == LABEL:
        valid = valid & (parameters.label >= 0) & (parameters.label < vocab)
    return valid


@triton.jit
def finish_row(
    tokens, constants, parameters, ranking, KIND: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr
):
    """Steps 7 to 11, of a valid row: strength, filters and draw. ``ranking``: space for the filters."""
    mu = parameters.strength
    if MODE != CONSTANT:
        moments = moments_of(tokens, constants, KIND, BLOCK)
        delta = tl.full([], 0.0, tl.float64)
        if MODE == LABEL:
            w, other = load_token(tokens.operands, parameters.label, KIND)
            inside = in_confidence_set(w, constants.max_w, constants.log_alpha)
            delta = in_nats(tl.where(inside, delta_of(constants, w, other, KIND), 0.0), KIND)
        mu = strength_of(moments, delta, parameters.strength, MODE)
    strength = scale_strength(mu, parameters.penalty, KIND)
    return draw_among(tokens, constants, strength, parameters, ranking, 0, tokens.count, -1.0, KIND, BLOCK)


@triton.jit
def draw_among(
    tokens,
    constants,
    strength,
    parameters,
    ranking,
    begin,
    end,
    share,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Steps 10 and 11 among the tokens ``begin .. end``; a negative ``share``: that of the row's uniform."""
    temperature = parameters.draw.temperature
    filter = make_filter(tokens, constants, strength, parameters.limits, temperature, ranking, KIND, BLOCK)
    landing = tl.full([], 0.0, tl.float64) + share
    if landing < 0.0:
        landing = row_uniform(parameters.draw)
    landing = tl.where(temperature == 0.0, -1.0, landing)
    rate = per_scaled_logit(strength.scale, tl.where(temperature == 0.0, 1.0, temperature))
    return draw_tokens(tokens, constants, strength, filter, begin, end, rate, landing, KIND, BLOCK)


@triton.jit
def describe(
    operands, constants, drawn, valid, flags, penalty, floats_out, ints_out, batch, KIND: tl.constexpr
):
    """Step 12: write a row's column of ``SampleInfo``: floats (5, B) and ints (2, B)."""
    strength = scale_strength(drawn.mu, penalty, KIND)
    w, o = load_token(operands, drawn.token, KIND)
    nan = tl.full([], float("nan"), tl.float32)
    tl.store(floats_out, tl.where(valid, drawn.mu, nan))
    z = steered_logits(constants, strength, w, delta_of(constants, w, o, KIND), KIND)
    log_steered = (z - drawn.max_z) * inverse_power(strength.scale) - drawn.log_z
    tl.store(floats_out + 2 * batch, tl.where(valid, log_steered, nan))
    tl.store(floats_out + 3 * batch, tl.where(valid, log_p_of(constants, w), nan))
    if DIRECTION & KIND < VECTOR:
        tl.store(floats_out + batch, tl.where(valid, constants.kl.to(tl.float32), nan))
        tl.store(floats_out + 4 * batch, tl.where(valid, log_q_of(constants, o), nan))
    else:
        tl.store(floats_out + batch, nan)
        tl.store(floats_out + 4 * batch, nan)
    tl.store(ints_out, tl.where(valid, drawn.size, 0))
    tl.store(ints_out + batch, tl.where(valid, flags & BASE_MASKED, INVALID))


@triton.jit(do_not_specialize=["top_k", "seed", "offset", "batch"])
def steered_sample_kernel(
    warm, other, warm_rows, base_rows, vocab, logit_bias, bitmask, labels,
    strength, strength_rows, alpha, alpha_rows, penalty, temperature, temperature_rows,
    top_k: tl.int64, top_k_rows, top_p, top_p_rows, min_p, min_p_rows,
    seed: tl.int64, seed_rows, offset: tl.int64, offset_rows,
    sums, counts, candidates, ranking, counters, token_out, floats_out, ints_out,
    warm_stride, other_stride, bias_stride, bitmask_stride, batch, slice_size,
    KIND: tl.constexpr, MODE: tl.constexpr,
    SPLITS: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program ``row * SPLITS + slice`` of ``batch * SPLITS``; ``kernels/library.py`` has the arguments."""
    SUMMED: tl.constexpr = DIRECTION & KIND < VECTOR or INFO & KIND or not DIRECT & KIND
    TILE: tl.constexpr = min(BLOCK, FINISHING)
    program = tl.program_id(0)
    index, part = program // SPLITS, program % SPLITS
    warm += row_index(warm_rows, index) * warm_stride
    other += row_index(base_rows, index) * other_stride
    if logit_bias is not None:
        logit_bias += index.to(tl.int64) * bias_stride
    if bitmask is not None:
        bitmask += index.to(tl.int64) * bitmask_stride
    operands = Operands(warm, other, vocab, logit_bias, bitmask)
    slices = Slices(part, slice_size, sums, counts, candidates, counters)
    slices = slices_of_row(slices, index, SPLITS, CAP)
    ranking += index.to(tl.int64) * (2 * RANK_LIMIT)

    mu = value_of(PerRow(strength, strength_rows), index)
    log_alpha = tl.full([], -INF, tl.float32)
    if DIRECTION & KIND != PLAIN:
        alpha = value_of(PerRow(alpha, alpha_rows), index)
        log_alpha = safe_log(alpha)
    temperature = value_of(PerRow(temperature, temperature_rows), index)
    seed, offset = value_of(PerRow(seed, seed_rows), index), value_of(PerRow(offset, offset_rows), index)
    # The compiler of torch.compile does not heed the annotations: a small number arrives as 32 bits.
    draw = Draw(temperature, seed.to(tl.int64), offset.to(tl.int64))
    top_k = value_of(PerRow(top_k, top_k_rows), index).to(tl.int64)
    given = scale_strength(mu, penalty, KIND)
    rate = per_scaled_logit(given.scale, tl.where(temperature == 0.0, 1.0, temperature))
    if sweep_slice(operands, slices, log_alpha, given, rate, KIND, SPLITS, CAP, BLOCK, STAGES):
        swept = merge(operands, slices, log_alpha, KIND, SPLITS, CAP)
        top_p, min_p = value_of(PerRow(top_p, top_p_rows), index), value_of(PerRow(min_p, min_p_rows), index)
        label = tl.full([], 0, tl.int64)
        if MODE == LABEL:
            label = tl.load(labels + index)
        parameters = Parameters(mu, label, alpha, penalty, Limits(top_k, top_p, min_p), draw)
        valid = valid_parameters(parameters, vocab, KIND, MODE) & ((swept.flags & INVALID) == 0)
        row_sums = swept.sums
        if not SUMMED:  # any logit of the row will do to be relative to
            found = swept.best_id != MAX_ID
            max_w = tl.load(operands.warm + swept.best_id, mask=found, other=-INF).to(tl.float32)
            max_w = adjusted(max_w, operands.bias, operands.bitmask, swept.best_id, found)
            row_sums = Sums(
                max_w, row_sums.max_b, row_sums.z_w, row_sums.z_b, row_sums.usable, row_sums.cross
            )
        valid = valid & (row_sums.max_w > -INF)

        constants = make_constants(operands, row_sums, log_alpha, valid, KIND)
        nothing, zero = tl.full([], MAX_ID, tl.int32), tl.full([], 0.0, tl.float32)
        drawn = Drawn(nothing, mu, zero, constants.log_zw, swept.count)
        if valid:
            tokens = tokens_of(operands, slices.candidates, swept.count, KIND)
            if DIRECT & KIND:
                token = swept.best_id
                if temperature > 0.0:
                    part, share = slice_of_draw(slices, swept.best, rate, row_uniform(draw), SPLITS)
                    begin = part * slices.size
                    end = tl.minimum(begin + slices.size, vocab)
                    landed = draw_among(
                        tokens, constants, given, parameters, ranking, begin, end, share, KIND, TILE
                    )
                    token = landed.token
                drawn = Drawn(token, mu, zero, constants.log_zw, swept.count)
                if DIRECTION & KIND != PLAIN:
                    # The masses do not stand where a base of -inf has delta = 0, which depends on K, and
                    # where large numbers, which are not relative to a maximum yet, were rounded.
                    unit = tl.where(temperature == 0.0, given.scale, given.scale * temperature)
                    rounded = tl.abs(swept.best) > unit * LOUD_FROM
                    rounded = rounded | ((swept.flags & (BASE_MASKED | FAR_APART)) != 0)
                    if rounded | ((INFO & KIND) != 0):
                        again = finish_row(tokens, constants, parameters, ranking, KIND, MODE, TILE)
                        token = tl.where(rounded, again.token, token)
                        drawn = Drawn(token, mu, again.max_z, again.log_z, again.size)
            else:
                drawn = finish_row(tokens, constants, parameters, ranking, KIND, MODE, TILE)
        token = drawn.token
        if token == MAX_ID:
            token = fallback_token(operands, TILE)
        tl.store(token_out + index, token.to(tl.int64))
        if INFO & KIND:
            drawn = Drawn(token, drawn.mu, drawn.max_z, drawn.log_z, drawn.size)
            describe(
                operands,
                constants,
                drawn,
                valid,
                swept.flags,
                penalty,
                floats_out + index,
                ints_out + index,
                batch,
                KIND,
            )
