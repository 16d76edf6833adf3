"""The scale of an adapter, turned up or down for a while: the cheapest way to steer there is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer

from svdk.errors import InputError
from svdk.models.pair import ModelPair
from svdk.utils.checks import is_number


def why_not_scaled(pair: ModelPair) -> str | None:
    """None where the adapter has a scale; else why it has none."""
    layers = [layer for layer in pair.layers.values() if isinstance(layer, BaseTunerLayer)]
    if layers and all(_scales(layer) for layer in layers):
        return None
    return f"an adapter of type {pair.peft_type} has no scale of its own (LoRA and its kin have)"


@contextmanager
def adapter_scale(model: Any, scale: float) -> Iterator[None]:
    """The adapter of a PEFT model (or :class:`svdk.ModelPair`) times ``scale`` inside; afterwards as before.

    With LoRA ``W x + s B A x`` becomes ``W x + scale s B A x``: 0 is the base model, 1 changes nothing. To
    first order in the adapter this is log-ratio steering with strength ``scale - 1``, without a base row.

    Raises:
        InputError: not a finite number, or an adapter without a scale.

    """
    if not is_number(scale) or not math.isfinite(scale):
        raise InputError(f"scale was {scale!r}; allowed: a finite number")
    if scale == 1:
        yield
        return
    pair = model if isinstance(model, ModelPair) else ModelPair(model)
    reason = why_not_scaled(pair)
    if reason is not None:
        raise InputError(f"scale was {scale}; allowed: 1, because {reason}")
    found = [_scales(layer) for layer in pair.layers.values() if isinstance(layer, BaseTunerLayer)]
    before = [dict(scales) for scales in found]
    try:
        for scales in found:
            scales.update({name: value * scale for name, value in scales.items()})
        yield
    finally:
        for scales, kept in zip(found, before, strict=True):
            scales.update(kept)


def _scales(layer: BaseTunerLayer) -> dict[str, float]:
    """Scale by adapter name, as the layer's forward reads it; empty where it has none."""
    scales = getattr(layer, "scaling", None)
    return scales if isinstance(scales, dict) else {}
