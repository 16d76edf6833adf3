"""Step 10: top-k, top-p and min-p in transformers' order, for candidates and for a whole row.

Candidates are ranked by comparing every token with every other: how many are above it (top-k), and what
mass comes before it (top-p). A whole row is searched for the threshold instead: keys that order like the
steered logits, four bits a sweep, sixteen thresholds tried at once.
"""

# A condition known at compile time and one known at run time must not share an `if`.
# ruff: noqa: SIM108

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .candidates import steered_tile, top_token
from .steering import COMPACT, FILTERS, INF, MAX_ID, safe_log

RANK_LIMIT = tl.constexpr(1024)  # more candidates are searched like a row: ranking costs their square
RANKED = tl.constexpr(32)  # candidates compared at a time
TILE = tl.constexpr(256)  # tokens a sweep of the threshold search handles at a time


class Limits(NamedTuple):
    """What a caller asked of the filters."""

    top_k: Any
    """0 is off."""
    top_p: Any
    """1 is off."""
    min_p: Any
    """0 is off."""


class Scores(NamedTuple):
    """What makes probabilities of scaled steered logits: weights are exp((z - top) * per_scaled)."""

    top: Any
    """The largest one."""
    per_scaled: Any
    """1 / (scale * temperature), finite."""


class Filter(NamedTuple):
    """Which tokens the filters keep; the rest of it is of use only where ``active``."""

    active: Any
    scores: Scores
    top_id: Any
    """The most likely token, which always stays."""
    log_min_p: Any
    ranked: Any
    """Whether ``ranking`` decides."""
    ranking: Any
    """Pointer to the candidates' steered logits, -inf where a filter drops one; 2 * RANK_LIMIT floats."""
    floor: Any
    """Else keys above this one stay, and those equal to it up to the id ``last_tie``."""
    last_tie: Any


