"""Fingerprints that tie adapters and artifacts to the base model and tokenizer they were made for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from svdk.errors import ArtifactError
from svdk.models.adapter_files import WARMSTART_FILE, paths, read_config
from svdk.utils.files import add_to_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLES_PER_TENSOR = 64
PROBE = "The 3 quick foxes — naïve, 東京, Ω≈π — said: \"jump();\"\n\tx_1 = {'a': 0.5}  …🙂"


def model_fingerprint(model: nn.Module) -> str:
    """sha256 (hex) over the base model's type, parameter names and shapes, and a sample of each tensor.

    Adapters do not count: a base model and the same model inside a ``PeftModel`` give the same. Values
    are rounded to bfloat16 first, so that a model loaded as float32 or as bfloat16 gives the same.
    """
    from peft import PeftModel

    base = model.get_base_model() if isinstance(model, PeftModel) else model
    digest = hashlib.sha256(str(getattr(base.config, "model_type", type(base).__name__)).encode())
    for name, tensor in sorted(base_parameters(base)):
        digest.update(f"\n{name} {tuple(tensor.shape)} ".encode())
        digest.update(_sample(tensor))
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 (hex) over vocabulary, BOS and EOS, and how a probe text is tokenised.

    Padding, truncation and the chat template do not count: they do not change what an id means.
    """
    content = {
        "vocab": sorted(tokenizer.get_vocab().items()),
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id],
        "probe": list(tokenizer(PROBE, add_special_tokens=False).input_ids),
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def adapter_fingerprint(folder: str | Path) -> str:
    """sha256 (hex) over an adapter's weights and those parts of its config that change what it computes.

    Raises :class:`ArtifactError` when the folder is not an adapter with safetensors weights.
    """
    config_path, weights_path = paths(Path(folder))
    config = read_config(config_path)
    for key in ("base_model_name_or_path", "revision", "inference_mode", "peft_version"):
        config.pop(key, None)
    return add_to_hash(hashlib.sha256(json.dumps(config, sort_keys=True).encode()), weights_path)


def check_base_model(model: nn.Module, folder: str | Path) -> None:
    """Raise :class:`ArtifactError` if ``folder`` records that its adapter was made on another base model."""
    path = Path(folder) / WARMSTART_FILE
    if not path.exists():  # an adapter made by other tools
        return
    record = read_config(path)
    if missing := {"base_model_fingerprint", "base_model"} - set(record):
        raise ArtifactError(f"{path} is damaged: it has no {', '.join(sorted(missing))}")
    made_on, name = record["base_model_fingerprint"], record["base_model"]
    if made_on != model_fingerprint(model):
        raise ArtifactError(
            f"adapter {folder} was made on the base model {name}; the model given is {model_name(model)}, "
            "whose weights differ"
        )


def checksums(base: nn.Module) -> dict[str, int]:
    """A number for each parameter of the base model that changes with any of its bits; one pass over them."""
    return {name: _checksum(tensor) for name, tensor in base_parameters(base) if not tensor.is_meta}


@torch.no_grad()
def _checksum(tensor: Tensor) -> int:
    data = tensor.data.contiguous().flatten().view(torch.uint8)
    whole = data.numel() % 8 == 0 and data.storage_offset() % 8 == 0
    return int((data.view(torch.int64) if whole else data).sum(dtype=torch.int64))


def base_parameters(base: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters of a model, those of adapter layers inside it left out, under their original names."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    inner = {}  # wrapper module -> the child that holds the original layer
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            inner[name] = "base_layer"
        elif isinstance(module, AuxiliaryTrainingWrapper):  # token wrappers hold it in an adapter layer
            inner[name] = "original_module" if module._modules.get("original_module") else "token_adapter"
    kept: list[tuple[str, Tensor]] = []
    for name, tensor in base.named_parameters():
        parts, clean, path = name.split("."), [], ""
        for part in parts:
            wrapped = inner.get(path)
            path = f"{path}.{part}" if path else part
            if wrapped is None:
                clean.append(part)
            elif part != wrapped:
                break
        else:
            kept.append((".".join(clean), tensor))
    return kept


def _sample(tensor: Tensor) -> bytes:
    """The bytes of evenly spaced entries, rounded to bfloat16."""
    flat = tensor.detach().reshape(-1)
    return sample_bytes(flat[sample_index(flat.numel()).to(flat.device)].cpu())


def sample_index(size: int) -> Tensor:
    """int64: the entries of a tensor of ``size`` numbers that a fingerprint takes."""
    count = min(SAMPLES_PER_TENSOR, size)
    return torch.arange(count) * max(size - 1, 0) // max(count - 1, 1)


def sample_bytes(values: Tensor) -> bytes:
    """What a fingerprint makes of those entries, on the CPU."""
    if values.is_floating_point():
        values = values.to(torch.bfloat16).view(torch.int16)
    return values.contiguous().numpy().tobytes()


def model_name(model: nn.Module) -> str:
    """What to call a model in an error message."""
    return str(getattr(model, "name_or_path", "") or type(model).__name__)
