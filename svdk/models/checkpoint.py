"""The base view of a model against the checkpoint it was loaded from."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svdk.errors import InputError
from svdk.models.adapter_rules import check_leaves_base
from svdk.models.fingerprints import base_parameters, model_name

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""What is compared; checkpoints in other types are converted in ways of their own while they are loaded."""
ROWS = 4
"""Read of each tensor: whatever rewrites weights reaches all rows."""
WITNESSES = 4
"""Tensors without an adapter that must equal the checkpoint before it counts as the model's own."""
INDEX = "model.safetensors.index.json"
_checked: weakref.WeakKeyDictionary[nn.Module, tuple[Any, ...]] = weakref.WeakKeyDictionary()


def check_base_view(module: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Refuse a model whose base weights an adapter has rewritten, whichever adapter is active now.

    The configuration of every attached adapter is checked, and where the model was loaded from safetensors
    on this machine, a few rows of every weight in ``layers`` (adapter layers by name) are compared with
    theirs. What has no counterpart there is skipped: renamed, converted, resized or quantised weights, and
    models that are not the checkpoint's at all. Files are read once for a model and its adapters.

    Raises:
        InputError: naming the setting, or the tensor that differs from its checkpoint.

    """
    configs = getattr(module, "peft_config", None) or {}
    owned = [p for layer in layers.values() for p in _original(layer).parameters()]
    state = (*map(id, configs.values()), *(p.data_ptr() for p in owned))
    for config in configs.values():
        check_leaves_base(config)
    if not layers or _checked.get(module) == state:
        return
    try:
        changed = _first_change(module, {id(p) for p in owned})
    except Exception:  # a folder that cannot be read (any more) is no evidence against the model
        changed = None
    if changed is not None:
        raise InputError(
            f"base weight {changed} was not that of the checkpoint {model_name(module)}; allowed: a base "
            "model that adapters left as it is (or one loaded from a folder of its own, if it is to differ)"
        )
    _checked[module] = state


def _original(layer: Any) -> nn.Module:
    original = getattr(layer, "original_module", None)
    return layer.get_base_layer() if original is None else original


def _first_change(module: Any, owned: set[int]) -> str | None:
    """The first adapted weight that differs from the checkpoint, if the rest of the model does not."""
    config = module.config
    if getattr(config, "quantization_config", None) is not None:
        return None
    files = _tensor_files(
        str(getattr(config, "_name_or_path", "") or ""), getattr(config, "_commit_hash", None)
    )
    converted = _converted(module)
    adapted: list[tuple[str, Tensor]] = []
    others: list[tuple[str, Tensor]] = []
    for name, tensor in base_parameters(module) if files else []:
        if type(tensor) is nn.Parameter and tensor.dtype in DTYPES.values() and not converted(name):
            (adapted if id(tensor) in owned else others).append((name, tensor))
    prefix = f"{module.base_model_prefix}."
    witnesses = 0
    for name, tensor in others:  # a random model of this configuration, or one trained whole, is its own base
        if tensor.dim() > 1 and witnesses < WITNESSES:
            same = _same(files, prefix, name, tensor)
            if same is False:
                return None
            witnesses += same is True
    for name, tensor in adapted:
        if _same(files, prefix, name, tensor) is False:
            return name
    return None


def _tensor_files(name: str, commit: str | None) -> dict[str, Any]:
    """Tensor name -> open safetensors file of the checkpoint; empty when there is none on this machine."""
    from huggingface_hub import try_to_load_from_cache
    from safetensors import safe_open

    folder = Path(name)
    if not name or not folder.is_dir():
        cached = try_to_load_from_cache(name, "config.json", revision=commit) if name and commit else None
        if not isinstance(cached, str):
            return {}
        folder = Path(cached).parent
    paths = [folder / "model.safetensors"]
    if not paths[0].is_file():
        if not (folder / INDEX).is_file():
            return {}
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        paths = [folder / file for file in sorted(set(weight_map.values()))]
    opened = [safe_open(path, framework="pt") for path in paths]
    return {key: file for file in opened for key in file.keys()}  # noqa: SIM118  # not a mapping


def _converted(module: Any) -> Callable[[str], bool]:
    """Whether transformers computed the tensor of a name from others while it loaded the model."""
    targets = [
        pattern
        for conversion in getattr(module, "_weight_conversions", None) or ()
        if hasattr(conversion, "operations")
        for pattern in conversion.target_patterns
    ]
    return lambda name: any(re.search(target, name) for target in targets)


def _same(files: Mapping[str, Any], prefix: str, name: str, tensor: Tensor) -> bool | None:
    """Whether a few rows are those in the checkpoint; None where nothing can be compared."""
    key = next((k for k in (name, prefix + name, name.removeprefix(prefix)) if k in files), None)
    if key is None or tensor.is_meta or not tensor.numel():
        return None
    stored = files[key].get_slice(key)
    if not tensor.dim() or list(stored.get_shape()) != list(tensor.shape) or stored.get_dtype() not in DTYPES:
        return None
    count = min(ROWS, len(tensor))
    rows = sorted({i * (len(tensor) - 1) // max(count - 1, 1) for i in range(count)})
    rest = (slice(0, 1),) * (tensor.dim() - 2) + (slice(None),) * (tensor.dim() > 1)
    places = [(slice(row, row + 1), *rest) for row in rows]
    want = torch.cat([stored[place] for place in places])
    have = torch.cat([tensor.detach()[place] for place in places]).cpu()
    # In its own type, or rounded on the way: a model may be float32 and have been bfloat16 before.
    ways = (want, want.to(torch.bfloat16), want.to(torch.float16))
    return any(torch.equal(way.to(have.dtype), have) for way in ways)
