"""Linear layers over two to four rows on the CPU, at the price of one row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

MAX_ROWS = 4
"""Measured on (576, 576) to (49152, 576) float32 weights, one thread: 2 rows take 0.36 to 0.59 and 4 rows 0.60
to 0.76 of what ``linear`` takes; from 6 rows on there is no gain."""


def few_rows_linears(module: nn.Module) -> list[tuple[nn.Linear, Callable[[Tensor], Tensor]]]:
    """The float32 CPU linear layers of ``module``, each with its forward for at most ``MAX_ROWS`` rows."""
    if not torch.backends.mkl.is_available():  # the trick is about MKL's choice of kernel
        return []
    found = []
    for layer in module.modules():
        weight = getattr(layer, "weight", None)
        if type(layer) is not nn.Linear or "forward" in vars(layer):
            continue
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous():
            found.append((layer, _linear(weight, layer.bias)))
    return found


def _linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        # W x^T, not x W^T: for so few rows MKL then streams W once instead of packing it first.
        out = torch.mm(weight, x.reshape(-1, x.shape[-1]).t()).t().contiguous()
        out = out if bias is None else out.add_(bias)
        return out.view(*x.shape[:-1], -1)

    return forward
