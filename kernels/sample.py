"""``steered_sample``: softmax of both rows, steering, filters and the draw, in one launch.

Bytes moved, for B rows of V tokens of s bytes: 2 B V s with a base model (B V s without), each logit read
from memory once. That is all when the row's candidates fit (CAP a slice; any alpha > 0 with penalty -inf
on a row that is not nearly flat), or when no sums are needed first (plain sampling; ``log_ratio`` and
``vector`` with alpha = 0 at a given strength). Otherwise (alpha = 0 with ``kl_gradient``, a finite
penalty, filters over the whole vocabulary) the finishing program reads its row again, from L2; a filter
then takes up to 20 such sweeps, and with few rows these do not use the whole GPU. A row is also read again
where its logits are so large that the first sweep rounded the noise, or the warm logits, away.
"""

# A condition known at compile time and one known at run time must not share an `if`.
# ruff: noqa: SIM108

from __future__ import annotations

import triton
import triton.language as tl

from .candidates import in_play, load_token, top_token
from .filters import RANK_LIMIT, rank_list, threshold
from .full_sweep import draw, finite_argmax, moments
from .steering import (
    CONSTANT,
    DIRECTION,
    EPS,
    INF,
    KL_BUDGET,
    LABEL,
    LISTS,
    MAX_ID,
    PLAIN,
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
    steered_of,
    value_of,
)
from .sweep import BASE_MASKED, COUNTS, FAR, INVALID, SUMS, divergence, merge, sweep_slice

ROUGH = tl.constexpr(1024.0)  # perturbed logits from here up are rounded by 3e-5 and more


@triton.jit
def per_score(scale, temperature):
    """1 / (scale * temperature): it takes differences of scaled logits to those of the filters. Finite."""
    return tl.minimum(1.0 / (scale.to(tl.float64) * temperature), 3e38).to(tl.float32)


@triton.jit
def strength_of(row, vocab, strength, label, KIND: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr):
    """The strength by the per-token optimum for a label, or by a budget of KL in nats."""
    mean, norm2, variance = moments(row, vocab, KIND, BLOCK)
    if MODE == LABEL:
        w, other = load_token(row, label, KIND)
        at_label = tl.where(inside_of(w, row.max_w, row.log_alpha), delta_of(row, w, other, KIND), 0.0)
        mu = tl.where(norm2 < EPS, 0.0, (in_nats(at_label, KIND) - mean) / (norm2 + EPS))
    else:
        tiny = variance < EPS
        mu = tl.where(tiny, 0.0, tl.sqrt(2.0 * strength.to(tl.float64) / tl.where(tiny, 1.0, variance)))
    return mu.to(tl.float32)


