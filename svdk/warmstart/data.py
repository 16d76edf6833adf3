"""Labelled examples: reading, checking, tokenising and splitting them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdk.errors import DataError, InputError
from svdk.utils.checks import check_choice, check_count, check_number
from svdk.utils.files import parse_json, read_text, write_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CALIBRATION_FILE = "calibration.jsonl"
"""What a warm start holds out and leaves beside the adapter."""
COLUMNS = "'prompt' and 'completion', or 'messages'"


@dataclass(frozen=True)
class Example:
    """A prompt and the completion that a model should give to it."""

    prompt: str
    completion: str


@dataclass
class Encoded:
    """Token ids of prompt + completion; positions ``prompt_length:`` are the labels."""

    input_ids: list[int]
    prompt_length: int

    @property
    def label_count(self) -> int:
        """How many of the ids are labels."""
        return len(self.input_ids) - self.prompt_length


def load_examples(
    source: str | Path | Sequence[Mapping[str, Any] | Example],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[Example]:
    """Read examples from a JSONL file (one object a line, UTF-8) or from a list of dicts.

    A row has the columns ``prompt`` and ``completion``, or ``messages`` (chat turns with ``role`` and
    ``content``, the last one by the assistant; these need a tokenizer with a chat template). Other columns
    are ignored. Raises :class:`DataError` naming the file, the line and what is wrong with it.
    """
    if isinstance(source, (str, os.PathLike)):
        rows = _read_jsonl(Path(source))
    else:
        rows = [(f"example {i}", row) for i, row in enumerate(source)]
    if not rows:
        name = f"{source}" if isinstance(source, (str, os.PathLike)) else "data"
        raise DataError(f"{name} held 0 examples; allowed: at least 1")
    return [row if isinstance(row, Example) else _example(row, where, tokenizer) for where, row in rows]


def save_examples(examples: Iterable[Example], path: str | Path) -> None:
    """Write examples as JSONL, atomically."""
    write_file(path, "".join(json.dumps(asdict(e), ensure_ascii=False) + "\n" for e in examples))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt as the model sees it: one BOS if the tokenizer uses one, never an EOS.

    A prompt that already starts with the BOS text (chat templates write it) does not get a second one.
    """
    has_bos = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
    ids = list(tokenizer(prompt, add_special_tokens=not has_bos).input_ids)
    if ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
        ids.pop()  # tokenizers with add_eos_token=True would end the text before the answer
    return ids


def encode(tokenizer: PreTrainedTokenizerBase, example: Example, max_length: int | None = None) -> Encoded:
    """Token ids of one example; the completion ends with EOS or another special token (end of turn).

    Nothing is ever cut: an example of more than ``max_length`` tokens raises :class:`DataError`. See
    :func:`encode_all` for skipping such examples.
    """
    if tokenizer.eos_token_id is None:
        raise InputError("tokenizer had no EOS token; allowed: one whose eos_token is set")
    prompt = encode_prompt(tokenizer, example.prompt)
    if not prompt:
        raise DataError(f"prompt {_quote(example.prompt)} had 0 tokens; allowed: at least 1")
    completion = encode_continuation(tokenizer, example, prompt)
    if not completion:
        raise DataError(f"completion {_quote(example.completion)} had 0 tokens; allowed: at least 1")
    last = completion[-1]
    if last != tokenizer.eos_token_id and not _is_special(tokenizer, last):
        completion.append(tokenizer.eos_token_id)
    length = len(prompt) + len(completion)
    if max_length is not None and length > max_length:
        raise DataError(
            f"example {_quote(example.prompt)} had {length} tokens; allowed: at most {max_length}"
        )
    return Encoded(prompt + completion, len(prompt))


def encode_continuation(tokenizer: PreTrainedTokenizerBase, example: Example, prompt: list[int]) -> list[int]:
    """Token ids of the completion alone, without an end; ``prompt`` are the ids of its prompt.

    Tokenised together with the prompt where that leaves the prompt's own tokens alone: on its own, a
    SentencePiece tokenizer would put a space before the completion. Where the boundary would merge, the
    prompt keeps the tokens that it has at decode time.
    """
    joint = encode_prompt(tokenizer, example.prompt + example.completion)
    if len(joint) > len(prompt) and joint[: len(prompt)] == prompt:
        return joint[len(prompt) :]
    return list(tokenizer(example.completion, add_special_tokens=False).input_ids)


def encode_all(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    max_length: int,
    too_long: str = "error",
) -> tuple[list[Encoded], list[int]]:
    """Encode examples; returns the encoded ones and the indices of those left out as too long.

    ``too_long="error"`` raises one :class:`DataError` that counts them; ``"skip"`` leaves them out whole
    (an example without its end teaches the wrong end) and raises only if none is left.
    """
    check_choice("too_long", too_long, ("error", "skip"))
    check_count("max_length", max_length, 2)
    encoded = [encode(tokenizer, example) for example in examples]
    skipped = [i for i, e in enumerate(encoded) if len(e.input_ids) > max_length]
    if skipped and (too_long == "error" or len(skipped) == len(encoded)):
        first = skipped[0]
        raise DataError(
            f"{len(skipped)} of {len(encoded)} examples had more than max_length = {max_length} tokens "
            f"(the first: {len(encoded[first].input_ids)} tokens, prompt {_quote(examples[first].prompt)}); "
            "allowed: a larger max_length, or too_long='skip' to leave them out"
        )
    left_out = set(skipped)
    return [e for i, e in enumerate(encoded) if i not in left_out], skipped


