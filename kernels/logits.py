"""``steered_logits``: a kernel that measures each row, and one that writes the steered rows.

Steps 1 to 8 in the first, and step 9 for the candidates where nothing else can be drawn; else 9 in the
second, token by token. Nothing is read back. Bytes moved, for B rows of V tokens of s bytes and an output of
t: with candidates B V (2 s + t), each logit read once, and B V (4 s + t) where the rows are read again (a
finite penalty, alpha = 0, a nearly flat row). The second kernel writes no token before it has read it, and
reads none for another one, so ``out`` may be the warm logits.
"""

# A condition known at compile time and one known at run time must not share an `if`.
# ruff: noqa: SIM102

from __future__ import annotations

import triton
import triton.language as tl

from .candidates import Tokens, load_tile, tokens_of
from .extract import KEPT, keep_constants, kept_constants
from .full_sweep import moments_of
from .steering import (
    COMPACT,
    CONSTANT,
    DIRECTION,
    INF,
    KL_BUDGET,
    OUTSIDE,
    PLAIN,
    Operands,
    PerRow,
    delta_of,
    in_confidence_set,
    in_nats,
    in_unit,
    is_finite,
    row_index,
    safe_log,
    strength_of,
    value_of,
)
from .sweep import FINISHING, make_constants, merge, slices_of_row, sweep_slice
from .token_sweep import BASE_MASKED, INVALID, Slices

EVERY_TOKEN = tl.constexpr(-1)  # instead of a number of candidates: all of the row is to be steered
NO_TOKEN = tl.constexpr(-2)  # the row is invalid


@triton.jit
def is_skipped(skip, index):
    """Whether a row is to be copied."""
    skipped = index < 0
    if skip is not None:
        skipped = tl.load(skip + index) != 0
    return skipped


@triton.jit
def log_alpha_of(alpha, alpha_rows, index, KIND: tl.constexpr):
    """Where C ends, below the maximum."""
    log_alpha = tl.full([], -INF, tl.float32)
    if DIRECTION & KIND != PLAIN:
        log_alpha = safe_log(value_of(PerRow(alpha, alpha_rows), index))
    return log_alpha


@triton.jit
def valid_parameters(mu, alpha, alpha_rows, index, KIND: tl.constexpr, MODE: tl.constexpr):
    """Step 1: whether a row's parameters are in range; only tensors get this far unchecked."""
    valid = is_finite(mu)
    if DIRECTION & KIND != PLAIN:
        valid = valid & in_unit(value_of(PerRow(alpha, alpha_rows), index))
    if MODE == KL_BUDGET:
        valid = valid & (mu >= 0.0)
    return valid


@triton.jit
def steered_tokens(constants, mu, penalty, largest, w, other, KIND: tl.constexpr):
    """Step 9 in nats, float32 between ``-largest`` and ``largest``; -inf where a token cannot be drawn."""
    wide, strength = w.to(tl.float64), tl.full([], 0.0, tl.float64) + mu
    inside = in_confidence_set(w, constants.max_w, constants.log_alpha)
    z = tl.where(inside, wide + strength * in_nats(delta_of(constants, w, other, KIND), KIND), -INF)
    if OUTSIDE & KIND:
        outside = (w > -INF) & (w - constants.max_w < constants.log_alpha)
        z = tl.where(outside, wide + strength * penalty, z)
    within = tl.minimum(tl.maximum(z, -largest), largest)
    return tl.where(z > -INF, within, -INF).to(tl.float32)


