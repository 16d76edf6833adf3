"""Top-k, top-p and min-p in transformers' order, for a short list of tokens and for a whole row.

A short list is ranked by comparing every token with every other: how many are above it (top-k), and what
mass comes before it (top-p). A whole row is searched for the threshold instead: keys that order like the
steered logits, four bits a sweep, sixteen thresholds tried at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .steering import INF, MAX_ID, best_of, delta_of, inside_of, load_set, ordered_key, steered_of

RANKED = tl.constexpr(64)  # list entries compared at a time
TILE = tl.constexpr(512)  # tokens a sweep of the threshold search handles at a time


@triton.jit
def steered_tile(
    warm, other, listed, from_list, start, count, max_w, log_zw, max_b, gap, log_alpha, mu, penalty,
    DIRECTION: tl.constexpr, FINITE_PENALTY: tl.constexpr, COMPACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``(ids, z, inside)`` of tile ``start`` of the tokens in play; z relative to ``max_w``."""
    ids, w, o = load_set(warm, other, listed, from_list, start, count, DIRECTION, COMPACT, BLOCK)
    inside = inside_of(w, max_w, log_alpha)
    delta = delta_of(w, o, max_w, log_zw, max_b, gap, DIRECTION)
    return ids, steered_of(w, delta, inside, max_w, mu, penalty, FINITE_PENALTY), inside


