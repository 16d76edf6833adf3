"""The specification: the three operations in plain PyTorch, float64, written to be read.

Every formula is from design section 2 (SVDecode, arXiv 2509.15888, and the exact step-size theory
beside it). Kernels are tested against this file; it allocates freely and is slow on purpose. The
functions take the flat arguments of the dispatcher's ops (see ``svdk/ops/schema.py``); call them
through ``svdk.steered_sample(..., backend="reference")`` and its siblings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from svdk.ops.philox import gumbel, random_bits
from svdk.ops.results import Status
from svdk.ops.schema import KL_BUDGET, LABEL, LOG_RATIO, PLAIN, VECTOR

EPS = 1e-12
"""A squared norm or variance below this means: the warm start changed nothing here."""


@dataclass
class Rows:
    """What every operation needs of a batch of rows; all (B, V) float64 or bool, or (B,)."""

    z: Tensor  # (B, V) warm logits; zeros on invalid rows
    log_p: Tensor  # (B, V)
    p: Tensor  # (B, V)
    log_q: Tensor | None  # (B, V)
    delta: Tensor  # (B, V) direction on C, 0 outside
    inside: Tensor  # (B, V) bool: the confidence set C
    kl: Tensor  # (B,)
    max_logit: Tensor  # (B,)
    lse: Tensor  # (B,)
    invalid: Tensor  # (B,) bool
    fallback: Tensor  # (B,) int64: argmax over the finite warm logits, 0 if there is none
    base_masked: Tensor  # (B,) bool

    @property
    def status(self) -> Tensor:
        """int32 (B,) bits of :class:`svdk.Status`."""
        masked = self.base_masked & ~self.invalid
        return (self.invalid * Status.INVALID + masked * Status.BASE_MASKED).int()

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """``sum p delta``, ``||delta||^2`` and ``Var_p(delta)``, each (B,)."""
        mean = (self.p * self.delta).sum(1)
        return mean, (self.delta**2).sum(1), (self.p * (self.delta - mean[:, None]) ** 2).sum(1)

    def nan_if_invalid(self, x: Tensor) -> Tensor:
        """Float32 (B,) with NaN on invalid rows."""
        return torch.where(self.invalid, math.nan, x).float()


def per_row(scalar: float, rows: Tensor | None, like: Tensor) -> Tensor:
    """A parameter as float64 (B,)."""
    if rows is None:
        return torch.full((like.shape[0],), scalar, dtype=torch.float64, device=like.device)
    return rows.double()


def take_rows(x: Tensor, rows: Tensor | None, vocab: int) -> Tensor:
    """The (B, vocab) part of a logits tensor, in float64."""
    x = x if rows is None else x.index_select(0, rows)
    return x[:, :vocab].double()


def argmax_lowest(x: Tensor) -> Tensor:
    """Index of the row maximum, the lowest one on ties; 0 for an all -inf row."""
    ids = torch.arange(x.shape[1], device=x.device)
    best = x.max(dim=1, keepdim=True).values
    return torch.where(x == best, ids, x.shape[1]).min(dim=1).values


def steering_rows(warm, base, vector, warm_rows, base_rows, vocab, direction, alpha, bad) -> Rows:
    """Softmax of both rows, K, the direction and the confidence set. ``bad`` (B,): rows to refuse."""
    z = take_rows(warm, warm_rows, vocab)
    others = [take_rows(base, base_rows, vocab)] if base is not None else []
    if vector is not None:
        others.append(vector[..., :vocab].double().expand(z.shape))

    finite = torch.isfinite(z)
    invalid = bad | (torch.isnan(z) | (z == math.inf)).any(1) | ~finite.any(1)
    for x in others:
        refused = ~torch.isfinite(x) if vector is not None else torch.isnan(x) | (x == math.inf)
        invalid = invalid | refused.any(1)
    fallback = argmax_lowest(torch.where(finite, z, -math.inf))
    z, *others = (torch.where(invalid[:, None], 0.0, x) for x in (z, *others))
    finite = finite | invalid[:, None]

    max_logit, lse = z.max(1).values, z.logsumexp(1)
    log_p = z.log_softmax(1)  # not z - lse, which rounds log(sum) away next to a maximum of 1e16
    p = log_p.exp()
    log_alpha = torch.where(invalid, 0.0, alpha).log()
    inside = finite & (z - max_logit[:, None] >= log_alpha[:, None])

    log_q, kl = None, torch.full_like(lse, math.nan)
    base_masked = torch.zeros_like(invalid)
    if base is not None:
        z_b = others[0]
        log_q = torch.where(torch.isfinite(z_b), z_b.log_softmax(1), -math.inf)
        usable = finite & torch.isfinite(log_q)
        base_masked = (finite & ~usable).any(1)
        ratio = torch.where(usable, log_p - log_q, 0.0)
        kl = (torch.where(usable, p, 0.0) * ratio).sum(1)
        delta = torch.where(usable, ratio - kl[:, None], 0.0)
        if direction != LOG_RATIO:
            delta = p * delta
    elif direction == VECTOR:
        delta = others[0]
    else:
        delta = torch.zeros_like(z)
    delta = torch.where(inside, delta, 0.0)
    return Rows(z, log_p, p, log_q, delta, inside, kl, max_logit, lse, invalid, fallback, base_masked)


def steer(rows: Rows, strength: Tensor, penalty: float) -> Tensor:
    """Steered logits (B, V) for one strength a row (B,)."""
    mu = strength[:, None]
    outside = rows.z + mu * penalty if math.isfinite(penalty) else torch.full_like(rows.z, -math.inf)
    return torch.where(rows.inside, rows.z + mu * rows.delta, outside)


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


def bad_parameters(strength, mode, alpha, temperature, top_k, top_p, min_p, labels, vocab) -> Tensor:
    """Rows (B,) with a parameter that no formula allows; only device tensors get this far unchecked."""
    bad = ~torch.isfinite(strength) | ~((alpha >= 0) & (alpha <= 1))
    bad |= ~(torch.isfinite(temperature) & (temperature >= 0)) | (top_k < 0)
    bad |= ~((top_p >= 0) & (top_p <= 1)) | ~((min_p >= 0) & (min_p <= 1))
    if mode == KL_BUDGET:
        bad |= strength < 0
    if mode == LABEL:
        bad |= (labels < 0) | (labels >= vocab)
    return bad


def steered_rows(
    warm, base, vector, warm_rows, base_rows, vocab, direction, labels, mode,
    strength, strength_rows, alpha, alpha_rows, penalty, temperature, temperature_rows,
    top_k, top_k_rows, top_p, top_p_rows, min_p, min_p_rows, seed, seed_rows, offset, offset_rows, *_,
) -> tuple[Rows, Tensor, Tensor, Tensor]:  # fmt: skip
    """The rows, mu (B,), the steered logits (B, V), and the scores (B, V) whose argmax is the token."""
    like = warm[:, 0] if warm_rows is None else warm_rows
    plain = direction == PLAIN
    strength = per_row(strength, strength_rows, like)
    alpha = per_row(0.0 if plain else alpha, None if plain else alpha_rows, like)
    temperature = per_row(temperature, temperature_rows, like)
    top_k, top_p = per_row(top_k, top_k_rows, like), per_row(top_p, top_p_rows, like)
    min_p = per_row(min_p, min_p_rows, like)
    bad = bad_parameters(strength, mode, alpha, temperature, top_k, top_p, min_p, labels, vocab)
    rows = steering_rows(warm, base, vector, warm_rows, base_rows, vocab, direction, alpha, bad)

    mean, norm2, variance = rows.moments()
    if mode == LABEL:
        at_label = rows.delta.gather(1, labels.clamp(0, vocab - 1)[:, None])[:, 0]
        strength = torch.where(norm2 < EPS, 0.0, (at_label - mean) / (norm2 + EPS))
    elif mode == KL_BUDGET:
        strength = torch.where(variance < EPS, 0.0, (2 * strength / variance).sqrt())
    strength = torch.where(rows.invalid, 0.0, strength)

    z = steer(rows, strength, penalty)
    greedy = rows.invalid | (temperature == 0)
    t = torch.where(greedy, 1.0, temperature)
    keep = filter_row(z, t, top_k, top_p, torch.where(rows.invalid, 0.0, min_p))
    seeds = torch.full(like.shape, seed, device=z.device) if seed_rows is None else seed_rows
    offsets = torch.full(like.shape, offset, device=z.device) if offset_rows is None else offset_rows
    noisy = torch.where(keep, z / t[:, None] + gumbel(random_bits(seeds, offsets, vocab)), -math.inf)
    return rows, strength, z, torch.where(greedy[:, None], z, noisy)


def steered_sample(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens int64 (B,), diagnostics float32 (5, B) and int32 (2, B); see :class:`svdk.SampleInfo`."""
    rows, strength, z, score = steered_rows(*arguments)
    token = torch.where(rows.invalid, rows.fallback, argmax_lowest(score))
    if not arguments[-1]:
        return token, z.new_empty(0, dtype=torch.float32), token.new_empty(0, dtype=torch.int32)

    def at(x: Tensor | None) -> Tensor:
        return torch.full_like(strength, math.nan) if x is None else x.gather(1, token[:, None])[:, 0]

    floats = [strength, rows.kl, at(z.log_softmax(1)), at(rows.log_p), at(rows.log_q)]
    candidates = torch.where(rows.invalid, 0, rows.inside.sum(1))
    ints = [candidates.int(), rows.status]
    return token, torch.stack([rows.nan_if_invalid(x) for x in floats]), torch.stack(ints)


