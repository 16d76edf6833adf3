"""Files that are whole or absent, whatever stops the writer; and files read with one wording of errors."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from svdk.errors import DataError, InputError, first_line


def write_file(path: str | Path, content: bytes | str) -> None:
    """Write ``content`` beside ``path``, flush it to the disk, then rename it onto ``path``.

    Raises ``OSError`` when that fails; what was at ``path`` is then still there, and nothing new beside it.
    """
    path = Path(path)
    beside = _beside(path)
    try:
        with beside.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_json(
    path: str | Path, content: Any, *, indent: int = 2, allow_nan: bool = False, ensure_ascii: bool = True
) -> None:
    """:func:`write_file` of JSON and a newline."""
    text = json.dumps(content, indent=indent, allow_nan=allow_nan, ensure_ascii=ensure_ascii)
    write_file(path, text + "\n")


def unfinished(path: Path) -> list[Path]:
    """What writers of ``path`` that were killed have left beside it."""
    return sorted(path.parent.glob(f".{glob.escape(path.name)}.*.tmp"))


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name ``path`` at the end, its files on the disk by then.

    After an error it is removed; so it is when another process has made ``path`` meanwhile.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(path)
    partial.mkdir()
    try:
        yield partial
        sync(partial)
        if not path.exists():
            os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync(folder: Path) -> None:
    """Flush the files in ``folder`` to the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def add_to_hash(digest: hashlib._Hash, path: Path) -> str:
    """Update ``digest`` with the bytes of a file of any size; its hex digits."""
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_text(path: Path, what: str = "data file", hint: str = "") -> str:
    """:func:`decode_text` of a file; ``DataError`` names the file and what is wrong with it.

    ``hint``: how to come by a file that is not there.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{what} {path} does not exist{hint and '; '}{hint}") from None
    except OSError as error:
        raise DataError(f"{what} {path} cannot be read: {error.strerror}") from None
    return decode_text(content, f"{what} {path}")


def decode_text(content: bytes | str, where: str) -> str:
    """UTF-8 text without a byte order mark, its lines ended by newlines as Python's text files have them."""
    try:
        text = content if isinstance(content, str) else content.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where} was not UTF-8 text (byte {error.start})") from None
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path, what: str = "data file") -> list[tuple[str, str]]:
    """The lines of a text file that hold something, each with its place, such as "data.jsonl line 3".

    Not ``splitlines()``: it would split at U+2028, U+0085, form feeds and more, which JSON strings and
    prompts may hold.
    """
    lines = enumerate(read_text(path, what).split("\n"), 1)
    return [(f"{path} line {number}", line) for number, line in lines if line.strip()]


def read_json_lines(path: Path, what: str = "data file") -> list[tuple[str, Any]]:
    """What the lines of :func:`read_lines` say in JSON."""
    return [(where, parse_json(line, where)) for where, line in read_lines(path, what)]


def parse_json(text: str, where: str) -> Any:
    """What ``text`` says in JSON; ``DataError`` names ``where`` it stands and what is wrong with it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise DataError(f"{where} was not valid JSON: {error.msg} at {line}column {error.colno}") from None
    except (RecursionError, ValueError) as error:  # ValueError: a number of thousands of digits
        raise DataError(f"{where} was not valid JSON: {first_line(error)}") from None


def read_object(
    path: Path, error: type[InputError] = InputError, *, limit: int | None = None, strict: bool = False
) -> dict[str, Any]:
    """The JSON object in ``path``; ``error`` when the file is damaged or has more than ``limit`` bytes.

    ``strict`` refuses NaN and infinities. Raises ``FileNotFoundError`` when there is no such file.
    """

    def refuse(literal: str) -> None:
        raise ValueError(f"{literal} is not strict JSON")

    if limit is not None and (size := path.stat().st_size) > limit:
        raise error(f"{path} has {size} bytes; allowed: at most {limit}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse if strict else None)
    except (ValueError, RecursionError) as cause:
        raise error(f"{path} is damaged: {first_line(cause)}") from cause
    if not isinstance(found, dict):
        raise error(f"{path} is damaged: it holds no JSON object")
    return found
