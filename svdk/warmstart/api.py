"""The warm start: a short PEFT fine-tune that tells where the output distribution has to move."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError

from svdk import __version__
from svdk.errors import DataError, InputError
from svdk.models.adapter_files import WARMSTART_FILE
from svdk.models.fingerprints import model_fingerprint, tokenizer_fingerprint
from svdk.models.loading import default_dtype, load_model
from svdk.utils.checks import check_count, check_number, check_seed
from svdk.utils.files import write_json
from svdk.warmstart.data import (
    CALIBRATION_FILE,
    Encoded,
    Example,
    data_hash,
    encode_all,
    load_examples,
    save_examples,
    split,
)
from svdk.warmstart.peft_configs import make_config
from svdk.warmstart.run_folder import drop_broken_checkpoints, open_run, publish, put_back
from svdk.warmstart.training import as_os_error, attached, fit, seeded, training_arguments

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

Source = str | Path | Sequence[Mapping[str, Any] | Example]


def warm_start(
    model: str | Path | PreTrainedModel | tuple[PreTrainedModel, PreTrainedTokenizerBase],
    train: Source,
    *,
    output_dir: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    peft: str = "lora",
    calibration: Source | None = None,
    calibration_fraction: float = 0.2,
    epochs: float = 1.0,
    max_steps: int = -1,
    learning_rate: float = 5e-5,
    lr_scheduler: str = "linear",
    batch_size: int = 8,
    gradient_accumulation: int = 1,
    max_length: int = 512,
    too_long: str = "error",
    seed: int = 0,
    resume: bool | str = "auto",
    overwrite: bool = False,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
    **peft_options: Any,
) -> Path:
    """Fine-tune a PEFT adapter on prompt / completion data; returns its folder.

    ``model`` is what :func:`svdk.load_model` takes, a loaded model (with ``tokenizer``), or a pair
    (model, tokenizer); a loaded model comes back as it was. ``train`` and ``calibration`` are what
    :func:`svdk.warmstart.data.load_examples` takes; without ``calibration``, the part
    ``calibration_fraction`` of ``train`` is held out (deterministic in ``seed``). Only completion tokens
    carry loss. ``max_length`` counts tokens of prompt and completion; examples beyond it are an error, or
    left out with ``too_long="skip"``. ``max_steps`` above 0 overrides ``epochs``. ``peft_options`` go to
    :func:`svdk.warmstart.peft_configs.make_config`.

    The folder is an ordinary PEFT adapter with ``calibration.jsonl`` and ``warmstart.json`` (base model,
    settings, loss) beside it. It is written beside, in ``<output_dir>.partial``, and renamed at the end, so
    that it is either complete or absent. An interrupted run leaves its checkpoints there: with
    ``resume="auto"`` the same call goes on from the last one and ends with the same adapter, ``True``
    insists on it, ``False`` starts anew. An adapter already there is only replaced with ``overwrite``.

    Raises :class:`InputError` or :class:`DataError` before anything is written, and OSError when a
    write fails. Under ``accelerate launch`` it trains on all processes and the first one writes.
    """
    check_number("epochs", epochs, "(0, inf)")
    check_number("learning_rate", learning_rate, "(0, inf)")
    check_count("batch_size", batch_size)
    check_count("gradient_accumulation", gradient_accumulation)
    check_count("max_length", max_length, 2)
    check_seed(seed)
    if resume not in (True, False, "auto"):
        raise InputError(f"resume was {resume!r}; allowed: True, False, 'auto'")
    output = Path(output_dir)
    partial = output.with_name(f"{output.name}.partial")
    put_back(partial, output)  # a kill in the middle of replacing an adapter: it is still there
    _check_output(output, overwrite)
    base, tokenizer = _resolve(model, tokenizer, dtype, device)
    config = make_config(peft, base, **peft_options)

    examples = load_examples(train, tokenizer)
    encoded, examples, skipped = _encode(tokenizer, examples, max_length, too_long)
    _check_positions(base, encoded, getattr(config, "num_virtual_tokens", 0))
    skipped_held_out = 0
    if calibration is not None:
        held_out = load_examples(calibration, tokenizer)
        _, held_out, skipped_held_out = _encode(tokenizer, held_out, max_length, too_long)
    else:
        tokens = dict(zip(examples, encoded, strict=True))
        examples, held_out = split(examples, calibration_fraction, seed)
        encoded = [tokens[e] for e in examples]

    settings = {
        "peft": peft,
        "epochs": epochs,
        "max_steps": max_steps,
        "learning_rate": learning_rate,
        "lr_scheduler": lr_scheduler,
        "batch_size": batch_size,
        "gradient_accumulation": gradient_accumulation,
        "max_length": max_length,
        "seed": seed,
        **peft_options,
    }
    record = {
        "format_version": 1,
        "svdk_version": __version__,
        "base_model": str(getattr(base, "name_or_path", "") or type(base).__name__),
        "base_model_fingerprint": model_fingerprint(base),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "settings": settings,
        "train_examples": len(examples),
        "train_data_hash": data_hash(examples),
        "calibration_examples": len(held_out),
        "calibration_data_hash": data_hash(held_out),
        "skipped_examples": skipped + skipped_held_out,
    }
    arguments = training_arguments(partial, settings, len(encoded), device)
    record["processes"] = arguments.world_size
    main = arguments.process_index == 0
    with arguments.main_process_first(local=False):
        checkpoint = open_run(partial, json.loads(json.dumps(record)), resume, main)
    try:
        with seeded(seed), attached(base, config) as peft_model:
            record["loss_history"] = fit(
                peft_model, encoded, arguments, tokenizer.pad_token_id, checkpoint, progress, callbacks
            )
            if main:
                _write_adapter(partial / "adapter", peft_model, held_out, record)
        if main:
            publish(partial, output)
        PartialState().wait_for_everyone()  # no process returns before the folder is there
    except SafetensorError as error:
        raise as_os_error(error, partial) from error
    finally:
        if main:  # after a failure, complete checkpoints stay, to resume from
            shutil.rmtree(partial / "adapter", ignore_errors=True)
            drop_broken_checkpoints(partial)
    return output


def _resolve(
    model: Any, tokenizer: PreTrainedTokenizerBase | None, dtype: Any, device: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A loaded model without adapters and its tokenizer; the Trainer moves it to the training device."""
    if isinstance(model, (str, os.PathLike)):
        target = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or default_dtype(torch.device(target))
        model, loaded = load_model(os.fspath(model), dtype=dtype, device="cpu")
        tokenizer = tokenizer or loaded
    elif isinstance(model, tuple):
        model, loaded = model
        tokenizer = tokenizer or loaded
    if tokenizer is None:
        raise InputError("tokenizer was None; allowed: the tokenizer of the loaded model")
    if getattr(model, "peft_config", None):
        raise InputError("model had an adapter attached; allowed: a base model without one")
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        raise InputError(
            f"tokenizer had {len(tokenizer)} tokens; allowed: at most the model's vocabulary, "
            f"{model.get_input_embeddings().weight.shape[0]}"
        )
    return model, tokenizer


