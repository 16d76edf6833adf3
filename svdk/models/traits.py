"""What transformers' families of models need to be run rightly: caches, positions, padding."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from transformers import PreTrainedModel

from svdk.errors import InputError
from svdk.models.rotary import LengthRotary

CACHE_NAMES = ("past_key_values", "cache_params")
"""Arguments under which a model takes one of transformers' caches."""

# What is wrong in transformers' own generate, too; tests/generation/test_families.py finds it and keeps the
# list up to date.
UNPADDED = {
    "deepseek_v4": "it compresses blocks of columns",
    "git": "it does not mask padding while it decodes",
    "minimax_m3_vl_text": "its sparse attention counts blocks of columns",
    "recurrent_gemma": "its states run over padding",
    "rwkv": "it ignores the attention mask",
    "xlstm": "its states run over padding",
}
UNPADDED_PREFIX = dict.fromkeys(
    ("moss_transcribe_diarize", "roformer"),
    "it rotates keys by their columns, those of a tuned prefix excepted",
)
_OTHER_LOGITS = "with its cache, its own generate has other logits than without"
NO_CACHE = {
    "blt": "transformers cannot make a cache for its configuration",
    "moshi": _OTHER_LOGITS,
    "recurrent_gemma": "it keeps its states in its own modules, which two models would share",
    "xlstm": "its own generate fails with its cache",
    "zamba2": _OTHER_LOGITS,
}
_TWO_SIDED = "whose tokens see later ones"
REFUSED = {
    "cpmant": _TWO_SIDED,
    "prophetnet": _TWO_SIDED,
    "reformer": "which hashes the whole row into buckets",
    "xlm": "which predicts by adding a token to the row",
    "xlnet": "which predicts by adding a token to the row",
}
ENCODERS = {
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie"),
    *("megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta"),
    *("xlm-roberta-xl", "xmod"),
}
"""Decoders where the configuration says ``is_decoder``."""


@dataclass(frozen=True)
class Traits:
    """How a model has to be run."""

    cache: str | None
    """The argument that takes its cache; None: it runs every token of the row again at each step."""
    no_cache: str | None
    """Why it does so although it has one."""
    arguments: frozenset[str]
    """Arguments that its forward names."""
    takes_any: bool
    """Whether it takes others too."""
    positions: bool
    """Whether it is given position ids that count from the row's first token."""
    own_positions: bool
    """Whether it counts them in a way of its own, although it takes position ids."""
    padding: str | None
    """Why a row would not be the same with padding to its left; None: it is."""
    padding_of_prefix: str | None
    """The same, with a tuned prefix."""
    rotary: LengthRotary
    """Rotary tables that depend on the row's length."""

    def accepts(self, name: str) -> bool:
        """Whether its forward takes the argument ``name``."""
        return self.takes_any or name in self.arguments


def find_traits(module: PreTrainedModel) -> Traits:
    """How ``module`` has to be run.

    Raises:
        InputError: it is no decoder-only language model, or one that svdk cannot run rightly.

    """
    name, kind = type(module).__name__, str(getattr(module.config, "model_type", ""))
    if getattr(module.config, "is_encoder_decoder", False):
        raise _refused(name, "an encoder-decoder model")
    if not isinstance(module, PreTrainedModel) or not module.can_generate():
        raise _refused(name, "which does not generate text")
    if kind in REFUSED:
        raise _refused(name, REFUSED[kind])
    if kind in ENCODERS and not getattr(module.config, "is_decoder", False):
        raise _refused(name, f"{_TWO_SIDED} without is_decoder=True in its configuration")
    signature = inspect.signature(module.forward).parameters
    arguments = frozenset(signature)
    takes_any = any(one.kind is one.VAR_KEYWORD for one in signature.values())
    cache = next((name for name in CACHE_NAMES if name in arguments), None)
    positions, own_positions, padding = "position_ids" in arguments, False, UNPADDED.get(kind)
    # RoBERTa's positions start behind its padding id, and follow the ids: the model counts for itself.
    if any(hasattr(part, "create_position_ids_from_input_ids") for part in module.modules()):
        positions, own_positions = False, positions
        padding = padding or "its positions do not start at 0 and count padding while it decodes"
    elif (
        kind != "roformer"  # whose sinusoids rotate keys: only distances count
        and not positions
        and any("PositionalEmbedding" in type(part).__name__ for part in module.modules())
    ):
        padding = padding or "its positions count padding"
    no_cache = NO_CACHE.get(kind)
    return Traits(
        cache=None if no_cache else cache,
        no_cache=no_cache,
        arguments=arguments,
        takes_any=takes_any,
        positions=positions,
        own_positions=own_positions,
        padding=padding,
        padding_of_prefix=padding or UNPADDED_PREFIX.get(kind),
        rotary=LengthRotary(module),
    )


def _refused(name: str, why: str) -> InputError:
    return InputError(f"model was {name}, {why}; allowed: a decoder-only language model")
