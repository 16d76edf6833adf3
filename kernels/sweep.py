"""Steps 3 and 4: what slices publish, the merge of slices, the row's constants; and of step 11 which slice a
draw lands in.

A slice yields the streaming softmax sums of both rows, the ids that may be in C, and for one-sweep problems
its best token (``tile_sweep``). With several slices a row, each publishes its numbers and counts itself in
with an acquire-release atomic; whichever counts last sees all of them, merges them and finishes the row in
the same launch, and leaves the counter at zero for the next one.
"""

# A condition known at compile time and one known at run time must not share an `if`.

from __future__ import annotations

import triton
import triton.language as tl

from .candidates import compact_candidates
from .steering import (
    COMPACT,
    DIRECTION,
    INF,
    MAX_ID,
    SHRINK,
    VECTOR,
    Constants,
    adjusted,
    best_of,
    in_confidence_set,
    or_zero,
)
from .tile_sweep import first_sweep
from .token_sweep import Slices, Sums, Swept, any_flags

NO_MASS = tl.constexpr(2.0**-90)  # beside the row's largest: no uniform of 53 bits lands there
RARE_BLOCK = tl.constexpr(256)  # tokens at a time in a sweep so rare that registers matter more
SUMS = tl.constexpr(8)  # float32 numbers a slice publishes: the six sums, its best score, its mass
FINISHING = tl.constexpr(1024)  # tokens at a time after the first sweep: more would not fit the registers
COUNTS = tl.constexpr(4)  # int32 numbers: flags, count, best id, one spare


@triton.jit
def slices_of_row(slices, index, SPLITS: tl.constexpr, CAP: tl.constexpr):
    """The slices of one row out of those of the launch."""
    row = index.to(tl.int64)
    sums = slices.sums + row * (SPLITS * SUMS)
    counts = slices.counts + row * (SPLITS * COUNTS)
    candidates = slices.candidates + row * (SPLITS * CAP)
    return Slices(slices.part, slices.size, sums, counts, candidates, slices.counter + index)


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
