"""The loss along mu that follows from a calibration's statistics.

Two views of one (direction, alpha) setting share an interface: :class:`MaskedView` (alpha > 0) knows the
candidates of every token and is exact at any mu; :class:`GridView` (alpha = 0) knows value, slope and
curvature on a grid of mu and interpolates between them. All mathematics is float64; calibration uses
lambda = 0, scoring may ask a :class:`MaskedView` for another penalty.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from svdk.errors import InputError

LIMIT = 64.0
"""Strengths beyond +-LIMIT are not searched; the paper's tasks need less than 2."""

# Row i: coefficients of t^0..t^5 of the quintic Hermite basis for f0, h f0', h^2 f0'', f1, h f1', h^2 f1''.
_HERMITE = torch.tensor(
    [
        [1, 0, 0, -10, 15, -6],
        [0, 1, 0, -6, 8, -3],
        [0, 0, 0.5, -1.5, 1.5, -0.5],
        [0, 0, 0, 10, -15, 6],
        [0, 0, 0, -4, 7, -3],
        [0, 0, 0, 0.5, -1, 0.5],
    ],
    dtype=torch.float64,
)


@dataclass(frozen=True)
class Curve:
    """Loss along mu at one point: of every token (T,), or summed over those of each example (E,); float64."""

    nll: Tensor
    slope: Tensor
    """d nll / d mu"""
    curvature: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Curve:
        """The same of what ``function`` makes of each field."""
        return Curve(function(self.nll), function(self.slope), function(self.curvature))


