"""Steps 2, 3 and 4: the first sweep over a slice of a row, the merge of slices, the row's constants; and of
step 11 which slice a draw lands in.

A slice yields the streaming softmax sums of both rows, the ids that may be in C, and for one-sweep problems
its best token. Sums are kept per lane and reduced once, so that a tile costs one or two block-wide maxima
and no more. With several slices a row, each publishes its numbers and counts itself in with an
acquire-release atomic; whichever counts last sees all of them, merges them and finishes the row within the
same launch, and leaves the counter at zero for the next one.
"""

# A condition known at compile time and one known at run time must not share an `if`.
# ruff: noqa: SIM102

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .candidates import compact_candidates
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
    Constants,
    adjusted,
    best_of,
    in_confidence_set,
    or_zero,
)

INVALID = tl.constexpr(1)  # the status bits of svdk.ops.results.Status
BASE_MASKED = tl.constexpr(2)
FAR_APART = tl.constexpr(4)  # ours alone: a log-ratio so large that DIRECT rounds the warm logits away
FAR_APART_FROM = tl.constexpr(256.0)
NO_MASS = tl.constexpr(2.0**-90)  # beside the row's largest: no uniform of 53 bits lands there
RARE_BLOCK = tl.constexpr(256)  # tokens at a time in a sweep so rare that registers matter more
SUMS = tl.constexpr(8)  # float32 numbers a slice publishes: the six sums, its best score, its mass
COUNTS = tl.constexpr(4)  # int32 numbers: flags, count, best id, one spare


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
def slices_of_row(slices, index, SPLITS: tl.constexpr, CAP: tl.constexpr):
    """The slices of one row out of those of the launch."""
    row = index.to(tl.int64)
    sums = slices.sums + row * (SPLITS * SUMS)
    counts = slices.counts + row * (SPLITS * COUNTS)
    candidates = slices.candidates + row * (SPLITS * CAP)
    return Slices(slices.part, slices.size, sums, counts, candidates, slices.counter + index)


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

    COMPACT collects as candidates (at most CAP) the ids within log_alpha of the running maximum, a superset
    of those in C; the count goes on past CAP. DIRECT adds up masses already here, by ``strength`` and
    ``rate`` (else None), what its scaled logits are multiplied by in exponentials. Without a base there are
    sums only if something asks for them, and DIRECT then counts the finite tokens.
    """
    HAS_BASE: tl.constexpr = (DIRECTION & KIND) < VECTOR
    SUMMED: tl.constexpr = HAS_BASE or INFO & KIND or not DIRECT & KIND
    begin = slices.part * slices.size
    end = tl.minimum(begin + slices.size, operands.vocab)
    candidates = slices.candidates + slices.part * CAP
    lane = tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], tl.float32)
    z_w, z_b, usable, cross, mass = zero, zero, zero, zero, zero
    best, best_id = zero - INF, tl.full([BLOCK], MAX_ID, tl.int32)
    flags, n_finite = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    max_w, max_b = tl.max(best, 0), tl.max(best, 0)
    count = tl.min(flags, 0)
    for start in tl.range(begin, end, BLOCK, num_stages=STAGES):
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


@triton.jit
def publish(slices, swept):
    """Write this slice's numbers where the finishing program finds them."""
    sums, counts = slices.sums + slices.part * SUMS, slices.counts + slices.part * COUNTS
    tl.store(sums, swept.sums.max_w)
    tl.store(sums + 1, swept.sums.max_b)
    tl.store(sums + 2, swept.sums.z_w)
    tl.store(sums + 3, swept.sums.z_b)
    tl.store(sums + 4, swept.sums.usable)
    tl.store(sums + 5, swept.sums.cross)
    tl.store(sums + 6, swept.best)
    tl.store(sums + 7, swept.mass)
    tl.store(counts, swept.flags)
    tl.store(counts + 1, swept.count)
    tl.store(counts + 2, swept.best_id)


@triton.jit
def arrive(counter, SPLITS: tl.constexpr):
    """Whether this program is the last of its row's SPLITS to get here; the last one zeroes the counter."""
    # All threads' writes come before the barrier, the barrier before the one thread's release.
    tl.debug_barrier()
    last = True
    if SPLITS > 1:
        last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
        if last:
            tl.store(counter, 0)
    return last


