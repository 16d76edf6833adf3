"""Step 2 token by token: the rest of a slice beside its whole tiles, and slices whose logits are unusual.

Every token is looked at on its own, so that status bits, -inf and numbers of any size come out right.
"""

# A condition known at compile time and one known at run time must not share an `if`.
# ruff: noqa: SIM102

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
    LOG_RATIO,
    MAX_ID,
    PLAIN,
    SHRINK,
    UNIT,
    VECTOR,
    adjusted,
    best_of,
    in_confidence_set,
    or_zero,
)

INVALID = tl.constexpr(1)  # the status bits of svdk.ops.results.Status
BASE_MASKED = tl.constexpr(2)
FAR_APART = tl.constexpr(4)  # ours alone: a log-ratio so large that DIRECT rounds the warm logits away
FAR_APART_FROM = tl.constexpr(256.0)


class Slices(NamedTuple):
    """How a row is cut, which slice this program has, and where slices publish what they found."""

    part: Any
    """The slice of this program."""
    size: Any
    """Tokens a slice."""
    sums: Any
    """Pointer to SUMS float32 numbers a slice."""
    counts: Any
    """Pointer to COUNTS int32 numbers a slice."""
    candidates: Any
    """Pointer to CAP ids a slice; unused unless KIND has COMPACT."""
    counter: Any
    """Pointer to how many of the row's slices are done."""


class Sums(NamedTuple):
    """Streaming softmax sums of a row or a slice; z_w, z_b and cross are relative to the maxima."""

    max_w: Any
    max_b: Any
    z_w: Any
    z_b: Any
    usable: Any
    """The part of z_w with a finite base logit."""
    cross: Any
    """Sum of exp(w - max_w) ((w - max_w) - (b - max_b)) over that part."""


class Swept(NamedTuple):
    """What the first sweep finds in a slice, or in a row once the slices are merged."""

    sums: Sums
    flags: Any
    """Status bits."""
    count: Any
    """How many candidates (of a row: in C, or -1 when some slice had too many); without COMPACT how many
    tokens have a finite warm logit, where that is counted."""
    best: Any
    """DIRECT: the largest steered logit, scaled but not less max_w, and its token."""
    best_id: Any
    mass: Any
    """DIRECT, of a slice: the sum of exp(z - best), z over the temperature and in nats."""


