"""The specification: the operations in plain PyTorch, float64, in the twelve steps of ``docs/algorithm.md``.

Every formula is from SVDecode (arXiv 2509.15888) and the exact step-size theory beside it. Kernels are tested
against this file, which goes by the definitions, looks at a row as often as it likes and is slow on purpose.
The operations take the flat arguments of ``svdk/ops/schema.py``; call them through
``svdk.steered_sample(..., backend="reference")`` and its siblings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from svdk.ops import schema
from svdk.ops.philox import row_uniforms
from svdk.ops.results import Status
from svdk.ops.schema import CONSTANT, KL_BUDGET, LABEL, LOG_RATIO, PLAIN, VECTOR, Operands, PerRow

EPS = 1e-12
"""A squared norm or variance below this means: the warm start changed nothing here."""


def argmax_lowest(x: Tensor) -> Tensor:
    """Index of the row maximum, the lowest one on ties; 0 for an all -inf row."""
    ids = torch.arange(x.shape[1], device=x.device)
    best = x.max(dim=1, keepdim=True).values
    return torch.where(x == best, ids, x.shape[1]).min(dim=1).values


def at(x: Tensor, token: Tensor) -> Tensor:
    """The entry (B,) of x (B, V) at one token a row."""
    return x.gather(1, token[:, None])[:, 0]


# Step 1: validate.
def unpack(op: schema.Op, flat: tuple) -> tuple[Operands, Any]:
    """A call's operands, and what else was given by name, one a row as (B,): float64, but int64 seeds."""
    operands, given = op.unpack(flat)
    for name, value in vars(given).items():
        if isinstance(value, PerRow):
            dtype = torch.int64 if name in ("seed", "offset") else torch.float64
            same = torch.full((operands.batch,), value.scalar, dtype=dtype, device=operands.warm.device)
            setattr(given, name, same if value.rows is None else value.rows.to(dtype))
    if operands.direction == PLAIN:
        given.alpha = torch.zeros_like(given.alpha)
    return operands, given


def valid_parameters(given: Any, vocab: int) -> Tensor:
    """Rows (B,) whose parameters are in range; those in tensors on a device get this far unchecked."""
    valid = torch.ones_like(given.alpha, dtype=torch.bool)
    for name, x in vars(given).items():
        if name in schema.PARAMETER and isinstance(x, Tensor):
            bounds = schema.PARAMETER[name]
            within = torch.isfinite(x) & (x >= bounds.low) & (x <= bounds.high)
            valid &= within if x.dim() == 1 else within.all(1)
    if getattr(given, "strength_mode", CONSTANT) == KL_BUDGET:
        valid &= given.strength >= 0
    if getattr(given, "labels", None) is not None:
        valid &= (given.labels >= 0) & (given.labels < vocab)
    return valid


def fallback_token(w: Tensor) -> Tensor:
    """The token of an invalid row: argmax over its finite warm logits, 0 if there is none."""
    return argmax_lowest(torch.where(torch.isfinite(w), w, -math.inf))


def take_rows(x: Tensor, rows: Tensor | None, vocab: int) -> Tensor:
    """The (B, vocab) part of a logits tensor, in float64."""
    x = x if rows is None else x.index_select(0, rows)
    return x[:, :vocab].double()


