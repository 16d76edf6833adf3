"""Labelled examples, and prompts without labels: reading, checking, tokenising and splitting them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdk.errors import DataError, InputError
from svdk.utils.checks import check_choice, check_count, check_number
from svdk.utils.files import read_json_lines, write_file
from svdk.warmstart.chat import OPTIONS, Chat, read_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CALIBRATION_FILE = "calibration.jsonl"
"""What a warm start holds out and leaves beside the adapter."""
COLUMNS = "'prompt' and 'completion', or 'messages', or 'prompt', 'options' and 'label'"
PROMPT_COLUMNS = "'prompt' or 'messages'"
NO_CHAT = (
    "messages were not a chat; allowed: a list of at least two objects with the strings 'role' and "
    "'content', the last one with role 'assistant'"
)
NO_ANSWER = (
    "completion was not an answer; allowed: turns by 'assistant' only, after a prompt that ends with "
    "another role"
)


@dataclass(frozen=True)
class Example:
    """A prompt and the completion that a model should give to it."""

    prompt: str
    completion: str
    options: tuple[str, ...] = ()
    """What the completion was chosen among, itself included; empty where the answer is free."""


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

    A row has the columns ``prompt`` and ``completion``: two strings, or two lists of chat turns. Or it has
    ``messages``: one such list, the last turn by the assistant. A turn is an object with ``role`` and
    ``content``, and what else the chat template reads (``tool_calls`` may stand for the content of a turn by
    the assistant). Chats need a tokenizer with a chat template, which also gets the columns ``tools`` and
    ``documents`` (lists of objects, or a JSON string of one) and the variables in ``chat_template_kwargs``.
    A choice has ``options``, a list of texts, and ``label``, one of them or its place from 0 on, in the place
    of the completion (or beside it).

    Columns that are ignored, and what the chat template leaves out, are named in one warning. Raises
    :class:`DataError` naming the file, the line and what is wrong with it.
    """
    named = isinstance(source, (str, os.PathLike))
    if isinstance(source, (str, os.PathLike)):
        rows = read_json_lines(Path(source))
    else:
        rows = [(f"example {i}", row) for i, row in enumerate(source)]
    name = f"{source}" if named else "data"
    if not rows:
        raise DataError(f"{name} held 0 examples; allowed: at least 1")
    columns = Columns()
    examples = [
        row if isinstance(row, Example) else _example(row, where, tokenizer, columns) for where, row in rows
    ]
    columns.warn(name)
    return examples


def load_prompts(path: Path) -> list[str | Chat]:
    """Read prompts from a JSONL file: in ``prompt`` a string or chat turns, or chat turns in ``messages``.

    As :func:`load_examples` reads it; a ``completion`` is passed over, other unknown columns with a warning.
    """
    columns = Columns()
    prompts = [_prompt(row, where, columns) for where, row in read_json_lines(path, "file of prompts")]
    columns.warn(str(path))
    return prompts


@dataclass
class Columns:
    """What was used of the rows and what was not, to say so once."""

    used: set[str] = field(default_factory=set)
    ignored: set[str] = field(default_factory=set)
    left_out: set[str] = field(default_factory=set)
    """By the chat template."""

    def add(self, row: Mapping[str, Any], used: Iterable[str], left_out: Iterable[str] = ()) -> None:
        """Note the columns of one row; null is nothing that could be ignored."""
        left_out = set(left_out)
        given = {repr(name) for name, value in row.items() if value is not None}
        used = given & ({repr(name) for name in used} - left_out)
        self.used |= used
        self.ignored |= given - used
        self.left_out |= left_out

    def warn(self, name: str) -> None:
        """One warning, if there is anything to say about the file ``name``."""
        said = []
        if self.ignored:
            noun, verb = ("columns", "are") if len(self.ignored) > 1 else ("column", "is")
            ignored, used = (", ".join(sorted(names)) for names in (self.ignored, self.used))
            said.append(f"{noun} {ignored} {verb} ignored; used: {used}")
        if self.left_out:
            said.append(f"the chat template leaves out {', '.join(sorted(self.left_out))}")
        if said:
            warnings.warn(f"{name}: {'; '.join(said)}", stacklevel=3)


def save_examples(examples: Iterable[Example], path: str | Path) -> None:
    """Write examples as JSONL, atomically."""
    rows = ({name: value for name, value in asdict(e).items() if value != ()} for e in examples)
    write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


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


def check_text(where: str, value: Any, *, blank: bool = False) -> str:
    """``value``; ``DataError`` unless it is text that holds something, if only blanks where ``blank``."""
    if not isinstance(value, str):
        raise DataError(f"{where} was of type {type(value).__name__}; allowed: a string")
    if not (value if blank else value.strip()):
        raise DataError(f"{where} was empty; allowed: a non-empty string")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise DataError(f"{where} held a lone surrogate; allowed: valid Unicode text")
    return value