@dataclass(frozen=True, eq=False, repr=False)
class MaskedView:
    """The steering vectors on C of T tokens: N candidates in ragged rows."""

    example: Tensor
    """(T,) int64: the example of each token."""
    examples: int
    logprob: Tensor
    """(T,) float64: log p(y*)."""
    row: Tensor
    """(N,) int64: the token of each candidate, ascending."""
    p: Tensor
    """(N,) float64."""
    delta: Tensor
    """(N,) float64."""
    label: Tensor
    """(T,) int64: the candidate that is the label, -1 when the label lies outside C."""
    penalty: float = 0.0
    """lambda: what tokens outside C get in place of delta; -inf rules them out whatever mu is."""
    limits: tuple[float, float] = (-math.inf, math.inf)
    """Where :meth:`evaluate` is defined."""

    @cached_property
    def _rest(self) -> Tensor:
        """(T,) probability outside C; rounding of p must not make it negative."""
        return (1.0 - self._sum(self.p)).clamp(min=0.0)

    @cached_property
    def _label_delta(self) -> Tensor:
        inside = self.label >= 0
        return torch.where(inside, self.delta[self.label.clamp(min=0)], 0.0)

    def _sum(self, values: Tensor) -> Tensor:
        """(N,) -> (T,)."""
        return torch.zeros_like(self.logprob).index_add_(0, self.row, values)

    def _by_example(self, values: Tensor) -> Tensor:
        """(T,) -> (E,)."""
        return values.new_zeros(self.examples).index_add_(0, self.example, values)

    @cached_property
    def tokens(self) -> Tensor:
        """(E,) float64: tokens of each example."""
        return self._by_example(torch.ones_like(self.logprob))

    @cached_property
    def _mean(self) -> Tensor:
        return self._sum(self.p * self.delta)

    @cached_property
    def gain(self) -> Tensor:
        """(T,) g: minus the slope at mu = 0."""
        return self._label_delta - self._mean

    @cached_property
    def norm2(self) -> Tensor:
        """(T,) Gauss-Newton curvature."""
        return self._sum(self.delta**2)

    @cached_property
    def variance(self) -> Tensor:
        """(T,) exact curvature at mu = 0; tokens outside C enter with delta 0."""
        mean = self._mean
        return self._sum(self.p * (self.delta - mean[self.row]) ** 2) + self._rest * mean**2

    def evaluate(self, strength: float | Tensor) -> Curve:
        """Exact loss and derivatives of each example at mu = ``strength``, one number or one a token (T,).

        With lambda = -inf the loss of a label outside C is infinite.
        """
        return self.at_tokens(strength).map(self._by_example)

    def at_tokens(self, strength: float | Tensor) -> Curve:
        """As :meth:`evaluate`, of each token."""
        mu = torch.as_tensor(strength, dtype=torch.float64).expand_as(self.logprob)
        shifted = mu[self.row] * self.delta
        barred = self.penalty == -math.inf
        shift = torch.full_like(mu, -math.inf) if barred else mu * self.penalty
        lift = 0.0 if barred else self.penalty
        top = shift.scatter_reduce(0, self.row, shifted, "amax")
        weight = self.p * (shifted - top[self.row]).exp()
        outside = self._rest * (shift - top).exp()
        total = self._sum(weight) + outside
        log_partition = top + total.log()
        weight, outside = weight / total[self.row], outside / total
        mean = self._sum(weight * self.delta) + outside * lift
        spread = self._sum(weight * (self.delta - mean[self.row]) ** 2) + outside * (lift - mean) ** 2
        inside = self.label >= 0
        nll = log_partition - self.logprob - torch.where(inside, mu * self._label_delta, shift)
        label_slope = torch.where(inside, self._label_delta, lift)
        return Curve(nll, mean - label_slope, spread)

    @cached_property
    def _spans(self) -> tuple[Tensor, Tensor]:
        """(T,) ends of the interval of mu in which the label is the greedy token; empty when low > high.

        Each rival asks for ``a + mu b >= 0``, linear in mu; a rival with a lower id also wins ties.
        """
        low = torch.full_like(self.logprob, -math.inf)
        high = torch.full_like(self.logprob, math.inf)
        inside = self.label >= 0
        high[~inside] = -math.inf
        low[~inside] = math.inf
        at = self.label[self.row]
        rival = (at >= 0) & (at != torch.arange(len(self.row)))
        row, at = self.row[rival], at[rival]
        a = self.p[at].log() - self.p[rival].log()
        b = self.delta[at] - self.delta[rival]
        wins_ties = rival.nonzero()[:, 0] < at
        bound = -a / torch.where(b == 0, 1.0, b)
        towards = torch.where(b > 0, bound.new_tensor(math.inf), -math.inf)
        bound = torch.where(wins_ties, torch.nextafter(bound, towards), bound)
        low.scatter_reduce_(0, row, torch.where(b > 0, bound, -math.inf), "amax")
        high.scatter_reduce_(0, row, torch.where(b < 0, bound, math.inf), "amin")
        beaten = (b == 0) & ((a < 0) | ((a == 0) & wins_ties))
        high.scatter_reduce_(0, row, torch.where(beaten, -math.inf, low.new_tensor(math.inf)), "amin")
        return low, high

    def correct(self, strength: float | Tensor) -> Tensor:
        """(E,) float64: tokens whose label is the greedy token (penalty -inf) at mu = ``strength``.

        ``strength`` is one number or one a token (T,).
        """
        return self._by_example(self.correct_tokens(strength))

    def correct_tokens(self, strength: float | Tensor) -> Tensor:
        """(T,) float64: 1 where :meth:`correct` counts a token."""
        low, high = self._spans
        return ((low <= strength) & (strength <= high)).double()

    def best_accuracy(self, keep: Tensor) -> float:
        """A mu with the most correct tokens among the examples ``keep`` (E,) bool.

        The accuracy is a step function: the middle of the best step is taken, on ties the one nearest to 0.
        """
        low, high = (ends[keep[self.example]] for ends in self._spans)
        low, high = low[low <= high].sort().values, high[low <= high].sort().values
        points = torch.cat([low, high]).unique()
        points = points[points.abs() <= LIMIT]
        if not len(points):
            return 0.0
        points = torch.cat([points[:1] - 1, points, points[-1:] + 1])
        mu = torch.cat([points.new_zeros(1), (points[1:] + points[:-1]) / 2])
        count = torch.searchsorted(low, mu, right=True) - torch.searchsorted(high, mu)
        mu = mu[count == count.max()]
        return float(mu[mu.abs().argmin()])


