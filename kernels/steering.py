"""What one token contributes: direction, confidence set and steered logit, for a tile of tokens.

Everything is relative to the row maxima, so that float32 spends its digits where they matter: with
``dw = w - max_w``, ``db = b - max_b`` the log-ratio is ``r = dw - db - (log Z_w - log Z_b)``, and
``gap = log Z_w - log Z_b + K`` turns it into ``r - K = dw - db - gap``. Two rows that differ by a
constant give exactly 0.
"""

# A condition known at compile time and one known at run time must not share an `if`.
# ruff: noqa: SIM102, SIM108

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from svdk import schema

KL_GRADIENT = tl.constexpr(schema.KL_GRADIENT)
LOG_RATIO = tl.constexpr(schema.LOG_RATIO)
VECTOR = tl.constexpr(schema.VECTOR)
PLAIN = tl.constexpr(schema.PLAIN)
CONSTANT = tl.constexpr(schema.CONSTANT)
LABEL = tl.constexpr(schema.LABEL)
KL_BUDGET = tl.constexpr(schema.KL_BUDGET)
EPS = tl.constexpr(1e-12)
INF = tl.constexpr(float("inf"))
MAX_ID = tl.constexpr(2**31 - 1)

# KIND, the one compile-time constant that most functions take: a direction and two flags.
DIRECTION = tl.constexpr(3)
"""The bits that hold one of the four directions."""
OUTSIDE = tl.constexpr(4)
"""The penalty is finite: tokens outside C stay in play."""
LISTS = tl.constexpr(8)
"""The ids in C are listed in the first sweep."""


class Row(NamedTuple):
    """A row after its first sweep."""

    warm: Any
    """Pointer to the warm logits."""
    other: Any
    """Pointer to the base logits or the vector; unused for PLAIN."""
    listed: Any
    """Pointer to the ids in C; unused unless KIND has LISTS."""
    from_list: Any
    """Whether the tokens in play are the listed ones; else the whole row."""
    count: Any
    """How many are in play."""
    max_w: Any
    log_zw: Any
    """Log-sum-exp of the warm row less max_w."""
    max_b: Any
    gap: Any
    log_alpha: Any
    mu: Any
    penalty: Any


@triton.jit
def or_zero(x):
    """x, or 0 where it is -inf: a maximum that may be subtracted."""
    return tl.where(x == -INF, 0.0, x)


@triton.jit
def safe_log(x):
    """Log of a parameter in [0, 1]; -inf at 0."""
    return tl.where(x > 0.0, tl.log(tl.where(x > 0.0, x, 1.0)), -INF)


@triton.jit
def inside_of(w, max_w, log_alpha):
    """Membership of the confidence set C."""
    return (w > -INF) & (w - max_w >= log_alpha)


@triton.jit
def delta_of(row, w, other, KIND: tl.constexpr):
    """The steering vector at tokens with logits ``w`` and base logits (or vector entries) ``other``."""
    if DIRECTION & KIND == PLAIN:
        delta = w * 0.0
    elif DIRECTION & KIND == VECTOR:
        delta = other
    else:
        usable = (w > -INF) & (other > -INF)
        dw = tl.where(usable, w - row.max_w, 0.0)
        delta = tl.where(usable, dw - (other - row.max_b) - row.gap, 0.0)
        if DIRECTION & KIND == KL_GRADIENT:
            delta = tl.exp(dw - row.log_zw) * delta
    return delta


@triton.jit
def steered_of(row, w, delta, KIND: tl.constexpr):
    """Steered logits less ``max_w``; -inf where a token cannot be drawn."""
    dw = w - row.max_w
    steered = tl.where(inside_of(w, row.max_w, row.log_alpha), dw + row.mu * delta, -INF)
    if OUTSIDE & KIND:
        outside = (w > -INF) & (dw < row.log_alpha)
        steered = tl.where(outside, dw + row.mu * row.penalty, steered)
    return steered


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
def steered_tile(row, start, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """``(ids, z)`` of the tokens in play from ``start`` on; z less ``max_w``."""
    ids, w, other = load_tile(row, start, KIND, BLOCK)
    return ids, steered_of(row, w, delta_of(row, w, other, KIND), KIND)


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
def moments(row, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """``(sum p delta, ||delta||^2, Var_p delta)`` over C, float64 (squares may pass float32's range)."""
    mean, norm2 = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    second = tl.zeros([BLOCK], tl.float64)
    for start in range(0, row.count, BLOCK):
        _, w, other = load_tile(row, start, KIND, BLOCK)
        inside = inside_of(w, row.max_w, row.log_alpha)
        delta = tl.where(inside, delta_of(row, w, other, KIND), 0.0).to(tl.float64)
        p = tl.where(inside, tl.exp(w - row.max_w - row.log_zw), 0.0).to(tl.float64)
        mean += p * delta
        norm2 += delta * delta
        second += p * delta * delta
    mean = tl.sum(mean, 0)
    return mean, tl.sum(norm2, 0), tl.maximum(tl.sum(second, 0) - mean * mean, 0.0)


@triton.jit
def top_token(row, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """The largest steered logit (less ``max_w``) of the tokens in play and its lowest id."""
    best, best_id = tl.full([BLOCK], -INF, tl.float32), tl.full([BLOCK], MAX_ID, tl.int32)
    for start in range(0, row.count, BLOCK):
        ids, z = steered_tile(row, start, KIND, BLOCK)
        better = z > best
        best, best_id = tl.where(better, z, best), tl.where(better, ids, best_id)
    return best_of(best, best_id)


@triton.jit
def finite_argmax(warm, vocab, BLOCK: tl.constexpr):
    """Lowest id of the largest finite logit of a row, 0 if there is none: the token of an invalid row."""
    best, best_id = tl.full([BLOCK], -INF, tl.float32), tl.full([BLOCK], MAX_ID, tl.int32)
    for start in range(0, vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        w = tl.load(warm + ids, mask=ids < vocab, other=-INF).to(tl.float32)
        better = (w < INF) & (w > best)
        best, best_id = tl.where(better, w, best), tl.where(better, ids, best_id)
    _, token = best_of(best, best_id)
    return tl.where(token == MAX_ID, 0, token)


@triton.jit
def best_of(score, ids):
    """Best score of a tile and its lowest id; id MAX_ID when nothing scored above -inf."""
    top = tl.max(score, 0)
    return top, tl.min(tl.where((score == top) & (score > -INF), ids, MAX_ID), 0)


@triton.jit
def value_of(rows, scalar, row):
    """A parameter: this row's entry of a (B,) tensor, or the scalar where there is no tensor."""
    value = scalar
    if rows is not None:
        value = tl.load(rows + row)
    return value


@triton.jit
def row_index(rows, row):
    """int64 index of a row in its tensor, through the (B,) index tensor if there is one."""
    index = row
    if rows is not None:
        index = tl.load(rows + row)
    return index.to(tl.int64)
