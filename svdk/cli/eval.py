"""``svdk eval``: a study of what steering does to tasks, or one adapter under lm-evaluation-harness."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Register ``eval`` and its options."""
    parser = commands.add_parser(
        "eval",
        help="measure what steering does to tasks, with intervals",
        description="Run a study: warm starts, calibrations and every steering setting on held-out "
        "questions. What is done stays in OUTPUT: an interrupted study goes on, and other strengths, "
        "estimators or penalties need no model. With --harness, score the base, warm-started and steered "
        "model with lm-eval instead.",
    )
    parser.add_argument(
        "study", nargs="?", help="a JSON file, or one that comes with svdk: laptop, paper, smoke"
    )
    parser.add_argument("--output", default="eval-out", help="folder of a study (default: eval-out)")
    parser.add_argument(
        "--data-dir",
        help="local data: truthfulqa/mc_task.json, commonsense/TASK/{train,test}.json "
        "(default: the Hugging Face hub)",
    )
    parser.add_argument("--only", nargs="+", metavar="TASK", help="these tasks of the study alone")
    parser.add_argument(
        "--score-only", action="store_true", help="run no model: score again what OUTPUT holds"
    )
    parser.add_argument(
        "--report",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="write evaluation.md and its figures (default: OUTPUT/report)",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    judge = parser.add_argument_group("judge of free answers to TruthfulQA (default: word overlap)")
    judge.add_argument("--judge-url", help="OpenAI-compatible endpoint, e.g. http://localhost:8000/v1")
    judge.add_argument("--judge-model", help="the model it should use")
    harness = parser.add_argument_group("lm-evaluation-harness (pip install 'svdk[eval]')")
    harness.add_argument(
        "--harness", nargs="+", metavar="TASK", help="tasks of lm-eval, or svdk's offline ones"
    )
    harness.add_argument("--model", help="hub name, folder or .gguf file of the base model, or smollm2-135m")
    harness.add_argument("--adapter", help="PEFT adapter folder, calibrated")
    harness.add_argument("--include-path", help="folder with more task files")
    harness.add_argument("--limit", type=int, help="questions of each task")
    harness.add_argument("--batch-size", type=int, default=8, help="rows in a forward pass (default: 8)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run what was asked for and say where the results are."""
    from svdk.errors import InputError

    if bool(args.study) == bool(args.harness):
        found = "a study and --harness" if args.study else "neither a study nor --harness"
        raise InputError(f"the command line held {found}; allowed: one of them")
    if args.threads is not None:
        import torch

        from svdk.utils.checks import check_count

        check_count("--threads", args.threads)
        torch.set_num_threads(args.threads)
    return _harness(args) if args.harness else _study(args)


def _study(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from tqdm.auto import tqdm

    from svdk.errors import InputError
    from svdk.eval.cells import write_cells
    from svdk.eval.runner import run_models
    from svdk.eval.spec import load_study

    study = load_study(args.study)
    if args.only:
        runs = tuple(run for run in study.runs if run.task in args.only)
        missing = sorted(set(args.only) - {run.task for run in runs})
        if missing:
            tasks = ", ".join(dict.fromkeys(run.task for run in study.runs))
            raise InputError(f"--only was {missing[0]}; allowed, the tasks of the study: {tasks}")
        study = replace(study, runs=runs)
    judge = _judge(args)
    if not args.score_only:
        run_models(study, args.output, args.data_dir)
    with tqdm(desc="cells", unit="cell", file=sys.stderr) as bar:
        path = write_cells(study, args.output, args.data_dir, judge=judge, advance=bar.update)
    print(f"wrote {path}")
    if args.report is not None:
        from svdk.eval.report import write_report

        folder = Path(args.report or Path(args.output) / "report")
        print(f"wrote {write_report(path, folder, command=_command())}")
    return 0


def _judge(args: argparse.Namespace):
    from svdk.errors import InputError

    if bool(args.judge_url) != bool(args.judge_model):
        raise InputError("--judge-url and --judge-model were not both given; allowed: both, or neither")
    if not args.judge_url:
        return None
    from svdk.eval.judge import ChatJudge

    return ChatJudge(args.judge_url, args.judge_model, cache=Path(args.output) / "judge.sqlite")


def _harness(args: argparse.Namespace) -> int:
    from svdk.errors import InputError

    for name in ("model", "adapter"):
        if getattr(args, name) is None:
            raise InputError(f"--{name} was absent; needed with --harness")
    from svdk.eval.harness import evaluate_harness

    output = Path(args.output) / "harness.json"
    found = evaluate_harness(
        args.model,
        args.adapter,
        args.harness,
        limit=args.limit,
        include_path=args.include_path,
        data_dir=args.data_dir,
        batch_size=args.batch_size,
        output=output,
    )
    for line in found["differences"]:
        print(
            f"{line['task']:<24} {line['metric']:<12} {line['from']} -> {line['to']}: {line['mean']:+.4f} "
            f"({line['low']:+.4f} to {line['high']:+.4f}, {line['n']} questions)"
        )
    print(f"wrote {output}")
    return 0


def _command() -> str:
    """The command line as a user would type it again."""
    return shlex.join(["svdk", *sys.argv[1:]])
