"""Goodness of fit of drawn tokens, for the tests and for the check on a GPU."""

from __future__ import annotations

import torch


def chi_square_p_value(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Tail probability; cells are pooled from the rare end until each expects at least 10 draws."""
    order = expected.argsort()
    cells, seen, want = [], 0.0, 0.0
    for c, e in zip(counts[order].tolist(), expected[order].tolist(), strict=True):
        seen, want = seen + c, want + e
        if want >= 10:
            cells.append((seen, want))
            seen = want = 0.0
    statistic = sum((c - e) ** 2 / e for c, e in cells)
    shape = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(shape, torch.tensor(statistic / 2, dtype=torch.float64)))
