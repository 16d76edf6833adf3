"""Which of vLLM's model classes have a steered twin, by the name under which vLLM registers it."""

from __future__ import annotations

from svdk.errors import InputError

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
}
"""vLLM's architecture -> its module below ``vllm.model_executor.models``."""
PREFIX = "Svdk"


def twin_name(architecture: str) -> str:
    """The steered twin of an architecture; ``InputError`` where there is none."""
    plain = architecture.removeprefix(PREFIX)
    if plain not in ARCHITECTURES:
        raise InputError(
            f"the model's architecture was {architecture}; allowed for steered serving: "
            f"{', '.join(ARCHITECTURES)}"
        )
    return PREFIX + plain
