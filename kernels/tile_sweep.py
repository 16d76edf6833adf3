"""Step 2: the first sweep over a slice of a row, by whole tiles of ordinary logits.

These are the loops that a step spends its time in. A tile is ``(ROWS, COLS)``, COLS logits to 16 bytes, so
that a thread holds whole rows of it: sums and maxima along a row cost no exchange, and what is kept from tile
to tile is one number a row. Exponentials are of base 2, their arguments one fused multiply-add each. There is
no look at single tokens: NaN, infinities, numbers far apart and warm logits whose base is -inf all show in
the sums, and then ``token_sweep`` goes over the slice again.
"""

# A condition known at compile time and one known at run time must not share an `if`.

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .steering import (
    COMPACT,
    DIRECT,
    DIRECTION,
    INF,
    INFO,
    MAX_ID,
    PLAIN,
    VECTOR,
    adjusted,
    in_confidence_set,
    or_zero,
)
from .token_sweep import Sums, Swept, sweep_tokens

LOG2E = tl.constexpr(1.4426950216293335)  # as a float32
LN2 = tl.constexpr(0.6931471805599453)
LOUD = tl.constexpr(2.0**24)  # from here up, a float32 multiple of log2 e may be off by more than 1
VECTOR_BITS = tl.constexpr(128)  # of one load of a thread


class TileDraw(NamedTuple):
    """DIRECT without a second operand: the best token of whole tiles and their mass relative to it."""

    holds: Any
    """Whether the rest is of use: the logits were ordinary ones."""
    best: Any
    """Scaled by the strength's ``scale``."""
    best_id: Any
    mass: Any


@triton.jit
def tile_ids(BLOCK: tl.constexpr, BITS: tl.constexpr):
    """``(ROWS, COLS)`` token ids from 0, for logits of so many bits."""
    COLS: tl.constexpr = VECTOR_BITS // BITS
    ROWS: tl.constexpr = BLOCK // COLS
    return tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]


@triton.jit
def moved(z, sums, keep):
    """``sums`` times ``keep``, which may be infinite where ``z`` is 0: nothing was added up there yet."""
    return tl.where(z == 0.0, 0.0, sums * keep)


