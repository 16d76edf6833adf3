"""``svdk warmstart``: fine-tune a PEFT adapter on a task file."""

from __future__ import annotations

import argparse
import math

PEFT_TYPES = "lora, ia3, prompt_tuning, p_tuning or prefix_tuning"


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Register ``warmstart`` and its options."""
    parser = commands.add_parser(
        "warmstart",
        help="fine-tune a PEFT adapter on a task file",
        description="Fine-tune a PEFT adapter on prompt / completion data (loss on completions only), hold "
        "out a calibration part, and write an ordinary PEFT adapter folder. An interrupted run goes on when "
        "the same command is given again.",
    )
    parser.add_argument("--model", required=True, help="hub name, folder, .gguf file, or smollm2-135m")
    parser.add_argument(
        "--data", required=True, help="JSONL with prompt and completion, or messages (and tools)"
    )
    parser.add_argument("--output", required=True, help="adapter folder to write")
    parser.add_argument("--calibration", help="JSONL to calibrate on, instead of a part of DATA")
    parser.add_argument(
        "--calibration-fraction", type=float, default=0.2, help="part of DATA to hold out (default: 0.2)"
    )
    parser.add_argument("--peft", default="lora", help=f"{PEFT_TYPES} (default: lora)")
    parser.add_argument("--epochs", type=float, default=1.0, help="passes over the data (default: 1)")
    parser.add_argument(
        "--max-steps", type=int, default=-1, help="stop after so many steps, whatever the epochs"
    )
    parser.add_argument("--learning-rate", type=float, default=5e-5, help="default: 5e-5")
    parser.add_argument("--lr-scheduler", default="linear", help="of transformers' Trainer (default: linear)")
    parser.add_argument("--batch-size", type=int, default=8, help="examples a step and device (default: 8)")
    parser.add_argument("--gradient-accumulation", type=int, default=1, help="batches a step (default: 1)")
    parser.add_argument("--max-length", type=int, default=512, help="tokens an example (default: 512)")
    parser.add_argument(
        "--too-long", choices=("error", "skip"), default="error", help="longer examples (default: error)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the split, the adapter and the order (default: 0)"
    )
    parser.add_argument(
        "--no-resume", action="store_true", help="discard an interrupted run instead of resuming"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an adapter that is already at OUTPUT"
    )
    parser.add_argument(
        "--dtype", help="auto, float32, bfloat16 or float16 (default: float32 on the CPU, else auto)"
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda when there is one)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.add_argument_group("adapter (defaults: the paper's)")
    options.add_argument("--lora-rank", type=int, help="default: 8")
    options.add_argument("--lora-alpha", type=float, help="default: 16")
    options.add_argument("--lora-dropout", type=float, help="default: 0.1")
    options.add_argument("--target-modules", nargs="+", metavar="NAME", help="default: by architecture")
    options.add_argument("--virtual-tokens", type=int, help="default: 20")
    options.add_argument("--encoder-hidden", type=int, help="p-tuning (default: 128)")
    options.add_argument("--encoder-layers", type=int, help="p-tuning (default: 2)")
    parser.set_defaults(run=run)


ADAPTER_OPTIONS = (
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "virtual_tokens",
    "encoder_hidden",
    "encoder_layers",
)
PASSED_ON = (
    "calibration",
    "calibration_fraction",
    "peft",
    "epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler",
    "batch_size",
    "gradient_accumulation",
    "max_length",
    "too_long",
    "seed",
    "overwrite",
    "dtype",
    "device",
)


def run(args: argparse.Namespace) -> int:
    """Train, then say what came out and what to do next."""
    from accelerate import PartialState

    from svdk.models.adapter_files import WARMSTART_FILE
    from svdk.utils.files import read_object
    from svdk.warmstart.api import warm_start

    chosen = {name: getattr(args, name) for name in PASSED_ON}
    chosen |= {name: value for name in ADAPTER_OPTIONS if (value := getattr(args, name)) is not None}
    folder = warm_start(
        args.model,
        args.data,
        output_dir=args.output,
        resume=False if args.no_resume else "auto",
        progress=not args.quiet,
        **chosen,
    )
    if not PartialState().is_main_process:
        return 0
    record = read_object(folder / WARMSTART_FILE)
    history = record["loss_history"]
    edge = math.ceil(len(history) / 10)  # single steps are noisy: the first and the last tenth
    first, last = (sum(loss for _, loss in part) / edge for part in (history[:edge], history[-edge:]))
    if record["skipped_examples"]:
        print(f"left out {record['skipped_examples']} examples of more than {args.max_length} tokens")
    print(
        f"trained {args.peft} on {record['train_examples']} examples in {history[-1][0]} steps: "
        f"loss {first:.3f} -> {last:.3f} nats a completion token"
    )
    print(f"adapter: {folder} ({record['calibration_examples']} examples held out for calibration)")
    print(f"next: svdk calibrate --model {args.model} --adapter {folder}")
    return 0
