"""Offline: vLLM's ``LLM`` over a steered model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import vllm
from vllm.lora.request import LoRARequest

from svdk.errors import ArtifactError
from svdk.vllm.options import engine_options
from svdk.vllm.rules import REFUSED


class LLM(vllm.LLM):
    """``vllm.LLM``, with calibrated adapters by name.

    ``LLM("model", adapters={"task": "folder"})``, then
    ``llm.generate(prompts, params, lora_request=llm.adapters["task"])``; without ``lora_request`` the base
    model answers.

    Args:
        model: a folder or hub name.
        adapters: name -> folder of a calibrated LoRA adapter; more with :meth:`add_adapter`.
        options: any of ``vllm.LLM``; they win over what the adapters ask for.

    Raises:
        InputError: an architecture without a twin.
        ArtifactError: an adapter that is not served steered.

    """

    def __init__(self, model: str, adapters: Mapping[str, str | Path] | None = None, **options: Any) -> None:
        """Start the engine and load the adapters."""
        mine = engine_options(model, adapters)
        overrides = mine["hf_overrides"] | (options.pop("hf_overrides", None) or {})
        super().__init__(model=model, **mine | options | {"hf_overrides": overrides})
        self.adapters: dict[str, LoRARequest] = {}
        self._next = 1
        for name, folder in (adapters or {}).items():
            self.add_adapter(name, folder)

    def add_adapter(self, name: str, folder: str | Path) -> LoRARequest:
        """Load a calibrated adapter now, so that a bad one is refused here and not in the middle of a batch.

        ``ArtifactError`` when it is refused; the engine goes on.
        """
        request = LoRARequest(name, self._next, str(folder))
        try:
            self.llm_engine.add_lora(request)
        except Exception as error:
            text = str(error)
            if REFUSED not in text:
                raise
            raise ArtifactError(text[text.index(REFUSED) :]) from error
        self._next += 1
        self.adapters[name] = request
        return request

    def counters(self) -> dict[str, int]:
        """Rows of logits since the start: ``steered_rows``, and ``fallen_rows`` that were NaN or infinite."""
        return self.collective_rpc("svdk_counters")[0]
