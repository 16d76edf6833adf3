"""A PEFT adapter folder, read and checked before memory is allocated for what it describes."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdk.errors import ArtifactError, first_line
from svdk.utils.checks import check_count
from svdk.utils.files import read_object

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor

WARMSTART_FILE = "warmstart.json"
"""What ``svdk warmstart`` records beside the adapter: base model, settings, loss."""
MAX_CONFIG_BYTES = 1 << 20
MAX_HEADER_BYTES = 1 << 24
"""Of a safetensors file: enough for a hundred thousand tensors."""
PROMPT_FACTOR = 64
"""How many times larger than the file a prompt's configuration may be; it is a few at most."""
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


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors by name."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / "adapter_model.safetensors"
    try:
        return load_file(path)
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
    if size > PROMPT_FACTOR * math.prod(shape):
        raise ValueError(
            f"the configuration describes {size} numbers, the tensor prompt_embeddings has shape {shape}"
        )


def check_shapes(found: dict[str, tuple[int, ...]], expected: dict[str, Tensor]) -> None:
    """``ValueError`` naming the first tensor of the file that the model has no place for, or lacks."""
    for name in sorted(found.keys() | expected.keys()):
        if name not in expected:
            raise ValueError(f"the model has no place for the tensor {name}")
        if name not in found:
            raise ValueError(f"the tensor {name} is missing")
        if found[name] != tuple(expected[name].shape):
            raise ValueError(f"the tensor {name} has shape {found[name]}, not {tuple(expected[name].shape)}")
