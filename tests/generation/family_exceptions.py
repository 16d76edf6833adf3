"""Where steered decoding of a family does not equal the slow loop, and why; read by test_families.py."""

from __future__ import annotations

from dataclasses import dataclass

from tests.helpers.families import FORWARDS, KINDS, Verdict


@dataclass(frozen=True)
class Known:
    """One reason, and whom it concerns: every listed family with every listed kind and forward."""

    verdict: str
    pattern: str
    """A regular expression that the verdict's detail holds."""
    names: str
    """Families, separated by blanks."""
    kinds: tuple[str, ...] = KINDS
    forwards: tuple[str, ...] = (*FORWARDS, "auto")

    @property
    def families(self) -> tuple[str, ...]:
        """``names``, apart."""
        return tuple(self.names.split())

    def covers(self, verdict: Verdict) -> bool:
        """Whether it names this family, kind and forward."""
        return (
            verdict.family in self.families
            and verdict.kind in self.kinds
            and verdict.forward in self.forwards
        )


EXCEPTIONS: tuple[Known, ...] = (
    # refused
    Known(
        "refused",
        r"allowed: a decoder-only model with a key-value cache",
        "openai-gpt reformer rwkv xlm xlnet",
        kinds=("lora", "ia3", "prompt"),
    ),
    Known(
        "refused",
        r"allowed: a decoder-only model with a key-value cache",
        "xlstm",
        kinds=("lora", "ia3"),
    ),
    Known(
        "refused",
        r"cache_params",
        "falcon_mamba mamba mamba2",
        kinds=("lora", "ia3", "prompt"),
    ),
    Known(
        "refused",
        r"lora\.layer\.ParamWrapper",
        "afmoe cohere2_moe ernie4_5_moe flex_olmo minimax minimax_m2 mixtral olmoe qwen3_next",
        kinds=("lora",),
        forwards=("paired",),
    ),
    Known(
        "refused",
        r"mm_encoder_outputs",
        "fuyu gemma3 gemma3n gemma4_unified got_ocr2",
    ),
    Known(
        "refused",
        r"mm_encoder_outputs",
        "gemma4",
        kinds=("lora", "ia3", "prefix"),
    ),
    Known(
        "refused",
        r"rows are regrouped inside a mixture of experts",
        "aria_text axk1 axk2 bailing_hybrid deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 "
        "dots1 dots3_note dots3_note_text exaone_moe flint glm4_moe glm4_moe_lite glm_moe_dsa "
        "hy_v3 hy_v4 jetmoe kimi_linear kolibri1 laguna llama4 llama4_text minimax_m3_vl_text "
        "nemotron_h qwen2_moe qwen3_5_moe qwen3_5_moe_text qwen4_exp qwen4_exp_text solar_open",
        kinds=("lora", "ia3"),
        forwards=("paired",),
    ),
    Known(
        "refused",
        r"rows are regrouped inside a mixture of experts",
        "beam hunyuan_v1_moe longcat_flash mellum qwen3_moe",
        kinds=("lora",),
        forwards=("paired",),
    ),
    Known(
        "refused",
        r"rows are regrouped inside a mixture of experts",
        "afmoe cohere2_moe ernie4_5_moe qwen3_next",
        kinds=("ia3",),
        forwards=("paired",),
    ),
    # wrong
    Known(
        "wrong",
        r"row 0 alone, row 1 alone, row 2 alone: equal",
        "afmoe beam cohere2 cohere2_moe cohere_compass_text cwm doge dots1 exaone4 exaone_moe "
        "flint gemma2 gemma3_text gemma3n_text gpt_neo gpt_oss granite_swa granitemoe_swa "
        "kolibri1 laguna llama4 llama4_text mellum ministral ministral3 mistral mixtral "
        "modernbert-decoder moss_transcribe_diarize mpt olmo3 phi3 phi4_multimodal phimoe qwen2 "
        "qwen2_moe qwen3 qwen3_moe roformer smollm3 starcoder2 vaultgemma",
        kinds=("prompt", "prefix"),
    ),
    Known(
        "wrong",
        r"row 0 alone, row 1 alone, row 2 alone: equal",
        "bailing_hybrid bamba falcon_h1 gemma4_unified_text granitemoehybrid inkling2_text "
        "inkling_text jamba kimi_linear lfm2 lfm2_moe lfm3 mimo_v2_flash nemotron_h olmo_hybrid "
        "qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next zamba zaya",
        kinds=("prompt",),
    ),
    Known(
        "wrong",
        r"row 0 alone, row 1 alone, row 2 alone: equal",
        "bart bigbird_pegasus blenderbot blenderbot-small git marian mbart mvp pegasus plbart trocr whisper",
        kinds=("lora", "ia3"),
    ),
    Known(
        "wrong",
        r"row 0 alone, row 1 alone, row 2 alone: equal",
        "bart bigbird_pegasus blenderbot blenderbot-small git marian mbart mvp pegasus plbart trocr",
        kinds=("prompt", "prefix"),
        forwards=("two_pass", "auto"),
    ),
    Known(
        "wrong",
        r"row 0 alone, row 1 alone, row 2 alone: equal",
        "deepseek_v32 glm_moe_dsa",
        kinds=("ia3",),
        forwards=("two_pass", "auto"),
    ),
    Known(
        "wrong",
        r"row 0 alone, row 1 alone, row 2 alone: equal",
        "dots3_note dots3_note_text",
        kinds=("lora",),
        forwards=("two_pass", "auto"),
    ),
    Known(
        "wrong",
        r"row 0 alone, row 1 alone, row 2 alone: equal",
        "deepseek_v4",
        kinds=("lora", "ia3"),
        forwards=("two_pass", "auto"),
    ),
    Known(
        "wrong",
        r"row 0 alone, row 1 alone, row 2 alone: equal",
        "minimax_m3_vl_text",
        kinds=("lora", "ia3", "prompt"),
        forwards=("two_pass", "auto"),
    ),
    Known(
        "wrong",
        r"row 0 alone, row 1 alone, row 2 alone: equal",
        "recurrent_gemma",
        kinds=("lora", "ia3"),
        forwards=("paired",),
    ),
    Known(
        "wrong",
        r"row 0 alone, row 1 alone, row 2 alone: equal",
        "whisper",
        kinds=("prompt",),
        forwards=("two_pass", "auto"),
    ),
    Known(
        "wrong",
        r"row \d alone: step",
        "bart bigbird_pegasus blenderbot blenderbot-small git marian mbart mvp pegasus plbart trocr",
        kinds=("prompt", "prefix"),
        forwards=("paired",),
    ),
    Known(
        "wrong",
        r"row \d alone: step",
        "camembert data2vec-text roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl xmod",
    ),
    Known(
        "wrong",
        r"row \d alone: step",
        "gemma4_text gemma4_unified_text moshi",
        kinds=("prefix",),
        forwards=("two_pass", "auto"),
    ),
    Known(
        "wrong",
        r"row \d alone: step",
        "hy_v4 minimax_m3_vl_text whisper",
        kinds=("prompt",),
        forwards=("paired",),
    ),
    Known(
        "wrong",
        r"row \d alone: step",
        "deepseek_v32 recurrent_gemma",
        kinds=("prompt",),
    ),
    Known(
        "wrong",
        r"row \d alone: step",
        "dots3_note dots3_note_text",
        kinds=("ia3",),
        forwards=("two_pass", "auto"),
    ),
    Known(
        "wrong",
        r"row \d alone: step",
        "prophetnet zamba2",
        kinds=("lora", "ia3", "prompt"),
    ),
    Known(
        "wrong",
        r"row \d alone: step",
        "deepseek_v32",
        kinds=("lora",),
        forwards=("two_pass", "auto"),
    ),
    Known(
        "wrong",
        r"row \d alone: step",
        "moshi",
        kinds=("lora", "ia3"),
    ),
    Known(
        "wrong",
        r"row \d alone: step",
        "recurrent_gemma",
        kinds=("lora", "ia3"),
        forwards=("two_pass", "auto"),
    ),
    # error
    Known(
        "error",
        r"MiniMax uses cache of its own",
        "minimax",
        kinds=("lora",),
        forwards=("two_pass", "auto"),
    ),
    Known(
        "error",
        r"MiniMax uses cache of its own",
        "minimax",
        kinds=("ia3", "prompt"),
    ),
    Known(
        "error",
        r"\['attention_mask'\]",
        "xlstm",
        kinds=("prompt",),
    ),
    Known(
        "error",
        r"modeling_cpmant\.py",
        "cpmant",
        kinds=("lora", "ia3", "prefix"),
    ),
    Known(
        "error",
        r"modeling_recurrent_gemma\.py",
        "recurrent_gemma",
        kinds=("prefix",),
    ),
    Known(
        "error",
        r"no attribute 'num_hidden_layers'",
        "blt",
        kinds=("lora", "ia3"),
    ),
    Known(
        "error",
        r"rows in a paired forward",
        "dbrx opt",
        kinds=("lora", "ia3"),
        forwards=("paired",),
    ),
    Known(
        "error",
        r"rows in a paired forward",
        "gemma4_text",
        kinds=("lora",),
        forwards=("paired",),
    ),
    Known(
        "error",
        r"zeros_like",
        "gemma4_text gemma4_unified_text",
        kinds=("prefix",),
        forwards=("paired",),
    ),
    # not attachable
    Known(
        "not attachable",
        r"'NoneType' object is not callable",
        "cpmant mllama moshi",
        kinds=("prompt",),
    ),
    Known(
        "not attachable",
        r"Cannot get conv state",
        "bailing_hybrid bamba falcon_h1 granitemoehybrid inkling2_text inkling_text jamba "
        "kimi_linear lfm2 lfm2_moe lfm3 nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe "
        "qwen3_5_moe_text qwen3_5_text qwen3_next zamba zamba2 zaya",
        kinds=("prefix",),
    ),
    Known(
        "not attachable",
        r"Sizes of tensors must match",
        "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 dots3_note dots3_note_text glm4_moe_lite "
        "glm_moe_dsa hy_v4 longcat_flash mimo_v2_flash minicpm3 youtu",
        kinds=("prefix",),
    ),
    Known(
        "not attachable",
        r"The size of tensor a",
        "whisper",
        kinds=("prefix",),
    ),
    Known(
        "not attachable",
        r"decoder_input_ids",
        "prophetnet",
        kinds=("prefix",),
    ),
    Known(
        "not attachable",
        r"entropy-based patching",
        "blt",
        kinds=("prompt",),
    ),
    Known(
        "not attachable",
        r"get_linear_cache",
        "minimax",
        kinds=("prefix",),
    ),
    Known(
        "not attachable",
        r"indexer_position_ids",
        "qwen4_exp qwen4_exp_text",
        kinds=("prefix",),
    ),
    Known(
        "not attachable",
        r"no attribute 'dtype'",
        "phimoe",
        kinds=("lora", "ia3"),
    ),
    Known(
        "not attachable",
        r"no attribute 'reshape'",
        "deepseek_v4",
        kinds=("prompt",),
    ),
    Known(
        "not attachable",
        r"self_attention_cache",
        "blt",
        kinds=("prefix",),
    ),
    Known(
        "not attachable",
        r"store_compression_weights",
        "deepseek_v4",
        kinds=("prefix",),
    ),
    Known(
        "not attachable",
        r"the adapter changes no logit",
        "falcon_mamba mamba mamba2 openai-gpt reformer rwkv xlm xlnet xlstm",
        kinds=("prefix",),
    ),
    Known(
        "not attachable",
        r"to reverse the embedding",
        "gemma4 gemma4_text qwen4_exp qwen4_exp_text",
        kinds=("prompt",),
    ),
    Known(
        "not attachable",
        r"update_index",
        "minimax_m3_vl_text",
        kinds=("prefix",),
    ),
    # not buildable
    Known(
        "not buildable",
        r"not a language model by itself",
        "gemma4_assistant gemma4_unified_assistant",
    ),
    Known(
        "not buildable",
        r"not a text model",
        "musicgen musicgen_melody",
    ),
)
