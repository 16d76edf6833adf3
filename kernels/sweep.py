"""The first sweep over a slice of a row, and how the last slice to finish takes over the row.

A slice yields the online-softmax sums of both rows (``SUMS`` float32 numbers), the ids that may be in C,
and for one-sweep problems its best token. Sums are kept per lane and reduced once, so that a tile costs
one or two block-wide maxima and no more. With several slices a row, each publishes its numbers and
counts itself in with an acquire-release atomic; whichever counts last sees all of them, merges them and
finishes the row within the same launch, and leaves the counter at zero for the next one.
"""

# A condition known at compile time and one known at run time must not share an `if`.
# ruff: noqa: SIM102

from __future__ import annotations

import triton
import triton.language as tl

from .candidates import pack
from .philox import block_bits, gumbel
from .steering import (
    DIRECTION,
    INF,
    LISTS,
    LOG_RATIO,
    MAX_ID,
    PLAIN,
    SHRINK,
    UNIT,
    VECTOR,
    best_of,
    inside_of,
    or_zero,
)

INVALID = tl.constexpr(1)  # the status bits of svdk.ops.results.Status
BASE_MASKED = tl.constexpr(2)
FAR = tl.constexpr(4)  # ours alone: some log-ratio is so large that DIRECT rounds the warm logits away
APART = tl.constexpr(256.0)
RARE = tl.constexpr(256)  # tokens a sweep handles at a time that is so rare that registers matter more
SUMS = tl.constexpr(8)  # float32 numbers a slice publishes: the six sums, its best score, one spare
COUNTS = tl.constexpr(4)  # int32 numbers: flags, count, best id, one spare


