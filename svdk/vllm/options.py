"""The engine options of a steered model, for :class:`svdk.vllm.LLM` and ``svdk serve`` alike; no vLLM."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svdk.errors import InputError
from svdk.models.adapter_files import paths, read_config
from svdk.vllm.architectures import twin_name

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's ``max_lora_rank`` may be."""


def engine_options(model: str, adapters: Mapping[str, str | Path] | None = None) -> dict[str, Any]:
    """VLLM's options, by their Python names, that serve ``adapters`` (name -> folder) on ``model`` steered.

    Raises:
        InputError: an architecture without a twin, or a folder that holds no LoRA adapter.

    """
    adapters = adapters or {}
    rank = max((_rank(folder) for folder in adapters.values()), default=16)
    fitting = [size for size in RANKS if size >= rank]
    if not fitting:
        raise InputError(f"an adapter had rank {rank}; allowed in vLLM: at most {RANKS[-1]}")
    return {
        "hf_overrides": {"architectures": [twin_name(architecture(model))]},
        "enable_lora": True,
        "max_loras": max(1, len(adapters)),
        "max_lora_rank": fitting[0],
    }


def architecture(model: str) -> str:
    """The architecture that the configuration of ``model`` (a folder or hub name) states."""
    folder = Path(model)
    if folder.is_dir():
        found = read_config(folder / "config.json").get("architectures")
    else:
        from transformers import AutoConfig

        found = AutoConfig.from_pretrained(model).architectures
    if not isinstance(found, list) or len(found) != 1 or not isinstance(found[0], str):
        raise InputError(f"architectures of {model} was {found!r}; allowed: one name")
    return found[0]


def _rank(folder: str | Path) -> int:
    config = read_config(paths(Path(folder))[0])
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    if config.get("peft_type") != "LORA" or not all(type(r) is int and r > 0 for r in ranks):
        raise InputError(f"adapter {folder} was of type {config.get('peft_type')!r}; allowed: LORA")
    return max(ranks)


def serve_command(
    model: str, adapters: Mapping[str, str | Path], python: str, more: list[str] | None = None
) -> list[str]:
    """The command line that starts vLLM's OpenAI server; ``more`` is appended as it is and so wins."""
    options = engine_options(model, adapters)
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--enable-lora", "--hf-overrides", json.dumps(options["hf_overrides"])]
    for name in ("max_loras", "max_lora_rank"):
        command += [f"--{name.replace('_', '-')}", str(options[name])]
    command += ["--enforce-eager"]
    if adapters:
        command += ["--lora-modules", *(f"{name}={folder}" for name, folder in adapters.items())]
    return command + list(more or ())
