"""Steering vectors averaged over the labelled positions of groups of examples, in one run of both models."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from svdk.calibration.sweep import MAX_OP, check_rows
from svdk.ops.api import extract


@dataclass(frozen=True)
class Averaging:
    """What is averaged, and how."""

    direction: str = "log_ratio"
    alpha: float = 0.1
    """Of the confidence mask; a token outside counts as 0."""
    weighting: str = "token"
    """``token``: every labelled position counts the same; ``example``: every example does."""
    backend: str = "auto"


@dataclass(eq=False)
class Averages:
    """Averages over G ``groups`` (E, G) bool of E examples: float64 sums of V tokens, on ``device``."""

    groups: Tensor
    vocab_size: int
    device: torch.device
    how: Averaging = field(default_factory=Averaging)

    def __post_init__(self) -> None:
        """Nothing is added yet."""
        # Sums over disjoint cells, the examples of the same groups, so that each row is added once.
        self._cells, self._cell = torch.unique(self.groups, dim=0, return_inverse=True)
        size = len(self._cells)
        self._sums = torch.zeros(size, self.vocab_size, dtype=torch.float64, device=self.device)
        self._mass = torch.zeros(size, dtype=torch.float64)

    @classmethod
    def without(cls, fold: Tensor, vocab_size: int, device: torch.device, backend: str) -> Averages:
        """As :func:`svdk.static_steering` averages: without each ``fold`` (E,), and last all examples."""
        groups = torch.stack(without_folds(fold), dim=1)
        return cls(groups, vocab_size, device, Averaging(backend=backend))

    def add(self, index: int, warm: Tensor, base: Tensor, rows: Tensor) -> None:
        """The rows (t,) of example ``index`` in the logits (R, V) of its batch."""
        how, cell = self.how, self._cell[index]
        weight = 1.0 if how.weighting == "token" else 1.0 / len(rows)
        self._mass[cell] += weight * len(rows)
        for part in rows.split(max(1, MAX_OP // self.vocab_size)):
            found = extract(
                warm, base, direction=how.direction, alpha=how.alpha, warm_rows=part, base_rows=part,
                backend=how.backend,
            )  # fmt: skip
            check_rows(found.status, f"calibration example {index}")
            self._sums[cell].index_add_(0, found.token_ids, found.delta.double(), alpha=weight)

    def vectors(self) -> list[Tensor]:
        """Float32 (V,) on the CPU, one a group; zeros for a group without examples."""
        sums, inside = self._sums.cpu(), self._cells.double()  # (cells, V), (cells, G)
        averages = (inside.T @ sums) / (inside.T @ self._mass).clamp(min=1e-300)[:, None]
        return list(averages.float().unbind(0))


def without_folds(fold: Tensor) -> list[Tensor]:
    """(E,) bool each: the examples without those of each ``fold`` (E,), and last all of them."""
    return [fold != k for k in range(int(fold.max()) + 1)] + [torch.ones_like(fold, dtype=torch.bool)]


def unit(vector: Tensor) -> Tensor:
    """``vector`` (V,) with median 0 and largest absolute entry 1; zeros if it is constant."""
    vector = vector - vector.median()
    return vector / vector.abs().max().clamp(min=torch.finfo(vector.dtype).tiny)
