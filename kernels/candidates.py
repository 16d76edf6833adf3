"""The tokens in play after the first sweep: the ids that it listed, or the whole row."""

# A condition known at compile time and one known at run time must not share an `if`.
# ruff: noqa: SIM102, SIM108

from __future__ import annotations

import triton
import triton.language as tl

from .steering import DIRECTION, INF, LISTS, MAX_ID, PLAIN, best_of, delta_of, inside_of, steered_of


@triton.jit
def load_tile(row, start, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """``(ids, warm, other)`` of the tokens in play from ``start`` on; warm is -inf past the end."""
    place = start + tl.arange(0, BLOCK)
    live = place < row.count
    ids = place
    if LISTS & KIND:
        if row.from_list:
            ids = tl.load(row.listed + place, mask=live, other=0)
    w = tl.load(row.warm + ids, mask=live, other=-INF).to(tl.float32)
    if DIRECTION & KIND == PLAIN:
        other = w
    else:
        other = tl.load(row.other + ids, mask=live, other=0.0).to(tl.float32)
    return ids, w, other


@triton.jit
def load_token(row, token, KIND: tl.constexpr):
    """``(warm, other)`` of one token."""
    w = tl.load(row.warm + token).to(tl.float32)
    if DIRECTION & KIND == PLAIN:
        other = w
    else:
        other = tl.load(row.other + token).to(tl.float32)
    return w, other


@triton.jit
def steered_tile(row, start, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """``(ids, z)`` of the tokens in play from ``start`` on; z as of :func:`steered_of`."""
    ids, w, other = load_tile(row, start, KIND, BLOCK)
    return ids, steered_of(row, w, delta_of(row, w, other, KIND), KIND)


@triton.jit
def top_token(row, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """The largest steered logit (as of :func:`steered_of`) of the tokens in play and its lowest id."""
    best, best_id = tl.full([BLOCK], -INF, tl.float32), tl.full([BLOCK], MAX_ID, tl.int32)
    for start in range(0, row.count, BLOCK):
        ids, z = steered_tile(row, start, KIND, BLOCK)
        better = z > best
        best, best_id = tl.where(better, z, best), tl.where(better, ids, best_id)
    return best_of(best, best_id)


@triton.jit
def in_play(count, vocab, KIND: tl.constexpr):
    """How many tokens are in play: the listed ones, or the whole row where there is no complete list."""
    number = vocab
    if LISTS & KIND:
        number = tl.where(count >= 0, count, vocab)
    return number


@triton.jit
def pack(listed, warm, count_s, max_w, log_alpha, LANES: tl.constexpr, CAP: tl.constexpr):
    """Move the listed ids that are inside C, in order, to the front of the row's list; how many, or -1.

    Slice s wrote its ``count_s[s]`` ids from ``s * CAP`` on. Place i of all of them belongs to the slice
    that is found by comparing i with the running totals. A move never goes up, and a store waits (through
    the cumsum) for the loads of its tile, so it can be done in place.
    """
    if tl.max(count_s, 0) > CAP:
        kept = tl.max(count_s, 0) * 0 - 1
    else:
        TILE: tl.constexpr = max(16, min(256, 2048 // LANES))
        ends = tl.cumsum(count_s, 0)
        total = tl.sum(count_s, 0)
        kept = total * 0
        for start in range(0, total, TILE):
            place = start + tl.arange(0, TILE)
            passed = ends[None, :] <= place[:, None]
            slices = tl.sum(passed.to(tl.int32), 1)
            within = place - tl.sum(tl.where(passed, count_s[None, :], 0), 1)
            live = place < total
            ids = tl.load(listed + slices * CAP + within, mask=live, other=0)
            w = tl.load(warm + ids, mask=live, other=-INF).to(tl.float32)
            inside = inside_of(w, max_w, log_alpha)
            tl.store(listed + kept + tl.cumsum(inside.to(tl.int32), 0) - 1, ids, mask=inside)
            kept += tl.sum(inside.to(tl.int32), 0)
        tl.debug_barrier()  # the list is read back by other threads
    return kept