@triton.jit
def steer_candidates(
    tokens, constants, mu, penalty, largest, steered, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    """Write the steered logits of a row's candidates to ``steered``, in their order."""
    for start in range(0, tokens.count, BLOCK):
        _, w, other = load_tile(tokens, start, KIND, BLOCK)
        place = start + tl.arange(0, BLOCK)
        z = steered_tokens(constants, mu, penalty, largest, w, other, KIND)
        tl.store(steered + place, z, mask=place < tokens.count)


@triton.jit
def measure_rows_kernel(
    warm, other, warm_rows, base_rows, vocab, strength, strength_rows, alpha, alpha_rows, penalty, skip,
    sums, counts, candidates, counters, steered_out, kept_out, mu_out, found_out, status_out, largest,
    warm_stride, other_stride, slice_size, KIND: tl.constexpr, MODE: tl.constexpr,
    SPLITS: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program ``row * SPLITS + slice``: constants, mu and status of each row; how many candidates, if any."""
    TILE: tl.constexpr = min(BLOCK, FINISHING)
    program = tl.program_id(0)
    index, part = program // SPLITS, program % SPLITS
    if is_skipped(skip, index):
        tl.store(status_out + index, 0)
    else:
        warm += row_index(warm_rows, index) * warm_stride
        other += row_index(base_rows, index) * other_stride
        operands = Operands(warm, other, vocab, None, None)
        slices = Slices(part, slice_size, sums, counts, candidates, counters)
        slices = slices_of_row(slices, index, SPLITS, CAP)
        log_alpha = log_alpha_of(alpha, alpha_rows, index, KIND)
        if sweep_slice(operands, slices, log_alpha, None, None, KIND, SPLITS, CAP, BLOCK, STAGES):
            swept = merge(operands, slices, log_alpha, KIND, SPLITS, CAP)
            mu = value_of(PerRow(strength, strength_rows), index)
            valid = valid_parameters(mu, alpha, alpha_rows, index, KIND, MODE)
            valid = valid & (swept.sums.max_w > -INF) & ((swept.flags & INVALID) == 0)
            if valid:
                constants = make_constants(operands, swept.sums, log_alpha, valid, KIND)
                tokens = tokens_of(operands, slices.candidates, swept.count, KIND)
                if MODE != CONSTANT:
                    moments = moments_of(tokens, constants, KIND, TILE)
                    mu = strength_of(moments, 0.0, mu, MODE)
                found = tl.full([], EVERY_TOKEN, tl.int32)
                if COMPACT & KIND:
                    found = swept.count
                    if found >= 0:
                        steered_out += index.to(tl.int64) * (SPLITS * CAP)
                        steer_candidates(tokens, constants, mu, penalty, largest, steered_out, KIND, TILE)
                keep_constants(kept_out + index * KEPT, constants)
                tl.store(mu_out + index, mu)
                tl.store(found_out + index, found)
                tl.store(status_out + index, swept.flags & BASE_MASKED)
            else:
                tl.store(found_out + index, NO_TOKEN)
                tl.store(status_out + index, INVALID)


@triton.jit
def write_rows_kernel(
    warm, other, warm_rows, base_rows, vocab, alpha, alpha_rows, penalty, skip,
    candidates, steered, kept, mus, found, logits_out, largest,
    warm_stride, other_stride, out_stride, width,
    KIND: tl.constexpr, SPLITS: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program ``row * tiles + tile``: BLOCK of the ``width`` steered logits of a row."""
    program, tiles = tl.program_id(0), tl.cdiv(width, BLOCK)
    index, begin = program // tiles, program % tiles * BLOCK
    ids = begin + tl.arange(0, BLOCK)
    warm += row_index(warm_rows, index) * warm_stride
    other += row_index(base_rows, index) * other_stride
    logits_out += index.to(tl.int64) * out_stride
    skipped = is_skipped(skip, index)
    z = tl.full([BLOCK], -INF, tl.float32)
    count = tl.full([], EVERY_TOKEN, tl.int32)
    if skipped:
        z = tl.load(warm + ids, mask=ids < vocab, other=-INF).to(tl.float32)
    else:
        count = tl.load(found + index)
        if count == NO_TOKEN:
            z = tl.full([BLOCK], float("nan"), tl.float32)
        if count == EVERY_TOKEN:
            constants = kept_constants(kept + index * KEPT, log_alpha_of(alpha, alpha_rows, index, KIND))
            tokens = Tokens(Operands(warm, other, vocab, None, None), candidates, count >= 0, vocab)
            _, w, o = load_tile(tokens, begin, KIND, BLOCK)
            z = steered_tokens(constants, tl.load(mus + index), penalty, largest, w, o, KIND)
    z = tl.where(ids < vocab, z, -INF)
    tl.store(logits_out + ids, z.to(logits_out.dtype.element_ty), mask=ids < width)
    if COMPACT & KIND:
        if count > 0:
            tl.debug_barrier()  # other threads write these than wrote them just now
            candidates += index.to(tl.int64) * (SPLITS * CAP)
            steered += index.to(tl.int64) * (SPLITS * CAP)
            for start in range(0, count, BLOCK):
                place = start + tl.arange(0, BLOCK)
                token = tl.load(candidates + place, mask=place < count, other=-1)
                z = tl.load(steered + place, mask=place < count, other=0.0)
                here = (token >= begin) & (token < begin + BLOCK)
                tl.store(logits_out + token, z.to(logits_out.dtype.element_ty), mask=here)