@triton.jit
def finish(
    row, vocab, mode_value, penalty, label, temperature, top_k, top_p, min_p, seed, offset, values,
    KIND: tl.constexpr, MODE: tl.constexpr, FILTERS: tl.constexpr, INFO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Strength, filters and draw of a row after its first sweep: (token, mu, and what :func:`draw` has)."""
    if MODE != CONSTANT:
        mu = strength_of(row, vocab, mode_value, label, KIND, MODE, BLOCK)
    else:
        mu = mode_value
    scale, push, outside = scaled_strength(mu, penalty, KIND)
    row = Row(
        row.warm, row.other, row.listed, row.from_list, row.count, row.max_w, row.log_zw, row.max_b, row.gap,
        row.log_alpha, scale, push, outside,
    )  # fmt: skip
    greedy = temperature == 0.0
    inverse = per_score(scale, tl.where(greedy, 1.0, temperature))
    filtered = False
    ranked = False
    top, top_id, lowest = (
        tl.full([], 0.0, tl.float32),
        tl.full([], MAX_ID, tl.int32),
        tl.full([], -INF, tl.float32),
    )
    floor, last_tie = tl.full([], 0, tl.uint32), tl.full([], MAX_ID, tl.int32)
    if FILTERS:
        filtered = (not greedy) & ((top_k > 0) | (top_p < 1.0) | (min_p > 0.0))
        if LISTS & KIND:
            ranked = row.from_list & (row.count <= RANK_LIMIT)
        if filtered:
            top, top_id = top_token(row, KIND, BLOCK)
            lowest = safe_log(min_p)
            if LISTS & KIND:
                if ranked:
                    rank_list(row, values, top, inverse, top_k, top_p, min_p, KIND)
                else:
                    floor, last_tie = threshold(row, top, inverse, top_k, top_p, KIND)
            else:
                floor, last_tie = threshold(row, top, inverse, top_k, top_p, KIND)
    token, high, log_z, inside = draw(
        row, values, ranked, filtered, top, top_id, floor, last_tie, lowest, inverse, temperature, greedy,
        seed, offset, KIND, FILTERS, INFO, BLOCK,
    )  # fmt: skip
    return token, mu, high, log_z, inside


@triton.jit(do_not_specialize=["top_k", "seed", "offset"])
def steered_sample_kernel(
    warm, other, warm_rows, other_rows, labels, sums, counts, listed, values, counters,
    token_out, floats_out, ints_out, warm_stride, other_stride, batch, vocab, slice_size, penalty,
    strength, strength_rows, alpha, alpha_rows, temperature, temperature_rows, top_k: tl.int64, top_k_rows,
    top_p, top_p_rows, min_p, min_p_rows, seed: tl.int64, seed_rows, offset: tl.int64, offset_rows,
    KIND: tl.constexpr, MODE: tl.constexpr, FILTERS: tl.constexpr, DIRECT: tl.constexpr, INFO: tl.constexpr,
    SPLITS: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program ``row * SPLITS + slice`` of ``batch * SPLITS``; ``kernels/library.py`` has the arguments."""
    HAS_BASE: tl.constexpr = (DIRECTION & KIND) < VECTOR
    SUMMED: tl.constexpr = HAS_BASE or INFO or not DIRECT
    program = tl.program_id(0)
    index, part = program // SPLITS, program % SPLITS
    warm += row_index(warm_rows, index) * warm_stride
    other += row_index(other_rows, index) * other_stride
    sums += index.to(tl.int64) * (SPLITS * SUMS)
    counts += index.to(tl.int64) * (SPLITS * COUNTS)
    listed += index.to(tl.int64) * (SPLITS * CAP)
    values += index.to(tl.int64) * (2 * RANK_LIMIT)

    mu = value_of(strength_rows, strength, index)
    log_alpha = tl.full([], -INF, tl.float32)
    alpha_ok = True
    if DIRECTION & KIND != PLAIN:
        alpha = value_of(alpha_rows, alpha, index)
        alpha_ok = in_unit(alpha)
        log_alpha = safe_log(alpha)
    temperature = value_of(temperature_rows, temperature, index)
    seed, offset = value_of(seed_rows, seed, index), value_of(offset_rows, offset, index)
    # The compiler of torch.compile does not heed the annotations: a small number arrives as 32 bits.
    seed, offset = seed.to(tl.int64), offset.to(tl.int64)
    top_k = value_of(top_k_rows, top_k, index).to(tl.int64)
    greedy = temperature == 0.0
    scale, push, _ = scaled_strength(mu, penalty, KIND)
    heat = scale * temperature
    last = sweep_slice(
        warm, other, part, slice_size, vocab, log_alpha, sums, counts, listed, counters + index,
        scale, push, heat, greedy, seed, offset, KIND, DIRECT, SUMMED, SPLITS, CAP, BLOCK, STAGES,
    )  # fmt: skip
    if last:
        max_w, max_b, zw, zb, usable, cross, flags, count, best, best_id = merge(
            sums, counts, listed, warm, log_alpha, SPLITS, KIND, CAP
        )
        top_p, min_p = value_of(top_p_rows, top_p, index), value_of(min_p_rows, min_p, index)
        valid = alpha_ok & is_finite(mu) & is_finite(temperature) & (temperature >= 0.0) & (top_k >= 0)
        valid = valid & in_unit(top_p) & in_unit(min_p) & ((flags & INVALID) == 0)
        label = tl.full([], 0, tl.int64)
        if MODE == KL_BUDGET:
            valid = valid & (mu >= 0.0)
        if MODE == LABEL:
            label = tl.load(labels + index)
            valid = valid & (label >= 0) & (label < vocab)
            label = tl.where(valid, label, 0)
        if not SUMMED:  # any logit of the row will do to be relative to
            found = best_id != MAX_ID
            max_w = tl.load(warm + best_id, mask=found, other=-INF).to(tl.float32)
        valid = valid & (max_w > -INF)

        token = tl.full([], MAX_ID, tl.int32)
        log_zw, log_zb, kl, gap = divergence(
            warm, other, vocab, max_w, max_b, zw, zb, usable, cross, valid, HAS_BASE
        )
        high, log_z, inside = tl.full([], 0.0, tl.float32), log_zw, count
        if valid:
            row = Row(
                warm, other, listed, count >= 0, in_play(count, vocab, KIND), max_w, log_zw, max_b, gap,
                log_alpha, scale, push, 0.0,
            )  # fmt: skip
            if DIRECT:
                token = best_id
                # The sweep's choice does not stand where a base of -inf has delta = 0, which depends on K,
                # and where the rounding of large numbers would show next to the noise.
                rough = tl.abs(best) > tl.where(greedy, scale, heat) * ROUGH
                rough = rough | ((flags & (BASE_MASKED | FAR)) != 0)
                if rough | (INFO and DIRECTION & KIND != PLAIN):
                    again, _, high, log_z, inside = finish(
                        row, vocab, mu, penalty, label, temperature, top_k, top_p, min_p, seed, offset,
                        values, KIND, MODE, FILTERS, INFO, BLOCK,
                    )  # fmt: skip
                    token = tl.where(rough, again, token)
            else:
                token, mu, high, log_z, inside = finish(
                    row, vocab, mu, penalty, label, temperature, top_k, top_p, min_p, seed, offset, values,
                    KIND, MODE, FILTERS, INFO, BLOCK,
                )  # fmt: skip
        if token == MAX_ID:
            token = finite_argmax(warm, vocab, BLOCK)
        tl.store(token_out + index, token.to(tl.int64))
        if INFO:
            describe(
                warm, other, floats_out + index, ints_out + index, batch, token, valid, mu, max_w, log_zw,
                max_b, log_zb, kl, gap, high, log_z, inside, flags, log_alpha, penalty, KIND,
            )  # fmt: skip


@triton.jit
def describe(
    warm, other, floats_out, ints_out, batch, token, valid, mu, max_w, log_zw, max_b, log_zb, kl, gap,
    high, log_z, inside, flags, log_alpha, penalty, KIND: tl.constexpr,
):  # fmt: skip
    """Write a row's column of ``SampleInfo``: floats (5, B) and ints (2, B)."""
    scale, push, outside = scaled_strength(mu, penalty, KIND)
    row = Row(
        warm, other, warm, False, 0, max_w, log_zw, max_b, gap, log_alpha, scale, push, outside,
    )  # fmt: skip
    w, o = load_token(row, token, KIND)
    nan = tl.full([], float("nan"), tl.float32)
    tl.store(floats_out, tl.where(valid, mu, nan))
    z = steered_of(row, w, delta_of(row, w, o, KIND), KIND)
    tl.store(floats_out + 2 * batch, tl.where(valid, (z - high) * inverse_power(scale) - log_z, nan))
    tl.store(floats_out + 3 * batch, tl.where(valid, w - max_w - log_zw, nan))
    if DIRECTION & KIND < VECTOR:
        tl.store(floats_out + batch, tl.where(valid, kl.to(tl.float32), nan))
        log_q = tl.where(o > -INF, o - max_b - log_zb, -INF)
        tl.store(floats_out + 4 * batch, tl.where(valid, log_q, nan))
    else:
        tl.store(floats_out + batch, nan)
        tl.store(floats_out + 4 * batch, nan)
    tl.store(ints_out, tl.where(valid, inside, 0))
    tl.store(ints_out + batch, tl.where(valid, flags & BASE_MASKED, INVALID))
