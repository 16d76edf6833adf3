"""What is checked when an engine with a steered model starts: what has no twin is refused by name."""

from __future__ import annotations

import functools
import logging
from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from svdk.errors import InputError
from svdk.vllm.rules import REFUSED

logger = logging.getLogger("vllm.svdk")
BAD_REQUEST = 400
"""Of HTTP."""
DIAL = "svdk.vllm.requests:RequestDial"
COUNTERS = "svdk.vllm.counters.Counters"


def checks(plain: type[VerifyAndUpdateConfig] | None) -> type[VerifyAndUpdateConfig]:
    """VLLM's hook for an architecture: that of the class that is twinned, and svdk's."""

    class Checks(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            if plain is not None:
                plain.verify_and_update_model_config(model_config)

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            if plain is not None:
                plain.verify_and_update_config(vllm_config)
            refuse(vllm_config)
            prepare(vllm_config)

    return Checks


def refuse(vllm_config: Any) -> None:
    """``InputError`` for a setting under which a row would lose its partner, or that nobody has tried.

    Each has the name of vLLM's option, what it was and what is allowed.
    """
    model, parallel, lora = vllm_config.model_config, vllm_config.parallel_config, vllm_config.lora_config
    if lora is None:
        raise InputError("enable_lora was False; allowed for a steered model: True (--enable-lora)")
    found: list[tuple[str, object, object, str]] = [
        ("pipeline_parallel_size", parallel.pipeline_parallel_size, 1, "hidden states leave in pairs"),
        ("kv_transfer_config", vllm_config.kv_transfer_config, None, "it knows one cache a layer"),
        ("enable_dbo", bool(getattr(parallel, "enable_dbo", False)), False, "it splits batches"),
        ("enable_batch_sharded_sampling", _flag(parallel, "enable_batch_sharded_sampling"), False, _SPLITS),
        ("prefill_context_parallel_size", getattr(parallel, "prefill_context_parallel_size", 1), 1, _SPLITS),
        ("decode_context_parallel_size", getattr(parallel, "decode_context_parallel_size", 1), 1, _SPLITS),
        ("speculative_config", _method(vllm_config), None, "vLLM then drops the requests' dials"),
        ("fully_sharded_loras", lora.fully_sharded_loras, False, "it adds adapters in another place"),
        ("enable_prompt_embeds", _flag(model, "enable_prompt_embeds"), False, "both rows start from ids"),
        ("multimodal model", bool(model.is_multimodal_model), False, "only text is run twice"),
        ("M-RoPE", bool(getattr(model, "uses_mrope", False)), False, "positions are one number a token"),
        ("use_mla", bool(getattr(model, "use_mla", False)), False, "its attention has no twin"),
        (
            "kv_sharing_fast_prefill",
            _flag(vllm_config.cache_config, "kv_sharing_fast_prefill"),
            False,
            _SPLITS,
        ),
        ("runner V2", bool(vllm_config.use_v2_model_runner), False, "set VLLM_USE_V2_MODEL_RUNNER=0"),
    ]
    for name, value, allowed, why in found:
        if value != allowed:
            raise InputError(f"{name} was {value!r}; allowed for a steered model: {allowed!r} ({why})")


_SPLITS = "it takes rows from their partners"


def _flag(config: Any, name: str) -> bool:
    return bool(getattr(config, name, False))


def _method(vllm_config: Any) -> object:
    found = vllm_config.speculative_config
    return None if found is None else getattr(found, "method", found)


def prepare(vllm_config: Any) -> None:
    """Name the processor that reads the requests' dials; compile nothing; let a client's error be its own."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    processors = list(model.logits_processors or ())
    if DIAL not in processors:
        model.logits_processors = [*processors, DIAL]
    if not parallel.worker_extension_cls:
        parallel.worker_extension_cls = COUNTERS
    if not model.enforce_eager:
        # A compiled graph would freeze whether there are base rows, and its ranges end at half of them.
        logger.warning("A steered model runs eagerly: enforce_eager is set.")
        model.enforce_eager = True
    answer_400()


def answer_400() -> None:
    """Have the server answer 400, not 500, when svdk refuses an adapter; a second call does nothing."""
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    load = OpenAIServingModels.load_lora_adapter
    if getattr(load, "_svdk_patched", False):
        return

    @functools.wraps(load)
    async def load_lora_adapter(self: Any, *args: Any, **options: Any) -> Any:
        answer = await load(self, *args, **options)
        error = getattr(answer, "error", None)
        if error is not None and REFUSED in error.message:
            error.message = error.message[error.message.index(REFUSED) :]
            error.code, error.type = BAD_REQUEST, "BadRequestError"
        return answer

    load_lora_adapter._svdk_patched = True  # type: ignore[attr-defined]
    OpenAIServingModels.load_lora_adapter = load_lora_adapter
