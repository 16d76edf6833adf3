"""The Trainer of a warm start: completion-only batches, a progress bar, resumable for every PEFT method."""

from __future__ import annotations

import errno
import math
import os
import random
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    SchedulerType,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from svdk.models.loading import attach, detach
from svdk.utils.checks import check_choice
from svdk.utils.tokens import pad
from svdk.warmstart.data import Encoded
from svdk.warmstart.run_folder import STATE_FILE

WEIGHTS = "trainable.safetensors"
IGNORE = -100
CHECKPOINTS = 10
TORCH_WRITE_ERROR = "inline_container|iostream|PytorchStreamWriter"
CHANGED_CONFIG = ("use_cache", "pretraining_tp")  # the Trainer and PEFT write these into a model's config


@dataclass
class Collator:
    """Encoded examples to a right-padded batch whose labels are the completions alone."""

    pad_id: int

    def __call__(self, batch: Sequence[Encoded]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels`` (-100 off the completion), each int64 (B, T)."""
        ids, mask = pad([e.input_ids for e in batch], self.pad_id, left=False)
        labels = torch.where(mask == 1, ids, IGNORE)
        for row, e in enumerate(batch):
            labels[row, : e.prompt_length] = IGNORE
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class WarmStartTrainer(Trainer):
    """A Trainer whose checkpoints hold the trainable tensors themselves.

    PEFT's own adapter files cannot be resumed for prompt methods: p-tuning saves the output of its
    encoder without the encoder, and PEFT refuses to load prompts as trainable.
    """

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file({n: p.detach().contiguous() for n, p in self._trainable()}, folder / WEIGHTS)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        saved = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        with torch.no_grad():
            for name, parameter in self._trainable():
                parameter.copy_(saved[name])

    def _save_checkpoint(self, *args, **kwargs) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not re.search(TORCH_WRITE_ERROR, str(error)):
                raise
            raise as_os_error(error, Path(str(self.args.output_dir))) from error

    def _trainable(self) -> list[tuple[str, torch.nn.Parameter]]:
        model = self.accelerator.unwrap_model(self.model)
        return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


class Progress(TrainerCallback):
    """One progress bar on stderr with the loss of the last logged steps."""

    def __init__(self, description: str) -> None:
        """``description`` stands before the bar."""
        self.description = description
        self.bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Open the bar (at the step that was reached, when resuming)."""
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc=self.description, unit="step"
            )

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Move the bar on."""
        if self.bar is not None:
            self.bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Show the loss."""
        if self.bar is not None and logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def close(self) -> None:
        """Close the bar, also after an interruption."""
        if self.bar is not None:
            self.bar.close()


def training_arguments(
    folder: Path, settings: dict[str, Any], examples: int, device: str | None = None
) -> TrainingArguments:
    """The Trainer's arguments: about ten checkpoints a run, nothing reported anywhere."""
    check_choice("lr_scheduler", settings["lr_scheduler"], [s.value for s in SchedulerType])
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings["epochs"],
        max_steps=settings["max_steps"],
        learning_rate=settings["learning_rate"],
        lr_scheduler_type=settings["lr_scheduler"],
        per_device_train_batch_size=settings["batch_size"],
        gradient_accumulation_steps=settings["gradient_accumulation"],
        seed=settings["seed"],
        use_cpu=device == "cpu",
        save_strategy="steps",
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
    )
    per_step = arguments.train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps
    steps = arguments.max_steps
    if steps <= 0:
        steps = math.ceil(arguments.num_train_epochs * math.ceil(examples / per_step))
    # Checkpoints fall on logged steps, so that a resumed run logs the same losses.
    arguments.logging_steps = math.ceil(steps / 200)
    arguments.save_steps = arguments.logging_steps * math.ceil(steps / CHECKPOINTS / arguments.logging_steps)
    return arguments


@contextmanager
def attached(base: PreTrainedModel, peft_config: PeftConfig) -> Iterator[PeftModel]:
    """``base`` with a new adapter; afterwards it is as before: no adapter, same mode, flags and device."""
    training, device = base.training, base.device
    config = base.config
    config_values = {name: getattr(config, name) for name in CHANGED_CONFIG if hasattr(config, name)}
    trainable = {name for name, p in base.named_parameters() if p.requires_grad}
    peft_model = attach(base, peft_config)
    try:
        yield peft_model
    finally:
        cast(torch.nn.Module, detach(peft_model)).to(device).train(training)
        for name, p in base.named_parameters():
            p.requires_grad_(name in trainable)
        for name, value in config_values.items():
            setattr(config, name, value)


def fit(
    peft_model: PeftModel,
    examples: list[Encoded],
    arguments: TrainingArguments,
    pad_id: int | None,
    checkpoint: Path | None,
    progress: bool,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[tuple[int, float]]:
    """Train the adapter, from ``checkpoint`` on if given; the (step, loss) history of the whole run."""
    trainer = WarmStartTrainer(
        model=peft_model,
        args=arguments,
        train_dataset=examples,
        data_collator=Collator(pad_id or 0),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    bar = Progress("warm start")
    if progress:
        trainer.add_callback(bar)
    reached = None if checkpoint is None else TrainerState.load_from_json(str(checkpoint / STATE_FILE))
    try:
        if reached is not None and reached.global_step >= reached.max_steps:  # the Trainer would go further
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.state = reached
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.accelerator.wait_for_everyone()
    finally:
        bar.close()
    peft_model.eval()
    return [(int(entry["step"]), entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def as_os_error(error: Exception, path: Path) -> OSError:
    """The OSError behind a failed write to the folder ``path`` that safetensors or torch put in own words."""
    found = re.search(r"os error (\d+)|code: (\d+)", str(error))
    if found:
        code = int(found[1] or found[2])
    else:
        code = errno.ENOSPC if shutil.disk_usage(path).free < 1 << 20 else errno.EIO
    return OSError(code, os.strerror(code), str(path))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python, NumPy and torch inside; the caller's generators go on as if nothing had happened."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        set_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
