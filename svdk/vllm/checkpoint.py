"""The fingerprint of a checkpoint on disk, without loading it: engines fuse and shard their weights."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import torch

from svdk.models.fingerprints import sample_bytes, sample_index

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_HEADER_BYTES = 1 << 27


def checkpoint_fingerprint(folder: str | Path) -> str | None:
    """``model_fingerprint`` of the causal language model saved in ``folder``; sha256 in hex.

    Reads the headers of its safetensors files and 64 numbers of each tensor. None where there are none, or
    where a tensor is stored otherwise than as floating-point numbers (quantised checkpoints).
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files or not (folder / "config.json").is_file():
        return None
    config = json.loads((folder / "config.json").read_text())
    tensors: dict[str, tuple[Path, int, str, list[int]]] = {}
    for file in files:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= MAX_HEADER_BYTES:
                return None
            header = json.loads(stream.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                tensors[name] = (file, 8 + length + entry["data_offsets"][0], entry["dtype"], entry["shape"])
    if config.get("tie_word_embeddings", _tied(config)):
        tensors.pop("lm_head.weight", None)
    digest = hashlib.sha256(str(config.get("model_type")).encode())
    for name, (file, start, dtype, shape) in sorted(tensors.items()):
        if name.endswith("rotary_emb.inv_freq"):  # a buffer that old checkpoints hold
            continue
        if dtype not in _DTYPES:
            return None
        digest.update(f"\n{name} {tuple(shape)} ".encode())
        digest.update(_sample(file, start, _DTYPES[dtype], math.prod(shape)))
    return digest.hexdigest()


def _tied(config: dict[str, object]) -> bool:
    """What a configuration means that does not say; Gemma's families tie by default."""
    return str(config.get("model_type", "")).startswith("gemma")


def _sample(file: Path, start: int, dtype: torch.dtype, size: int) -> bytes:
    """The entries that ``model_fingerprint`` takes, read one by one."""
    taken = bytearray()
    with file.open("rb") as stream:
        for i in sample_index(size).tolist():
            stream.seek(start + i * dtype.itemsize)
            taken += stream.read(dtype.itemsize)
    values = torch.frombuffer(taken, dtype=dtype) if taken else torch.empty(0, dtype=dtype)
    return sample_bytes(values)
