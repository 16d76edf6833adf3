"""``svdk demo``: warm start, calibration and steered decoding on a small task, with a report."""

from __future__ import annotations

import argparse


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Register ``demo`` and its options."""
    parser = commands.add_parser(
        "demo",
        help="the whole way on a small task: warm start, calibrate, compare, report",
        description="Fine-tune SmolLM2-135M briefly on a made-up task, calibrate the steering, compare base, "
        "warm-started and steered answers on held-out examples, and write a report. It takes some minutes.",
    )
    parser.add_argument("--output", default="demo-out", help="folder to write (default: demo-out)")
    parser.add_argument("--seed", type=int, default=0, help="of the task and the training (default: 0)")
    parser.add_argument("--quick", action="store_true", help="fewer examples, about a minute, wide intervals")
    parser.add_argument(
        "--model",
        default="smollm2-135m",
        help="hub name, folder or .gguf file (default: smollm2-135m, which the settings were chosen for)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo; it prints what it does."""
    from svdk.demo.run import QUICK, Settings, run_demo

    run_demo(args.output, seed=args.seed, settings=QUICK if args.quick else Settings(), model=args.model)
    return 0
