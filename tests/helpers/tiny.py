"""Tiny random models, tokenizers and adapters, built in code: no download, a few milliseconds each."""

from __future__ import annotations

import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.models.auto import AutoModelForCausalLM

PEFT_TYPES = ("lora", "ia3", "prompt_tuning", "p_tuning", "prefix_tuning")
ARCHITECTURES = ("llama", "qwen2", "gpt2", "gemma2")
SPECIALS = ("<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>")
VOCAB_SIZE = 256 + len(SPECIALS)
VIRTUAL_TOKENS = 4
HIDDEN = 32

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# What each architecture calls its q,k,v,o projections, and what IA3 rescales (k, v, last MLP layer).
LORA_TARGETS = {"gpt2": ["c_attn", "attn.c_proj"]}
IA3_TARGETS = {"gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"])}
FAN_IN_FAN_OUT = {"gpt2"}  # its Conv1D stores weights transposed


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: ids 0..4 are the special tokens, 5..260 the bytes; left padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate((*SPECIALS, *alphabet))}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=list(SPECIALS[3:]),
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=512,
    )


def ids_but_letters(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Everything that is not a lower-case letter: without these ids, random models write text."""
    return [i for text, i in tokenizer.get_vocab().items() if not (len(text) == 1 and "a" <= text <= "z")]


def tiny_config(arch: str = "llama", vocab_size: int = VOCAB_SIZE):
    """Two layers, hidden 32, four heads (two key-value heads where the architecture has such)."""
    # A wide initialisation: at the usual 0.02 the next-token distribution is flat and tests see nothing.
    common = {
        "vocab_size": vocab_size,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.3,
    }
    if arch == "gpt2":
        return GPT2Config(
            n_layer=2, n_head=4, n_embd=HIDDEN, n_positions=512,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **common,
        )  # fmt: skip
    common |= {
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }
    if arch == "llama":
        return LlamaConfig(**common)
    if arch == "qwen2":
        return Qwen2Config(**(common | {"tie_word_embeddings": True}))
    if arch == "gemma2":  # sliding window on every other layer, soft-capped logits
        return Gemma2Config(head_dim=8, sliding_window=64, **common)
    raise ValueError(f"arch was {arch!r}; allowed: {', '.join(ARCHITECTURES)}")


def tiny_model(arch: str = "llama", seed: int = 0, vocab_size: int = VOCAB_SIZE) -> PreTrainedModel:
    """A random float32 model in eval mode; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(arch, vocab_size), attn_implementation="eager")
    # Greedy by default, as saved models are; pad_token_id set so that generate does not warn.
    model.generation_config.pad_token_id = 0
    return model.to(torch.float32).eval()


def tiny_peft_config(peft_type: str, arch: str = "llama"):
    """A small adapter config; LoRA and IA3 start at random, non-zero values."""
    common = {"task_type": "CAUSAL_LM"}
    if peft_type == "lora":
        return LoraConfig(
            r=4, lora_alpha=8, lora_dropout=0.0, init_lora_weights=False,
            target_modules=LORA_TARGETS.get(arch, ["q_proj", "k_proj", "v_proj", "o_proj"]),
            fan_in_fan_out=arch in FAN_IN_FAN_OUT, **common,
        )  # fmt: skip
    if peft_type == "ia3":
        targets, feedforward = IA3_TARGETS.get(arch, (["k_proj", "v_proj", "down_proj"], ["down_proj"]))
        return IA3Config(
            target_modules=targets, feedforward_modules=feedforward, init_ia3_weights=False,
            fan_in_fan_out=arch in FAN_IN_FAN_OUT, **common,
        )  # fmt: skip
    if peft_type == "prompt_tuning":
        return PromptTuningConfig(num_virtual_tokens=VIRTUAL_TOKENS, **common)
    if peft_type == "p_tuning":
        return PromptEncoderConfig(
            num_virtual_tokens=VIRTUAL_TOKENS, encoder_hidden_size=16, encoder_num_layers=2, **common
        )
    if peft_type == "prefix_tuning":
        return PrefixTuningConfig(num_virtual_tokens=VIRTUAL_TOKENS, **common)
    raise ValueError(f"peft_type was {peft_type!r}; allowed: {', '.join(PEFT_TYPES)}")


def tiny_peft(
    peft_type: str = "lora",
    arch: str = "llama",
    seed: int = 0,
    model: PreTrainedModel | None = None,
    config: PeftConfig | None = None,
) -> PeftModel:
    """``model`` (default: ``tiny_model(arch)``) with a random non-zero adapter: base and warm logits differ.

    ``config``: of the adapter (default: ``tiny_peft_config(peft_type, arch)``).

    The adapter is injected in place, so do not pass a model that other tests share.
    """
    model = tiny_model(arch) if model is None else model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 + seed)
        peft_model = get_peft_model(model, config or tiny_peft_config(peft_type, arch))
    return peft_model.eval()


def save_tiny(folder, arch: str = "llama", seed: int = 0):
    """Save ``tiny_model`` and its tokenizer as a local model folder; returns the folder."""
    tiny_model(arch, seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_examples(n: int = 24, seed: int = 0) -> list[dict[str, str]]:
    """Prompt / completion rows of an easy task (repeat the word in capitals), all different for n <= 100."""
    words = ["red", "oak", "sun", "fig", "ice", "owl", "jam", "sky", "elm", "bee"]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(words) ** 2, generator=generator).tolist()
    pairs = [f"{words[i // len(words)]} {words[i % len(words)]}" for i in order]
    return [{"prompt": f"say {p}: ", "completion": p.upper()} for p in (pairs * (n // len(pairs) + 1))[:n]]


def tiny_mixed(seed: int = 1) -> PeftMixedModel:
    """Adapters of two types in one model, both active."""
    lora = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=["q_proj"])
    loha = LoHaConfig(r=4, alpha=8, init_weights=False, target_modules=["v_proj"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(tiny_model(), lora, mixed=True)
        model.add_adapter("other", loha)
    model.set_adapter(["default", "other"])
    return model.eval()
