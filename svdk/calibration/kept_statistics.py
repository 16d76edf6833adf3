"""What calibration keeps of the teacher-forced logits, and the loss along mu that follows from it.

Two views of one (direction, alpha) setting share an interface: :class:`MaskedView` (alpha > 0) knows the
candidates of every token and is exact at any mu; :class:`GridView` (alpha = 0) knows value, slope and
curvature on a grid of mu and interpolates between them. All mathematics is float64; calibration uses
lambda = 0, scoring may ask a :class:`MaskedView` for another penalty.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from svdk.errors import ArtifactError, InputError

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


def default_grid(points: int = 49) -> Tensor:
    """(points,) float64 strengths from -LIMIT to LIMIT, 0 in the middle, spaced like sinh.

    Close to 0 the spacing is about 0.2, where the optimum of a useful task lies; further out it grows to a
    fifth of the strength, which is as fast as the loss there changes shape.
    """
    half = points // 2
    steps = torch.linspace(0, math.asinh(LIMIT), half + 1, dtype=torch.float64).sinh()
    return torch.cat([-steps[1:].flip(0), steps])


@dataclass(frozen=True)
class Curve:
    """Sums over the tokens of each example at one mu, each (E,) float64."""

    nll: Tensor
    slope: Tensor
    """d nll / d mu"""
    curvature: Tensor


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
        """Exact loss and derivatives at mu = ``strength``, one number or one a token (T,).

        With lambda = -inf the loss of a label outside C is infinite.
        """
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
        return Curve(self._by_example(nll), self._by_example(mean - label_slope), self._by_example(spread))

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
        low, high = self._spans
        return self._by_example(((low <= strength) & (strength <= high)).double())

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
    """Loss curves of E examples on a grid of M strengths, with per-token moments at mu = 0.

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
    nll: Tensor
    slope: Tensor
    curvature: Tensor
    """(E, M) float64 each: sums over the tokens of an example"""
    counts: Tensor
    """(E, M) float64: correct greedy tokens"""

    @property
    def examples(self) -> int:
        """The number of examples, E."""
        return len(self.tokens)

    @property
    def limits(self) -> tuple[float, float]:
        """The first and last grid point: nothing is known beyond."""
        return float(self.grid[0]), float(self.grid[-1])

    def _locate(self, strength: float) -> tuple[int, float, float]:
        """The grid interval, its width and the place in it (0..1)."""
        low, high = self.limits
        if not low <= strength <= high:
            raise ValueError(f"strength was {strength}; the grid covers {low} to {high}")
        left = int(torch.searchsorted(self.grid, strength, right=True)) - 1
        left = min(left, len(self.grid) - 2)
        width = float(self.grid[left + 1] - self.grid[left])
        return left, width, (strength - float(self.grid[left])) / width

    def evaluate(self, strength: float) -> Curve:
        """Loss and derivatives at mu = ``strength``, which must lie on the grid's range."""
        left, width, t = self._locate(strength)
        ends = torch.stack(
            [
                column[:, side] * width**order
                for side in (left, left + 1)
                for order, column in enumerate((self.nll, self.slope, self.curvature))
            ],
            dim=1,
        )  # (E, 6)
        k = torch.arange(6, dtype=torch.float64)
        power = torch.tensor([t], dtype=torch.float64) ** k
        first = k * torch.cat([power.new_zeros(1), power[:-1]])
        second = k * (k - 1) * torch.cat([power.new_zeros(2), power[:-2]])
        return Curve(
            ends @ (_HERMITE @ power),
            ends @ (_HERMITE @ first) / width,
            ends @ (_HERMITE @ second) / width**2,
        )

    def correct(self, strength: float) -> Tensor:
        """(E,) float64: correct greedy tokens, linear between grid points."""
        left, _, t = self._locate(strength)
        return (1 - t) * self.counts[:, left] + t * self.counts[:, left + 1]

    def best_accuracy(self, keep: Tensor) -> float:
        """The grid point with the most correct tokens among ``keep`` (E,) bool; on ties nearest to 0."""
        total = self.counts[keep].sum(0)
        best = self.grid[total == total.max()]
        return float(best[best.abs().argmin()])


View = MaskedView | GridView


