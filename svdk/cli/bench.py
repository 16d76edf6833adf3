"""``svdk bench``: measure this machine, or compare two results files."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svdk.bench.suite import Options

PARTS = ("micro", "end-to-end")
DTYPES = ("float32", "bfloat16", "float16")
LOGITS = ("natural", "peaked", "flat", "zipf")


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Register ``bench`` and its options."""
    parser = commands.add_parser(
        "bench",
        help="measure svdk and its baselines on this machine, or compare two results",
        description="Time every operation against eager PyTorch, torch.compile, transformers' warpers and "
        "others in the same run, then whole decoding steps. The options that name shapes replace the grid by "
        "their product. What does not fit the budget is skipped, and the report says so.",
    )
    parser.add_argument("--quick", action="store_true", help="a small grid, in under a minute")
    parser.add_argument(
        "--grid",
        choices=("default", "filters", "busy", "full"),
        help="default: minutes; filters: plain sampling with filters; busy: a few points, also beside a busy "
        "loop a core; full: hours",
    )
    parser.add_argument("--busy", type=int, metavar="N", help="measure beside N busy loops, too")
    parser.add_argument("--part", choices=PARTS, action="append", help="default: both")
    parser.add_argument("--setting", nargs="+", metavar="NAME", help="micro settings (see the tables)")
    parser.add_argument("--batch", nargs="+", type=int, metavar="B")
    parser.add_argument("--vocab", nargs="+", type=int, metavar="V")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES)
    parser.add_argument("--logits", nargs="+", choices=LOGITS)
    parser.add_argument("--cache", nargs="+", choices=("hot", "cold"))
    parser.add_argument("--backend", nargs="+", metavar="NAME", help="default: all but the reference")
    parser.add_argument("--no-baselines", action="store_true", help="svdk alone")
    parser.add_argument(
        "--no-compile", action="store_true", help="without torch.compile, which is slow to start"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda when there is one")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument(
        "--budget", type=float, metavar="MIN", help="minutes (default: 15; quick 1; full 240)"
    )
    parser.add_argument("--memory", type=float, metavar="GB", help="for one measurement (default: half)")
    parser.add_argument(
        "--model",
        nargs="+",
        metavar="NAME",
        help="end to end: model names, or random weights in a shape: 0.5b, 1.5b, 3b, 8b",
    )
    parser.add_argument("--output", metavar="JSON", help="write the results to this file")
    parser.add_argument("--figures", metavar="DIR", help="draw PNG figures into this folder")
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("OLD", "NEW"),
        help="compare two results files instead; exit code 1 when svdk became slower beyond the noise",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and report, or compare."""
    if args.compare:
        from svdk.bench import results

        comparison = results.compare(*map(results.load, args.compare))
        print(results.report(comparison))
        return 1 if comparison.regressions else 0
    if args.figures:
        from svdk.utils.figures import check_matplotlib

        check_matplotlib()
    options = _options(args)
    import torch

    # Imported here and not in suite: only a command line owns the screen.
    from transformers.utils import logging

    from svdk.bench import figures, machine, results, suite, tables

    if args.output:
        results.check_target(args.output, machine.describe(torch.device(options.device)))
    logging.disable_progress_bar()
    threads = torch.get_num_threads()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        found = suite.run(options, lambda line: print(line, flush=True))
    finally:
        torch.set_num_threads(threads)
    if found["micro"]:
        print(tables.micro(found))
    if found["end_to_end"]:
        print(tables.end_to_end(found))
    for skipped in found["skipped"]:
        print(f"skipped: {skipped['what']}: {skipped['why']}")
    print(f"{found['seconds']:.0f} s, svdk {found['machine']['svdk']}, torch {found['machine']['torch']}")
    if args.output:
        print(f"wrote {results.save(found, args.output)}")
    if args.figures:
        for path in figures.draw(found, args.figures):
            print(f"wrote {path}")
    return 0


def _options(args: argparse.Namespace) -> Options:
    """Checked options; everything that can be wrong is, before the first measurement."""
    import torch

    from svdk.bench import cases, micro, suite
    from svdk.errors import InputError
    from svdk.utils.checks import check_number

    if args.quick and args.grid:
        raise InputError(f"--grid was {args.grid} with --quick; allowed: one of them")
    for name in ("threads", "budget", "memory", "busy"):
        value = getattr(args, name)
        if value is not None:
            check_number(f"--{name}", value, "(0, inf]")
    for name in ("batch", "vocab"):
        if any(value < 1 for value in getattr(args, name) or ()):
            raise InputError(f"--{name} was {getattr(args, name)}; allowed: integers of at least 1")
    if unknown := sorted(set(args.setting or ()) - set(cases.SETTINGS)):
        raise InputError(f"--setting was {', '.join(unknown)}; allowed: {', '.join(cases.SETTINGS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device was cuda; allowed on this machine: cpu (torch finds no CUDA device)")
    for name in ("output", "figures"):
        path = getattr(args, name)
        if path and (Path(path).is_dir() if name == "output" else Path(path).is_file()):
            kind = "a folder; allowed: a file name" if name == "output" else "a file; allowed: a folder"
            raise InputError(f"--{name} was {path}, {kind}")

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = suite.quick(device) if args.quick else suite.Options(device=device)
    if args.grid:
        minutes = 240.0 if args.grid == "full" else options.minutes
        options = replace(options, blocks=micro.GRIDS[args.grid], minutes=minutes)
    if args.grid in ("filters", "busy"):
        options = replace(options, models=())
    if args.grid == "busy" or args.busy:
        options = replace(options, busy=args.busy or os.cpu_count() or 1)
    shapes = {
        "settings": args.setting, "batches": args.batch, "vocabs": args.vocab,
        "dtypes": args.dtype, "kinds": args.logits, "caches": args.cache,
    }  # fmt: skip
    given: dict[str, Any] = {name: tuple(values) for name, values in shapes.items() if values}
    if given:
        block = replace(micro.Block(micro.MAIN, compile=options.with_compile), **given)
        options = replace(options, blocks=(block,))
    parts = args.part or PARTS
    if "micro" not in parts:
        options = replace(options, blocks=())
    if "end-to-end" not in parts:
        options = replace(options, models=())
    elif args.model:
        options = replace(options, models=tuple(args.model))
    return replace(
        options,
        backends=tuple(args.backend) if args.backend else None,
        with_baselines=options.with_baselines and not args.no_baselines,
        with_compile=options.with_compile and not args.no_compile,
        minutes=args.budget or options.minutes,
        memory=args.memory,
    )