def _check_output(output: Path, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / "adapter_config.json").is_file():  # never delete what is not an adapter
        raise InputError(f"output_dir was {output}, which is in use; allowed: a new or empty folder")
    if not overwrite:
        raise InputError(f"output_dir was {output}, which holds an adapter; overwrite replaces it")


def _encode(
    tokenizer: PreTrainedTokenizerBase, examples: list[Example], max_length: int, too_long: str
) -> tuple[list[Encoded], list[Example], int]:
    """Token ids, the examples they belong to, and how many were left out."""
    encoded, skipped = encode_all(tokenizer, examples, max_length, too_long)
    left_out = set(skipped)
    return encoded, [e for i, e in enumerate(examples) if i not in left_out], len(skipped)


def _check_positions(model: PreTrainedModel, encoded: list[Encoded], virtual_tokens: int) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(len(e.input_ids) for e in encoded) + virtual_tokens
    if limit is not None and longest > limit:
        raise DataError(
            f"the longest example had {longest} tokens ({virtual_tokens} of them virtual); "
            f"allowed: at most {limit}, the positions of the model"
        )


def _write_adapter(folder: Path, peft_model: PeftModel, held_out: list[Example], record: dict) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    peft_model.active_peft_config.base_model_name_or_path = record["base_model"]
    # False: "auto" asks the hub whether the vocabulary was resized.
    peft_model.save_pretrained(str(folder), save_embedding_layers=False)
    if held_out:
        save_examples(held_out, folder / CALIBRATION_FILE)
    write_json(folder / WARMSTART_FILE, record, allow_nan=True)
