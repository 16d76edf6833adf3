"""svdk: fast decode-time adaptation of language models with steering vectors (SVDecode).

Names load on first use, so ``import svdk`` costs little beyond torch and never imports transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "steered_sample": "svdk.ops.api",
    "steered_logprob": "svdk.ops.api",
    "steered_logits": "svdk.ops.api",
    "extract": "svdk.ops.api",
    "warm_up": "svdk.ops.warming",
    "SampleInfo": "svdk.ops.results",
    "LogprobInfo": "svdk.ops.results",
    "SteeringBatch": "svdk.ops.results",
    "Status": "svdk.ops.results",
    "SteeringConfig": "svdk.ops.configs",
    "SamplingConfig": "svdk.ops.configs",
    "Steering": "svdk.calibration.artifact",
    "warm_start": "svdk.warmstart.api",
    "extract_steering": "svdk.calibration.sweep",
    "calibrate": "svdk.calibration.calibrate",
    "recalibrate": "svdk.calibration.calibrate",
    "static_vector": "svdk.calibration.static_vector",
    "static_steering": "svdk.calibration.static_vector",
    "logit_bias": "svdk.calibration.static_vector",
    "generate": "svdk.generation.generate",
    "choose": "svdk.generation.choose",
    "SteeringLogitsProcessor": "svdk.generation.logits_processor",
    "patch_transformers": "svdk.generation.patch",
    "ModelPair": "svdk.models.pair",
    "adapter_scale": "svdk.models.adapter_scale",
    "load_model": "svdk.models.loading",
    "load_adapter": "svdk.models.loading",
    "SvdkError": "svdk.errors",
    "InputError": "svdk.errors",
    "DataError": "svdk.errors",
    "ArtifactError": "svdk.errors",
    "BackendError": "svdk.errors",
}
_MODULES = ("backends", "errors", "reference", "sampling")

__all__ = ["__version__", *_EXPORTS, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"svdk.{name}")
    if name not in _EXPORTS:
        raise AttributeError(f"module 'svdk' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
