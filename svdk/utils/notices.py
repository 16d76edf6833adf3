"""Warnings that are said once a process."""

from __future__ import annotations

import warnings

said: set[str] = set()


def warn_once(message: str) -> None:
    """A ``UserWarning``, the first time only: a step of decoding repeats what the last one did."""
    if message not in said:
        said.add(message)
        warnings.warn(message, stacklevel=3)
