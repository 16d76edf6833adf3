"""Steps 5, 6, 8 and 9 for a tile of tokens: confidence set, direction, strength and steered logits.

Everything is relative to the row maxima, so that float32 spends its digits where they matter: with
``dw = w - max_w``, ``db = b - max_b`` the log-ratio is ``r = dw - db - (log Z_w - log Z_b)``, and
``gap = log Z_w - log Z_b + K`` turns it into ``r - K = dw - db - gap``. Two rows that differ by a
constant give exactly 0.

Logits go up to the largest float32, and so may strengths: neither differences nor products may overflow.
So sweeps work on numbers that are scaled by powers of two, which costs no precision: directions by
``SHRINK`` (a vector's entries stay as they are) and steered logits by the strength's ``scale``. Order, ties
and differences are those of the steered logits, and -inf is left to tokens that cannot be drawn.

What belongs together travels as a NamedTuple; only the launch signatures of the kernels are flat.
"""

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

# KIND, the one compile-time constant that most functions take: a direction and flags.
DIRECTION = tl.constexpr(3)
"""The bits that hold one of the four directions."""
OUTSIDE = tl.constexpr(4)
"""The penalty is finite: tokens outside C can be drawn too."""
COMPACT = tl.constexpr(8)
"""The first sweep collects candidates for C, and the later steps go over those in C alone."""
DIRECT = tl.constexpr(16)
"""The first sweep draws: C is the whole row and the steered logits need no sums."""
FILTERS = tl.constexpr(32)
"""Some row may have a top-k, top-p or min-p."""
INFO = tl.constexpr(64)
"""Diagnostics are asked for."""


class PerRow(NamedTuple):
    """A parameter that is a scalar or has one value a row."""

    scalar: Any
    rows: Any
    """Pointer to a (B,) tensor, or None."""


class Operands(NamedTuple):
    """The logits of a row."""

    warm: Any
    """Pointer to the warm logits."""
    other: Any
    """Pointer to the base logits or the vector; unused for PLAIN."""
    vocab: Any
    bias: Any
    """Pointer to the float32 bias of the row's warm and base logits, or None."""
    bitmask: Any
    """Pointer to the words of the row's mask, or None."""


class Constants(NamedTuple):
    """What a row's first sweep gave; the logs of the normalisers are relative to the maxima."""

    max_w: Any
    log_zw: Any
    max_b: Any
    log_zb: Any
    kl: Any
    """K, float64."""
    gap: Any
    """SHRINK * (log Z_w - log Z_b + K)."""
    log_alpha: Any


class Strength(NamedTuple):
    """A strength, as it is and scaled so that no steered logit can overflow."""

    mu: Any
    scale: Any
    """A power of two: steered logits are multiplied by it."""
    scaled_strength: Any
    """What a token's ``delta_of`` is multiplied by."""
    scaled_penalty: Any
    """What is added outside C: scale * mu * penalty."""


class Moments(NamedTuple):
    """Moments of the direction, delta being 0 outside C; float64, as squares may pass float32."""

    mean: Any
    """Sum of p delta."""
    norm2: Any
    variance: Any
    """Under p."""


@triton.jit
def value_of(parameter, row):
    """The value of a :class:`PerRow` in a row."""
    value = parameter.scalar
    if parameter.rows is not None:
        value = tl.load(parameter.rows + row)
    return value


@triton.jit
def row_index(rows, row):
    """int64 index of a row in its tensor, through the (B,) index tensor if there is one."""
    index = row
    if rows is not None:
        index = tl.load(rows + row)
    return index.to(tl.int64)


@triton.jit
def adjusted(x, bias, bitmask, ids, live):
    """Warm or base logits x of the tokens ``ids`` with the row's bias, and -inf where its mask has a 0.

    Callers load x themselves: torch.compile takes every pointer that goes into a call for written if an
    address depends on what the call returns.
    """
    if bias is not None:
        x += tl.load(bias + ids, mask=live, other=0.0)
    if bitmask is not None:
        word = tl.load(bitmask + (ids >> 5), mask=live, other=0)
        x = tl.where(((word >> (ids & 31)) & 1) != 0, x, -INF)
    return x


@triton.jit
def in_unit(x):
    """Whether a parameter is in [0, 1]; NaN is not."""
    return (x >= 0.0) & (x <= 1.0)


@triton.jit
def is_finite(x):
    """Whether a parameter is neither NaN nor infinite."""
    return (x > -INF) & (x < INF)


@triton.jit
def or_zero(x):
    """x, or 0 where it is -inf: a maximum that may be subtracted."""
    return tl.where(x == -INF, 0.0, x)


@triton.jit
def safe_log(x):
    """Log of a parameter in [0, 1]; -inf at 0."""
    return tl.where(x > 0.0, tl.log(tl.where(x > 0.0, x, 1.0)), -INF)