def _example(row: Any, where: str, tokenizer: PreTrainedTokenizerBase | None, columns: Columns) -> Example:
    given = _given(row, where, COLUMNS)
    if {"options", "label"} <= given:
        return _choice(row, given, where, tokenizer, columns)
    pair = {"prompt", "completion"} <= (set(row) if "messages" not in given else given)
    used = ["prompt", "completion"] if pair else ["messages"]
    options: tuple[str, ...] = ()
    if not pair and "messages" not in row:
        raise DataError(f"{where}: columns were {_list(row)}; needed: {COLUMNS}")
    chats = [name for name in used if not pair or _is_list(row[name])]
    if not chats:
        prompt, completion = row["prompt"], row["completion"]
        options = _options_beside(row, completion)
        columns.add(row, [*used, "options"] if options else used)
    elif chats != used:
        kinds = " and ".join(f"{name} was of type {type(row[name]).__name__}" for name in used)
        raise DataError(f"{where}: {kinds}; allowed: two strings, or two lists of chat turns")
    else:
        chat = read_chat(row, used, where)
        answers = len(row["completion"]) if pair else 1
        roles = [turn["role"] for turn in chat.turns]
        if len(roles) == 1 or set(roles[-answers:]) != {"assistant"}:
            raise DataError(f"{where}: {NO_ANSWER if pair else NO_CHAT}")
        if pair and roles[-answers - 1] == "assistant":
            raise DataError(f"{where}: {NO_ANSWER}")
        prompt, completion = chat.answered(tokenizer, answers)
        columns.add(row, [*used, *OPTIONS], chat.left_out(tokenizer))
    prompt, completion = (
        check_text(f"{where}: prompt", prompt),
        check_text(f"{where}: completion", completion),
    )
    return Example(prompt, completion, options)


def _options_beside(row: Mapping[str, Any], completion: Any) -> tuple[str, ...]:
    """The options of a row whose completion is one of them; else nothing: another column of this name."""
    options: Any = row.get("options")
    if not _is_list(options) or completion not in options or not all(isinstance(x, str) for x in options):
        return ()
    return tuple(options) if len(set(options)) == len(options) > 1 else ()


def _choice(
    row: Any, given: set[str], where: str, tokenizer: PreTrainedTokenizerBase | None, columns: Columns
) -> Example:
    """A row with options and the label of the right one; in chats each option is an answer's content."""
    options, label = row["options"], row["label"]
    if (
        not _is_list(options)
        or len(options) < 2
        or not all(isinstance(x, str) and x.strip() for x in options)
    ):
        raise DataError(f"{where}: options was {_quote(str(options))}; allowed: a list of at least two texts")
    if len(set(options)) < len(options):
        raise DataError(f"{where}: options held {_quote(str(options))}; allowed: different texts")
    options = [check_text(f"{where}: options[{i}]", text) for i, text in enumerate(options)]
    if isinstance(label, str) and label in options:
        label = options.index(label)
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(options):
        raise DataError(
            f"{where}: label was {label!r}; allowed: one of the options, or its place, 0 to "
            f"{len(options) - 1}"
        )
    if isinstance(row.get("completion"), str) and row["completion"] != options[label]:
        raise DataError(
            f"{where}: completion was {_quote(row['completion'])} with label {label}; allowed: the option "
            f"{_quote(options[label])}"
        )
    used = "messages" if "messages" in given else "prompt"
    if used not in given:
        raise DataError(f"{where}: columns were {_list(row)}; needed: {COLUMNS}")
    if not _is_list(row[used]):
        columns.add(row, [used, "options", "label", "completion"])
        return Example(check_text(f"{where}: prompt", row[used]), options[label], tuple(options))
    chat = read_chat(row, [used], where)
    if chat.turns[-1]["role"] == "assistant":
        raise DataError(f"{where}: the last turn of {used} was by 'assistant'; allowed: one that it answers")
    answers = [
        dataclasses.replace(chat, turns=[*chat.turns, {"role": "assistant", "content": text}])
        for text in options
    ]
    texts = [answer.answered(tokenizer) for answer in answers]
    columns.add(row, [used, *OPTIONS, "options", "label"], answers[label].left_out(tokenizer))
    prompt, completion = texts[label]
    return Example(prompt, completion, tuple(text for _, text in texts))


def _prompt(row: Any, where: str, columns: Columns) -> str | Chat:
    given = _given(row, where, PROMPT_COLUMNS)
    used = "prompt" if "prompt" in given or "messages" not in row else "messages"
    if used not in row:
        raise DataError(f"{where}: columns were {_list(row)}; needed: {PROMPT_COLUMNS}")
    row = {name: value for name, value in row.items() if name != "completion"}  # an answer is no loss here
    if used == "prompt" and not _is_list(row["prompt"]):
        columns.add(row, ["prompt"])
        return check_text(f"{where}: prompt", row["prompt"])
    chat = read_chat(row, [used], where)
    if chat.turns[-1]["role"] == "assistant":
        raise DataError(f"{where}: the last turn of {used} was by 'assistant'; allowed: one that it answers")
    columns.add(row, [used, *OPTIONS])
    return chat


def _given(row: Any, where: str, needed: str) -> set[str]:
    """The columns that hold something: tables with the columns of several formats fill up with null."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where} was a {type(row).__name__}; allowed: an object with columns {needed}")
    return {name for name, value in row.items() if value is not None}


def _list(names: Iterable[Any]) -> str:
    return ", ".join(map(repr, names)) or "none"


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_special(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bool:
    added = tokenizer.added_tokens_decoder.get(token_id)
    return added is not None and added.special


def _quote(text: str, limit: int = 40) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "...")
