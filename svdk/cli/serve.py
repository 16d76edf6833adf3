"""``svdk serve``: print and run the command line of vLLM's OpenAI server over a steered model."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import sys

from svdk.errors import BackendError, InputError


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Register ``serve`` and its options."""
    parser = commands.add_parser(
        "serve",
        help="serve a steered model with vLLM",
        description="Print and run the command line of vLLM's OpenAI server: clients get steered "
        "answers with model=NAME of an adapter, plain ones with model=MODEL. What follows -- goes to vLLM as "
        "it is (docs/serving.md).",
    )
    parser.add_argument("model", metavar="MODEL", help="model folder or hub name")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="a LoRA adapter calibrated by `svdk calibrate`, and its name; may be given several times",
    )
    parser.add_argument("--print-only", action="store_true", help="print the command line, run nothing")
    parser.usage = "svdk serve MODEL [--adapter NAME=FOLDER ...] [--print-only] [-- OPTION ...]"
    parser.set_defaults(run=run, rest=[])


def run(args: argparse.Namespace) -> int:
    """Print the command line and become that process."""
    from svdk.vllm.options import serve_command

    command = serve_command(args.model, adapters_by_name(args.adapter), sys.executable, args.rest)
    print(shlex.join(command), flush=True)
    if args.print_only:
        return 0
    if importlib.util.find_spec("vllm") is None:
        raise BackendError(
            "vllm is not installed; allowed: an environment with it (pip install 'svdk[vllm]')"
        )
    return os.execv(command[0], command)


def adapters_by_name(given: list[str]) -> dict[str, str]:
    """``NAME=FOLDER`` each; ``InputError`` for anything else or a name given twice."""
    found: dict[str, str] = {}
    for text in given:
        name, sign, folder = text.partition("=")
        if not name or not sign or not folder or name in found:
            raise InputError(f"--adapter was {text!r}; allowed: NAME=FOLDER, each name once")
        found[name] = folder
    return found
