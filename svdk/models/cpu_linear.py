"""Linear layers over the few rows of a decoding step on the CPU, at the price of reading the weights once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor, nn

TRANSPOSED_ROWS = 4
"""Up to here, W x^T: MKL then streams W, where for x W^T it packs W first."""
ONEDNN_ROWS = 64
"""Up to here, oneDNN's product. Milliseconds on one AMD EPYC core, weights (49152, 576), cold:

====  ======  ======  ======
rows  linear  W x^T   oneDNN
====  ======  ======  ======
2     13.0    4.4     5.9
4     12.7    5.8     6.6
8     13.7    11.2    7.5
64    46.9    54.9    19.7
====  ======  ======  ======

One row by itself runs on one thread: linear 10.4, W x^T 11.3, oneDNN 14.0 ms; 6.0 as one of two equal
rows (two cores of an AMD EPYC with AVX2, other work beside it).
"""


@contextmanager
def replaced(forwards: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Layers with other forwards inside; afterwards with their own again."""
    try:
        for layer, forward in forwards:
            vars(layer)["forward"] = forward
        yield
    finally:
        for layer, _ in forwards:
            vars(layer).pop("forward", None)


def fast_linears(module: nn.Module) -> list[tuple[nn.Linear, Callable[[Tensor], Tensor]]]:
    """The float32 CPU linear layers of ``module``, each with a forward that suits a few rows."""
    if torch.is_autocast_enabled("cpu"):
        return []
    available = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not available or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # a private op of torch's
        return []
    found = []
    for layer in module.modules():
        if type(layer) is not nn.Linear or "forward" in vars(layer):
            continue
        weight = layer.weight
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous():
            found.append((layer, _linear(weight, layer.bias)))
    return found


def _linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    outputs, inputs = weight.shape

    def forward(x: Tensor) -> Tensor:
        rows = x.numel() // inputs
        if rows > ONEDNN_ROWS or rows == 0 or x.dtype != torch.float32:
            return F.linear(x, weight, bias)
        if rows > TRANSPOSED_ROWS:  # the op behind torch.compile's linear layers
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        few = x.reshape(rows, inputs)
        if rows == 1:  # a product with one column runs on one thread
            few = few.repeat(2, 1)
        out = torch.mm(weight, few.t()).t()[:rows].contiguous()
        out = out if bias is None else out.add_(bias)
        return out.view(*x.shape[:-1], outputs)

    return forward
