"""The candidates of a row: how those in C are brought together (step 3), and how later steps read them.

From step 5 on, a row's tokens are its candidates where it has them, and the whole row otherwise (C may be
everything, or larger than the space for candidates). :func:`load_tile` makes the two alike, so that
``full_sweep`` and ``filters`` need one loop for both.
"""

# A condition known at compile time and one known at run time must not share an `if`.
# ruff: noqa: SIM102

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .steering import (
    COMPACT,
    DIRECTION,
    INF,
    MAX_ID,
    PLAIN,
    VECTOR,
    Operands,
    adjusted,
    best_of,
    delta_of,
    in_confidence_set,
    steered_logits,
)


class Tokens(NamedTuple):
    """The tokens that the steps after the first sweep go over."""

    operands: Operands
    candidates: Any
    """Pointer to the ids in C, ascending; unused unless KIND has COMPACT."""
    from_candidates: Any
    """Whether the tokens are the candidates; else the whole row."""
    count: Any
    """How many tokens."""


@triton.jit
def tokens_of(operands, candidates, count, KIND: tl.constexpr):
    """The tokens of a row: ``count`` candidates, or the whole row where there are none or they overflowed."""
    number = operands.vocab
    if COMPACT & KIND:
        number = tl.where(count >= 0, count, operands.vocab)
    return Tokens(operands, candidates, count >= 0, number)


@triton.jit
def compact_candidates(
    candidates, operands, count_s, max_w, log_alpha, LANES: tl.constexpr, CAP: tl.constexpr
):
    """Move the candidates that are in C, in order, to the front of the row's; how many, or -1.

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
            ids = tl.load(candidates + slices * CAP + within, mask=live, other=0)
            w = tl.load(operands.warm + ids, mask=live, other=-INF).to(tl.float32)
            w = adjusted(w, operands.bias, operands.bitmask, ids, live)
            inside = in_confidence_set(w, max_w, log_alpha)
            tl.store(candidates + kept + tl.cumsum(inside.to(tl.int32), 0) - 1, ids, mask=inside)
            kept += tl.sum(inside.to(tl.int32), 0)
        tl.debug_barrier()  # the candidates are read back by other threads
    return kept


@triton.jit
def load_tile(tokens, start, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """``(ids, warm, other)`` of a row's tokens from ``start`` on; warm is -inf past the end."""
    place = start + tl.arange(0, BLOCK)
    live = place < tokens.count
    ids = place
    if COMPACT & KIND:
        if tokens.from_candidates:
            ids = tl.load(tokens.candidates + place, mask=live, other=0)
    w = tl.load(tokens.operands.warm + ids, mask=live, other=-INF).to(tl.float32)
    w = adjusted(w, tokens.operands.bias, tokens.operands.bitmask, ids, live)
    if DIRECTION & KIND == PLAIN:
        other = w
    else:
        other = tl.load(tokens.operands.other + ids, mask=live, other=0.0).to(tl.float32)
        if DIRECTION & KIND < VECTOR:
            other = adjusted(other, tokens.operands.bias, tokens.operands.bitmask, ids, live)
    return ids, w, other


@triton.jit
def load_token(operands, token, KIND: tl.constexpr):
    """``(warm, other)`` of one token."""
    w = tl.load(operands.warm + token).to(tl.float32)
    w = adjusted(w, operands.bias, operands.bitmask, token, token >= 0)
    if DIRECTION & KIND == PLAIN:
        other = w
    else:
        other = tl.load(operands.other + token).to(tl.float32)
        if DIRECTION & KIND < VECTOR:
            other = adjusted(other, operands.bias, operands.bitmask, token, token >= 0)
    return w, other


@triton.jit
def steered_tile(tokens, constants, strength, start, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """``(ids, z)`` of a row's tokens from ``start`` on; z as of :func:`steered_logits`."""
    ids, w, other = load_tile(tokens, start, KIND, BLOCK)
    return ids, steered_logits(constants, strength, w, delta_of(constants, w, other, KIND), KIND)


@triton.jit
def top_token(tokens, constants, strength, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """The largest steered logit (as of :func:`steered_logits`) of a row's tokens and its lowest id."""
    best, best_id = tl.full([BLOCK], -INF, tl.float32), tl.full([BLOCK], MAX_ID, tl.int32)
    for start in range(0, tokens.count, BLOCK):
        ids, z = steered_tile(tokens, constants, strength, start, KIND, BLOCK)
        better = z > best
        best, best_id = tl.where(better, z, best), tl.where(better, ids, best_id)
    return best_of(best, best_id)
