"""A tiny random model of every causal language model type that transformers registers."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, SiglipVisionConfig
from transformers.models.auto import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""Every model type of the registry, 189 in transformers 5.23."""
VOCAB = 97
WINDOW = 6
"""Slots of every sliding window, and of every chunk of a chunked attention."""
LAYERS = 4
WIDE = 0.3
"""Standard deviation of the weights; at the usual 0.02 the next-token distribution is flat."""

HIDDEN, HEADS, HEAD = 32, 4, 8


def _named(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


# Tiny values by the name of a field, for fields whose default is not None.
SIZES: dict[str, Any] = {
    **_named(VOCAB, "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size"),
    **_named(HIDDEN, "hidden_size d_model n_embd emb_dim embedding_size input_embedding_size lru_width"),
    **_named(HIDDEN, "output_embedding_size hidden_size_global attention_hidden_size mamba_d_ssm"),
    **_named(
        48, "intermediate_size moe_intermediate_size decoder_ffn_dim encoder_ffn_dim ffn_dim dff dim_ff"
    ),
    **_named(48, "d_inner feed_forward_size ffn_hidden_size expert_ffn_hidden_size intermediate_size_mlp"),
    **_named(48, "shared_expert_intermediate_size shared_experts_intermediate_size shared_intermediate_size"),
    **_named(48, "dense_intermediate_size moe_shared_expert_intermediate_size"),
    **_named(LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers"),
    # PreTrainedConfig maps num_hidden_layers to the encoder's: the cache is made for so many layers.
    **_named(LAYERS, "encoder_layers num_encoder_layers"),
    **_named(HEADS, "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads"),
    **_named(HEADS, "encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads"),
    **_named(HEADS, "swa_num_attention_heads linear_num_value_heads linear_num_heads"),
    **_named(2, "num_key_value_heads swa_num_key_value_heads linear_num_key_heads num_kv_heads"),
    **_named(HEAD, "head_dim swa_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim dim_head kv_channels"),
    **_named(HEAD, "linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_head mamba_head_dim"),
    **_named(16, "index_head_dim q_lora_rank kv_lora_rank"),
    # With fewer, most index scores are 0.
    **_named(8, "index_n_heads"),
    **_named(8, "rotary_dim"),
    **_named(8, "o_lora_rank d_rel gated_norm_rank router_hidden_size laurel_rank adapter_rank"),
    **_named(8, "hidden_size_per_layer_input state_size mamba_d_state ssm_state_size num_buckets"),
    **_named(8, "mamba_n_heads mamba_num_heads n_mamba_heads"),
    **_named(2, "mamba_n_groups mamba_ngroups n_groups o_groups"),
    **_named(4, "n_routed_experts num_experts num_local_experts moe_num_experts zero_expert_num"),
    **_named(2, "num_experts_per_tok moe_topk moe_k n_group hc_mult hc_count"),
    **_named(1, "topk_group n_shared_experts num_shared_experts moe_num_shared_experts"),
    **_named(1, "first_k_dense_replace num_dense_layers"),
    **_named(64, "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions"),
    **_named(64, "original_max_position_embeddings max_source_positions"),
    **_named(WINDOW, "sliding_window sliding_window_size attention_window_size local_attention window_size"),
    **_named(WINDOW, "attention_chunk_size local_attention_window_len keep_window_size"),
    **_named(4, "chunk_size mamba_chunk_size block_size local_attn_chunk_length lsh_attn_chunk_length"),
    **_named(4, "index_topk rel_extent"),
    **_named(0, "pad_token_id"),
    **_named(1, "bos_token_id decoder_start_token_id"),
    **_named(2, "eos_token_id sep_token_id cls_token_id"),
    **_named(3, "image_token_id image_token_index audio_token_id video_token_id eod_token_id"),
    **_named(4, "boi_token_id boi_token_index eoi_token_id eoi_token_index boa_token_id eoa_token_id"),
    **_named(4, "eoa_token_index vision_start_token_id vision_end_token_id"),
    **_named(True, "is_decoder use_sliding_window"),
    **_named(2, "max_window_layers"),
    **_named(0, "num_mtp_layers num_nextn_predict_layers"),
}
# Always set, whatever the default.
ALWAYS = ("pad_token_id", "bos_token_id", "eos_token_id", "num_key_value_heads", "head_dim")
# Per-layer lists: shortened so that every kind of the full-size default is there.
PER_LAYER = ("layer_types", "layers_block_type", "mlp_layer_types", "indexer_types")

SLIDING = ["full_attention", "sliding_attention"] * 2
HYBRID_MLP = ["dense", "sparse", "sparse", "sparse"]
_LLAMA4 = {"interleave_moe_layer_step": 2, "no_rope_layer_interval": 2}
_BYTES = {"vocab_size": VOCAB, "intermediate_size": 48, "num_key_value_heads": HEADS}
_SHARED = {"num_kv_shared_layers": 2}
_GEMMA4 = {
    **_SHARED,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 16,
}
_UNIFIED = {**_SHARED, "global_head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
_DOTS3 = {
    "swa_num_attention_heads": HEADS,
    "swa_num_key_value_heads": HEADS,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}
_DOTS3_VISION = {
    "adapter_in_dim": HIDDEN,
    "adapter_out_dim": HIDDEN,
    "mlp_layer_types": ["dense", "sparse"] * 2,
}
_DOTS3_AUDIO = {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN, "downsample_hidden_size": 8}
_GEMMA3N_VISION = {
    "image_size": 32,
    "patch_size": 8,
    "rms_norm_eps": 1e-6,
    "vocab_size": 4,
    "vocab_offset": VOCAB,
}
_QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
    "ple_layer_ids": [1],
    "ple_embed_dim": 16,
    "ngram_size": 2,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 50,
    "make_ngram_vocab_size_divisible_by": 2,
    "split_ngram_parts": 1,
    "hc_lowrank": 8,
    "layer_types": ["linear_attention", "indexed_attention"] * 2,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3], "mamba_d_head": "auto"},
    "blt": {
        "encoder_hash_byte_group_vocab": 50,
        "encoder_hash_byte_group_size": [3, 4],
        "patcher_config": _BYTES,
        "encoder_config": _BYTES,
        "decoder_config": _BYTES,
        "global_config": {"num_key_value_heads": HEADS},
    },
    "codegen": {"rotary_dim": 4},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "cohere2_moe": {"logit_scale": 1.0, "mlp_layer_types": HYBRID_MLP},
    "cohere_compass_text": {
        "layer_types": SLIDING,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
            "full_attention": None,
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 48, "moe_top_k": 2},
    },
    "deepseek_v2": {
        "num_experts_per_tok": 2,
        "topk_method": "group_limited_greedy",
        "n_group": 2,
        "topk_group": 1,
    },
    "deepseek_v4": {
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention", "sliding_attention"]
        * 2,
        "mlp_layer_types": ["hash_moe"] + ["moe"] * 5,
        "num_hidden_layers": 6,
        "num_key_value_heads": 1,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    "doge": {"sliding_window": WINDOW},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"text_config": _DOTS3, "vision_config": _DOTS3_VISION, "audio_config": _DOTS3_AUDIO},
    "dots3_note_text": _DOTS3,
    "falcon_h1": {"mamba_d_head": "auto"},
    "gemma3n": {"text_config": _SHARED},
    "gemma3n_text": _SHARED,
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _UNIFIED},
    "gemma4_unified_text": _UNIFIED,
    "glm_moe_dsa": {"indexer_types": ["full", "shared"] * 2},
    "got_ocr2": {"vision_config": {"image_size": 32, "patch_size": 8, "mlp_dim": 32, "output_channels": 8}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2, "mamba_d_head": "auto"},
    "inkling_text": {"logits_mup_width_multiplier": 1.0, "mlp_layer_types": HYBRID_MLP},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "num_hidden_layers": 4,
    },
    "laguna": {"layer_types": SLIDING},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4": {"text_config": _LLAMA4},
    "llama4_text": _LLAMA4,
    "mamba2": {"head_dim": 16},
    "mellum": {"layer_types": SLIDING},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "mlp_layer_types": HYBRID_MLP,
        "index_block_size": 2,
        "index_n_heads": HEADS,
        "index_topk_blocks": 2,
    },
    "ministral": {"layer_types": SLIDING},
    "ministral3": {"sliding_window": WINDOW},
    "mixtral": {"sliding_window": WINDOW},
    "phi3": {"sliding_window": WINDOW},
    "phi4_multimodal": {
        "sliding_window": WINDOW,
        "vision_config": {"image_size": 56, "crop_size": 56, "patch_size": 14},
        "audio_config": {
            "ext_pw_out_channel": HIDDEN,
            "nemo_conv_channels": 16,
            "depthwise_separable_out_channel": 16,
            "num_blocks": 2,
        },
    },
    "phimoe": {"sliding_window": WINDOW},
    "qwen2_moe": {"mlp_only_layers": [0]},
    "qwen3_moe": {"mlp_only_layers": [0]},
    "qwen3_next": {"mlp_only_layers": [0]},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "axial_pos_embds_dim": (16, 16),
        "axial_pos_shape": (8, 8),
        "hash_seed": 0,
        "attention_head_size": 8,
        "num_buckets": 2,
    },
    "roc_bert": {
        "pronunciation_vocab_size": VOCAB,
        "shape_vocab_size": VOCAB,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "smollm3": {"sliding_window": WINDOW, "use_sliding_window": True, "no_rope_layer_interval": 2},
    "starcoder2": {"sliding_window": WINDOW},
    "xlm": {"causal": True},
    "xlstm": {"hidden_size": 64},
    "xmod": {"default_language": "en_XX"},
    "zaya": {
        "num_experts_per_tok": 1,
        "layer_types": ["hybrid", "hybrid_sliding"] * 2,
        "sliding_window": WINDOW,
    },
}

