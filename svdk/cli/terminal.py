"""Text on a terminal: streamed as it is decoded, and in columns."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer
else:
    BaseStreamer = object  # transformers asks for no more than its methods, and takes seconds to load

MIN_COLUMN = 24
"""Cells; narrower columns are harder to read than text one below the other."""


class Printer(BaseStreamer):
    """A streamer that writes text the moment it is whole (not half of a multi-byte character)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Skip the prompt, which comes first."""
        self._tokenizer = tokenizer
        self._ids: list[int] | None = None
        self._printed = ""

    def put(self, ids: Any) -> None:
        """Take the prompt, then one token at a time."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += ids.flatten().tolist()
        self._write(end=False)

    def end(self) -> None:
        """Write what was held back and a newline."""
        self._write(end=True)
        print(flush=True)

    def _write(self, end: bool) -> None:
        text = self._tokenizer.batch_decode([self._ids or []], skip_special_tokens=True)[0]
        if end or not text.endswith("\ufffd"):
            print(text[len(self._printed) :], end="", flush=True)
            self._printed = text


def columns(answers: dict[str, str], width: int) -> str:
    """Answers side by side when each gets a readable column, else one below the other."""
    size = (width - 3 * (len(answers) - 1)) // len(answers)
    if size < MIN_COLUMN:
        return "\n".join(f"[{name}]\n{text}" for name, text in answers.items())
    cells = []
    for name, text in answers.items():
        lines = [part for line in text.splitlines() for part in textwrap.wrap(line, size) or [""]]
        cells.append([name, "-" * size, *lines])
    height = max(map(len, cells))
    rows = zip(*(cell + [""] * (height - len(cell)) for cell in cells), strict=True)
    return "\n".join(" | ".join(part.ljust(size) for part in row).rstrip() for row in rows)
