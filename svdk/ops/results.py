"""What the operations return beside tokens and logits."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag

from torch import Tensor


class Status(IntFlag):
    """Per-row status bits in :class:`SampleInfo`, :class:`LogprobInfo` and :class:`SteeringBatch`."""

    OK = 0
    INVALID = 1
    """NaN or +inf in a row, no finite warm logit, or a per-row parameter out of range."""
    BASE_MASKED = 2
    """Some token is finite in the warm row and -inf in the base row: it got delta = 0."""


@dataclass(frozen=True)
class SampleInfo:
    """Diagnostics of :func:`svdk.steered_sample`, one entry a row, shape ``(B,)`` each.

    Log-probabilities are of the returned token, before temperature and filters, in nats.
    On ``INVALID`` rows every float is NaN and ``candidates`` is 0.
    """

    strength: Tensor
    """float32: the mu that was used."""
    kl: Tensor
    """float32: K = KL(p || q) in nats; NaN without a base model."""
    logprob_steered: Tensor
    """float32: log softmax(z_hat)(token)."""
    logprob_warm: Tensor
    """float32: log p(token)."""
    logprob_base: Tensor
    """float32: log q(token); NaN without a base model."""
    candidates: Tensor
    """int32: the size of the confidence set C."""
    status: Tensor
    """int32: :class:`Status` bits."""


@dataclass(frozen=True)
class LogprobInfo:
    """What :func:`svdk.steered_logprob` returns; ``delta`` is 0 outside C wherever it is summed.

    With ``A(mu) = log sum_y p(y) exp(mu * delta(y))`` (tokens outside C entering with ``penalty``
    in place of ``delta``), ``logprob(mu) = log p(y*) + mu * delta(y*) - A(mu)``.
    """

    logprob: Tensor
    """float32 (B,) or (B, M): log softmax(z_hat)(label); -inf where the label cannot be drawn."""
    slope: Tensor
    """float32, same shape: d logprob / d mu = delta(y*) - A'(mu); 0 where logprob is -inf."""
    curvature: Tensor
    """float32, same shape: A''(mu) = Var of delta under softmax(z_hat) = -d2 logprob / d mu2."""
    greedy: Tensor
    """int64, same shape: the token that greedy decoding with penalty -inf would emit (argmax over C)."""
    gain: Tensor
    """float32 (B,): g = delta(y*) - sum p delta, minus the derivative of the NLL at mu = 0, lambda = 0."""
    norm2: Tensor
    """float32 (B,): squared norm of delta on C, the Gauss-Newton curvature."""
    variance: Tensor
    """float32 (B,): Var_p(delta), the exact curvature of the NLL at mu = 0."""
    kl: Tensor
    """float32 (B,): K = KL(p || q) in nats; NaN without a base model."""
    logprob_warm: Tensor
    """float32 (B,): log p(label)."""
    logprob_base: Tensor
    """float32 (B,): log q(label); NaN without a base model."""
    status: Tensor
    """int32 (B,): :class:`Status` bits."""


@dataclass(frozen=True)
class SteeringBatch:
    """A ragged batch of steering vectors restricted to C, as :func:`svdk.extract` returns it.

    Row ``i`` owns entries ``row_ptr[i]:row_ptr[i + 1]``, token ids ascending.
    """

    row_ptr: Tensor
    """int64 (B + 1,)"""
    token_ids: Tensor
    """int64 (N,)"""
    p: Tensor
    """float32 (N,): warm-start probability (normalised over the whole vocabulary)."""
    delta: Tensor
    """float32 (N,): steering vector."""
    kl: Tensor
    """float32 (B,): K in nats; NaN without a base model."""
    max_logit: Tensor
    """float32 (B,): max z_w."""
    lse: Tensor
    """float32 (B,): log-sum-exp of z_w."""
    status: Tensor
    """int32 (B,): :class:`Status` bits; an INVALID row has no entries."""

    def row(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """``(token_ids, p, delta)`` of one row."""
        span = slice(int(self.row_ptr[index]), int(self.row_ptr[index + 1]))
        return self.token_ids[span], self.p[span], self.delta[span]