_ASSISTANT = "not a language model by itself: it reads the keys and values of the model that it assists"
_CODES = (
    "not a text model: it predicts several streams of audio codes, and AutoModelForCausalLM cannot build it"
)
NOT_BUILT = {
    "gemma4_assistant": _ASSISTANT,
    "gemma4_unified_assistant": _ASSISTANT,
    "musicgen": _CODES,
    "musicgen_melody": _CODES,
}


class CannotBuild(Exception):  # noqa: N818
    """Why there is no tiny model of a type."""


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A small configuration of ``model_type`` with every kind of layer that the family has."""
    config = _shrink(CONFIG_MAPPING[model_type], OVERRIDES.get(model_type, {}))
    if model_type == "gemma3n":  # its own vision tower is timm's
        vision = SiglipVisionConfig(**_tiny_values(SiglipVisionConfig) | _GEMMA3N_VISION)
        vars(config)["vision_config"] = vision  # past the check of its type
    return config


def tiny_family(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A random float32 model in eval mode; the same seed gives the same weights.

    Raises:
        CannotBuild: with the reason.

    """
    if model_type in NOT_BUILT:
        raise CannotBuild(NOT_BUILT[model_type])
    config = tiny_config(model_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        except ValueError as error:
            if "attn_implementation" not in str(error) and "eager" not in str(error):
                raise
            model = AutoModelForCausalLM.from_config(config)
        model = model.to(torch.float32).eval()
        _widen(model)
    # A fresh one: some configurations force or suppress tokens.
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model


def _widen(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        if parameter.dim() < 2:
            continue
        spread = float(parameter.data.std())
        if spread == 0 and not parameter.data.any():
            parameter.data.normal_(0, WIDE)
        elif 0 < spread < WIDE / 2:
            parameter.data.mul_(WIDE / spread)


def _shrink(kind: type[PreTrainedConfig], overrides: dict[str, Any]) -> PreTrainedConfig:
    values = _tiny_values(kind)
    for name, value in overrides.items():
        values[name] = {**values.get(name, {}), **value} if name.endswith("_config") else value
    return kind(**values)


def _tiny_values(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if field.name in ALWAYS or (field.name in SIZES and field.default is not None):
            values[field.name] = SIZES[field.name]
    values |= _per_layer(kind)
    if "kv_lora_rank" in values:  # latent attention has as many key heads as heads
        values["num_key_value_heads"] = HEADS
    for name, spec in (getattr(kind, "sub_configs_defaults", None) or {}).items():
        if not spec.optional:
            sub = CONFIG_MAPPING[spec.model_type] if spec.model_type else spec.config_class
            values[name] = _tiny_values(sub) | {"model_type": sub.model_type}
    return values


def _per_layer(kind: type[PreTrainedConfig]) -> dict[str, list[Any]]:
    """The per-layer lists of the full-size default, shortened to one of each kind, repeated."""
    try:
        full = kind()
    except Exception:  # some have no valid default
        return {}
    found = {}
    fields = {field.name for field in dataclasses.fields(kind)}
    for name in PER_LAYER:
        kinds = list(dict.fromkeys(getattr(full, name, None) or ()))
        if name in fields and len(kinds) > 1:
            found[name] = (kinds * LAYERS)[: max(LAYERS, len(kinds))]
    return found
