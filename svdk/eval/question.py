"""One question with its answer options, and where questions are read from: a folder or the hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdk.errors import DataError
from svdk.utils.files import parse_json, read_text


@dataclass(frozen=True)
class Question:
    """A prompt and the answer options that are scored after it."""

    id: str
    """From the contents, not the place in a file: the same question has the same id wherever it is read."""
    prompt: str
    options: tuple[str, ...]
    """Continuations exactly as scored after ``prompt``, with their leading space if it needs one; no EOS."""
    correct: tuple[bool, ...]
    """Which options are true (TruthfulQA: several), in the order of ``options``."""
    best: int
    """The gold option. Never rely on its position: in TruthfulQA's file it always stands first."""
    mc1: tuple[int, ...] = ()
    """The options that MC1 compares, ``best`` among them (TruthfulQA only)."""
    category: str = ""


def content_id(*parts: str) -> str:
    """12 hex digits of the SHA-256 of some texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def normalised(text: str) -> str:
    """``text`` without differences in case and white space: how questions are told apart."""
    return " ".join(text.casefold().split())


def seeded_order(keys: Iterable[str], seed: int, purpose: str) -> list[int]:
    """Indices of ``keys`` in a shuffled order that follows from their contents and the seed alone."""
    ranks = [hashlib.sha256(f"{purpose}\0{seed}\0{key}".encode()).digest() for key in keys]
    return sorted(range(len(ranks)), key=lambda index: ranks[index])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON array in a UTF-8 file; ``DataError`` names the file and what is wrong."""
    rows = parse_json(read_text(path), f"data file {path}")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"data file {path} was not a list of objects; allowed: a JSON array of at least 1")
    return rows


def hub_rows(dataset: str, config: str | None, split: str) -> list[dict[str, Any]]:
    """The rows of one split of a hub dataset; ``DataError`` without ``datasets`` or without a connection.

    Data sets only: code that lies beside one on the hub is never run.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            f"dataset {dataset} comes from the Hugging Face hub, which needs the package 'datasets' "
            f"({error}); allowed: pip install datasets, or a local folder as data_dir"
        ) from error
    try:
        rows = load_dataset(dataset, config, split=split)
    except Exception as error:  # offline, renamed or moved: each library below raises its own kind
        name = type(error).__name__
        raise DataError(
            f"dataset {dataset} ({config or 'default'}, {split}) could not be loaded from the hub: "
            f"{name}: {error}; allowed: a connection or a filled cache, or a local folder as data_dir"
        ) from error
    return [dict(row) for row in rows]


def field(row: dict[str, Any], name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """``row[name]``; ``DataError`` unless it is there and of that kind."""
    value = row.get(name)
    if not isinstance(value, kind):
        was = "missing" if name not in row else f"of type {type(value).__name__}"
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise DataError(f"{where}: {name!r} was {was}; allowed: {' or '.join(k.__name__ for k in kinds)}")
    return value
