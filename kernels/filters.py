"""Top-k, top-p and min-p in transformers' order, for a short list of tokens and for a whole row.

A short list is ranked by comparing every token with every other: how many are above it (top-k), and what
mass comes before it (top-p). A whole row is searched for the threshold instead: keys that order like the
steered logits, four bits a sweep, sixteen thresholds tried at once.
"""

# A condition known at compile time and one known at run time must not share an `if`.
# ruff: noqa: SIM108

from __future__ import annotations

import triton
import triton.language as tl

from .candidates import steered_tile
from .steering import INF, MAX_ID, safe_log

RANK_LIMIT = tl.constexpr(1024)  # a longer list is searched like a row: ranking costs its square
RANKED = tl.constexpr(32)  # list entries compared at a time
TILE = tl.constexpr(256)  # tokens a sweep of the threshold search handles at a time


@triton.jit
def weights(z, top, inverse):
    """Unnormalised probabilities of steered logits; 0 at -inf."""
    return tl.where(z > -INF, tl.exp((z - top) * inverse), 0.0)


@triton.jit
def rank_list(row, values, top, inverse, top_k, top_p, min_p, KIND: tl.constexpr):
    """Write the list's steered logits to ``values`` (2 * count floats), -inf where a filter drops one."""
    for start in range(0, row.count, RANKED):
        _, z = steered_tile(row, start, KIND, RANKED)
        place = start + tl.arange(0, RANKED)
        tl.store(values + place, z, mask=place < row.count)
    tl.debug_barrier()  # what follows reads what other threads wrote
    if top_k > 0:
        drop_below_kth(values, row.count, top_k)
    if top_p < 1.0:
        drop_tail(values, row.count, top, inverse, top_p)
    if min_p > 0.0:
        lowest = safe_log(min_p)
        for start in range(0, row.count, RANKED):
            place = start + tl.arange(0, RANKED)
            z = tl.load(values + place, mask=place < row.count, other=-INF)
            keep = (z - top) * inverse >= lowest
            tl.store(values + place, tl.where(keep, z, -INF), mask=place < row.count)
        tl.debug_barrier()


@triton.jit
def drop_below_kth(values, count, top_k):
    """Top-k: a token stays when fewer than k are above it, so ties with the k-th stay."""
    for start in range(0, count, RANKED):
        place = start + tl.arange(0, RANKED)
        z = tl.load(values + place, mask=place < count, other=-INF)
        above = tl.zeros([RANKED], tl.int32)
        for begin in range(0, count, RANKED):
            others = begin + tl.arange(0, RANKED)
            y = tl.load(values + others, mask=others < count, other=-INF)
            above += tl.sum((y[None, :] > z[:, None]).to(tl.int32), 1)
        tl.store(values + count + place, tl.where(above < top_k, z, -INF), mask=place < count)
    copy_back(values, count)


@triton.jit
def drop_tail(values, count, top, inverse, top_p):
    """Top-p: a token stays when the mass before it (larger, or equal with a lower id) is below top_p."""
    mass = tl.zeros([RANKED], tl.float32)
    for start in range(0, count, RANKED):
        place = start + tl.arange(0, RANKED)
        z = tl.load(values + place, mask=place < count, other=-INF)
        mass += weights(z, top, inverse)
    budget = top_p * tl.sum(mass, 0)
    for start in range(0, count, RANKED):
        place = start + tl.arange(0, RANKED)
        z = tl.load(values + place, mask=place < count, other=-INF)
        before, ahead_of = tl.zeros([RANKED], tl.float32), tl.zeros([RANKED], tl.int32)
        for begin in range(0, count, RANKED):
            others = begin + tl.arange(0, RANKED)
            y = tl.load(values + others, mask=others < count, other=-INF)
            # The list is in the order of ids, so places compare as ids do.
            tie = (y[None, :] == z[:, None]) & (others[None, :] < place[:, None])
            ahead = (y[None, :] > z[:, None]) | tie
            before += tl.sum(tl.where(ahead, weights(y, top, inverse)[None, :], 0.0), 1)
            ahead_of += tl.sum(ahead.to(tl.int32), 1)
        keep = (before < budget) | (ahead_of == 0)  # the most likely token always stays
        tl.store(values + count + place, tl.where(keep, z, -INF), mask=place < count)
    copy_back(values, count)


