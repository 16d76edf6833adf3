"""The entry point (``vllm.general_plugins``) that every process of vLLM runs once."""

from __future__ import annotations

from svdk.vllm.architectures import ARCHITECTURES, twin_name


def register() -> None:
    """Make the steered architectures known, with their checks; the other models are left as they are."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from svdk.vllm.lora import patch_adapter_loading
    from svdk.vllm.start import checks

    for name in ARCHITECTURES:
        mine = twin_name(name)
        ModelRegistry.register_model(mine, f"svdk.vllm.models:{mine}")
        MODELS_CONFIG_MAP[mine] = checks(MODELS_CONFIG_MAP.get(name))
    patch_adapter_loading()