@triton.jit
def inverse_power(x):
    """1 / x of a power of two, exactly."""
    return (0x7F000000 - x.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def best_of(score, ids):
    """Best score of a tile and its lowest id; id MAX_ID when nothing scored above -inf."""
    top = tl.max(score, 0)
    return top, tl.min(tl.where((score == top) & (score > -INF), ids, MAX_ID), 0)


@triton.jit
def log_p_of(constants, w):
    """Log-probability of a token in the warm row."""
    return w - constants.max_w - constants.log_zw


@triton.jit
def log_q_of(constants, b):
    """Log-probability of a token in the base row."""
    return tl.where(b > -INF, b - constants.max_b - constants.log_zb, -INF)


@triton.jit
def in_confidence_set(w, max_w, log_alpha):
    """Membership of the confidence set C."""
    return (w > -INF) & (w - max_w >= log_alpha)


@triton.jit
def delta_of(constants, w, other, KIND: tl.constexpr):
    """The direction at tokens with logits ``w`` and base logits (or vector entries) ``other``.

    With a base it is multiplied by SHRINK; see :func:`in_nats`.
    """
    if DIRECTION & KIND == PLAIN:
        delta = tl.where(w > -INF, w, 0.0) * 0.0
    elif DIRECTION & KIND == VECTOR:
        delta = other
    else:
        usable = (w > -INF) & (other > -INF)
        dw = w * SHRINK - constants.max_w * SHRINK
        delta = tl.where(usable, dw - (other * SHRINK - constants.max_b * SHRINK) - constants.gap, 0.0)
        if DIRECTION & KIND == KL_GRADIENT:
            delta = tl.where(usable, tl.exp(log_p_of(constants, w)) * delta, 0.0)
    return delta


@triton.jit
def in_nats(delta, KIND: tl.constexpr):
    """What :func:`delta_of` gave, as a float64 in its own unit."""
    delta = delta.to(tl.float64)
    if DIRECTION & KIND < VECTOR:
        delta = delta * UNIT
    return delta


@triton.jit
def strength_of(moments, delta, budget, MODE: tl.constexpr):
    """mu: the optimum for a label with direction ``delta``, or what spends a budget of KL in nats."""
    if MODE == LABEL:
        mu = tl.where(moments.norm2 < EPS, 0.0, (delta - moments.mean) / (moments.norm2 + EPS))
    else:
        tiny = moments.variance < EPS
        mu = tl.where(tiny, 0.0, tl.sqrt(2.0 * budget.to(tl.float64) / tl.where(tiny, 1.0, moments.variance)))
    return mu.to(tl.float32)


@triton.jit
def scale_strength(mu, penalty, KIND: tl.constexpr):
    """The :class:`Strength` of a mu: scale * max(1, |mu|) is below 2^-8.

    Scaled steered logits are then below 2^124 in size, those outside C below 2^127.
    """
    number = tl.full([], 0.0, tl.float32) + mu  # the interpreter's scalars are Python's
    size = tl.minimum(tl.maximum(number, -LARGEST_MU), LARGEST_MU)
    power = tl.maximum(tl.abs(size), 1.0).to(tl.int32, bitcast=True) & 0x7F800000
    scale = (0x7A800000 - power).to(tl.float32, bitcast=True)  # 2^-9 over the power of two in |mu|
    scaled_strength = size * scale
    if DIRECTION & KIND < VECTOR:
        scaled_strength = scaled_strength * UNIT
    scaled_penalty = scale * 0.0
    if OUTSIDE & KIND:
        shift = scale.to(tl.float64) * number.to(tl.float64) * penalty
        scaled_penalty = tl.minimum(tl.maximum(shift, -(2.0**126)), 2.0**126).to(tl.float32)
    return Strength(mu, scale, scaled_strength, scaled_penalty)


@triton.jit
def scaled_logits(constants, strength, w):
    """Warm logits less ``max_w``, times the strength's scale."""
    return w * strength.scale - constants.max_w * strength.scale


@triton.jit
def steered_inside(constants, strength, w, delta):
    """Steered logits of tokens in C, less ``max_w``, times the strength's scale."""
    return scaled_logits(constants, strength, w) + strength.scaled_strength * delta


@triton.jit
def steered_logits(constants, strength, w, delta, KIND: tl.constexpr):
    """Steered logits less ``max_w``, times the strength's scale; -inf where a token cannot be drawn."""
    inside = in_confidence_set(w, constants.max_w, constants.log_alpha)
    steered = tl.where(inside, steered_inside(constants, strength, w, delta), -INF)
    if OUTSIDE & KIND:
        outside = (w > -INF) & (w - constants.max_w < constants.log_alpha)
        steered = tl.where(outside, scaled_logits(constants, strength, w) + strength.scaled_penalty, steered)
    return steered