@triton.jit
def first_sweep(
    warm, other, begin, end, log_alpha, listed, scale, push, heat, greedy, seed, offset,
    KIND: tl.constexpr, DIRECT: tl.constexpr, SUMMED: tl.constexpr,
    CAP: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tokens [begin, end) of a row, begin a multiple of BLOCK.

    LISTS in KIND lists at ``listed`` (at most CAP) the ids within log_alpha of the running maximum, a
    superset of those in C; the count goes on past CAP. DIRECT takes part in the draw already here (C is
    the whole row and the steered logits need no sums); scale and push are those of a Row, heat is scale times
    the temperature. SUMMED asks for the sums, and where there is no base for the number of finite tokens.

    Returns (max_w, max_b, Z_w, Z_b, usable, cross, flags, count, best, best_id): Z relative to the maxima;
    usable: the part of Z_w with a finite base; cross: sum of exp(w - max_w) ((w - max_w) - (b - max_b))
    over it.
    """
    HAS_BASE: tl.constexpr = (DIRECTION & KIND) < VECTOR
    lane = tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], tl.float32)
    zw, zb, usable, cross = zero, zero, zero, zero
    best, best_id = zero - INF, tl.full([BLOCK], MAX_ID, tl.int32)
    found, finite = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    max_w, max_b = tl.max(best, 0), tl.max(best, 0)
    count = tl.min(found, 0)
    for start in tl.range(begin, end, BLOCK, num_stages=STAGES):
        ids = start + lane
        live = ids < end
        w = tl.load(warm + ids, mask=live, other=-INF).to(tl.float32)
        found |= tl.where(w < INF, 0, INVALID)  # NaN compares false
        if DIRECTION & KIND != PLAIN:
            o = tl.load(other + ids, mask=live, other=-INF if HAS_BASE else 0.0).to(tl.float32)
            found |= tl.where(o < INF, 0, INVALID)
        if DIRECTION & KIND == VECTOR:
            found |= tl.where(o > -INF, 0, INVALID)

        if SUMMED or LISTS & KIND:
            tile_max = tl.max(w, 0)
            new_w = tl.maximum(max_w, tile_max)
        if SUMMED:
            ref_w = or_zero(new_w)
            dw, keep = w - ref_w, tl.exp(max_w - ref_w)
            e = tl.exp(dw)
            zw = zw * keep + e
            if HAS_BASE:
                new_b = tl.maximum(max_b, tl.max(o, 0))
                ref_b = or_zero(new_b)
                db = o - ref_b
                zb = zb * tl.exp(max_b - ref_b) + tl.exp(db)
                both = (w > -INF) & (o > -INF)
                found |= tl.where((w > -INF) & (o == -INF), BASE_MASKED, 0)
                shift = (max_w - ref_w) - (max_b - ref_b)
                # Where nothing is kept, the rest may be infinite. (What overflows is summed again later.)
                kept = usable * keep
                moved = tl.where(kept > 0.0, keep * (cross + usable * shift), 0.0)
                cross = moved + tl.where(both & (e > 0.0), e * (dw - db), 0.0)
                usable = kept + tl.where(both, e, 0.0)
                max_b = new_b
        if LISTS & KIND:
            if tile_max - new_w >= log_alpha:  # else nothing in this tile can be in C
                near = inside_of(w, new_w, log_alpha)
                place = count + tl.cumsum(near.to(tl.int32), 0) - 1
                tl.store(listed + place, ids, mask=near & (place < CAP))
                count += tl.sum(near.to(tl.int32), 0)
        if SUMMED or LISTS & KIND:
            max_w = new_w
        if DIRECT:
            z = w * scale
            if DIRECTION & KIND == LOG_RATIO:
                ratio = tl.where((w > -INF) & (o > -INF), w * SHRINK - o * SHRINK, 0.0)
                found |= tl.where(tl.abs(ratio) * UNIT <= APART, 0, FAR)
                z += push * ratio
            if DIRECTION & KIND == VECTOR:
                z += push * o
            if not greedy:
                z += heat * gumbel(block_bits(start, seed, offset, BLOCK))
            better = (w > -INF) & (z > best)
            best, best_id = tl.where(better, z, best), tl.where(better, ids, best_id)
            if SUMMED and not HAS_BASE:
                finite += (w > -INF).to(tl.int32)
    if DIRECT:
        count = tl.sum(finite, 0)
    top, top_id = best_of(best, best_id)
    flags = tl.max(found & INVALID, 0) | tl.max(found & BASE_MASKED, 0) | tl.max(found & FAR, 0)
    return (max_w, max_b, tl.sum(zw, 0), tl.sum(zb, 0), tl.sum(usable, 0), tl.sum(cross, 0),
            flags, count, top, top_id)  # fmt: skip


@triton.jit
def publish(sums, counts, max_w, max_b, zw, zb, usable, cross, flags, count, best, best_id):
    """Write a slice's numbers where the finishing program finds them."""
    tl.store(sums, max_w)
    tl.store(sums + 1, max_b)
    tl.store(sums + 2, zw)
    tl.store(sums + 3, zb)
    tl.store(sums + 4, usable)
    tl.store(sums + 5, cross)
    tl.store(sums + 6, best)
    tl.store(counts, flags)
    tl.store(counts + 1, count)
    tl.store(counts + 2, best_id)


@triton.jit
def sweep_slice(
    warm, other, part, slice_size, vocab, log_alpha, sums, counts, listed, counter,
    scale, push, heat, greedy, seed, offset,
    KIND: tl.constexpr, DIRECT: tl.constexpr, SUMMED: tl.constexpr,
    SPLITS: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sweep slice ``part`` of a row and publish it; whether this program is to finish the row."""
    begin = part * slice_size
    end = tl.minimum(begin + slice_size, vocab)
    max_w, max_b, zw, zb, usable, cross, flags, count, best, best_id = first_sweep(
        warm, other, begin, end, log_alpha, listed + part * CAP, scale, push, heat, greedy, seed, offset,
        KIND, DIRECT, SUMMED, CAP, BLOCK, STAGES,
    )  # fmt: skip
    publish(sums + part * SUMS, counts + part * COUNTS, max_w, max_b, zw, zb, usable, cross, flags, count,
            best, best_id)  # fmt: skip
    return arrive(counter, SPLITS)


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
def merge(sums, counts, listed, warm, log_alpha, SPLITS: tl.constexpr, KIND: tl.constexpr,
          CAP: tl.constexpr):  # fmt: skip
    """The whole row's numbers out of its slices', in the order of :func:`first_sweep`.

    LISTS: the ids that are in C are moved to the front of ``listed``; ``count`` is how many, or -1
    if some slice had more than fitted.
    """
    LANES: tl.constexpr = triton.next_power_of_2(SPLITS)
    lane = tl.arange(0, LANES)
    live = lane < SPLITS
    at, of = sums + lane * SUMS, counts + lane * COUNTS
    max_w_s, max_b_s = tl.load(at, mask=live, other=-INF), tl.load(at + 1, mask=live, other=-INF)
    max_w, max_b = tl.max(max_w_s, 0), tl.max(max_b_s, 0)
    ref_w, ref_b = or_zero(max_w), or_zero(max_b)
    scale = tl.exp(max_w_s - ref_w)
    zw = tl.sum(tl.load(at + 2, mask=live, other=0.0) * scale, 0)
    zb = tl.sum(tl.load(at + 3, mask=live, other=0.0) * tl.exp(max_b_s - ref_b), 0)
    usable_s = tl.load(at + 4, mask=live, other=0.0)
    cross_s = tl.load(at + 5, mask=live, other=0.0)
    shift = (max_w_s - ref_w) - (max_b_s - ref_b)
    kept = usable_s * scale
    cross = tl.sum(tl.where(kept > 0.0, scale * (cross_s + usable_s * shift), 0.0), 0)
    usable = tl.sum(kept, 0)
    flags_s = tl.load(of, mask=live, other=0)
    flags = tl.max(flags_s & INVALID, 0) | tl.max(flags_s & BASE_MASKED, 0) | tl.max(flags_s & FAR, 0)
    count_s = tl.load(of + 1, mask=live, other=0)
    best, best_id = best_of(tl.load(at + 6, mask=live, other=-INF), tl.load(of + 2, mask=live, other=MAX_ID))
    if LISTS & KIND:
        count_s = tl.where(inside_of(max_w_s, max_w, log_alpha), count_s, 0)
        count = pack(listed, warm, count_s, max_w, log_alpha, LANES, CAP)
    else:
        count = tl.sum(count_s, 0)
    return max_w, max_b, zw, zb, usable, cross, flags, count, best, best_id


@triton.jit
def sums_again(warm, other, vocab, max_w, max_b):
    """``(Z_w, usable, cross)`` of :func:`first_sweep` in float64, where they passed float32's range."""
    zw, usable = tl.zeros([RARE], tl.float64), tl.zeros([RARE], tl.float64)
    cross = tl.zeros([RARE], tl.float64)
    for start in range(0, vocab, RARE):
        ids = start + tl.arange(0, RARE)
        w = tl.load(warm + ids, mask=ids < vocab, other=-INF).to(tl.float64)
        o = tl.load(other + ids, mask=ids < vocab, other=-INF).to(tl.float64)
        both = (w > -INF) & (o > -INF)
        e = tl.exp(w - max_w)
        zw += e
        usable += tl.where(both, e, 0.0)
        cross += tl.where(both, e * ((w - max_w) - (o - max_b)), 0.0)
    return tl.sum(zw, 0), tl.sum(usable, 0), tl.sum(cross, 0)


@triton.jit
def divergence(
    warm, other, vocab, max_w, max_b, zw, zb, usable, cross, valid, HAS_BASE: tl.constexpr
):  # fmt: skip
    """``(log Z_w, log Z_b, K, gap)`` of a row from its sums; Z relative to the maxima, K float64."""
    log_zw = tl.log(zw)
    log_zb = log_zw
    kl = tl.full([], 0.0, tl.float64)
    if HAS_BASE:
        log_zb = tl.where(zb > 0.0, tl.log(tl.where(zb > 0.0, zb, 1.0)), 0.0)
        mass, part, total = zw.to(tl.float64), usable.to(tl.float64), cross.to(tl.float64)
        overflown = (tl.abs(cross) < INF) == 0
        if valid & overflown:
            mass, part, total = sums_again(warm, other, vocab, max_w, max_b)
        kl = (total - part * (log_zw - log_zb)) / mass
    gap = (((log_zw - log_zb) + kl) * SHRINK).to(tl.float32)
    return log_zw, log_zb, kl, gap
