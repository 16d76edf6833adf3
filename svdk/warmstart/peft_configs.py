"""PEFT configurations for a warm start: the paper's hyper-parameters; targets by what the model has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from svdk.errors import InputError
from svdk.utils.checks import check_choice, check_count, check_number

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

PEFT_TYPES = ("lora", "ia3", "prompt_tuning", "p_tuning", "prefix_tuning")

# The q, k, v and output projections of attention, under the names that model families give them. The first
# set that a model has in full is taken; longer names come before those that are their endings.
ATTENTION = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),  # Llama, Mistral, Qwen, Gemma, ...
    ("q_proj", "k_proj", "v_proj", "out_proj"),  # OPT, GPT-J, GPT-Neo
    ("q_proj", "k_proj", "v_proj", "self_attn.dense"),  # Phi, Phi-2
    ("qkv_proj", "o_proj"),  # Phi-3
    ("query_key_value", "self_attention.dense"),  # BLOOM, Falcon
    ("query_key_value", "attention.dense"),  # GPT-NeoX
    ("attn.c_attn", "attn.c_proj"),  # GPT-2, StarCoder
    ("Wqkv", "out_proj"),  # MPT
)
# IA3 rescales keys, values and the input of the last layer of the MLP.
KEYS_VALUES = (("k_proj", "v_proj"), ("qkv_proj",), ("query_key_value",), ("attn.c_attn",), ("Wqkv",))
MLP_LAST = ("down_proj", "fc2", "fc_out", "dense_4h_to_h", "mlp.c_proj")


def make_config(
    peft: str,
    model: PreTrainedModel,
    *,
    lora_rank: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.1,
    target_modules: Sequence[str] | None = None,
    virtual_tokens: int = 20,
    encoder_hidden: int = 128,
    encoder_layers: int = 2,
) -> PeftConfig:
    """The PEFT config of method ``peft`` (one of ``PEFT_TYPES``) for ``model``.

    LoRA goes on the q, k, v and output projections and IA3 on k, v and the last MLP layer, unless
    ``target_modules`` names others (endings of module names). ``virtual_tokens`` is for the three prompt
    methods, ``encoder_hidden`` (units) and ``encoder_layers`` for p-tuning alone. Raises :class:`InputError`.
    """
    check_choice("peft", peft, PEFT_TYPES)
    check_count("lora_rank", lora_rank)
    check_count("virtual_tokens", virtual_tokens)
    check_count("encoder_hidden", encoder_hidden)
    check_count("encoder_layers", encoder_layers)
    check_number("lora_alpha", lora_alpha, "(0, inf)")
    check_number("lora_dropout", lora_dropout, "[0, 1)")
    if peft == "lora":
        return _lora(model, target_modules, lora_rank, lora_alpha, lora_dropout)
    if peft == "ia3":
        return _ia3(model, target_modules)
    if target_modules is not None:
        raise InputError(
            f"target_modules was {list(target_modules)}, which {peft} has no use for; allowed: None"
        )
    return _virtual(peft, virtual_tokens, encoder_hidden, encoder_layers)


def _virtual(peft: str, virtual_tokens: int, encoder_hidden: int, encoder_layers: int) -> PeftConfig:
    from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

    common: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": virtual_tokens}
    if peft == "prompt_tuning":
        return PromptTuningConfig(**common)
    if peft == "p_tuning":
        return PromptEncoderConfig(
            encoder_hidden_size=encoder_hidden, encoder_num_layers=encoder_layers, **common
        )
    return PrefixTuningConfig(**common)


def _lora(model, target_modules, rank: int, alpha: float, dropout: float) -> PeftConfig:
    from peft import LoraConfig

    linear = _linear_layers(model)
    if target_modules is None:
        target_modules = _first_match(linear, ATTENTION)
        if target_modules is None:
            raise _no_targets(model, "the q, k, v and output projections")
    chosen = _chosen(linear, target_modules)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=cast(int, alpha),  # PEFT takes a float too
        lora_dropout=dropout,
        target_modules=list(target_modules),
        fan_in_fan_out=_transposed(linear, chosen),
    )


def _ia3(model, target_modules) -> PeftConfig:
    from peft import IA3Config

    linear = _linear_layers(model)
    if target_modules is None:
        keys_values = _first_match(linear, KEYS_VALUES)
        mlp = _first_match(linear, [(name,) for name in MLP_LAST])
        if keys_values is None or mlp is None:
            raise _no_targets(model, "the k, v and last MLP layers")
        target_modules = (*keys_values, *mlp)
    chosen = _chosen(linear, target_modules)
    feedforward = [t for t in target_modules if t in MLP_LAST or t.split(".")[-1] in MLP_LAST]
    return IA3Config(
        task_type="CAUSAL_LM",
        target_modules=list(target_modules),
        feedforward_modules=feedforward,
        fan_in_fan_out=_transposed(linear, chosen),
    )


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers (also transformers' transposed Conv1D, and quantised ones), by full name."""
    from transformers.pytorch_utils import Conv1D

    return {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}


def _matches(names: Iterable[str], target: str) -> list[str]:
    return [name for name in names if name == target or name.endswith(f".{target}")]


def _first_match(linear: dict[str, nn.Module], sets: Iterable[Sequence[str]]) -> Sequence[str] | None:
    return next((s for s in sets if all(_matches(linear, target) for target in s)), None)


def _chosen(linear: dict[str, nn.Module], targets: Sequence[str]) -> list[str]:
    if isinstance(targets, str) or not targets:
        raise InputError(
            f"target_modules was {targets!r}; allowed: a list of endings of linear layers' names"
        )
    chosen = []
    for target in targets:
        found = _matches(linear, target)
        if not found:
            endings = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise InputError(
                f"target_modules held {target!r}, which no linear layer's name ends with; "
                f"this model has {', '.join(endings)}"
            )
        chosen += found
    return chosen


def _transposed(linear: dict[str, nn.Module], chosen: list[str]) -> bool:
    kinds = {not isinstance(linear[name], nn.Linear) for name in chosen}
    if len(kinds) > 1:
        raise InputError("target_modules mixed Linear and Conv1D layers; allowed: layers of one kind")
    return kinds.pop()


def _no_targets(model: nn.Module, what: str) -> InputError:
    kind = getattr(model.config, "model_type", type(model).__name__)
    endings = sorted({name.rsplit(".", 1)[-1] for name in _linear_layers(model)})
    return InputError(
        f"target_modules was None, and a model of type {kind} has no known names for {what}; "
        f"name some of its linear layers: {', '.join(endings)}"
    )
