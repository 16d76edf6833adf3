"""Serving steered models with vLLM: a plug-in that vLLM finds by itself (``docs/serving.md``).

Nothing here imports vLLM before it is used, so ``import svdk.vllm`` works without it.
"""

from __future__ import annotations

from typing import Any

__all__ = ["LLM", "engine_options"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from svdk.vllm.llm import LLM

        return LLM
    if name == "engine_options":
        from svdk.vllm.options import engine_options

        return engine_options
    raise AttributeError(f"module 'svdk.vllm' has no attribute {name!r}")
