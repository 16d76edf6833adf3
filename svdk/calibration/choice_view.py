"""The loss of choosing among options along mu, seen as calibration sees the loss of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from svdk.calibration.kept_statistics import default_grid
from svdk.calibration.loss_views import LIMIT, Curve, View

TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False, repr=False)
class ChoiceView:
    """Q questions whose options are scored by a view: the softmax over the options' log-probabilities.

    The loss of a question is ``log sum_o exp L_o(mu) - L_label(mu)``, L_o being the log-probability of all
    tokens of option o: the whole vocabulary's partition sums cancel where options have one token each. An
    example, and a token, is a question here.
    """

    view: View
    """Of all tokens of all O options; its examples are the options."""
    impossible: Tensor
    """(O,) bool: options that the warm model rules out."""
    question: Tensor
    """(O,) int64: the question of each option, ascending."""
    gold: Tensor
    """(Q,) int64: the right option of each question, counted over all options."""

    @property
    def examples(self) -> int:
        """The number of questions, Q."""
        return len(self.gold)

    @property
    def tokens(self) -> Tensor:
        """(Q,) float64: ones."""
        return torch.ones(self.examples, dtype=torch.float64)

    @property
    def limits(self) -> tuple[float, float]:
        """Where :meth:`evaluate` is defined and strengths are looked for."""
        low, high = self.view.limits
        return max(low, -LIMIT), min(high, LIMIT)

    def logprobs(self, strength: float | Tensor) -> Tensor:
        """(O,) float64: log-probability of each option at mu = ``strength``."""
        return torch.where(self.impossible, -torch.inf, -self.view.evaluate(strength).nll)

    def evaluate(self, strength: float | Tensor) -> Curve:
        """Loss and derivatives of each question at mu = ``strength``."""
        curve = self.view.evaluate(strength)
        value = torch.where(self.impossible, -torch.inf, -curve.nll)
        nll, share = choice_loss(value, self.question, self.gold)
        slope, bend = -curve.slope, -curve.curvature
        mean = self._sum(share * slope)
        spread = self._sum(share * (slope - mean[self.question]) ** 2)
        return Curve(nll, mean - slope[self.gold], self._sum(share * bend) + spread - bend[self.gold])

    at_tokens = evaluate

    def correct(self, strength: float | Tensor) -> Tensor:
        """(Q,) float64: 1 where the right option is the most likely one; of equals, the first."""
        return choice_hits(self.logprobs(strength), self.question, self.gold)

    correct_tokens = correct

    def _sum(self, values: Tensor) -> Tensor:
        """(O,) -> (Q,)."""
        return torch.zeros(self.examples, dtype=torch.float64).index_add_(0, self.question, values)

    @cached_property
    def _points(self) -> Tensor:
        """(M,) strengths: the range, closely."""
        low, high = self.limits
        points = default_grid(97)
        inside = points[(points > low) & (points < high)]
        return torch.cat([points.new_tensor([low]), inside, points.new_tensor([high])])

    @cached_property
    def _losses(self) -> Tensor:
        """(M, Q) loss at each of the points."""
        return torch.stack([self.evaluate(float(mu)).nll for mu in self._points])

    def minimise(self, keep: Tensor) -> tuple[float, bool]:
        """The strength of least loss over the questions ``keep`` (Q,) bool; whether it ends the range.

        With options of several tokens the loss need not be convex: the best of many points (of equals the
        one nearest to 0), then the zero of the slope between its neighbours.
        """
        total = self._losses[:, keep].sum(1)
        best = (total <= total.min() + 1e-12 * total.min().abs()).nonzero()[:, 0]
        place = int(best[self._points[best].abs().argmin()])
        mu = float(self._points[place])
        if place in (0, len(self._points) - 1):
            return mu, True
        low, high = float(self._points[place - 1]), float(self._points[place + 1])
        for _ in range(100):
            curve = self.evaluate(mu)
            slope, bend = float(curve.slope[keep].sum()), float(curve.curvature[keep].sum())
            if slope == 0 or high - low < TOLERANCE:
                break
            low, high = (mu, high) if slope < 0 else (low, mu)
            step = mu - slope / bend if bend > 0 else (low + high) / 2
            step = step if low < step < high else (low + high) / 2
            if abs(step - mu) < TOLERANCE:
                break
            mu = step
        return mu, False


def choice_loss(logprobs: Tensor, question: Tensor, gold: Tensor) -> tuple[Tensor, Tensor]:
    """Loss (Q,) of choosing, and each option's share (O,) of its question, from log-probabilities (O,).

    A question all of whose options are impossible is answered at random.
    """
    top = torch.full((len(gold),), -torch.inf, dtype=logprobs.dtype)
    top = top.scatter_reduce(0, question, logprobs, "amax")
    # All impossible: all alike.
    level = torch.where(torch.isfinite(top)[question], logprobs, 0.0)
    top = torch.where(torch.isfinite(top), top, 0.0)
    weight = (level - top[question]).exp()
    total = torch.zeros_like(top).index_add_(0, question, weight)
    return top + total.log() - level[gold], weight / total[question]


def choice_hits(logprobs: Tensor, question: Tensor, gold: Tensor) -> Tensor:
    """(Q,) float64: 1 where the right option has the largest log-probability (O,); of equals, the first."""
    mine = logprobs[gold][question]
    place = torch.arange(len(logprobs))
    beaten = (logprobs > mine) | ((logprobs == mine) & (place < gold[question]))
    count = torch.zeros(len(gold), dtype=torch.float64).index_add_(0, question, beaten.double())
    return (count == 0).double()