@triton.jit
def make_filter(
    tokens, constants, strength, limits, temperature, ranking, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    """The filter of a row. ``ranking``: space for that of candidates."""
    greedy = temperature == 0.0
    per_scaled = per_scaled_logit(strength.scale, tl.where(greedy, 1.0, temperature))
    active = False
    ranked = False
    top, top_id = tl.full([], 0.0, tl.float32), tl.full([], MAX_ID, tl.int32)
    log_min_p = tl.full([], -INF, tl.float32)
    floor, last_tie = tl.full([], 0, tl.uint32), tl.full([], MAX_ID, tl.int32)
    if FILTERS & KIND:
        active = (not greedy) & ((limits.top_k > 0) | (limits.top_p < 1.0) | (limits.min_p > 0.0))
        if COMPACT & KIND:
            ranked = tokens.from_candidates & (tokens.count <= RANK_LIMIT)
        if active:
            top, top_id = top_token(tokens, constants, strength, KIND, BLOCK)
            log_min_p = safe_log(limits.min_p)
            scores = Scores(top, per_scaled)
            if COMPACT & KIND:
                if ranked:
                    filter_candidates(tokens, constants, strength, scores, limits, ranking, KIND)
                else:
                    floor, last_tie = filter_row(tokens, constants, strength, scores, limits, KIND)
            else:
                floor, last_tie = filter_row(tokens, constants, strength, scores, limits, KIND)
    return Filter(active, Scores(top, per_scaled), top_id, log_min_p, ranked, ranking, floor, last_tie)


@triton.jit
def per_scaled_logit(scale, temperature):
    """1 / (scale * temperature): it takes differences of scaled logits to those of the filters. Finite."""
    return tl.minimum(1.0 / (scale.to(tl.float64) * temperature), 3e38).to(tl.float32)


@triton.jit
def kept_by(filter, ids, z, place, count):
    """Whether an active filter keeps tokens of steered logits ``z``, the ``place``-th of ``count``."""
    if filter.ranked:
        keep = tl.load(filter.ranking + place, mask=place < count, other=-INF) > -INF
    else:
        key, scores = ordered_key(z), filter.scores
        keep = (
            (key > filter.floor) | ((key == filter.floor) & (ids <= filter.last_tie)) | (ids == filter.top_id)
        )
        keep = keep & ((z - scores.top) * scores.per_scaled >= filter.log_min_p)
    return keep


@triton.jit
def weights(z, scores):
    """Unnormalised probabilities of steered logits; 0 at -inf."""
    return tl.where(z > -INF, tl.exp((z - scores.top) * scores.per_scaled), 0.0)


@triton.jit
def filter_candidates(tokens, constants, strength, scores, limits, ranking, KIND: tl.constexpr):
    """Write the candidates' steered logits to ``ranking`` (2 * count floats), -inf where one is dropped."""
    count = tokens.count
    for start in range(0, count, RANKED):
        _, z = steered_tile(tokens, constants, strength, start, KIND, RANKED)
        place = start + tl.arange(0, RANKED)
        tl.store(ranking + place, z, mask=place < count)
    tl.debug_barrier()  # what follows reads what other threads wrote
    if limits.top_k > 0:
        drop_below_kth(ranking, count, limits.top_k)
    if limits.top_p < 1.0:
        drop_tail(ranking, count, scores, limits.top_p)
    if limits.min_p > 0.0:
        log_min_p = safe_log(limits.min_p)
        for start in range(0, count, RANKED):
            place = start + tl.arange(0, RANKED)
            z = tl.load(ranking + place, mask=place < count, other=-INF)
            keep = (z - scores.top) * scores.per_scaled >= log_min_p
            tl.store(ranking + place, tl.where(keep, z, -INF), mask=place < count)
        tl.debug_barrier()


@triton.jit
def drop_below_kth(ranking, count, top_k):
    """Top-k: a token stays when fewer than k are above it, so ties with the k-th stay."""
    for start in range(0, count, RANKED):
        place = start + tl.arange(0, RANKED)
        z = tl.load(ranking + place, mask=place < count, other=-INF)
        above = tl.zeros([RANKED], tl.int32)
        for begin in range(0, count, RANKED):
            others = begin + tl.arange(0, RANKED)
            y = tl.load(ranking + others, mask=others < count, other=-INF)
            above += tl.sum((y[None, :] > z[:, None]).to(tl.int32), 1)
        tl.store(ranking + count + place, tl.where(above < top_k, z, -INF), mask=place < count)
    copy_back(ranking, count)


@triton.jit
def drop_tail(ranking, count, scores, top_p):
    """Top-p: a token stays when the mass before it (larger, or equal with a lower id) is below top_p."""
    mass = tl.zeros([RANKED], tl.float32)
    for start in range(0, count, RANKED):
        place = start + tl.arange(0, RANKED)
        z = tl.load(ranking + place, mask=place < count, other=-INF)
        mass += weights(z, scores)
    budget = top_p * tl.sum(mass, 0)
    for start in range(0, count, RANKED):
        place = start + tl.arange(0, RANKED)
        z = tl.load(ranking + place, mask=place < count, other=-INF)
        before, ahead_of = tl.zeros([RANKED], tl.float32), tl.zeros([RANKED], tl.int32)
        for begin in range(0, count, RANKED):
            others = begin + tl.arange(0, RANKED)
            y = tl.load(ranking + others, mask=others < count, other=-INF)
            # Candidates are in the order of ids, so places compare as ids do.
            tie = (y[None, :] == z[:, None]) & (others[None, :] < place[:, None])
            ahead = (y[None, :] > z[:, None]) | tie
            before += tl.sum(tl.where(ahead, weights(y, scores)[None, :], 0.0), 1)
            ahead_of += tl.sum(ahead.to(tl.int32), 1)
        keep = (before < budget) | (ahead_of == 0)  # the most likely token always stays
        tl.store(ranking + count + place, tl.where(keep, z, -INF), mask=place < count)
    copy_back(ranking, count)


@triton.jit
def copy_back(ranking, count):
    """Copy the second half of ``ranking`` over the first, between the barriers that this needs."""
    tl.debug_barrier()
    for start in range(0, count, RANKED):
        place = start + tl.arange(0, RANKED)
        z = tl.load(ranking + count + place, mask=place < count, other=-INF)
        tl.store(ranking + place, z, mask=place < count)
    tl.debug_barrier()


@triton.jit
def ordered_key(z):
    """Order-preserving map from float32 to uint32; both zeros are one value."""
    bits = tl.where(z == 0.0, 0.0, z).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)


