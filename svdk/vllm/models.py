"""The steered twins of vLLM's classes, under the names by which the plug-in registers them."""

from __future__ import annotations

import importlib

from svdk.vllm.architectures import ARCHITECTURES, twin_name
from svdk.vllm.twin import twin

for _name, _module in ARCHITECTURES.items():
    _class = twin(getattr(importlib.import_module(f"vllm.model_executor.models.{_module}"), _name))
    _class.__module__ = __name__
    globals()[twin_name(_name)] = _class
