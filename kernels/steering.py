"""What one token contributes: direction, confidence set and steered logit, for a tile of tokens.

Everything is relative to the row maxima, so that float32 spends its digits where they matter: with
``dw = w - max_w``, ``db = b - max_b`` the log-ratio is ``r = dw - db - (log Z_w - log Z_b)``, and
``gap = log Z_w - log Z_b + K`` turns it into ``r - K = dw - db - gap``. Two rows that differ by a
constant give exactly 0.

Logits go up to the largest float32, and so may strengths: neither differences nor products may overflow.
So sweeps work on numbers that are scaled by powers of two, which costs no precision: directions by
``SHRINK`` (a vector's entries stay as they are) and steered logits by the row's ``scale``. Order, ties and
differences are those of the steered logits, and -inf is left to tokens that cannot be drawn.
"""

# A condition known at compile time and one known at run time must not share an `if`.
# ruff: noqa: SIM102, SIM108

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from svdk.ops import schema

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
SHRINK = tl.constexpr(2.0**-4)
UNIT = tl.constexpr(2.0**4)  # 1 / SHRINK
LARGEST_MU = tl.constexpr(2.0**117)  # beyond it, all that counts is who has the larger delta
CLEAR = tl.constexpr(0.03)  # a mass that is known well enough as what lacks to 1

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
    """SHRINK * (log Z_w - log Z_b + K)."""
    log_alpha: Any
    scale: Any
    """A power of two: steered logits are multiplied by it."""
    push: Any
    """What a token's ``delta_of`` is multiplied by."""
    outside: Any
    """What is added outside C: scale * mu * penalty."""


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
def inverse_power(x):
    """1 / x of a power of two, exactly."""
    return (0x7F000000 - x.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def scaled_strength(mu, penalty, KIND: tl.constexpr):
    """``(scale, push, outside)`` of a :class:`Row` for a strength: scale * max(1, |mu|) is below 2^-8.

    Scaled steered logits are then below 2^124 in size, those outside C below 2^127.
    """
    mu = tl.full([], 0.0, tl.float32) + mu  # the interpreter's scalars are Python's
    size = tl.minimum(tl.maximum(mu, -LARGEST_MU), LARGEST_MU)
    power = tl.maximum(tl.abs(size), 1.0).to(tl.int32, bitcast=True) & 0x7F800000
    scale = (0x7A800000 - power).to(tl.float32, bitcast=True)  # 2^-9 over the power of two in |mu|
    push = size * scale
    if DIRECTION & KIND < VECTOR:
        push = push * UNIT
    outside = scale * 0.0
    if OUTSIDE & KIND:
        shift = scale.to(tl.float64) * mu.to(tl.float64) * penalty
        outside = tl.minimum(tl.maximum(shift, -(2.0**126)), 2.0**126).to(tl.float32)
    return scale, push, outside


@triton.jit
def delta_of(row, w, other, KIND: tl.constexpr):
    """The steering vector at tokens with logits ``w`` and base logits (or vector entries) ``other``.

    With a base it is multiplied by SHRINK; see :func:`in_nats`.
    """
    if DIRECTION & KIND == PLAIN:
        delta = tl.where(w > -INF, w, 0.0) * 0.0
    elif DIRECTION & KIND == VECTOR:
        delta = other
    else:
        usable = (w > -INF) & (other > -INF)
        dw = w * SHRINK - row.max_w * SHRINK
        delta = tl.where(usable, dw - (other * SHRINK - row.max_b * SHRINK) - row.gap, 0.0)
        if DIRECTION & KIND == KL_GRADIENT:
            delta = tl.where(usable, tl.exp(w - row.max_w - row.log_zw) * delta, 0.0)
    return delta


@triton.jit
def in_nats(delta, KIND: tl.constexpr):
    """What :func:`delta_of` gave, as a float64 in its own unit."""
    delta = delta.to(tl.float64)
    if DIRECTION & KIND < VECTOR:
        delta = delta * UNIT
    return delta


@triton.jit
def steered_inside(row, w, delta):
    """Steered logits of tokens in C, less ``max_w``, times ``row.scale``."""
    return (w * row.scale - row.max_w * row.scale) + row.push * delta


@triton.jit
def steered_of(row, w, delta, KIND: tl.constexpr):
    """Steered logits less ``max_w``, times ``row.scale``; -inf where a token cannot be drawn."""
    inside = inside_of(w, row.max_w, row.log_alpha)
    steered = tl.where(inside, steered_inside(row, w, delta), -INF)
    if OUTSIDE & KIND:
        outside = (w > -INF) & (w - row.max_w < row.log_alpha)
        steered = tl.where(outside, (w * row.scale - row.max_w * row.scale) + row.outside, steered)
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
    """``(ids, z)`` of the tokens in play from ``start`` on; z as of :func:`steered_of`."""
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
def log_outside(warm, vocab, max_w, log_alpha, BLOCK: tl.constexpr):
    """Log of the sum of exp(w - max_w) over the tokens outside C, float64; -inf if there are none.

    Summed about each lane's own maximum: a strength can bring back what would underflow next to max_w.
    """
    top, mass = tl.full([BLOCK], -INF, tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        w = tl.load(warm + ids, mask=ids < vocab, other=-INF).to(tl.float32)
        w = tl.where(inside_of(w, max_w, log_alpha), -INF, w)
        new_top = tl.maximum(top, w)
        mass = mass * tl.exp(top - or_zero(new_top)) + tl.exp(w - or_zero(new_top))
        top = new_top
    highest = tl.max(top, 0)
    mass = tl.sum(mass * tl.exp(top - or_zero(highest)), 0)
    some = mass > 0.0
    log_mass = highest.to(tl.float64) - max_w + tl.log(tl.where(some, mass, 1.0))
    return tl.where(some, log_mass, -INF)


@triton.jit
def entry_at_top(row, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """A vector's entry at the likeliest token (the lowest id of them), float64."""
    found = tl.full([BLOCK], MAX_ID, tl.int32)
    for start in range(0, row.count, BLOCK):
        ids, w, _ = load_tile(row, start, KIND, BLOCK)
        found = tl.minimum(found, tl.where(w == row.max_w, ids, MAX_ID))
    return tl.load(row.other + tl.min(found, 0)).to(tl.float64)


@triton.jit
def moments(row, vocab, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """``(sum p delta, ||delta||^2, Var_p delta)``, delta 0 outside C; float64 (squares may pass float32).

    About 0, the variance of a vector with a common offset, or in a confident row, would be lost in rounding:
    a vector is summed about its entry at the likeliest token.
    """
    pivot = tl.full([], 0.0, tl.float64)
    if DIRECTION & KIND == VECTOR:
        pivot = entry_at_top(row, KIND, BLOCK)
    mass, norm2 = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    first, second = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for start in range(0, row.count, BLOCK):
        _, w, other = load_tile(row, start, KIND, BLOCK)
        inside = inside_of(w, row.max_w, row.log_alpha)
        delta = in_nats(tl.where(inside, delta_of(row, w, other, KIND), 0.0), KIND)
        p = tl.exp(w - row.max_w - row.log_zw).to(tl.float64)
        mass += p
        first += p * (delta - pivot)
        second += p * (delta - pivot) * (delta - pivot)
        norm2 += delta * delta
    mean, square = tl.sum(first, 0), tl.sum(second, 0)
    if DIRECTION & KIND == VECTOR:
        total = tl.sum(mass, 0)
        if LISTS & KIND:
            if row.from_list:  # what is not listed does not move
                rest = 1.0 - total
                if (rest < CLEAR) & (pivot != 0.0):
                    rest = tl.exp(log_outside(row.warm, vocab, row.max_w, row.log_alpha, BLOCK) - row.log_zw)
                mean -= rest * pivot
                square += rest * pivot * pivot
                total += rest
        mean = mean / total
        square = square / total
    return pivot + mean, tl.sum(norm2, 0), tl.maximum(square - mean * mean, 0.0)


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
