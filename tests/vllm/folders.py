"""Tiny models and calibrated adapters on disk, of shapes that vLLM's CPU attention takes (heads of 32)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto import AutoModelForCausalLM

from svdk.calibration.artifact import Steering
from svdk.models.fingerprints import adapter_fingerprint, model_fingerprint
from tests.helpers.tiny import VOCAB_SIZE, tiny_tokenizer

COMMON = {
    "vocab_size": VOCAB_SIZE,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # A wide initialisation: at the usual 0.02 the next-token distribution is flat and tests see nothing.
    "initializer_range": 0.2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
WINDOW = 48
TWO_HEADS = {"num_attention_heads": 2}  # 64 / 2: Qwen2 has no head size of its own
CONFIGS = {
    "llama": lambda: LlamaConfig(**COMMON),
    "mistral": lambda: MistralConfig(sliding_window=None, **COMMON),
    "mistral_window": lambda: MistralConfig(sliding_window=WINDOW, **COMMON),
    "qwen2": lambda: Qwen2Config(**{k: v for k, v in COMMON.items() if k != "head_dim"} | TWO_HEADS),
    "qwen3": lambda: Qwen3Config(**COMMON | {"tie_word_embeddings": True}),
    "gemma2": lambda: Gemma2Config(sliding_window=WINDOW, **COMMON | {"tie_word_embeddings": True}),
    "gemma3": lambda: Gemma3TextConfig(sliding_window=WINDOW, **COMMON | {"tie_word_embeddings": True}),
}  # fmt: skip
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]


def save_model(folder: Path, family: str = "llama", seed: int = 0) -> Path:
    """A random float32 model with its tokenizer."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]()).float()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path, *adapters: Path):
    """The model as transformers loads it, with the adapters under the names of their folders."""
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if not adapters:
        return model.eval()
    peft_model = PeftModel.from_pretrained(model, adapters[0], adapter_name=adapters[0].name)
    for folder in adapters[1:]:
        peft_model.load_adapter(folder, adapter_name=folder.name)
    return peft_model.eval()


def save_adapter(folder: Path, model_folder: Path, seed: int = 1, config=None, **steering) -> Path:
    """A random LoRA adapter with a ``steering.json`` of these fields and all fingerprints.

    ``config``: of the adapter, another one than the usual.
    """
    torch.manual_seed(100 + seed)
    config = config or LoraConfig(
        r=4, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM", target_modules=TARGETS
    )
    get_peft_model(load(model_folder), config).save_pretrained(folder)
    given = {"strength": 1.5, "direction": "log_ratio", "alpha": 0.1, "lever": "constant"} | steering
    Steering(
        vocab_size=VOCAB_SIZE,
        peft_type=str(getattr(config.peft_type, "value", config.peft_type)),
        base_model_fingerprint=model_fingerprint(load(model_folder)),
        adapter_fingerprint=adapter_fingerprint(folder),
        **given,
    ).save(folder)
    return folder


def save_vector(folder: Path, model_folder: Path, seed: int) -> Path:
    """An adapter with a static vector."""
    torch.manual_seed(seed)
    vector = torch.randn(VOCAB_SIZE)
    return save_adapter(
        folder, model_folder, seed, direction="vector", lever="vector", vector=vector, strength=2.0, alpha=0.0
    )


def resteer(folder: Path, **changes) -> None:
    """Save the steering in ``folder`` again with other fields."""
    dataclasses.replace(Steering.load(folder), **changes).save(folder)
