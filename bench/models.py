"""Models for the end-to-end part: the real one, and random weights in the shapes of larger ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

REAL = "smollm2-135m"


@dataclass(frozen=True)
class Shape:
    """A Llama-like model by its sizes (those of the model named in ``like``)."""

    like: str
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool

    @property
    def parameters(self) -> int:
        """Number of weights."""
        head = self.hidden // self.heads
        attention = self.hidden * head * 2 * (self.heads + self.kv_heads)
        layer = attention + 3 * self.hidden * self.mlp + 2 * self.hidden
        return self.layers * layer + self.vocab * self.hidden * (1 if self.tied else 2) + self.hidden


SHAPES = {
    "0.5b": Shape("Qwen2.5-0.5B", 896, 4864, 24, 14, 2, 151936, True),
    "1.5b": Shape("Qwen2.5-1.5B", 1536, 8960, 28, 12, 2, 151936, True),
    "3b": Shape("Qwen2.5-3B", 2048, 11008, 36, 16, 2, 151936, True),
    "8b": Shape("Llama-3.1-8B", 4096, 14336, 32, 32, 8, 128256, False),
}


def load(name: str, device: torch.device) -> PeftModel:
    """A PEFT model (LoRA rank 8 on q, k, v, o, random weights) over ``name``: a shape, or a real model.

    Raises:
        InputError: a model that cannot be loaded.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import GenerationConfig

    if name in SHAPES:
        model = random_model(SHAPES[name], device)
    else:
        from svdk.models.loading import load_model

        model, _ = load_model(name, device=device)
    # No end-of-sequence token: every contestant decodes the same number of tokens.
    model.generation_config = GenerationConfig(pad_token_id=0)
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    return get_peft_model(model, config).eval()


def random_model(shape: Shape, device: torch.device) -> PreTrainedModel:
    """A Llama model of this shape with random weights: float32 on a CPU, bfloat16 elsewhere."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype_on(device)).eval()


def dtype_on(device: torch.device) -> torch.dtype:
    """What the models run in."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16
