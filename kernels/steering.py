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
def in_unit(x):
    """Whether a parameter is in [0, 1]; NaN is not."""
    return (x >= 0.0) & (x <= 1.0)


@triton.jit
def is_finite(x):
    """Whether a parameter is neither NaN nor infinite."""
    return (x > -INF) & (x < INF)


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