@triton.jit
def sweep_slice(
    operands,
    slices,
    log_alpha,
    strength,
    rate,
    KIND: tl.constexpr,
    SPLITS: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sweep this program's slice and publish it; whether this program is to finish the row."""
    publish(slices, first_sweep(operands, slices, log_alpha, strength, rate, KIND, CAP, BLOCK, STAGES))
    return arrive(slices.counter, SPLITS)


@triton.jit
def merge(operands, slices, log_alpha, KIND: tl.constexpr, SPLITS: tl.constexpr, CAP: tl.constexpr):
    """Step 3: the row's numbers out of its slices'; its candidates come to the front, less those not in C."""
    LANES: tl.constexpr = triton.next_power_of_2(SPLITS)
    lane = tl.arange(0, LANES)
    live = lane < SPLITS
    at, of = slices.sums + lane * SUMS, slices.counts + lane * COUNTS
    max_w_s, max_b_s = tl.load(at, mask=live, other=-INF), tl.load(at + 1, mask=live, other=-INF)
    max_w, max_b = tl.max(max_w_s, 0), tl.max(max_b_s, 0)
    ref_w, ref_b = or_zero(max_w), or_zero(max_b)
    rescale = tl.exp(max_w_s - ref_w)
    z_w = tl.sum(tl.load(at + 2, mask=live, other=0.0) * rescale, 0)
    z_b = tl.sum(tl.load(at + 3, mask=live, other=0.0) * tl.exp(max_b_s - ref_b), 0)
    usable_s = tl.load(at + 4, mask=live, other=0.0)
    cross_s = tl.load(at + 5, mask=live, other=0.0)
    shift = (max_w_s - ref_w) - (max_b_s - ref_b)
    kept = usable_s * rescale
    cross = tl.sum(tl.where(kept > 0.0, rescale * (cross_s + usable_s * shift), 0.0), 0)
    usable = tl.sum(kept, 0)
    flags = any_flags(tl.load(of, mask=live, other=0))
    count_s = tl.load(of + 1, mask=live, other=0)
    best, best_id = best_of(tl.load(at + 6, mask=live, other=-INF), tl.load(of + 2, mask=live, other=MAX_ID))
    if COMPACT & KIND:
        count_s = tl.where(in_confidence_set(max_w_s, max_w, log_alpha), count_s, 0)
        count = compact_candidates(slices.candidates, operands, count_s, max_w, log_alpha, LANES, CAP)
    else:
        count = tl.sum(count_s, 0)
    return Swept(Sums(max_w, max_b, z_w, z_b, usable, cross), flags, count, best, best_id, z_w * 0.0)


@triton.jit
def slice_of_draw(slices, best, rate, uniform, SPLITS: tl.constexpr):
    """Step 11, DIRECT: which slice a row's uniform lands in, and after which share of its mass (float64)."""
    LANES: tl.constexpr = triton.next_power_of_2(SPLITS)
    lane = tl.arange(0, LANES)
    at = slices.sums + lane * SUMS
    best_s = tl.load(at + 6, mask=lane < SPLITS, other=-INF)
    mass_s = tl.load(at + 7, mask=lane < SPLITS, other=0.0) * tl.exp((best_s - best) * rate)
    mass_s = tl.where(mass_s > NO_MASS, mass_s, 0.0).to(tl.float64)
    until = tl.cumsum(mass_s, 0)
    target = uniform * tl.sum(mass_s, 0)
    some = mass_s > 0.0
    first = tl.min(tl.where(some & (until > target), lane, LANES), 0)
    part = tl.where(first < LANES, first, tl.max(tl.where(some, lane, 0), 0))
    mass = tl.sum(tl.where(lane == part, mass_s, 0.0), 0)
    before = tl.sum(tl.where(lane < part, mass_s, 0.0), 0)
    return part, tl.maximum((target - before) / mass, 0.0)  # the two sums before it may differ in a bit


@triton.jit
def sums_in_float64(operands, sums):
    """``(z_w, usable, cross)`` of :class:`Sums` in float64, where they passed float32's range."""
    z_w, usable = tl.zeros([RARE_BLOCK], tl.float64), tl.zeros([RARE_BLOCK], tl.float64)
    cross = tl.zeros([RARE_BLOCK], tl.float64)
    for start in range(0, operands.vocab, RARE_BLOCK):
        ids = start + tl.arange(0, RARE_BLOCK)
        w = tl.load(operands.warm + ids, mask=ids < operands.vocab, other=-INF).to(tl.float32)
        w = adjusted(w, operands.bias, operands.bitmask, ids, ids < operands.vocab)
        w = w.to(tl.float64)
        o = tl.load(operands.other + ids, mask=ids < operands.vocab, other=-INF).to(tl.float32)
        o = adjusted(o, operands.bias, operands.bitmask, ids, ids < operands.vocab)
        o = o.to(tl.float64)
        both = (w > -INF) & (o > -INF)
        e = tl.exp(w - sums.max_w)
        z_w += e
        usable += tl.where(both, e, 0.0)
        cross += tl.where(both, e * ((w - sums.max_w) - (o - sums.max_b)), 0.0)
    return tl.sum(z_w, 0), tl.sum(usable, 0), tl.sum(cross, 0)


@triton.jit
def kl_divergence(operands, sums, log_zw, log_zb, valid):
    """K = KL(p || q) of a row, float64."""
    z_w, usable, cross = sums.z_w.to(tl.float64), sums.usable.to(tl.float64), sums.cross.to(tl.float64)
    overflown = (tl.abs(sums.cross) < INF) == 0
    if valid & overflown:
        z_w, usable, cross = sums_in_float64(operands, sums)
    return (cross - usable * (log_zw - log_zb)) / z_w


@triton.jit
def make_constants(operands, sums, log_alpha, valid, KIND: tl.constexpr):
    """Step 4: a row's constants from its sums; of use only where ``valid``."""
    log_zw = tl.log(sums.z_w)
    log_zb = log_zw
    kl = tl.full([], 0.0, tl.float64)
    if DIRECTION & KIND < VECTOR:
        log_zb = tl.where(sums.z_b > 0.0, tl.log(tl.where(sums.z_b > 0.0, sums.z_b, 1.0)), 0.0)
        kl = kl_divergence(operands, sums, log_zw, log_zb, valid)
    gap = (((log_zw - log_zb) + kl) * SHRINK).to(tl.float32)
    return Constants(sums.max_w, log_zw, sums.max_b, log_zb, kl, gap, log_alpha)