@dataclass(frozen=True, eq=False, repr=False)
class GridSums:
    """Storage of a :class:`GridView`: moments (3, T) float32, curves (3, E, M), counts (E, M) int32."""

    moments: Tensor
    curves: Tensor
    counts: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Statistics:
    """Everything calibration needs, in the form in which the artifact stores it."""

    tokens: Tensor
    """(E,) int64: labelled tokens of each example."""
    logprob_warm: Tensor
    logprob_base: Tensor
    """(T,) float32 each: log-probability of the label."""
    excluded: int = 0
    """Labels that the warm model itself gives probability 0, which no strength can change."""
    alpha: float = 0.0
    """The mask of ``sizes`` ... ``label``; 0 when there are none."""
    sizes: Tensor | None = None
    """(T,) int32: candidates of each token."""
    p: Tensor | None = None
    ratio: Tensor | None = None
    """(N,) float32 each: probability and r - K; either direction follows from them."""
    label: Tensor | None = None
    """(T,) int32: place of the label in its row, -1 outside C."""
    grid: Tensor | None = None
    """(M,) float64"""
    full: Mapping[str, GridSums] = field(default_factory=dict)
    """alpha = 0, by direction."""

    @property
    def examples(self) -> int:
        """The number of examples, E."""
        return len(self.tokens)

    def settings(self) -> list[tuple[str, float]]:
        """The (direction, alpha) settings that can be evaluated."""
        masked = [] if self.sizes is None else [("kl_gradient", self.alpha), ("log_ratio", self.alpha)]
        return masked + [(direction, 0.0) for direction in self.full]

    def view(self, direction: str, alpha: float, penalty: float = 0.0) -> View:
        """The view of one of :meth:`settings`; ``InputError`` for another.

        ``penalty`` (lambda) other than 0 is for scoring with a mask; without mask nothing is outside C.
        """
        if (direction, alpha) not in self.settings():
            have = ", ".join(f"({name}, alpha {mask:g})" for name, mask in self.settings())
            raise InputError(f"setting was ({direction}, alpha {alpha:g}); these statistics hold: {have}")
        example = torch.repeat_interleave(torch.arange(self.examples), self.tokens)
        if alpha == 0.0 and direction in self.full:
            sums = self.full[direction]
            tokens, (gain, norm2, variance) = self.tokens.double(), sums.moments.double()
            grid, (nll, slope, curvature) = _there(self.grid), sums.curves
            counts = sums.counts.double()
            return GridView(example, tokens, gain, norm2, variance, grid, nll, slope, curvature, counts)
        sizes, at = _there(self.sizes).long(), _there(self.label)
        p, delta = _there(self.p).double(), _there(self.ratio).double()
        if direction == "kl_gradient":
            delta = p * delta
        start = sizes.cumsum(0) - sizes
        label = torch.where(at >= 0, start + at, -1)
        row = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        return MaskedView(example, self.examples, self.logprob_warm.double(), row, p, delta, label, penalty)

    def tensors(self) -> dict[str, Tensor]:
        """Flat tensors by name, for the artifact."""
        names = ("tokens", "logprob_warm", "logprob_base", "sizes", "p", "ratio", "label", "grid")
        out = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        out["excluded"] = torch.tensor(self.excluded)
        out["alpha"] = torch.tensor(self.alpha, dtype=torch.float64)
        for direction, sums in self.full.items():
            for name in ("moments", "curves", "counts"):
                out[f"full.{direction}.{name}"] = getattr(sums, name)
        return out

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Statistics:
        """The inverse of :meth:`tensors`; ``ArtifactError`` when shapes or values do not fit together."""
        try:
            parts = dict(tensors)
            full = {}
            for direction in ("kl_gradient", "log_ratio", "vector"):
                if f"full.{direction}.curves" in parts:
                    full[direction] = GridSums(
                        *(parts.pop(f"full.{direction}.{name}") for name in ("moments", "curves", "counts"))
                    )
            excluded, alpha = int(parts.pop("excluded")), float(parts.pop("alpha"))
            result = cls(excluded=excluded, alpha=alpha, full=full, **parts)
            problem = result._problem()
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise ArtifactError(f"the calibration statistics are incomplete: {error}") from error
        if problem:
            raise ArtifactError(f"the calibration statistics are inconsistent: {problem}")
        return result

    def _problem(self) -> str | None:
        tokens, examples = int(self.tokens.sum()), self.examples
        if self.tokens.dim() != 1 or (examples and int(self.tokens.min()) < 0):
            return "tokens must be non-negative counts"
        if self.logprob_warm.shape != (tokens,) or self.logprob_base.shape != (tokens,):
            return f"log-probabilities must have shape ({tokens},)"
        if self.sizes is not None:
            sizes, label = self.sizes, _there(self.label)
            if sizes.shape != (tokens,) or label.shape != (tokens,):
                return f"sizes and label must have shape ({tokens},)"
            candidates = int(sizes.sum())
            if _there(self.p).shape != (candidates,) or _there(self.ratio).shape != (candidates,):
                return f"p and ratio must have shape ({candidates},)"
            if bool(((sizes < 0) | (label < -1) | (label >= sizes)).any()):
                return "a label points outside its candidates"
        if self.full:
            grid = _there(self.grid)
            points = len(grid)
            for sums in self.full.values():
                shapes = tuple(tuple(x.shape) for x in (sums.moments, sums.curves, sums.counts))
                if shapes != ((3, tokens), (3, examples, points), (examples, points)):
                    return f"grid sums had shapes {shapes}"
            if points < 3 or bool((grid.diff() <= 0).any()) or not bool((grid == 0).any()):
                return "the grid must ascend through 0"
        return None


def _there(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError("a tensor that belongs to the others is absent")
    return tensor