def adjusted(x: Tensor, operands: Operands, given: Any) -> Tensor:
    """Warm or base logits (B, V) with the call's bias added, and -inf where its bitmask has a 0.

    The sum is rounded to float32, as in every backend, so that all of them draw the same token. (float64
    logits, which the reference alone takes, stay what they are.) The mask comes last: what a masked token had
    does not matter, a NaN neither.
    """
    bias, bitmask = getattr(given, "logit_bias", None), getattr(given, "bitmask", None)
    if bias is not None:
        wide = operands.warm.dtype == torch.float64
        x = ((x if wide else x.float()) + bias[..., : operands.vocab]).double()
    if bitmask is not None:
        ids = torch.arange(operands.vocab, device=x.device)
        allowed = (bitmask[:, ids // 32] >> (ids % 32)) & 1
        x = torch.where(allowed == 1, x, -math.inf)
    return x


# Steps 2 and 3: first sweep, merge. A kernel adds up slice by slice, relative to the maxima so far, and takes
# the sums for K along (`usable`, `cross`). Here a row is one slice, and K gets a look of its own.
class Sums(NamedTuple):
    """Maxima and log sum exp(x - maximum) of both rows, (B, 1)."""

    max_w: Tensor
    log_zw: Tensor
    max_b: Tensor
    log_zb: Tensor


def first_sweep(w: Tensor, b: Tensor) -> Sums:
    """The sums of a warm and a base row: the likeliest token has the log-probability -log_z."""
    log_zw, log_zb = (-x.log_softmax(1).max(1, keepdim=True).values for x in (w, b))
    return Sums(w.max(1, keepdim=True).values, log_zw, b.max(1, keepdim=True).values, log_zb)


# Step 4: constants.
class Constants(NamedTuple):
    """What the formulas of a single token need to know of its row, (B, 1)."""

    direction: int
    log_alpha: Tensor
    sums: Sums
    kl: Tensor  # NaN without a base


def log_p_of(sums: Sums, w: Tensor) -> Tensor:
    """Warm log-probabilities; the two numbers apart, or a maximum of 1e16 would round log_zw away."""
    return (w - sums.max_w) - sums.log_zw


def log_q_of(sums: Sums, b: Tensor) -> Tensor:
    """Base log-probabilities."""
    return torch.where(b > -math.inf, (b - sums.max_b) - sums.log_zb, -math.inf)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """K = sum p (log p - log q) over the usable tokens: those with a finite logit in both rows."""
    usable = (log_p > -math.inf) & (log_q > -math.inf)
    ratio = torch.where(usable, log_p - log_q, 0.0)
    return (torch.where(usable, log_p.exp(), 0.0) * ratio).sum(1, keepdim=True)


def make_constants(direction: int, alpha: Tensor, w: Tensor, base: Tensor | None) -> Constants:
    """Steps 2 to 4."""
    sums = first_sweep(w, w if base is None else base)
    kl = torch.full_like(sums.max_w, math.nan)
    if base is not None:
        kl = kl_divergence(log_p_of(sums, w), log_q_of(sums, base))
    return Constants(direction, alpha.log()[:, None], sums, kl)


# Step 5: confidence set.
def in_confidence_set(c: Constants, w: Tensor) -> Tensor:
    """Membership of C = {p >= alpha max p}."""
    return (w > -math.inf) & (w - c.sums.max_w >= c.log_alpha)


# Step 6: direction.
def delta_of(c: Constants, w: Tensor, other: Tensor | None) -> Tensor:
    """The steering vector, in C and elsewhere."""
    if other is None:
        return torch.zeros_like(w)
    if c.direction == VECTOR:
        return other
    log_p, log_q = log_p_of(c.sums, w), log_q_of(c.sums, other)
    delta = torch.where((log_p > -math.inf) & (log_q > -math.inf), log_p - log_q - c.kl, 0.0)
    return delta if c.direction == LOG_RATIO else log_p.exp() * delta


@dataclass
class Rows:
    """What steps 1 to 6 make of a batch of rows: (B, V) in float64 or bool, and (B,)."""

    w: Tensor  # (B, V) warm logits; zeros on invalid rows
    log_p: Tensor  # (B, V)
    log_q: Tensor  # (B, V), NaN without a base
    delta: Tensor  # (B, V) steering vector on C, 0 outside
    inside: Tensor  # (B, V) bool: C
    c: Constants
    invalid: Tensor  # (B,) bool
    fallback: Tensor  # (B,) int64

    @property
    def status(self) -> Tensor:
        """int32 (B,) bits of :class:`svdk.Status`."""
        base_masked = ((self.w > -math.inf) & (self.log_q == -math.inf)).any(1)
        return (self.invalid * Status.INVALID + base_masked * Status.BASE_MASKED).int()

    def nan_if_invalid(self, x: Tensor) -> Tensor:
        """Float32 (B,) with NaN on invalid rows."""
        return torch.where(self.invalid, math.nan, x).float()


def open_rows(operands: Operands, given: Any) -> Rows:
    """Steps 1 to 6."""
    vocab, direction, other = operands.vocab, operands.direction, None
    w = adjusted(take_rows(operands.warm, operands.warm_rows, vocab), operands, given)
    valid = valid_parameters(given, vocab) & torch.isfinite(w).any(1)
    valid &= (w < math.inf).all(1)  # NaN compares false
    if operands.base is not None:
        other = adjusted(take_rows(operands.base, operands.base_rows, vocab), operands, given)
        valid &= (other < math.inf).all(1)
    elif operands.vector is not None:
        other = operands.vector[..., :vocab].double().expand(w.shape)
        valid &= torch.isfinite(other).all(1)
    fallback = fallback_token(w)
    w = torch.where(valid[:, None], w, 0.0)
    other = None if other is None else torch.where(valid[:, None], other, 0.0)

    base = other if direction < VECTOR else None
    c = make_constants(direction, torch.where(valid, given.alpha, 0.0), w, base)
    log_q = torch.full_like(w, math.nan) if base is None else log_q_of(c.sums, base)
    inside = in_confidence_set(c, w)
    delta = torch.where(inside, delta_of(c, w, other), 0.0)
    return Rows(w, log_p_of(c.sums, w), log_q, delta, inside, c, ~valid, fallback)


# Step 7: moments.
class Moments(NamedTuple):
    """Of delta under p, (B,)."""

    mean: Tensor
    norm2: Tensor
    variance: Tensor


def moments_of(rows: Rows) -> Moments:
    """``sum p delta``, ``||delta||^2`` and ``Var_p(delta)``; delta is 0 outside C."""
    p, delta = rows.log_p.exp(), rows.delta
    mean = (p * delta).sum(1)
    return Moments(mean, (delta**2).sum(1), (p * (delta - mean[:, None]) ** 2).sum(1))


# Step 8: strength.
def strength_of(rows: Rows, given: Any) -> Tensor:
    """Mu (B,): given, the optimum for a label, or as large as a budget of KL in nats allows."""
    mu, m = given.strength, moments_of(rows)
    if given.strength_mode == LABEL:
        gain = at(rows.delta, given.labels.clamp(0, rows.w.shape[1] - 1)) - m.mean
        mu = torch.where(m.norm2 < EPS, 0.0, gain / (m.norm2 + EPS))
    elif given.strength_mode == KL_BUDGET:
        mu = torch.where(m.variance < EPS, 0.0, (2 * given.strength / m.variance).sqrt())
    return torch.where(rows.invalid, 0.0, mu)


# Step 9: steer.
def steered_logit(rows: Rows, mu: Tensor, penalty: float) -> Tensor:
    """Steered logits (B, V) for one strength a row (B,)."""
    mu = mu[:, None]
    outside = rows.w + mu * penalty if math.isfinite(penalty) else torch.full_like(rows.w, -math.inf)
    return torch.where(rows.inside, rows.w + mu * rows.delta, outside)


# Step 10: filters.
def filter_row(z: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Top-k, top-p and min-p in that order, as transformers do, as a (B, V) mask of what may be drawn."""
    vocab = z.shape[1]
    order = torch.sort(z, dim=1, descending=True, stable=True)  # ties: the lower id first
    k = torch.where(top_k > 0, top_k.clamp(max=vocab), vocab)
    kth = order.values.gather(1, (k - 1).long()[:, None])
    x = (order.values - order.values[:, :1]) / temperature[:, None]
    weight = torch.where(order.values >= kth, x.exp(), 0.0)  # ties with the k-th stay, as in transformers
    share = weight / weight.sum(1, keepdim=True)
    before = share.cumsum(1) - share
    keep = (weight > 0) & ((before < top_p[:, None]) | (top_p[:, None] >= 1))
    keep &= x >= min_p.log()[:, None]
    keep[:, 0] = True
    return torch.zeros_like(keep).scatter(1, order.indices, keep)


# Step 11: draw.
def masses_of(rows: Rows, z: Tensor, given: Any) -> Tensor:
    """What may be drawn, (B, V): ``exp((z - max z) / T)``, 0 for the others; all on the argmax if greedy."""
    greedy = rows.invalid | (given.temperature == 0)
    temperature = torch.where(greedy, 1.0, given.temperature)
    keep = filter_row(z, temperature, given.top_k, given.top_p, torch.where(rows.invalid, 0.0, given.min_p))
    masses = torch.where(keep, ((z - z.amax(1, keepdim=True)) / temperature[:, None]).exp(), 0.0)
    best = torch.zeros_like(z).scatter(1, argmax_lowest(z)[:, None], 1.0)
    return torch.where(greedy[:, None], best, masses)


def draw_row(masses: Tensor, uniform: Tensor) -> Tensor:
    """Tokens int64 (B,): the first in order of id whose cumulative mass exceeds ``uniform`` (B,) of all.

    The last one with mass where rounding leaves none.
    """
    reached, ids = masses.cumsum(1), torch.arange(masses.shape[1], device=masses.device)
    behind = (masses > 0) & (reached > uniform[:, None] * reached[:, -1:])
    last = torch.where(masses > 0, ids, 0).amax(1)
    return torch.where(behind.any(1), behind.int().argmax(1), last)


# Step 12: describe.
def describe(rows: Rows, mu: Tensor, z: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 (5, B) and int32 (2, B) in the order of :class:`svdk.SampleInfo`."""
    floats = (mu, rows.c.kl[:, 0], *(at(x, token) for x in (z.log_softmax(1), rows.log_p, rows.log_q)))
    candidates = torch.where(rows.invalid, 0, rows.inside.sum(1)).int()
    return torch.stack([rows.nan_if_invalid(x) for x in floats]), torch.stack([candidates, rows.status])


# The operations.
def steered_rows(*flat: Any) -> tuple[Any, Rows, Tensor, Tensor, Tensor]:
    """``steered_sample`` up to the draw: what was given, rows, mu (B,), steered logits and masses (B, V)."""
    operands, given = unpack(schema.STEERED_SAMPLE, flat)
    rows = open_rows(operands, given)
    mu = strength_of(rows, given)
    z = steered_logit(rows, mu, given.penalty)
    return given, rows, mu, z, masses_of(rows, z, given)


def steered_sample(*flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens int64 (B,), diagnostics float32 (5, B) and int32 (2, B); see :class:`svdk.SampleInfo`."""
    given, rows, mu, z, masses = steered_rows(*flat)
    token = torch.where(rows.invalid, rows.fallback, draw_row(masses, row_uniforms(given.seed, given.offset)))
    info = flat[-1]
    empty = z.new_empty(0, dtype=torch.float32), token.new_empty(0, dtype=torch.int32)
    return token, *(describe(rows, mu, z, token) if info else empty)


class Partition(NamedTuple):
    """Rows at one strength: log softmax(z), and log sum exp(z) along mu; (B, V) and (B,)."""

    log_shares: Tensor  # (B, V) log softmax(z)
    moves: Tensor  # (B, V) dz / dmu
    slope: Tensor  # (B,) of the log-partition
    curvature: Tensor  # (B,)
    greedy: Tensor  # (B,) argmax over C


def partition_of(rows: Rows, mu: Tensor, penalty: float) -> Partition:
    """Step 9 for ``steered_logprob``."""
    z = steered_logit(rows, mu, penalty)
    moves = torch.where(rows.inside, rows.delta, penalty if math.isfinite(penalty) else 0.0)
    share = z.softmax(1)
    slope = (share * moves).sum(1)
    curvature = (share * (moves - slope[:, None]) ** 2).sum(1)
    inside = argmax_lowest(torch.where(rows.inside, z, -math.inf))
    greedy = torch.where(rows.invalid, rows.fallback, inside)
    return Partition(z.log_softmax(1), moves, slope, curvature, greedy)


def strengths_of(operands: Operands, given: Any) -> Tensor:
    """The strengths (B, M) of a call of ``steered_logprob``: those of the grid, or one a row."""
    grid = given.strengths
    return given.strength[:, None] if grid is None else grid.double().expand(operands.batch, -1)


def steered_logprob(*flat: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Curves float32 (3, B, M), greedy int64 (B, M), rows float32 (6, B), status (B,).

    Curves: logprob, slope, curvature. Rows: gain, norm2, variance, kl, log p(label), log q(label).
    """
    operands, given = unpack(schema.STEERED_LOGPROB, flat)
    given.strength = strengths_of(operands, given)
    rows = open_rows(operands, given)
    label = given.labels.clamp(0, operands.vocab - 1)
    curves, greedy = [], []
    for mu in torch.where(rows.invalid[:, None], 0.0, given.strength).T:
        part = partition_of(rows, mu, given.penalty)
        logprob = at(part.log_shares, label)
        slope = torch.where(logprob == -math.inf, 0.0, at(part.moves, label) - part.slope)
        curves.append(torch.stack([rows.nan_if_invalid(x) for x in (logprob, slope, part.curvature)]))
        greedy.append(part.greedy)
    m = moments_of(rows)
    log_p, log_q, delta = (at(x, label) for x in (rows.log_p, rows.log_q, rows.delta))
    stats = (delta - m.mean, m.norm2, m.variance, rows.c.kl[:, 0], log_p, log_q)
    return (
        torch.stack(curves, 2) if curves else rows.w.new_empty(3, operands.batch, 0, dtype=torch.float32),
        torch.stack(greedy, 1) if greedy else label.new_empty(operands.batch, 0),
        torch.stack([rows.nan_if_invalid(x) for x in stats]),
        rows.status,
    )


def extract(*flat: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """row_ptr (B + 1,), ids (N,), p (N,), delta (N,), rows float32 (3, B): kl, max, lse; status (B,)."""
    operands, given = unpack(schema.EXTRACT, flat)
    rows = open_rows(operands, given)
    inside = rows.inside & ~rows.invalid[:, None]
    row, ids = inside.nonzero(as_tuple=True)
    row_ptr = torch.zeros(operands.batch + 1, dtype=torch.int64, device=ids.device)
    row_ptr[1:] = inside.sum(1).cumsum(0)
    max_w, log_zw, _, _ = rows.c.sums
    stats = [rows.nan_if_invalid(x[:, 0]) for x in (rows.c.kl, max_w, max_w + log_zw)]
    p, delta = rows.log_p.exp()[row, ids].float(), rows.delta[row, ids].float()
    return row_ptr, ids, p, delta, torch.stack(stats), rows.status


def steered_logits(*flat: Any) -> Tensor:
    """Steered logits into ``out`` (B, W), -inf from ``vocab`` on; returns the status (B,)."""
    operands, given = unpack(schema.STEERED_LOGITS, flat)
    out, skip = given.out, given.skip
    rows = open_rows(operands, given)
    largest = torch.finfo(out.dtype).max
    z = steered_logit(rows, strength_of(rows, given), given.penalty)
    z = torch.where(z > -math.inf, z.clamp(-largest, largest), -math.inf)
    z, status = torch.where(rows.invalid[:, None], math.nan, z), rows.status
    if skip is not None:
        z = torch.where(skip[:, None], take_rows(operands.warm, operands.warm_rows, operands.vocab), z)
        status = torch.where(skip, 0, status)
    out[:, operands.vocab :] = -math.inf
    out[:, : operands.vocab] = z
    return status
