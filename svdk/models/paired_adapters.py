"""One adapter layer over warm and base rows at once: the adapter touches the warm rows only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft.tuners.ia3 import layer as ia3
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from svdk.errors import BackendError
from svdk.models.stream import Stream

SPLIT_LAYERS = ("Linear", "Embedding", "SVDLinear")
"""Layer classes that take rows along the first dimension and leave them independent of each other."""


@dataclass
class RowSpans:
    """Which rows of the running batch each adapter owns; rows outside every span are base rows."""

    total: int = 0
    """All rows, warm and base."""
    stream: Stream | None = None
    """Knows how many tokens of a row are in the running forward."""
    spans: list[tuple[str | None, int, int]] = field(default_factory=list)
    """(adapter, first, end); adapter None: whatever is active in the layer."""

    def scale(self, x: Tensor) -> int:
        """How many entries of the first dimension of ``x`` belong to a row: 1, or its tokens side by side.

        Raises:
            BackendError: the input is not laid out in rows; the adapter would go to the wrong ones.

        """
        flat = x.dim() == (2 if x.is_floating_point() else 1)  # (rows * tokens, hidden), as OPT has it
        each = self.stream.columns if flat and self.stream is not None else 1
        if x.shape[0] != self.total * each:
            raise BackendError(
                f"an adapter layer got {x.shape[0]} rows in a paired forward over {self.total}; "
                "use forward='two_pass' for this model"
            )
        return each


def route(layer: nn.Module, rows: RowSpans, adapters: list[str] | None) -> Callable[..., Tensor] | str:
    """A forward for ``layer`` that serves ``rows``, or the reason why there is none.

    ``adapters``: the adapters that rows name one by one, None when all warm rows use the active ones.
    """
    if "forward" in vars(layer):
        return "its forward is already replaced (device_map, or another patch)"
    if getattr(layer, "merged", False) or getattr(layer, "disable_adapters", False):
        return "its adapter was merged or disabled since"
    base: Any = getattr(layer, "base_layer", None)
    kind = type(layer)
    plain = isinstance(base, (nn.Linear, Conv1D)) and "forward" not in vars(base)
    if isinstance(layer, lora.Linear) and kind is lora.Linear and plain and not layer.lora_variant:
        return _lora_linear(layer, base, rows, adapters)
    if adapters is not None:
        return "rows with different adapters need plain LoRA on linear layers"
    if isinstance(layer, ia3.Linear) and kind is ia3.Linear and plain:
        return _ia3_linear(layer, base, rows)
    if isinstance(layer, ModulesToSaveWrapper) and not list(layer.original_module.children()):
        return _split(layer, layer.original_module, rows)
    if isinstance(layer, BaseTunerLayer) and kind.__name__ in SPLIT_LAYERS and _is_plain(base):
        return _split(layer, base, rows)
    return f"no paired forward for a {kind.__module__.removeprefix('peft.tuners.')}.{kind.__name__} layer"


def _is_plain(base: nn.Module | None) -> bool:
    return type(base) is nn.Linear or isinstance(base, (Conv1D, nn.Embedding))


def _lora_linear(
    layer: lora.Linear, base: nn.Module, rows: RowSpans, adapters: list[str] | None
) -> Callable[..., Tensor]:
    def weights(names: list[str]) -> list[tuple[Tensor, Tensor, Tensor | None, float]]:
        found: list[tuple[Tensor, Tensor, Tensor | None, float]] = []
        for name in names:
            if name in layer.lora_A:
                down, up = (cast(nn.Linear, part[name]) for part in (layer.lora_A, layer.lora_B))
                found.append((down.weight.t(), up.weight.t(), up.bias, float(layer.scaling[name])))
        return found

    by_name = {None: weights(layer.active_adapters)} | {name: weights([name]) for name in adapters or ()}

    def forward(x: Tensor, *args: Any, adapter_names: object = None, **kwargs: Any) -> Tensor:
        if adapter_names is not None and adapters is None:  # put in by PEFT's hooks, for mixed batches
            raise BackendError("adapter_names was given without row_adapters")
        each = rows.scale(x)
        out = base(x, *args, **kwargs)  # (rows, T, out), fresh: may be added to in place
        for name, first, end in rows.spans:
            mine = x[first * each : end * each].reshape(-1, x.shape[-1])
            result = out[first * each : end * each].view(-1, out.shape[-1])
            for down, up, bias, scale in by_name[name]:
                hidden = torch.mm(mine.to(down.dtype), down)
                if bias is None and up.dtype == out.dtype == hidden.dtype:  # not so under autocast
                    result.addmm_(hidden, up, alpha=scale)
                else:
                    delta = torch.mm(hidden, up) if bias is None else torch.addmm(bias, hidden, up)
                    result.add_(delta, alpha=scale)
        return out

    return forward


def _ia3_linear(layer: ia3.Linear, base: nn.Module, rows: RowSpans) -> Callable[..., Tensor]:
    scale = None
    for name in layer.active_adapters:
        if name in layer.ia3_l:
            mine = layer.ia3_l[name].flatten()
            scale = mine if scale is None else scale * mine

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        each = rows.scale(x)
        if scale is None:
            return base(x, *args, **kwargs)
        if layer.is_feedforward:
            x = x.clone()  # also the residual's or another layer's input
        out = x if layer.is_feedforward else base(x, *args, **kwargs)
        for _, first, end in rows.spans:
            out[first * each : end * each].mul_(scale)
        return base(out, *args, **kwargs) if layer.is_feedforward else out

    return forward


def _split(layer: nn.Module, original: nn.Module, rows: RowSpans) -> Callable[..., Tensor]:
    """Any row-wise layer: its own forward for the warm rows, the original module for the base rows."""
    adapted = type(layer).forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        ((_, _, end),) = rows.spans  # warm rows come first
        end *= rows.scale(x)
        return torch.cat([adapted(layer, x[:end], *args, **kwargs), original(x[end:], *args, **kwargs)])

    return forward
