"""Gradients of ``steered_logprob``; the other results of the ops have none, and do not claim any.

With ``g = dL/dz`` of the steered logits z (the label less ``softmax(z)``) and ``z = w + mu delta`` on the
confidence set, the rest is the chain rule through ``delta``, log p, log q and K (docs/algorithm.md, steps 4,
6 and 9). The set is held fixed: at its boundary the log-probability is a step, whose derivative says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from svdk.ops import reference
from svdk.ops.schema import LIBRARY, LOG_RATIO, PLAIN, STEERED_LOGPROB, VECTOR, Operands

_NAMES = STEERED_LOGPROB.names


def wanted(flat: Sequence[Any]) -> bool:
    """Whether autograd follows one of an op's flat arguments."""
    if forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for x in flat:  # no any(): this is part of what every call costs
            if isinstance(x, Tensor) and x.requires_grad:
                return True
    return False


def without(op: Callable[..., Any], flat: Sequence[Any]) -> Any:
    """Call an op whose results have no gradient."""
    if not wanted(flat):
        return op(*flat)
    with torch.no_grad():
        return op(*(forward_ad.unpack_dual(x).primal if isinstance(x, Tensor) else x for x in flat))


Curves = tuple[Tensor, Tensor, Tensor]


def logprob(op: Callable[..., Any], flat: Sequence[Any]) -> tuple[Curves, Tensor, Tensor, Tensor]:
    """``steered_logprob`` of a backend: log-probability, slope and curvature (B, M) each, and the rest."""
    if wanted(flat) and not torch.compiler.is_compiling():
        first, others, greedy, stats, status = _SteeredLogprob.apply(op, *flat)
        return (first, others[0], others[1]), greedy, stats, status
    curves, greedy, stats, status = op(*flat)  # traced: with the gradient that the op itself has
    first, slope, curvature = curves.unbind(0)
    return (first, slope.detach(), curvature.detach()), greedy, stats.detach(), status


class RowGradients(NamedTuple):
    """Of one strength a row, (B, V) in float64; None: no such operand."""

    warm: Tensor
    base: Tensor | None
    vector: Tensor | None


def row_gradients(rows: reference.Rows, given: Any, mu: Tensor, weight: Tensor) -> RowGradients:
    """Of the log-probabilities at ``mu`` (B,), times ``weight`` (B,)."""
    z = reference.steered_logit(rows, mu, given.penalty)
    label = given.labels.clamp(0, rows.w.shape[1] - 1)
    drawable = ~rows.invalid & (reference.at(z, label) > -torch.inf)
    g = -z.softmax(1)
    g = g.scatter_add(1, label[:, None], g.new_ones(g.shape[0], 1))
    g = torch.where(drawable, weight, 0.0)[:, None] * g
    if rows.c.direction == PLAIN:
        return RowGradients(g, None, None)
    of_delta = torch.where(rows.inside, mu[:, None] * g, 0.0)
    if rows.c.direction == VECTOR:
        return RowGradients(g, None, of_delta)
    p, q = rows.log_p.exp(), rows.log_q.exp()
    usable = (rows.log_p > -torch.inf) & (rows.log_q > -torch.inf)
    ratio = torch.where(usable, rows.log_p - rows.log_q, 0.0)
    of_ratio = torch.where(usable, of_delta, 0.0)
    of_log_p = of_ratio
    if rows.c.direction != LOG_RATIO:  # delta = p (ratio - K)
        of_ratio = of_ratio * p
        of_log_p = of_ratio + of_delta * rows.delta
    total, mass = of_ratio.sum(1, keepdim=True), (p * usable).sum(1, keepdim=True)
    kl_in_warm = p * (usable * (ratio + 1) - rows.c.kl - mass)
    kl_in_base = q * mass - p * usable
    warm = g + of_log_p - p * of_log_p.sum(1, keepdim=True) - total * kl_in_warm
    base = q * total - of_ratio - total * kl_in_base
    return RowGradients(warm, base, None)


class _Opened(NamedTuple):
    """A call's rows, for its gradients."""

    operands: Operands
    given: Any
    rows: reference.Rows
    mu: Tensor
    """(B, M), 0 on invalid rows."""


def _open(flat: Sequence[Any]) -> _Opened:
    operands, given = reference.unpack(STEERED_LOGPROB, tuple(flat))
    given.strength = reference.strengths_of(operands, given)
    rows = reference.open_rows(operands, given)
    return _Opened(operands, given, rows, torch.where(rows.invalid[:, None], 0.0, given.strength))