@triton.jit
def top_token(
    warm, other, listed, from_list, count, max_w, log_zw, max_b, gap, log_alpha, mu, penalty,
    DIRECTION: tl.constexpr, FINITE_PENALTY: tl.constexpr, COMPACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest steered logit of the tokens in play and its lowest id."""
    best = tl.full([BLOCK], -INF, tl.float32)
    best_id = tl.full([BLOCK], MAX_ID, tl.int32)
    for start in range(0, count, BLOCK):
        ids, z, _ = steered_tile(
            warm, other, listed, from_list, start, count, max_w, log_zw, max_b, gap, log_alpha, mu, penalty,
            DIRECTION, FINITE_PENALTY, COMPACT, BLOCK,
        )  # fmt: skip
        better = z > best
        best, best_id = tl.where(better, z, best), tl.where(better, ids, best_id)
    return best_of(best, best_id)


@triton.jit
def rank_list(
    warm, other, listed, values, count, max_w, log_zw, max_b, gap, log_alpha, mu, penalty,
    top, inverse_temperature, top_k, top_p, min_p, DIRECTION: tl.constexpr,
):  # fmt: skip
    """Write the filtered steered logits of the list (-inf where a filter drops the token) to ``values``."""
    for start in range(0, count, RANKED):
        ids, z, _ = steered_tile(
            warm, other, listed, True, start, count, max_w, log_zw, max_b, gap, log_alpha, mu, penalty,
            DIRECTION, False, True, RANKED,
        )  # fmt: skip
        tl.store(values + start + tl.arange(0, RANKED), z, mask=start + tl.arange(0, RANKED) < count)
    tl.debug_barrier()
    if (top_k > 0) & (top_k < count):
        drop_below_kth(values, values + count, count, top_k)
    if top_p < 1.0:
        drop_tail(listed, values, values + count, count, top, inverse_temperature, top_p)
    lowest = tl.where(min_p > 0.0, tl.log(tl.where(min_p > 0.0, min_p, 1.0)), -INF)
    for start in range(0, count, RANKED):
        place = start + tl.arange(0, RANKED)
        z = tl.load(values + place, mask=place < count, other=-INF)
        keep = (z == top) | ((z - top) * inverse_temperature >= lowest)
        tl.store(values + place, tl.where(keep, z, -INF), mask=place < count)
    tl.debug_barrier()


@triton.jit
def drop_below_kth(values, scratch, count, top_k):
    """Top-k: a token stays when fewer than k are above it, so ties with the k-th stay."""
    for start in range(0, count, RANKED):
        place = start + tl.arange(0, RANKED)
        z = tl.load(values + place, mask=place < count, other=-INF)
        above = tl.zeros([RANKED], tl.int32)
        for other_start in range(0, count, RANKED):
            others = other_start + tl.arange(0, RANKED)
            y = tl.load(values + others, mask=others < count, other=-INF)
            above += tl.sum((y[None, :] > z[:, None]).to(tl.int32), 1)
        tl.store(scratch + place, tl.where(above < top_k, z, -INF), mask=place < count)
    copy_back(values, scratch, count)


@triton.jit
def drop_tail(listed, values, scratch, count, top, inverse_temperature, top_p):
    """Top-p: a token stays when the mass before it (larger, or equal with a lower id) is below top_p."""
    mass = tl.zeros([RANKED], tl.float32)
    for start in range(0, count, RANKED):
        place = start + tl.arange(0, RANKED)
        z = tl.load(values + place, mask=place < count, other=-INF)
        mass += tl.exp((z - top) * inverse_temperature)
    budget = top_p * tl.sum(mass, 0)
    for start in range(0, count, RANKED):
        place = start + tl.arange(0, RANKED)
        z = tl.load(values + place, mask=place < count, other=-INF)
        before = tl.zeros([RANKED], tl.float32)
        first = tl.full([RANKED], 1, tl.int32)
        for other_start in range(0, count, RANKED):
            others = other_start + tl.arange(0, RANKED)
            y = tl.load(values + others, mask=others < count, other=-INF)
            # The list is in the order of ids, so places compare as ids do.
            ahead = (y[None, :] > z[:, None]) | ((y[None, :] == z[:, None]) & (others[None, :] < place[:, None]))
            ahead = ahead & (y[None, :] > -INF)
            before += tl.sum(tl.where(ahead, tl.exp((y - top) * inverse_temperature)[None, :], 0.0), 1)
            first = tl.where(tl.sum(ahead.to(tl.int32), 1) > 0, 0, first)
        keep = (before < budget) | (first == 1)
        tl.store(scratch + place, tl.where(keep, z, -INF), mask=place < count)
    copy_back(values, scratch, count)


@triton.jit
def copy_back(values, scratch, count):
    """values <- scratch, with the barriers that reads and writes by different threads need."""
    tl.debug_barrier()
    for start in range(0, count, RANKED):
        place = start + tl.arange(0, RANKED)
        tl.store(values + place, tl.load(scratch + place, mask=place < count, other=0.0), mask=place < count)
    tl.debug_barrier()


@triton.jit
def find_key(
    warm, other, listed, from_list, count, max_w, log_zw, max_b, gap, log_alpha, mu, penalty,
    top, inverse_temperature, floor, target, by_mass,
    DIRECTION: tl.constexpr, FINITE_PENALTY: tl.constexpr, COMPACT: tl.constexpr,
):  # fmt: skip
    """The largest key such that the tokens from it (and from ``floor``) up number, or weigh, ``target``."""
    step = tl.arange(0, 16).to(tl.uint32)
    found = (tl.sum(step, 0) * 0).to(tl.uint32)
    for round_ in range(8):
        shift = (28 - 4 * round_).to(tl.uint32) if isinstance(round_, tl.tensor) else 28 - 4 * round_
        thresholds = tl.maximum(found + (step << shift), floor)
        reached = tl.zeros([16], tl.float32)
        for start in range(0, count, TILE):
            _, z, _ = steered_tile(
                warm, other, listed, from_list, start, count, max_w, log_zw, max_b, gap, log_alpha, mu, penalty,
                DIRECTION, FINITE_PENALTY, COMPACT, TILE,
            )  # fmt: skip
            weight = tl.where(by_mass, tl.exp((z - top) * inverse_temperature), 1.0)
            weight = tl.where(z > -INF, weight, 0.0)
            at_least = ordered_key(z)[:, None] >= thresholds[None, :]
            reached += tl.sum(tl.where(at_least, weight[:, None], 0.0), 0)
        steps = tl.sum((reached >= target).to(tl.int32), 0)
        found += (tl.maximum(steps - 1, 0).to(tl.uint32)) << shift
    return tl.maximum(found, floor)


@triton.jit
def threshold(
    warm, other, listed, from_list, count, max_w, log_zw, max_b, gap, log_alpha, mu, penalty,
    top, inverse_temperature, top_k, top_p,
    DIRECTION: tl.constexpr, FINITE_PENALTY: tl.constexpr, COMPACT: tl.constexpr,
):  # fmt: skip
    """``(floor, last_tie)``: top-k and top-p keep keys above floor, and equal to it up to id last_tie."""
    floor = (top_k * 0).to(tl.uint32)
    last_tie = top_k * 0 + MAX_ID
    if top_k > 0:
        floor = find_key(
            warm, other, listed, from_list, count, max_w, log_zw, max_b, gap, log_alpha, mu, penalty,
            top, inverse_temperature, floor, top_k.to(tl.float32), False, DIRECTION, FINITE_PENALTY, COMPACT,
        )  # fmt: skip
    if top_p < 1.0:
        mass, _, _ = mass_from(
            warm, other, listed, from_list, count, max_w, log_zw, max_b, gap, log_alpha, mu, penalty,
            top, inverse_temperature, floor, DIRECTION, FINITE_PENALTY, COMPACT,
        )  # fmt: skip
        budget = top_p * mass
        floor = find_key(
            warm, other, listed, from_list, count, max_w, log_zw, max_b, gap, log_alpha, mu, penalty,
            top, inverse_temperature, floor, budget, True, DIRECTION, FINITE_PENALTY, COMPACT,
        )  # fmt: skip
        mass, tie, ties = mass_from(
            warm, other, listed, from_list, count, max_w, log_zw, max_b, gap, log_alpha, mu, penalty,
            top, inverse_temperature, floor, DIRECTION, FINITE_PENALTY, COMPACT,
        )  # fmt: skip
        # The j-th of the ties (from 0) stays while mass above + j * tie < budget.
        wanted = tl.ceil((budget - (mass - tie * ties)) / tl.where(tie > 0.0, tie, 1.0))
        if (ties > 1) & (wanted < ties):
            last_tie = nth_tie(
                warm, other, listed, from_list, count, max_w, log_zw, max_b, gap, log_alpha, mu, penalty,
                floor, tl.maximum(wanted, 1.0), DIRECTION, FINITE_PENALTY, COMPACT,
            )  # fmt: skip
    return floor, last_tie


@triton.jit
def mass_from(
    warm, other, listed, from_list, count, max_w, log_zw, max_b, gap, log_alpha, mu, penalty,
    top, inverse_temperature, floor,
    DIRECTION: tl.constexpr, FINITE_PENALTY: tl.constexpr, COMPACT: tl.constexpr,
):  # fmt: skip
    """``(mass of the keys from floor up, mass of one token at floor, how many are at floor)``."""
    mass, ties, tie = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    for start in range(0, count, TILE):
        _, z, _ = steered_tile(
            warm, other, listed, from_list, start, count, max_w, log_zw, max_b, gap, log_alpha, mu, penalty,
            DIRECTION, FINITE_PENALTY, COMPACT, TILE,
        )  # fmt: skip
        key, weight = ordered_key(z), tl.where(z > -INF, tl.exp((z - top) * inverse_temperature), 0.0)
        mass += tl.where(key >= floor, weight, 0.0)
        level = (key == floor) & (z > -INF)
        tie = tl.where(level, weight, tie)
        ties += tl.where(level, 1.0, 0.0)
    return tl.sum(mass, 0), tl.max(tie, 0), tl.sum(ties, 0)


@triton.jit
def nth_tie(
    warm, other, listed, from_list, count, max_w, log_zw, max_b, gap, log_alpha, mu, penalty, floor, wanted,
    DIRECTION: tl.constexpr, FINITE_PENALTY: tl.constexpr, COMPACT: tl.constexpr,
):  # fmt: skip
    """The id of the ``wanted``-th token whose key is ``floor``, in the order of ids."""
    seen = wanted * 0.0
    token = tl.full([TILE], -1, tl.int32)
    for start in range(0, count, TILE):
        ids, z, _ = steered_tile(
            warm, other, listed, from_list, start, count, max_w, log_zw, max_b, gap, log_alpha, mu, penalty,
            DIRECTION, FINITE_PENALTY, COMPACT, TILE,
        )  # fmt: skip
        level = ((ordered_key(z) == floor) & (z > -INF)).to(tl.float32)
        number = seen + tl.cumsum(level, 0)
        token = tl.where((level > 0.0) & (number <= wanted), ids, token)
        seen += tl.sum(level, 0)
    return tl.max(token, 0)
