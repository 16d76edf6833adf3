"""Between vLLM's adapters and a steered model: rules as adapters load, the adapter on the warm rows alone."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svdk.calibration.artifact import JSON_NAME
from svdk.vllm.checkpoint import checkpoint_fingerprint
from svdk.vllm.rules import AdapterRefusedError, Served, read_rule

if TYPE_CHECKING:
    from svdk.vllm.pairing import Pairing

logger = logging.getLogger("vllm.svdk")
_PATCHED = "_svdk_patched"


def attach(manager: Any, pairing: Pairing) -> None:
    """Follow vLLM's LoRA manager: which adapter each token has, and its matrices on the warm rows only."""
    for wrapper in manager.punica_wrapper_mapping.values():
        _follow(wrapper, pairing)


def _follow(wrapper: Any, pairing: Pairing) -> None:
    update, add = wrapper.update_metadata, wrapper.add_lora_linear

    def update_metadata(mapping: Any, ids: list[int | None], *args: Any, **options: Any) -> None:
        update(mapping, ids, *args, **options)
        pairing.plan(mapping, ids, wrapper.token_lora_indices)

    def add_lora_linear(y: Tensor, x: Tensor, *args: Any, **options: Any) -> Tensor | None:
        rows = x.shape[0] // 2 if pairing.runs_base else x.shape[0]
        warm = x[:rows]
        if pairing.on_cpu:
            # vLLM's CPU code looks up slot -1, which is the last one, for rows without an adapter: they
            # bring zeros there, so that whatever adapter lives in it adds nothing.
            has = wrapper.token_lora_indices[:rows] >= 0
            warm = torch.where(has[:, None], warm, 0.0) if len(has) == rows else warm
        return add(y[:rows], warm, *args, **options)

    wrapper.update_metadata, wrapper.add_lora_linear = update_metadata, add_lora_linear


def patch_adapter_loading() -> None:
    """Have vLLM's workers read the rule of every adapter that they load; a second call does nothing."""
    from vllm.lora.worker_manager import WorkerLoRAManager

    load = WorkerLoRAManager._load_adapter
    if getattr(load, _PATCHED, False):
        return

    def load_adapter(self: Any, lora_request: Any) -> Any:
        from vllm.lora.utils import get_adapter_absolute_path

        model = self._adapter_manager.model
        pairing = getattr(model, "pairing", None)
        folder = Path(get_adapter_absolute_path(lora_request.lora_path))
        if pairing is None:
            if (folder / JSON_NAME).is_file():
                logger.warning(
                    "The adapter %s is calibrated, but %s does not steer; serve it with `svdk serve`.",
                    lora_request.lora_name,
                    type(model).__name__,
                )
            return load(self, lora_request)
        if not folder.is_dir():
            return load(self, lora_request)  # which says that there is none
        rule = read_rule(folder, served(model))
        try:
            lora = load(self, lora_request)
        except (ValueError, RuntimeError, KeyError, OSError) as error:
            raise AdapterRefusedError(folder, error) from error
        _scale(lora, rule.config.scale)
        known = self.list_adapters() | {lora_request.lora_int_id}
        pairing.rules = {i: r for i, r in pairing.rules.items() if i in known} | {lora.id: rule}
        pairing.refresh()
        return lora

    setattr(load_adapter, _PATCHED, True)
    WorkerLoRAManager._load_adapter = load_adapter


def _scale(lora: Any, scale: float) -> None:
    """The adapter times ``scale``: vLLM has its own scale in the second matrix already."""
    if scale == 1:
        return
    for layer in lora.loras.values():
        parts = layer.lora_b if isinstance(layer.lora_b, list) else [layer.lora_b]
        for part in parts:
            if part is not None:
                part *= scale


def served(model: Any) -> Served:
    """The base model of an engine, as adapters are checked against it; read from its checkpoint once."""
    found = model.__dict__.get("svdk_served")
    if found is None:
        config = model.svdk_config.model_config
        folder = _checkpoint_folder(config)
        fingerprint = None if folder is None else checkpoint_fingerprint(folder)
        if fingerprint is None:
            logger.warning(
                "The checkpoint %s holds no plain safetensors: adapters cannot be compared with it.",
                config.model,
            )
        dial = model.pairing.requests is not None
        found = Served(config.hf_text_config.vocab_size, fingerprint, str(config.model), dial)
        model.__dict__["svdk_served"] = found
    return found


def _checkpoint_folder(config: Any) -> Path | None:
    if Path(config.model).is_dir():
        return Path(config.model)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(config.model, "config.json", revision=config.revision)
    return Path(found).parent if isinstance(found, str) else None
