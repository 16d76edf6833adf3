"""GGUF files: de-quantised once, then loaded from a cache, because that takes ten times as long."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from svdk.errors import InputError, first_line, out_of_memory
from svdk.utils.files import add_to_hash, new_folder

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMAT = 1


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/svdk`` or ``~/.cache/svdk``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "svdk"


def load_gguf(
    path: Path, dtype: str | torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a GGUF file, de-quantised to float32, then cast to ``dtype``.

    The first load keeps the de-quantised weights under :func:`cache_folder`, keyed by the file's sha256;
    where they cannot be kept (disk full, read-only), it warns. Raises :class:`InputError` when the
    file cannot be read as GGUF or the ``gguf`` package is missing.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = torch.float32 if dtype == "auto" else dtype
    folder = cache_folder() / f"gguf-{FORMAT}-{add_to_hash(hashlib.sha256(), path)[:24]}"
    if folder.is_dir():
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
            return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), tokenizer
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            if out_of_memory(error):
                raise
            raise InputError(f"cache folder {folder} is damaged, delete it: {error}") from error
    model, tokenizer = _convert(path)
    try:
        with new_folder(folder) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    except (OSError, SafetensorError) as error:
        warnings.warn(f"cannot keep the de-quantised {path.name} in {folder}: {error}", stacklevel=2)
    cast("nn.Module", model).to(dtype)
    return model, tokenizer


def clear_quantized(model: Any) -> None:
    """Make a de-quantised model an ordinary one: what calls itself quantised cannot be saved."""
    model.is_quantized = False
    for holder, name in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        if hasattr(holder, name):
            delattr(holder, name)


def _convert(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"model {path} needs the gguf package: pip install gguf")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    except (OSError, ValueError, KeyError, IndexError, TypeError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        raise InputError(f"model {path} cannot be read as GGUF: {first_line(error)}") from error
    clear_quantized(model)
    return model, tokenizer