def steered_logprob(
    warm, base, vector, warm_rows, base_rows, vocab, direction, labels,
    strength, strength_rows, alpha, alpha_rows, penalty, strengths,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Curves float32 (3, B, M), greedy int64 (B, M), rows float32 (6, B), status (B,).

    Curves: logprob, slope, curvature. Rows: gain, norm2, variance, kl, log p(label), log q(label).
    """
    alpha = per_row(alpha, alpha_rows, labels)
    bad = ~((alpha >= 0) & (alpha <= 1)) | (labels < 0) | (labels >= vocab)
    if strengths is None:
        grid = per_row(strength, strength_rows, labels)[:, None]
    else:
        grid = strengths.double().expand(labels.shape[0], -1)
    bad |= ~torch.isfinite(grid).all(1)
    rows = steering_rows(warm, base, vector, warm_rows, base_rows, vocab, direction, alpha, bad)
    label = labels.clamp(0, vocab - 1)[:, None]

    def at(x: Tensor) -> Tensor:
        return x.gather(1, label)[:, 0]

    move = torch.where(rows.inside, rows.delta, penalty if math.isfinite(penalty) else 0.0)
    curves, greedy = [], []
    for mu in torch.where(rows.invalid[:, None], 0.0, grid).T:
        z = steer(rows, mu, penalty)
        q = z.softmax(1)
        logprob = at(z.log_softmax(1))
        mean = (q * move).sum(1)
        slope = torch.where(logprob == -math.inf, 0.0, at(move) - mean)
        curves.append([logprob, slope, (q * (move - mean[:, None]) ** 2).sum(1)])
        inside = argmax_lowest(torch.where(rows.inside, z, -math.inf))
        greedy.append(torch.where(rows.invalid, rows.fallback, inside))
    mean, norm2, variance = rows.moments()
    no_base = torch.full_like(mean, math.nan)
    log_q = no_base if rows.log_q is None else at(rows.log_q)
    stats = [at(rows.delta) - mean, norm2, variance, rows.kl, at(rows.log_p), log_q]
    columns = [torch.stack([rows.nan_if_invalid(x) for x in triple]) for triple in curves]
    empty = rows.z.new_empty(3, labels.shape[0], 0, dtype=torch.float32)
    return (
        torch.stack(columns, dim=2) if columns else empty,
        torch.stack(greedy, dim=1) if greedy else labels.new_empty(labels.shape[0], 0),
        torch.stack([rows.nan_if_invalid(x) for x in stats]),
        rows.status,
    )


def extract(
    warm, base, vector, warm_rows, base_rows, vocab, direction, alpha, alpha_rows
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """row_ptr (B + 1,), ids (N,), p (N,), delta (N,), rows float32 (3, B): kl, max, lse; status (B,)."""
    like = warm[:, 0] if warm_rows is None else warm_rows
    alpha = per_row(alpha, alpha_rows, like)
    bad = ~((alpha >= 0) & (alpha <= 1))
    rows = steering_rows(warm, base, vector, warm_rows, base_rows, vocab, direction, alpha, bad)
    inside = rows.inside & ~rows.invalid[:, None]
    row, ids = inside.nonzero(as_tuple=True)
    row_ptr = torch.zeros(like.shape[0] + 1, dtype=torch.int64, device=like.device)
    row_ptr[1:] = inside.sum(1).cumsum(0)
    stats = [rows.nan_if_invalid(x) for x in (rows.kl, rows.max_logit, rows.lse)]
    p, delta = rows.p[row, ids].float(), rows.delta[row, ids].float()
    return row_ptr, ids, p, delta, torch.stack(stats), rows.status