@triton.jit
def copy_back(values, count):
    """Copy the second half of ``values`` over the first, between the barriers that this needs."""
    tl.debug_barrier()
    for start in range(0, count, RANKED):
        place = start + tl.arange(0, RANKED)
        z = tl.load(values + count + place, mask=place < count, other=-INF)
        tl.store(values + place, z, mask=place < count)
    tl.debug_barrier()


@triton.jit
def ordered_key(z):
    """Order-preserving map from float32 to uint32; both zeros are one value."""
    bits = tl.where(z == 0.0, 0.0, z).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)


@triton.jit
def threshold(row, top, inverse, top_k, top_p, KIND: tl.constexpr):
    """``(floor, last_tie)``: top-k and top-p keep keys above floor, and equal to it up to id last_tie."""
    floor = tl.full([], 0, tl.uint32)
    last_tie = tl.full([], MAX_ID, tl.int32)
    if top_k > 0:
        floor = find_key(row, top, inverse, floor, top_k * 1.0, False, KIND)
    if top_p < 1.0:
        mass, _, _ = mass_from(row, top, inverse, floor, KIND)
        budget = top_p * mass
        floor = find_key(row, top, inverse, floor, budget, True, KIND)
        mass, tie, ties = mass_from(row, top, inverse, floor, KIND)
        # The j-th of the ties (from 0) stays while mass above + j * tie < budget.
        wanted = tl.ceil((budget - (mass - tie * ties)) / tl.where(tie > 0.0, tie, 1.0))
        if wanted < ties:
            last_tie = nth_tie(row, floor, tl.maximum(wanted, 1.0), KIND)
    return floor, last_tie


@triton.jit
def find_key(row, top, inverse, floor, target, BY_MASS: tl.constexpr, KIND: tl.constexpr):
    """The largest key such that the tokens from it (and from ``floor``) up number, or weigh, ``target``."""
    step = tl.arange(0, 16).to(tl.uint32)
    found = tl.full([], 0, tl.uint32)
    for digit in range(8):
        shift = 28 - 4 * digit
        thresholds = tl.maximum(found + (step << shift), floor)
        reached = tl.zeros([16], tl.float32)
        for start in range(0, row.count, TILE):
            _, z = steered_tile(row, start, KIND, TILE)
            if BY_MASS:
                weight = weights(z, top, inverse)
            else:
                weight = tl.where(z > -INF, 1.0, 0.0)
            from_here = ordered_key(z)[:, None] >= thresholds[None, :]
            reached += tl.sum(tl.where(from_here, weight[:, None], 0.0), 0)
        steps = tl.maximum(tl.sum((reached >= target).to(tl.int32), 0) - 1, 0)
        found += steps.to(tl.uint32) << shift
    return tl.maximum(found, floor)


@triton.jit
def mass_from(row, top, inverse, floor, KIND: tl.constexpr):
    """``(mass of the keys from floor up, mass of one token at floor, how many are at floor)``."""
    mass, ties, tie = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    for start in range(0, row.count, TILE):
        _, z = steered_tile(row, start, KIND, TILE)
        key, weight = ordered_key(z), weights(z, top, inverse)
        mass += tl.where(key >= floor, weight, 0.0)
        level = (key == floor) & (z > -INF)
        tie = tl.where(level, weight, tie)
        ties += tl.where(level, 1.0, 0.0)
    return tl.sum(mass, 0), tl.max(tie, 0), tl.sum(ties, 0)


@triton.jit
def nth_tie(row, floor, wanted, KIND: tl.constexpr):
    """The id of the ``wanted``-th token whose key is ``floor``, in the order of ids."""
    seen = tl.full([], 0.0, tl.float32)
    token = tl.full([TILE], -1, tl.int32)
    for start in range(0, row.count, TILE):
        ids, z = steered_tile(row, start, KIND, TILE)
        level = ((ordered_key(z) == floor) & (z > -INF)).to(tl.float32)
        number = seen + tl.cumsum(level, 0)
        token = tl.where((level > 0.0) & (number <= wanted), ids, token)
        seen += tl.sum(level, 0)
    return tl.max(token, 0)