@triton.jit
def sweep_tokens(
    operands,
    slices,
    so_far,
    begin,
    log_alpha,
    strength,
    rate,
    KIND: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``so_far``, a :class:`Swept` of ordinary tokens, with the tokens from ``begin`` on, whatever they are.

    COMPACT collects as candidates (at most CAP) the ids within log_alpha of the running maximum, a superset
    of those in C; the count goes on past CAP. DIRECT adds up masses already here, by ``strength`` and
    ``rate`` (else None), what its scaled logits are multiplied by in exponentials. Without a base there are
    sums only if something asks for them, and DIRECT then counts the finite tokens.
    """
    HAS_BASE: tl.constexpr = (DIRECTION & KIND) < VECTOR
    SUMMED: tl.constexpr = HAS_BASE or INFO & KIND or not DIRECT & KIND
    # A remainder of a tile, but where DIRECT has a second operand: then this is the sweep.
    TILE: tl.constexpr = min(BLOCK, 1024 if DIRECT & KIND else 256)
    end = tl.minimum(slices.part * slices.size + slices.size, operands.vocab)
    candidates = slices.candidates + slices.part * CAP
    lane = tl.arange(0, TILE)
    first = lane == 0
    z_w, z_b = tl.where(first, so_far.sums.z_w, 0.0), tl.where(first, so_far.sums.z_b, 0.0)
    usable, cross = tl.where(first, so_far.sums.usable, 0.0), tl.where(first, so_far.sums.cross, 0.0)
    mass, best = tl.where(first, so_far.mass, 0.0), tl.where(first, so_far.best, -INF)
    best_id = tl.where(first, so_far.best_id, MAX_ID)
    flags, n_finite = tl.zeros([TILE], tl.int32), tl.zeros([TILE], tl.int32)
    max_w, max_b = so_far.sums.max_w, so_far.sums.max_b
    count = so_far.count
    for start in tl.range(begin, end, TILE):
        ids = start + lane
        live = ids < end
        w = tl.load(operands.warm + ids, mask=live, other=-INF).to(tl.float32)
        w = adjusted(w, operands.bias, operands.bitmask, ids, live)
        flags |= tl.where(w < INF, 0, INVALID)  # NaN compares false
        if DIRECTION & KIND != PLAIN:
            o = tl.load(operands.other + ids, mask=live, other=-INF if HAS_BASE else 0.0).to(tl.float32)
            if DIRECTION & KIND < VECTOR:
                o = adjusted(o, operands.bias, operands.bitmask, ids, live)
            flags |= tl.where(o < INF, 0, INVALID)
        if DIRECTION & KIND == VECTOR:
            flags |= tl.where(o > -INF, 0, INVALID)

        if SUMMED or COMPACT & KIND:
            tile_max = tl.max(w, 0)
            new_w = tl.maximum(max_w, tile_max)
        if SUMMED:
            ref_w = or_zero(new_w)
            dw, keep = w - ref_w, tl.exp(max_w - ref_w)
            e = tl.exp(dw)
            z_w = z_w * keep + e
            if HAS_BASE:
                new_b = tl.maximum(max_b, tl.max(o, 0))
                ref_b = or_zero(new_b)
                db = o - ref_b
                z_b = z_b * tl.exp(max_b - ref_b) + tl.exp(db)
                both = (w > -INF) & (o > -INF)
                flags |= tl.where((w > -INF) & (o == -INF), BASE_MASKED, 0)
                shift = (max_w - ref_w) - (max_b - ref_b)
                # Where nothing is kept, the rest may be infinite. (What overflows is summed again later.)
                kept = usable * keep
                moved = tl.where(kept > 0.0, keep * (cross + usable * shift), 0.0)
                cross = moved + tl.where(both & (e > 0.0), e * (dw - db), 0.0)
                usable = kept + tl.where(both, e, 0.0)
                max_b = new_b
        if COMPACT & KIND:
            if tile_max - new_w >= log_alpha:  # else nothing in this tile can be in C
                near = in_confidence_set(w, new_w, log_alpha)
                place = count + tl.cumsum(near.to(tl.int32), 0) - 1
                tl.store(candidates + place, ids, mask=near & (place < CAP))
                count += tl.sum(near.to(tl.int32), 0)
        if SUMMED or COMPACT & KIND:
            max_w = new_w
        if DIRECT & KIND:
            z = w * strength.scale
            if DIRECTION & KIND == LOG_RATIO:
                ratio = tl.where((w > -INF) & (o > -INF), w * SHRINK - o * SHRINK, 0.0)
                flags |= tl.where(tl.abs(ratio) * UNIT <= FAR_APART_FROM, 0, FAR_APART)
                z += strength.scaled_strength * ratio
            if DIRECTION & KIND == VECTOR:
                z += strength.scaled_strength * o
            z = tl.where(w > -INF, z, -INF)
            better = z > best
            e = tl.where(z > -INF, tl.exp(-tl.abs(z - best) * rate), 0.0)  # the less of the two
            mass = tl.where(better, mass * e + 1.0, mass + e)
            best, best_id = tl.where(better, z, best), tl.where(better, ids, best_id)
            if SUMMED and not HAS_BASE:
                n_finite += (w > -INF).to(tl.int32)
    if DIRECT & KIND:
        count = tl.sum(n_finite, 0)
    top, top_id = best_of(best, best_id)
    found = any_flags(flags)
    sums = Sums(max_w, max_b, tl.sum(z_w, 0), tl.sum(z_b, 0), tl.sum(usable, 0), tl.sum(cross, 0))
    if DIRECT & KIND:
        mass *= tl.where(best > -INF, tl.exp((best - or_zero(top)) * rate), 0.0)
    return Swept(sums, found, count, top, top_id, tl.sum(mass, 0))


@triton.jit
def any_flags(flags):
    """The bits that are set anywhere in a tile."""
    return tl.max(flags & INVALID, 0) | tl.max(flags & BASE_MASKED, 0) | tl.max(flags & FAR_APART, 0)