def split(
    examples: Sequence[Example], calibration_fraction: float, seed: int = 0
) -> tuple[list[Example], list[Example]]:
    """Split into (train, calibration), deterministic in the contents and the seed; order is kept.

    Examples with the same prompt stay on one side, so that calibration never sees a prompt that was
    trained on (when all prompts are equal: the same completion instead). With a fraction above 0 both
    sides get at least one example. Raises :class:`DataError` when that is impossible.
    """
    check_number("calibration_fraction", calibration_fraction, "[0, 1)")
    if calibration_fraction == 0:
        return list(examples), []
    same_prompt = len({e.prompt for e in examples}) == 1
    groups: dict[str, list[int]] = {}
    for i, e in enumerate(examples):
        groups.setdefault(e.completion if same_prompt else e.prompt, []).append(i)
    if len(groups) < 2:
        raise DataError(
            f"{len(examples)} examples with {len(groups)} different contents cannot be split; "
            "allowed: at least 2 different ones, or calibration_fraction = 0"
        )
    order = sorted(groups, key=lambda key: hashlib.sha256(f"{seed}\0{key}".encode()).digest())
    target = max(1, round(calibration_fraction * len(examples)))
    chosen: set[int] = set()
    taken = 0
    for key in order:
        if len(chosen) + len(groups[key]) <= target and taken < len(groups) - 1:
            chosen.update(groups[key])
            taken += 1
    if not chosen:  # every group is larger than the target
        chosen.update(groups[min(order, key=lambda key: len(groups[key]))])
    train = [e for i, e in enumerate(examples) if i not in chosen]
    return train, [examples[i] for i in sorted(chosen)]


def data_hash(examples: Iterable[Example]) -> str:
    """sha256 (hex) of prompts and completions in their order."""
    digest = hashlib.sha256()
    for e in examples:
        digest.update(json.dumps([e.prompt, e.completion]).encode() + b"\n")
    return digest.hexdigest()


def _read_jsonl(path: Path) -> list[tuple[str, Any]]:
    # Not splitlines(): JSON strings may hold U+2028 and other characters it would split at.
    lines = {f"{path} line {number}": line for number, line in enumerate(read_text(path).split("\n"), 1)}
    return [(where, parse_json(line, where)) for where, line in lines.items() if line.strip()]


def _example(row: Any, where: str, tokenizer: PreTrainedTokenizerBase | None) -> Example:
    if not isinstance(row, Mapping):
        raise DataError(f"{where} was a {type(row).__name__}; allowed: an object with columns {COLUMNS}")
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
    elif "messages" in row:
        prompt, completion = _render_chat(row["messages"], where, tokenizer)
    else:
        columns = ", ".join(map(repr, row)) or "none"
        raise DataError(f"{where}: columns were {columns}; needed: {COLUMNS}")
    for name, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, str):
            raise DataError(f"{where}: {name} was of type {type(value).__name__}; allowed: a string")
        if not value.strip():
            raise DataError(f"{where}: {name} was empty; allowed: a non-empty string")
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise DataError(f"{where}: {name} held a lone surrogate; allowed: valid Unicode text")
    return Example(prompt, completion)


def _render_chat(messages: Any, where: str, tokenizer: PreTrainedTokenizerBase | None) -> tuple[str, str]:
    """Prompt up to and with the generation prompt, completion = last turn with its end-of-turn token."""
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{where}: 'messages' need a tokenizer with a chat template; use prompt and completion"
        )
    valid = isinstance(messages, Sequence) and all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )
    if not valid or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError(
            f"{where}: messages were not a chat; allowed: a list of at least two objects with the strings "
            "'role' and 'content', the last one with role 'assistant'"
        )
    if not messages[-1]["content"].strip():
        raise DataError(f"{where}: the last message was empty; allowed: a non-empty answer")
    turns = [dict(m) for m in messages]
    try:
        prompt = str(tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True))
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception as error:  # templates are programs of their own: jinja2 errors and any they raise
        raise DataError(f"{where}: the chat template refused the messages: {error}") from error
    if not text.startswith(prompt):
        raise DataError(
            f"{where}: the chat template does not render the chat as prompt + answer; use prompt, completion"
        )
    # Templates write a newline after the end of turn; the model is stopped before it could say it.
    return prompt, text[len(prompt) :].rstrip()


def _is_special(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bool:
    added = tokenizer.added_tokens_decoder.get(token_id)
    return added is not None and added.special


def _quote(text: str, limit: int = 40) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "...")
