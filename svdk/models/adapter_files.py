"""A PEFT adapter folder, read and checked before memory is allocated for what it describes."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from svdk.errors import ArtifactError, first_line
from svdk.utils.checks import check_count
from svdk.utils.files import read_object

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

WARMSTART_FILE = "warmstart.json"
"""What ``svdk warmstart`` records beside the adapter: base model, settings, loss."""
MAX_CONFIG_BYTES = 1 << 20
MAX_HEADER_BYTES = 1 << 24
"""Of a safetensors file: enough for a hundred thousand tensors."""
SIZE_FACTOR = 64
"""How many times larger than the file a configuration may be where both differ; it is a few at most."""
PIECE = 4096
"""Rows of an embedding that are compared at a time."""
WRAPPER = re.compile(r"\b(base_layer|original_module|token_adapter)\.")
"""What PEFT puts into the name of a base tensor whose layer has an adapter, this one or another."""
TRAINING_ONLY = ".lora_monteclora_sampler."
"""In the names of tensors that PEFT writes and leaves out again when an adapter is loaded for inference."""
MISFIT = (
    ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError, OverflowError, ImportError,
    re.error,
)  # fmt: skip
"""What PEFT raises for a configuration that makes no sense, or none on this model."""


def paths(folder: Path) -> tuple[Path, Path]:
    """Configuration and weights; ``ArtifactError`` unless both are there."""
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for path in (config, weights):
        if not path.is_file():
            raise ArtifactError(f"adapter {folder} has no {path.name}; allowed: a PEFT adapter folder")
    return config, weights


def read_adapter(folder: Path) -> tuple[PeftConfig, dict[str, tuple[int, ...]]]:
    """The configuration, and the shape of every tensor; the weights stay where they are."""
    from peft import PeftConfig

    config_path, weights_path = paths(folder)
    read_config(config_path)
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except MISFIT as error:
        raise ArtifactError(f"{config_path} is damaged: {first_line(error)}") from error
    if getattr(config, "megatron_config", None) is not None:  # PEFT would import what megatron_core names
        raise ArtifactError(f"{config_path}: megatron_config was given; allowed: None, no code is imported")
    config.inference_mode = True
    config.base_model_name_or_path = None  # set anew by get_peft_model, which warns when it differs
    return config, _read_shapes(weights_path)


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``, of at most ``MAX_CONFIG_BYTES``."""
    return read_object(path, ArtifactError, limit=MAX_CONFIG_BYTES)


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The header of a safetensors file; ``ArtifactError`` unless it describes exactly the file's bytes.

    The library maps the whole file before it looks, whatever size the file or its header claim to have.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if end != size - 8 - length:
            raise ValueError(f"tensors of {end} bytes in a file of {size} with a header of {length}")
        return {name: tuple(map(int, entry["shape"])) for name, entry in header.items()}
    except (*MISFIT, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged: {first_line(error)}") from error


def read_weights(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """The adapter's tensors of these names."""
    from safetensors import SafetensorError, safe_open

    path = folder / "adapter_model.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ArtifactError(f"{path} is damaged: {first_line(error)}") from error


def check_prompt(config: PeftConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    """``ValueError`` when a prompt's configuration is out of proportion to the prompt in the file."""
    if "prompt_embeddings" not in shapes:
        raise ValueError("the tensor prompt_embeddings is missing")
    size = 1
    for name in ("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_layers"):
        value = getattr(config, name)
        if value is None and name != "num_virtual_tokens":
            continue  # PEFT takes it from the model
        check_count(name, value)
        size *= value if name != "num_layers" or config.peft_type == "PREFIX_TUNING" else 1
    shape = shapes["prompt_embeddings"]
    if size > SIZE_FACTOR * math.prod(shape):
        raise ValueError(
            f"the configuration describes {size} numbers, the tensor prompt_embeddings has shape {shape}"
        )


def trial_config(config: PeftConfig, model: PreTrainedModel) -> PeftConfig:
    """The configuration for a trial on the meta device; ``ValueError`` for indices out of range."""
    trial: Any = copy.deepcopy(config)
    tokens = getattr(config, "trainable_token_indices", None) or []
    largest = max(chain.from_iterable(tokens.values()) if isinstance(tokens, dict) else tokens, default=0)
    embedding: Any = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    if largest >= rows:
        raise ValueError(
            f"trainable_token_indices went up to {largest}; allowed: below {rows}, the vocabulary"
        )
    if config.peft_type == "ADALORA" and trial.rank_pattern:
        masks = trial.rank_pattern.values()
        if not all(isinstance(kept, bool) for mask in masks for kept in mask):
            raise ValueError("rank_pattern was not all true or false; allowed: a mask for every layer")
        if sum(map(len, masks)) > SIZE_FACTOR * sum(map(sum, masks)):
            raise ValueError(f"rank_pattern leaves out too much; allowed: 1 rank in {SIZE_FACTOR} is kept")
        # Only how many are kept counts for the shapes, and a meta tensor takes numbers, but no mask.
        trial.rank_pattern = {name: [1] * sum(mask) for name, mask in trial.rank_pattern.items()}
    return trial


def match_tensors(
    shapes: dict[str, tuple[int, ...]], peft_model: PeftModel, base: dict[str, Tensor]
) -> tuple[list[str], dict[str, Tensor]]:
    """The names of the adapter's own tensors, and what others in the file are copies of: tensors of ``base``.

    ``ValueError`` names the first tensor that the model has no place for or lacks, or that has another shape.
    """
    from peft import get_peft_model_state_dict

    own = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    twice = get_peft_model_state_dict(peft_model, save_embedding_layers=True)
    prefix = "base_model." if peft_model.active_peft_config.is_prompt_learning else "base_model.model."
    copies = {}
    for name in sorted(shapes.keys() | own.keys()):
        place = own.get(name)
        if place is None:
            key = name.removeprefix(prefix)
            place = copy_of = base.get(key, base.get(WRAPPER.sub("", key)))
            if copy_of is not None:
                copies[name] = copy_of
            else:  # a trained copy of a layer is written once more under another name
                place = twice.get(name)
        if place is None and TRAINING_ONLY not in name:
            raise ValueError(f"the model has no place for the tensor {name}")
        if name not in shapes:
            raise ValueError(f"the tensor {name} is missing")
        if place is not None and shapes[name] != tuple(place.shape):
            raise ValueError(f"the tensor {name} has shape {shapes[name]}, not {tuple(place.shape)}")
    return list(own), copies


def read_own_weights(folder: Path, own: list[str], copies: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's own tensors.

    PEFT adds the embedding and the head when an adapter targets them, when the vocabulary was resized or when
    it is asked to: ``ValueError`` names the first of these that is not the base model's.
    """
    for name, tensor in copies.items():
        if not _equal(read_weights(folder, [name])[name], tensor):
            raise ValueError(
                f"the tensor {name} is not that of the base model; allowed: an adapter that leaves it as it "
                "is or trains a copy (modules_to_save)"
            )
    return read_weights(folder, own)


def _equal(stored: Tensor, base: Tensor) -> bool:
    """Whether two tensors are equal in the type of either, a piece at a time."""
    as_base, as_stored = True, stored.is_floating_point()
    for ours, theirs in zip(base.detach().split(PIECE), stored.split(PIECE), strict=True):
        mine = ours.to(theirs.device)
        as_base = as_base and torch.equal(theirs.to(mine.dtype), mine)
        as_stored = as_stored and torch.equal(mine.to(theirs.dtype), theirs)
    return as_base or as_stored
