"""Which adapters can be switched off without a trace: PEFT types, settings and initialisations."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from svdk.errors import InputError
from svdk.utils.checks import check_choice

if TYPE_CHECKING:
    from peft import PeftConfig

WEIGHT_TYPES = ("LORA", "IA3", "ADALORA", "LOHA", "LOKR")
"""PEFT types that live inside layers, each with a flag that turns it off."""
PROMPT_TYPES = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
"""PEFT types that add virtual tokens and leave the layers alone."""
INITIALISATIONS: dict[str, tuple[str, ...]] = {
    "init_lora_weights": ("gaussian", "orthogonal", "eva", "mica"),
    "init_weights": ("lycoris", "zero"),
    "init_ia3_weights": (),
}
"""Beside True and False: what sets the adapter's own weights alone. PEFT has more, and gets new ones."""
WARM_ONLY = {"alora_invocation_tokens"}
"""Not supported in the active adapter, but none of these changes the base model."""
HARMLESS = {
    # what it is, and what it was made on
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "megatron_core"),
    # virtual tokens
    *("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"),
    *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
    *("encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"),
    "prefix_projection",
    # where it goes, and how large it is there
    *("target_modules", "exclude_modules", "feedforward_modules", "target_parameters", "modules_to_save"),
    *("layers_to_transform", "layers_pattern", "trainable_token_indices", "ensure_weight_tying"),
    *("fan_in_fan_out", "r", "alpha", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("use_effective_conv2d", "decompose_both", "decompose_factor"),
    # variants that add their own part to what the untouched layer gives
    *("use_dora", "lora_bias", "use_qalora", "qalora_group_size", "use_bdlora", "velora_config"),
    *("monteclora_config", "arrow_config"),
    # training alone, or details of an initialisation, which is looked at itself
    *("lora_dropout", "rank_dropout", "module_dropout", "rank_dropout_scale", "runtime_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
}
"""Settings that may have any value. All others must have PEFT's default: those that change the base model
(trained biases, replicated layers, KaSA) as well as those that a later PEFT brings."""


def check_type(config: PeftConfig) -> None:
    """``InputError`` when the adapter's PEFT type is not supported."""
    check_choice("PEFT type", _kind(config), WEIGHT_TYPES + PROMPT_TYPES)


def check_config(config: PeftConfig) -> None:
    """``InputError`` unless the adapter can be switched off and leaves the base weights as they are."""
    check_type(config)
    if getattr(config, "num_transformer_submodules", 1) == 2:
        raise InputError(
            f"{_kind(config)} adapter was made for an encoder-decoder model; allowed: decoder-only"
        )
    check_leaves_base(config)
    for name in sorted(WARM_ONLY):
        if value := getattr(config, name, None):
            raise InputError(
                f"adapter had {name}={value!r}; allowed: None, an adapter that is on at every token"
            )


def check_leaves_base(config: PeftConfig) -> None:
    """``InputError`` when attaching or training the adapter changed weights of the base model.

    That holds while the adapter is not active, too; types that svdk does not know are left alone here.
    """
    if _kind(config) not in WEIGHT_TYPES + PROMPT_TYPES:
        return
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name, None)
        if name in INITIALISATIONS:
            _check_initialisation(name, value)
        elif name not in HARMLESS and name not in WARM_ONLY:
            default = _default(field)
            if value != default and (value or default):  # None, [] and False all mean: not used
                wanted = f"{default!r}, an adapter that leaves the base weights as they are"
                raise InputError(f"adapter had {name}={value!r}; allowed: {wanted}")


def _check_initialisation(name: str, value: Any) -> None:
    known = INITIALISATIONS[name]
    if value is None or isinstance(value, bool) or (isinstance(value, str) and value.lower() in known):
        return
    wanted = f"{', '.join(('True', 'False', *known))}, which leave the base weights as they are"
    raise InputError(
        f"adapter had {name}={value!r}; allowed: {wanted} (PEFT's save_pretrained writes some others as "
        "plain LoRA when it is given path_initial_model_for_weight_conversion)"
    )


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _kind(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))