@triton.jit
def filter_row(tokens, constants, strength, scores, limits, KIND: tl.constexpr):
    """``(floor, last_tie)``: top-k and top-p keep keys above floor, and equal to it up to id last_tie."""
    floor = tl.full([], 0, tl.uint32)
    last_tie = tl.full([], MAX_ID, tl.int32)
    if limits.top_k > 0:
        floor = find_key(tokens, constants, strength, scores, floor, limits.top_k * 1.0, False, KIND)
    if limits.top_p < 1.0:
        mass, _, _ = mass_from(tokens, constants, strength, scores, floor, KIND)
        budget = limits.top_p * mass
        floor = find_key(tokens, constants, strength, scores, floor, budget, True, KIND)
        mass, tie, ties = mass_from(tokens, constants, strength, scores, floor, KIND)
        # The j-th of the ties (from 0) stays while mass above + j * tie < budget.
        wanted = tl.ceil((budget - (mass - tie * ties)) / tl.where(tie > 0.0, tie, 1.0))
        if wanted < ties:
            last_tie = nth_tie(tokens, constants, strength, floor, tl.maximum(wanted, 1.0), KIND)
    return floor, last_tie


@triton.jit
def find_key(tokens, constants, strength, scores, floor, target, BY_MASS: tl.constexpr, KIND: tl.constexpr):
    """The largest key such that the tokens from it (and from ``floor``) up number, or weigh, ``target``."""
    step = tl.arange(0, 16).to(tl.uint32)
    found = tl.full([], 0, tl.uint32)
    for digit in range(8):
        shift = 28 - 4 * digit
        thresholds = tl.maximum(found + (step << shift), floor)
        reached = tl.zeros([16], tl.float32)
        for start in range(0, tokens.count, TILE):
            _, z = steered_tile(tokens, constants, strength, start, KIND, TILE)
            if BY_MASS:
                weight = weights(z, scores)
            else:
                weight = tl.where(z > -INF, 1.0, 0.0)
            from_here = ordered_key(z)[:, None] >= thresholds[None, :]
            reached += tl.sum(tl.where(from_here, weight[:, None], 0.0), 0)
        steps = tl.maximum(tl.sum((reached >= target).to(tl.int32), 0) - 1, 0)
        found += steps.to(tl.uint32) << shift
    return tl.maximum(found, floor)


@triton.jit
def mass_from(tokens, constants, strength, scores, floor, KIND: tl.constexpr):
    """``(mass of the keys from floor up, mass of one token at floor, how many are at floor)``."""
    mass, ties, tie = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    for start in range(0, tokens.count, TILE):
        _, z = steered_tile(tokens, constants, strength, start, KIND, TILE)
        key, weight = ordered_key(z), weights(z, scores)
        mass += tl.where(key >= floor, weight, 0.0)
        level = (key == floor) & (z > -INF)
        tie = tl.where(level, weight, tie)
        ties += tl.where(level, 1.0, 0.0)
    return tl.sum(mass, 0), tl.max(tie, 0), tl.sum(ties, 0)


@triton.jit
def nth_tie(tokens, constants, strength, floor, wanted, KIND: tl.constexpr):
    """The id of the ``wanted``-th token whose key is ``floor``, in the order of ids."""
    seen = tl.full([], 0.0, tl.float32)
    token = tl.full([TILE], -1, tl.int32)
    for start in range(0, tokens.count, TILE):
        ids, z = steered_tile(tokens, constants, strength, start, KIND, TILE)
        level = ((ordered_key(z) == floor) & (z > -INF)).to(tl.float32)
        number = seen + tl.cumsum(level, 0)
        token = tl.where((level > 0.0) & (number <= wanted), ids, token)
        seen += tl.sum(level, 0)
    return tl.max(token, 0)