def _spread(x: Tensor | None, like: Tensor | None, picked: Tensor | None) -> Tensor | None:
    """A gradient (..., vocab) of rows as one of the tensor that they were picked from."""
    if x is None or like is None:
        return None
    full = torch.zeros(like.shape, dtype=torch.float64, device=like.device)
    if picked is None:
        full[..., : x.shape[-1]] = x
    else:
        full[:, : x.shape[1]].index_add_(0, picked, x)
    return full.to(like.dtype)


def backward(flat: Sequence[Any], upstream: Tensor, slope: Tensor) -> list[Tensor | None]:
    """Gradients in the flat arguments, from that in the log-probability (B, M) and its slope (B, M)."""
    with torch.no_grad():
        opened = _open(flat)
        operands, rows, weights = opened.operands, opened.rows, upstream.double()
        of_mu = torch.where(rows.invalid[:, None], 0.0, weights * slope.double())
        sums: list[Tensor | None] = [torch.zeros_like(rows.w), None, None]
        for mu, weight in zip(opened.mu.T, weights.T, strict=True):
            parts = row_gradients(rows, opened.given, mu, weight)
            sums = [x if s is None else s if x is None else s + x for s, x in zip(sums, parts, strict=True)]
        warm, base, vector = sums
        found: list[Tensor | None] = [None] * len(flat)
        found[0] = _spread(warm, operands.warm, operands.warm_rows)
        found[1] = _spread(base, operands.base, operands.base_rows)
        if vector is not None and operands.vector is not None and operands.vector.dim() == 1:
            vector = vector.sum(0)
        found[2] = _spread(vector, operands.vector, None)
        for name, x in (("strength_rows", of_mu.sum(1)), ("strengths", of_mu.sum(0))):
            place = _NAMES.index(name)
            if flat[place] is not None:
                found[place] = x.to(flat[place].dtype)
        return found


def push_forward(flat: Sequence[Any], tangents: Sequence[Any], slope: Tensor) -> Tensor:
    """The derivative (B, M) of the log-probability along tangents of the flat arguments."""
    opened = _open(flat)
    operands, rows = opened.operands, opened.rows
    along: list[Tensor | None] = []
    for place, picked in ((0, operands.warm_rows), (1, operands.base_rows), (2, None)):
        x = tangents[place]
        x = x if x is None or picked is None else x[picked]
        along.append(None if x is None else x[..., : operands.vocab].double())
    of_rows, of_grid = (tangents[_NAMES.index(name)] for name in ("strength_rows", "strengths"))
    found = []
    for mu in opened.mu.T:
        parts = row_gradients(rows, opened.given, mu, torch.ones_like(mu))
        pairs = [(x, t) for x, t in zip(parts, along, strict=True) if x is not None and t is not None]
        found.append(sum(((x * t).sum(1) for x, t in pairs), torch.zeros_like(mu)))
    result = torch.stack(found, 1)
    if of_rows is not None:
        result = result + slope.double() * of_rows[:, None].double()
    if of_grid is not None:
        result = result + slope.double() * of_grid[None].double()
    return torch.where(rows.invalid[:, None], 0.0, result).float()


class _SteeredLogprob(torch.autograd.Function):
    """The op of any backend, with these gradients."""

    @staticmethod
    def forward(op: Callable[..., Any], *flat: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        curves, greedy, stats, status = op(*flat)
        return curves[0].clone(), curves[1:], greedy, stats, status

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_forward(*_save(ctx, inputs[1:], output[1][0]))
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * (1 + len(ctx.flat))
        flat, slope = _restore(ctx)
        return (None, *backward(flat, upstream, slope))

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        flat, slope = _restore(ctx)
        return push_forward(flat, tangents, slope), None, None, None, None


def _save(ctx: Any, flat: Sequence[Any], slope: Tensor) -> tuple[Tensor, ...]:
    """For backward; returns what :func:`_restore` needs of tensors."""
    ctx.flat = [None if isinstance(x, Tensor) else x for x in flat]
    ctx.places = [i for i, x in enumerate(flat) if isinstance(x, Tensor)]
    saved = (*(flat[i] for i in ctx.places), slope)
    ctx.save_for_backward(*saved)
    return saved


def _restore(ctx: Any) -> tuple[list[Any], Tensor]:
    *tensors, slope = ctx.saved_tensors
    flat = list(ctx.flat)
    for place, x in zip(ctx.places, tensors, strict=True):
        flat[place] = x
    return flat, slope


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """What :func:`op_backward` needs of a call of an op ``steered_logprob``."""
    _save(ctx, inputs, output[0][1])


def op_backward(ctx: Any, curves: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """Of its curves only the first, the log-probability, has a gradient."""
    flat, slope = _restore(ctx)
    return tuple(backward(flat, curves[0], slope))


torch.library.register_autograd(
    "svdk::steered_logprob", op_backward, setup_context=setup_context, lib=LIBRARY
)
