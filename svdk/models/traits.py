"""What transformers' families of models need to be run rightly: caches, positions, padding."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from transformers import PreTrainedModel

from svdk.errors import InputError
from svdk.models.rotary import LengthRotary

CACHE_NAMES = ("past_key_values", "cache_params")
"""Arguments under which a model takes one of transformers' caches."""

# transformers' own generate is wrong for these with padded rows: found, and kept up to date, by
# tests/generation/test_families.py.
UNPADDED = {
    "cpmant": "it ignores the attention mask",
    "git": "it does not mask padding while it decodes",
}
# These run every token of the row again at each step, which is always right.
NO_CACHE = {
    "cpmant",  # with its cache, transformers' own generate has other logits than without
    "recurrent_gemma",  # it keeps its states in its own modules: the two models would share them
}
REFUSED: dict[str, str] = {}


@dataclass(frozen=True)
class Traits:
    """How a model has to be run."""

    cache: str | None
    """The argument that takes its cache; None: it runs every token of the row again at each step."""
    arguments: frozenset[str]
    """Arguments that its forward names."""
    takes_any: bool
    """Whether it takes others too."""
    positions: bool
    """Whether it is given position ids that count from the row's first token."""
    padding: str | None
    """Why a row would not be the same with padding to its left; None: it is."""
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
    signature = inspect.signature(module.forward).parameters
    arguments = frozenset(signature)
    takes_any = any(one.kind is one.VAR_KEYWORD for one in signature.values())
    cache = next((name for name in CACHE_NAMES if name in arguments), None)
    positions, padding = "position_ids" in arguments, UNPADDED.get(kind)
    # RoBERTa's positions start behind its padding id, and follow the ids: the model counts for itself.
    if any(hasattr(part, "create_position_ids_from_input_ids") for part in module.modules()):
        positions = False
        padding = padding or "its positions do not start at 0 and count padding while it decodes"
    elif not positions and any("PositionalEmbedding" in type(part).__name__ for part in module.modules()):
        padding = padding or "its positions count padding"
    cache = None if kind in NO_CACHE else cache
    return Traits(cache, arguments, takes_any, positions, padding, LengthRotary(module))


def _refused(name: str, why: str) -> InputError:
    return InputError(f"model was {name}, {why}; allowed: a decoder-only model with a key-value cache")