@triton.jit
def first_sweep(
    operands,
    slices,
    log_alpha,
    strength,
    rate,
    KIND: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Step 2: what the tokens of this program's slice add up to, as :class:`Swept`; slices begin at a BLOCK.

    Whole tiles here or, for plain draws, in :func:`draw_tiles`; by tokens the rest of the slice, or all of it
    where its logits are not ordinary, and draws with a second operand. Exponentials are relative to the
    largest warm logit so far and to the largest base logit of the tile that had it: a tile that brings
    neither a candidate nor a new maximum costs one block-wide maximum.
    """
    HAS_BASE: tl.constexpr = (DIRECTION & KIND) < VECTOR
    begin = slices.part * slices.size
    end = tl.minimum(begin + slices.size, operands.vocab)
    whole = begin + tl.maximum(end - begin, 0) // BLOCK * BLOCK
    low, none, nothing = tl.full([], -INF, tl.float32), tl.full([], 0.0, tl.float32), tl.full([], 0, tl.int32)
    so_far = Swept(Sums(low, low, none, none, none, none), nothing, nothing, low, nothing + MAX_ID, none)
    after = begin
    if DIRECT & KIND:
        if DIRECTION & KIND == PLAIN and not INFO & KIND:
            drawn = draw_tiles(operands, begin, whole, strength.scale, rate, BLOCK, STAGES)
            if drawn.holds:
                so_far = Swept(so_far.sums, nothing, nothing, drawn.best, drawn.best_id, drawn.mass)
                after = whole
    else:
        # torch.compile takes what goes into a call for written where an address, such as that of a candidate,
        # depends on what the call returns: so the loop is here.
        candidates = slices.candidates + slices.part * CAP
        at = tile_ids(BLOCK, operands.warm.dtype.element_ty.primitive_bitwidth)
        zero = tl.zeros([at.shape[0]], tl.float32)
        z_w, z_b, cross, top_b, far = zero, zero, zero, zero - INF, zero - INF
        max_w, high_b, from_w, from_b, count = low, low, none, none, nothing
        for start in tl.range(begin, whole, BLOCK, num_stages=STAGES):
            ids = start + at
            w = tl.load(operands.warm + ids).to(tl.float32)
            w = adjusted(w, operands.bias, operands.bitmask, ids, ids < end)
            if DIRECTION & KIND <= VECTOR:
                o = tl.load(operands.other + ids).to(tl.float32)
                if HAS_BASE:
                    o = adjusted(o, operands.bias, operands.bitmask, ids, ids < end)
            tile_max = tl.max(tl.max(w, 1), 0)
            new_w = tl.maximum(max_w, tile_max)
            seen = tile_max > max_w
            if COMPACT & KIND:
                seen = tile_max - new_w >= log_alpha  # else nothing in this tile can be in C
            if seen:
                to_w, to_b = or_zero(new_w) * LOG2E, from_b
                if HAS_BASE:
                    high_b = tl.maximum(high_b, tl.max(tl.max(o, 1), 0))
                    to_b = or_zero(high_b) * LOG2E
                    shift = (from_w - to_w) - (from_b - to_b)
                    cross = moved(z_w, cross + z_w * shift, tl.exp2(from_w - to_w))
                    z_b = moved(z_b, z_b, tl.exp2(from_b - to_b))
                z_w = moved(z_w, z_w, tl.exp2(from_w - to_w))
                if COMPACT & KIND:
                    near = tl.reshape(in_confidence_set(w, new_w, log_alpha).to(tl.int32), [BLOCK])
                    place = count + tl.cumsum(near, 0) - 1
                    kept = (near > 0) & (place < CAP)
                    tl.store(candidates + place, start + tl.arange(0, BLOCK), mask=kept)
                    count += tl.sum(near, 0)
                max_w, from_w, from_b = new_w, to_w, to_b
            t_w = tl.fma(w, LOG2E, -from_w)
            e = tl.exp2(t_w)
            z_w += tl.sum(e, 1)
            if HAS_BASE:
                t_b = tl.fma(o, LOG2E, -from_b)
                z_b += tl.sum(tl.exp2(t_b), 1)
                cross += tl.sum(tl.where(e > 0.0, e * (t_w - t_b), 0.0), 1)
                far = tl.maximum(far, tl.max(w - o, 1))  # infinite where the base alone is -inf
                top_b = tl.maximum(top_b, tl.max(o, 1))
            elif DIRECTION & KIND == VECTOR:
                z_b += tl.sum(o * 0.0, 1)  # NaN if an entry is not finite
        max_b = tl.max(top_b, 0)
        sums, holds = settle(z_w, z_b, cross, max_w, max_b, from_w, from_b, far, KIND)
        if holds:
            so_far = Swept(sums, nothing, count, low, so_far.best_id, none)
            after = whole
        if COMPACT & KIND:
            tl.debug_barrier()  # other threads may write the same candidates again
    return sweep_tokens(operands, slices, so_far, after, log_alpha, strength, rate, KIND, CAP, BLOCK)


@triton.jit
def settle(z_w, z_b, cross, max_w, max_b, from_w, from_b, far, KIND: tl.constexpr):
    """The :class:`Sums` of whole tiles, and whether they hold: the logits were ordinary ones."""
    HAS_BASE: tl.constexpr = (DIRECTION & KIND) < VECTOR
    # What the references lack to the maxima: a product was rounded, a base rose later on.
    more_w = tl.fma(or_zero(max_w), LOG2E, -from_w)
    more_b = tl.fma(or_zero(max_b), LOG2E, -from_b)
    z_w, z_b, cross = tl.sum(z_w, 0), tl.sum(z_b, 0), tl.sum(cross, 0)
    holds = (z_w < INF) & (z_b < INF) & (tl.abs(or_zero(max_w)) < LOUD)
    usable = z_w * 0.0  # nobody asks for it without a base
    if HAS_BASE:
        # A base that was -inf where its reference was taken may lie far below it.
        holds = holds & (tl.max(far, 0) < INF) & (tl.abs(or_zero(max_b)) < LOUD) & (more_b >= -2.0)
        cross = tl.exp2(-more_w) * (cross - z_w * (more_w - more_b)) * LN2
        holds = holds & (tl.abs(cross) < INF)
        usable = z_w * tl.exp2(-more_w)
    return Sums(max_w, max_b, z_w * tl.exp2(-more_w), z_b * tl.exp2(-more_b), usable, cross), holds


@triton.jit
def draw_tiles(operands, begin, end, scale, rate, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """The :class:`TileDraw` of the tokens ``begin .. end``, a multiple of BLOCK, for plain sampling.

    ``scale`` and ``rate`` are those of :func:`first_sweep`. No number is exchanged between threads before
    the end: every row of a tile has its own best token.
    """
    at = tile_ids(BLOCK, operands.warm.dtype.element_ty.primitive_bitwidth)
    COLS: tl.constexpr = at.shape[1]
    mass = tl.zeros([at.shape[0]], tl.float32)
    best, best_at = mass - INF, tl.full([at.shape[0]], MAX_ID, tl.int32)
    per_logit = scale * rate * LOG2E
    for start in tl.range(begin, end, BLOCK, num_stages=STAGES):
        ids = start + at
        w = tl.load(operands.warm + ids).to(tl.float32)
        w = adjusted(w, operands.bias, operands.bitmask, ids, ids < end)
        top = tl.max(w, 1)
        new = tl.maximum(best, top)
        ref = or_zero(new)
        mass *= tl.exp2((best - ref) * per_logit)
        mass += tl.sum(tl.exp2((w - ref[:, None]) * per_logit), 1)
        best_at = tl.where(top > best, start, best_at)
        best = new
    highest = tl.max(best, 0)
    total = tl.sum(mass * tl.exp2((best - or_zero(highest)) * per_logit), 0)
    found = (best == highest) & (best > -INF)
    row = tl.min(tl.where(found, best_at + tl.arange(0, at.shape[0]) * COLS, end), 0)
    ids = row + tl.arange(0, COLS)
    live = ids < end
    w = tl.load(operands.warm + ids, mask=live, other=-INF).to(tl.float32)
    w = adjusted(w, operands.bias, operands.bitmask, ids, live)
    best_id = tl.min(tl.where(live & (w == highest), ids, MAX_ID), 0)
    return TileDraw(total < INF, highest * scale, best_id, total)
