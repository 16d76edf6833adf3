"""What an adapter's calibration asks of a serving engine, read and checked when the adapter is loaded."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from svdk.calibration.artifact import JSON_NAME, Steering
from svdk.errors import ArtifactError, InputError
from svdk.generation.sampler import WITHOUT_BASE
from svdk.models.adapter_files import WARMSTART_FILE, read_adapter, read_config
from svdk.models.adapter_rules import check_config
from svdk.ops.configs import SteeringConfig

REFUSED = "svdk refused the adapter"
"""What the message of every refusal starts with; the server looks for it to answer 400 instead of 500."""
LEVERS = (None, "none", "scale", "vector", "constant", "positions")
MAX_POSITIONS = 4096
"""Each slot holds this many strengths at most."""
_SERVED = {"strength", "direction", "alpha", "penalty", "strength_mode", "positions", "scale", "vector"}
"""Fields that steer, and that are served here."""
_TOLD = {
    *("lever", "options", "bias", "estimator", "objective", "gain", "confidence_interval", "at_bound"),
    *("peft_type", "base_model_fingerprint", "adapter_fingerprint", "tokenizer_fingerprint", "vocab_size"),
    *("data_hash", "metrics", "svdk_version", "format_version", "statistics"),
}
"""Fields that say what the steering is or where it comes from; they change no logits here."""
_UNSUPPORTED = {
    "use_dora": "vLLM adds the low-rank product only",
    "lora_bias": "vLLM adds the low-rank product only",
    "fan_in_fan_out": "vLLM reads weights as they are",
    "modules_to_save": "vLLM loads low-rank matrices only",
    "trainable_token_indices": "embeddings are shared by the warm and the base rows",
    "target_parameters": "vLLM adapts modules",
    "alora_invocation_tokens": "the adapter must be on at every token",
}
"""Settings of an adapter that vLLM passes over in silence, or whose layers are not run twice."""
_HEADS = ("embed_tokens", "lm_head", "lora_embedding")


class AdapterRefusedError(ArtifactError):
    """An adapter that cannot be served steered; the message says why, and the engine goes on."""

    def __init__(self, folder: str | Path, why: object) -> None:
        """``why``: what is wrong with it and what is allowed."""
        super().__init__(f"{REFUSED} {folder}: {why}")


@dataclass(frozen=True, eq=False)
class Rule:
    """How rows of one adapter are steered."""

    config: SteeringConfig
    vector: Tensor | None = None
    """(V,) for direction ``vector``."""

    @property
    def steers(self) -> bool:
        """Whether the logits of the adapter change at all."""
        return self.config.steers

    @property
    def needs_base(self) -> bool:
        """Whether its tokens need a row of the base model."""
        return self.steers and self.config.direction != "vector"


@dataclass(frozen=True)
class Served:
    """The base model that an adapter meets."""

    vocab_size: int
    fingerprint: str | None
    """As ``svdk.models.fingerprints.model_fingerprint``; None where the checkpoint cannot be read."""
    name: str
    dial: bool = True
    """Whether the engine tells which output position a row is, and its dial."""


def read_rule(folder: str | Path, served: Served) -> Rule:
    """The rule of the adapter in ``folder``, for the model ``served``.

    Raises:
        AdapterRefusedError: no or an invalid ``steering.json``, another base model, an adapter that vLLM
            would not apply as PEFT does, or a steering that is not served.

    """
    folder = Path(folder)
    try:
        _check_adapter(folder)
        steering = Steering.load(folder)
        _check_model(folder, steering, served)
        return rule_of(steering, served)
    except AdapterRefusedError:
        raise
    except (InputError, OSError) as error:
        raise AdapterRefusedError(folder, error) from error


def rule_of(steering: Steering, served: Served) -> Rule:
    """The rule of a steering; ``InputError`` for whatever is not known here, today's or a later svdk's."""
    if steering.lever not in LEVERS:
        allowed = ", ".join(str(x) for x in LEVERS if x)
        raise InputError(f"lever was {steering.lever!r}; allowed in serving: {allowed}")
    for field in dataclasses.fields(steering):
        if field.name in _SERVED | _TOLD:
            continue
        if not _is_default(field, getattr(steering, field.name)):
            raise InputError(f"{field.name} was given; allowed in serving: a steering without it")
    if len(steering.positions) > MAX_POSITIONS:
        have = len(steering.positions)
        raise InputError(f"positions had {have} strengths; allowed in serving: at most {MAX_POSITIONS}")
    if len(steering.positions) and not served.dial:
        raise InputError("positions were given; allowed in an engine that does not say them: one strength")
    config = steering.override()
    if steering.lever in WITHOUT_BASE and not config.steers:
        return Rule(SteeringConfig(strength=0.0, alpha=0.0, scale=config.scale))
    vector = None if steering.vector is None else steering.vector.float()
    if vector is not None and vector.shape[0] != served.vocab_size:
        raise InputError(f"vector had {vector.shape[0]} entries; allowed: {served.vocab_size}, one a token")
    return Rule(config, vector)


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    if field.default_factory is not dataclasses.MISSING:
        return bool(value == field.default_factory())
    return value is None or bool(value == field.default)


def _check_adapter(folder: Path) -> None:
    """``InputError`` for an adapter that vLLM would not apply to the warm rows alone, as PEFT does."""
    if not (folder / JSON_NAME).is_file():
        raise InputError(f"it has no {JSON_NAME}; allowed: an adapter that `svdk calibrate` has calibrated")
    config, shapes = read_adapter(folder)
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        raise InputError(f"PEFT type was {kind}; allowed in serving: LORA")
    for name, why in _UNSUPPORTED.items():
        if value := getattr(config, name, None):
            raise InputError(f"adapter had {name}={value!r}; allowed in serving: none ({why})")
    check_config(config)
    for name in sorted(shapes):
        if any(part in name for part in _HEADS):
            raise InputError(
                f"the adapter holds the tensor {name}; allowed in serving: layers between embedding and head"
            )


def _check_model(folder: Path, steering: Steering, served: Served) -> None:
    if steering.vocab_size not in (None, served.vocab_size):
        raise ArtifactError(
            f"vocabulary size does not match: the artifact was made for {steering.vocab_size}, "
            f"{served.name} has {served.vocab_size}"
        )
    found = {"the artifact": steering.base_model_fingerprint}
    record = folder / WARMSTART_FILE
    if record.exists():
        found["the adapter"] = read_config(record).get("base_model_fingerprint")
    for what, made_on in found.items():
        if made_on is not None and served.fingerprint is not None and made_on != served.fingerprint:
            raise ArtifactError(
                f"base model does not match: {what} was made for {made_on}, {served.name} is "
                f"{served.fingerprint}"
            )