@dataclass(frozen=True, eq=False, repr=False)
class GridView:
    """Loss curves on a grid of M strengths, with per-token moments at mu = 0.

    Between grid points the loss is the quintic Hermite polynomial of the exact values, slopes and
    curvatures at both ends; the accuracy, a step function, is interpolated linearly.
    """

    example: Tensor
    """(T,) int64"""
    tokens: Tensor
    """(E,) float64"""
    gain: Tensor
    norm2: Tensor
    variance: Tensor
    """(T,) float64 each"""
    grid: Tensor
    """(M,) float64, ascending, with 0 in it"""
    owner: Tensor
    """(R,) int64: the example of each curve. One a token (R = T), or one an example in old artifacts."""
    nll: Tensor
    slope: Tensor
    curvature: Tensor
    """(R, M) float64 each"""
    hits: Tensor
    """(R, M) float64: correct greedy tokens"""

    @property
    def examples(self) -> int:
        """The number of examples, E."""
        return len(self.tokens)

    @property
    def limits(self) -> tuple[float, float]:
        """The first and last grid point: nothing is known beyond."""
        return float(self.grid[0]), float(self.grid[-1])

    def _by_example(self, values: Tensor) -> Tensor:
        """(R,) -> (E,)."""
        return values.new_zeros(self.examples).index_add_(0, self.owner, values)

    def _check_tokens(self) -> None:
        if len(self.owner) != len(self.example):
            raise InputError(
                "these statistics were kept an example by an older svdk; needed for strengths by token: "
                "the calibration once more"
            )

    def _locate(self, strength: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The grid interval (1,) or (R,), its width and the place in it (0..1)."""
        mu = torch.as_tensor(strength, dtype=torch.float64)
        if mu.dim():
            self._check_tokens()
        mu = mu.reshape(-1)
        low, high = self.limits
        if bool(((mu < low) | (mu > high)).any()) or bool(mu.isnan().any()):
            raise ValueError(f"strength was {strength}; the grid covers {low} to {high}")
        left = torch.searchsorted(self.grid, mu, right=True) - 1
        left = left.clamp(max=len(self.grid) - 2)
        width = self.grid[left + 1] - self.grid[left]
        return left, width, (mu - self.grid[left]) / width

    @staticmethod
    def _column(values: Tensor, at: Tensor) -> Tensor:
        """(R,) of (R, M) in one column, or in one a row."""
        return values[:, int(at)] if len(at) == 1 else values.gather(1, at[:, None])[:, 0]

    def evaluate(self, strength: float | Tensor) -> Curve:
        """Loss and derivatives of each example at mu = ``strength``, on the grid's range.

        ``strength`` is one number or one a token (T,).
        """
        return self._curve(strength).map(self._by_example)

    def at_tokens(self, strength: float | Tensor) -> Curve:
        """As :meth:`evaluate`, of each token; ``InputError`` where only sums an example were kept."""
        self._check_tokens()
        return self._curve(strength)

    def _curve(self, strength: float | Tensor) -> Curve:
        left, width, t = self._locate(strength)
        ends = torch.stack(
            [
                self._column(values, side) * width**order
                for side in (left, left + 1)
                for order, values in enumerate((self.nll, self.slope, self.curvature))
            ],
            dim=1,
        )  # (R, 6)
        coefficients = ends @ _HERMITE
        k = torch.arange(6, dtype=torch.float64)
        power = t[:, None] ** k
        first = torch.nn.functional.pad(power[:, :-1], (1, 0)) * k
        second = torch.nn.functional.pad(power[:, :-2], (2, 0)) * (k * (k - 1))
        return Curve(
            (coefficients * power).sum(1),
            (coefficients * first).sum(1) / width,
            (coefficients * second).sum(1) / width**2,
        )

    def correct(self, strength: float | Tensor) -> Tensor:
        """(E,) float64: correct greedy tokens, linear between grid points."""
        return self._by_example(self._hits(strength))

    def correct_tokens(self, strength: float | Tensor) -> Tensor:
        """(T,) float64: of each token; ``InputError`` where only sums an example were kept."""
        self._check_tokens()
        return self._hits(strength)

    def _hits(self, strength: float | Tensor) -> Tensor:
        left, _, t = self._locate(strength)
        return (1 - t) * self._column(self.hits, left) + t * self._column(self.hits, left + 1)

    def best_accuracy(self, keep: Tensor) -> float:
        """The grid point with the most correct tokens among ``keep`` (E,) bool; on ties nearest to 0."""
        total = self.hits[keep[self.owner]].sum(0)
        best = self.grid[total == total.max()]
        return float(best[best.abs().argmin()])


View = MaskedView | GridView
