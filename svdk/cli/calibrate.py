"""``svdk calibrate``: find the steering strength of an adapter and write the artifact beside it."""

from __future__ import annotations

import argparse
from pathlib import Path

DIRECTIONS = ("kl_gradient", "log_ratio", "auto")
ESTIMATORS = ("mean", "median", "trimmed_mean", "ratio", "newton", "optimum")
OBJECTIVES = ("nll", "accuracy", "choice", "auto")
BACKENDS = ("auto", "cuda", "triton", "cpu", "reference")
LEVERS = ("none", "bias", "scale", "vector", "constant", "classes", "positions", "auto")
PLOT_NAME = "steering.png"


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Register ``calibrate`` and its options."""
    parser = commands.add_parser(
        "calibrate",
        help="find the steering strength of an adapter",
        description="Run the base and the warm-started model once over labelled data, estimate the steering "
        "strength, and write steering.json and steering.safetensors into the adapter folder.",
    )
    parser.add_argument("--model", help="hub name, folder or .gguf file of the base model, or smollm2-135m")
    parser.add_argument("--adapter", required=True, help="PEFT adapter folder (of `svdk warmstart`)")
    parser.add_argument(
        "--data", help="JSONL with prompt and completion, or messages (default: calibration.jsonl in ADAPTER)"
    )
    parser.add_argument(
        "--direction",
        choices=DIRECTIONS,
        help="auto compares both directions, with mask and without (default: kl_gradient, the paper's)",
    )
    parser.add_argument("--alpha", type=float, help="confidence mask in [0, 1] (default: 0.1)")
    parser.add_argument("--estimator", choices=ESTIMATORS, help="default: optimum; mean is the paper's")
    parser.add_argument("--objective", choices=OBJECTIVES, help="what to optimise (default: nll)")
    parser.add_argument(
        "--lever",
        choices=LEVERS,
        help="what to turn: one strength, one an output position, or the adapter's own scale, which needs no "
        "base model; auto: the cheapest that is not demonstrably worse than the best (default: constant)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the folds and the bootstrap (default: 0)")
    parser.add_argument("--folds", type=int, default=5, help="of the cross-validation (default: 5)")
    parser.add_argument("--max-length", type=int, default=512, help="tokens an example (default: 512)")
    parser.add_argument(
        "--too-long", choices=("error", "skip"), default="error", help="longer examples (default: error)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="examples in a forward pass (default: 8)")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="of the ops (default: auto)")
    parser.add_argument(
        "--reuse",
        action="store_true",
        help="estimate anew from the statistics saved in ADAPTER, without --model and --data",
    )
    parser.add_argument(
        "--plot", nargs="?", const="", metavar="PNG", help=f"write a plot (default file: ADAPTER/{PLOT_NAME})"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Calibrate, save, and print the report."""
    from svdk.errors import InputError

    if args.reuse == bool(args.model):
        was = "given" if args.model else "absent"
        raise InputError(f"--model was {was} with --reuse {args.reuse}; allowed: exactly one of them")
    if args.reuse and args.data:
        raise InputError(f"--data was {args.data} with --reuse; allowed: one of them")
    if args.plot is not None:
        from svdk.utils.figures import check_matplotlib

        check_matplotlib()
    from svdk.calibration.calibrate import calibrate, recalibrate

    chosen = {name: getattr(args, name) for name in ("direction", "alpha", "estimator", "objective", "lever")}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    chosen |= {"seed": args.seed, "folds": args.folds}
    if args.reuse:
        steering = recalibrate(args.adapter, **chosen)
    else:
        steering = calibrate(
            args.model,
            args.adapter,
            args.data,
            max_length=args.max_length,
            too_long=args.too_long,
            batch_size=args.batch_size,
            backend=args.backend,
            progress=True,
            **chosen,
        )
    report = steering.report()
    path = steering.save(args.adapter)
    print(report.table(), steering.verdict(), sep="\n\n")
    print(f"wrote {path}")
    if args.plot is not None:
        from svdk.calibration.plot import plot_calibration

        print(f"wrote {plot_calibration(report, args.plot or Path(args.adapter) / PLOT_NAME)}")
    return 0
