"""The ``svdk`` command. Each subcommand is a module of this package with ``add_parser`` and ``run``."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from svdk.errors import SvdkError

COMMANDS = ("demo", "warmstart", "calibrate", "generate", "serve", "eval", "bench", "info")


def build_parser() -> argparse.ArgumentParser:
    """The whole argument parser; subcommand modules import heavy packages only inside ``run``."""
    parser = argparse.ArgumentParser(
        prog="svdk", description="Decode-time adaptation of language models with steering vectors."
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f"svdk.cli.{name}").add_parser(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 on an input error, 130 when interrupted."""
    given, rest = _split(sys.argv[1:] if argv is None else list(argv))
    args = build_parser().parse_args(given)
    if rest is not None:
        args.rest = rest
    try:
        with _short_warnings(args):
            return args.run(args) or 0
    except SvdkError as error:
        return _fail(args, str(error))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _fail(args, f"disk full while writing {error.filename or 'output'}")
        return _fail(args, f"{error.strerror or error}: {error.filename or ''}".rstrip(": "))
    except KeyboardInterrupt:
        return 130


def _split(argv: list[str]) -> tuple[list[str], list[str] | None]:
    """The arguments before and after ``--`` of ``svdk serve``, which hands on the latter; argparse cannot."""
    command = next((word for word in argv if not word.startswith("-")), None)
    if command != "serve" or "--" not in argv:
        return argv, None
    at = argv.index("--")
    return argv[:at], argv[at + 1 :]


@contextmanager
def _short_warnings(args: argparse.Namespace) -> Iterator[None]:
    """Warnings as lines of the program, without their place in the code; ``--debug`` keeps Python's form."""
    with warnings.catch_warnings():
        # PEFT sets this off in transformers whenever it wraps a model; nobody at a prompt can act on it.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        if not _debug(args):
            warnings.showwarning = _show
        yield


def _show(message: Warning | str, *_place: Any, **_more: Any) -> None:
    print(f"svdk: {' '.join(str(message).split())}", file=sys.stderr, flush=True)


def _debug(args: argparse.Namespace) -> bool:
    return bool(args.debug or os.environ.get("SVDK_DEBUG"))


def _fail(args: argparse.Namespace, message: str) -> int:
    if _debug(args):
        raise
    print(f"svdk {args.command}: error: {message}", file=sys.stderr)
    return 2
