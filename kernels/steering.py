"""What one token contributes: direction, confidence set and steered logit, for a tile of tokens.

Everything is relative to the row maxima, so that float32 spends its digits where they matter: with
``dw = w - max_w``, ``db = b - max_b`` the log-ratio is ``r = dw - db - (log Z_w - log Z_b)``, and
``gap = log Z_w - log Z_b + K`` turns it into ``r - K = dw - db - gap``. Two rows that differ by a
constant give exactly 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from svdk import schema

KL_GRADIENT = tl.constexpr(schema.KL_GRADIENT)
LOG_RATIO = tl.constexpr(schema.LOG_RATIO)
VECTOR = tl.constexpr(schema.VECTOR)
PLAIN = tl.constexpr(schema.PLAIN)
LABEL = tl.constexpr(schema.LABEL)
KL_BUDGET = tl.constexpr(schema.KL_BUDGET)
EPS = tl.constexpr(1e-12)
INF = tl.constexpr(float("inf"))
MAX_ID = tl.constexpr(2**31 - 1)


@triton.jit
def or_zero(x):
    """x, or 0 where it is -inf: a maximum that may be subtracted."""
    return tl.where(x == -INF, 0.0, x)


@triton.jit
def delta_of(w, other, max_w, log_zw, max_b, gap, DIRECTION: tl.constexpr):
    """The steering vector at tokens with logits ``w`` and base logits (or vector entries) ``other``."""
    if DIRECTION == PLAIN:
        return w * 0.0
    elif DIRECTION == VECTOR:
        return other
    else:
        usable = (w > -INF) & (other > -INF)
        dw = tl.where(usable, w - max_w, 0.0)
        delta = tl.where(usable, dw - (other - max_b) - gap, 0.0)
        if DIRECTION == KL_GRADIENT:
            delta = tl.exp(dw - log_zw) * delta
        return delta


@triton.jit
def inside_of(w, max_w, log_alpha):
    """Membership of the confidence set C."""
    return (w > -INF) & (w - max_w >= log_alpha)


@triton.jit
def steered_of(w, delta, inside, max_w, mu, penalty, FINITE_PENALTY: tl.constexpr):
    """Steered logits less ``max_w``; -inf where a token cannot be drawn."""
    if FINITE_PENALTY:
        outside = tl.where(w > -INF, w - max_w + mu * penalty, -INF)
    else:
        outside = -INF
    return tl.where(inside, w - max_w + mu * delta, outside)


@triton.jit
def ordered_key(z):
    """Order-preserving map from float32 to uint32; both zeros are one value."""
    bits = tl.where(z == 0.0, 0.0, z).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)


@triton.jit
def value_of(rows, scalar, row):
    """A parameter: this row's entry of a (B,) tensor, or the scalar where there is no tensor."""
    if rows is None:
        return scalar
    else:
        return tl.load(rows + row)


@triton.jit
def row_index(rows, row):
    """int64 index of a row in its tensor, through the (B,) index tensor if there is one."""
    if rows is None:
        return row.to(tl.int64)
    else:
        return tl.load(rows + row).to(tl.int64)


@triton.jit
def load_set(warm, other, listed, from_list, start, count, DIRECTION: tl.constexpr, COMPACT: tl.constexpr,
             BLOCK: tl.constexpr):  # fmt: skip
    """Tile ``start`` of the tokens still in play: ``(ids, warm, other)``, -inf past the end.

    They are the ids at ``listed`` or, where these did not fit (``from_list`` false), the whole row.
    """
    place = start + tl.arange(0, BLOCK)
    live = place < count
    ids = place
    if COMPACT:
        if from_list:
            ids = tl.load(listed + place, mask=live, other=0)
    w = tl.load(warm + ids, mask=live, other=-INF).to(tl.float32)
    if DIRECTION == PLAIN:
        return ids, w, w
    else:
        return ids, w, tl.load(other + ids, mask=live, other=0.0).to(tl.float32)


@triton.jit
def finite_argmax(warm, vocab, BLOCK: tl.constexpr):
    """Lowest id of the largest finite logit of a row, 0 if there is none: the token of an invalid row."""
    best = tl.full([BLOCK], -INF, tl.float32)
    best_id = tl.full([BLOCK], MAX_ID, tl.int32)
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
