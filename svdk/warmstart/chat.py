"""Chats: turns and what a row says beside them, checked, and rendered by a tokenizer's chat template."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from svdk.errors import DataError
from svdk.utils.files import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPTIONS = {
    "tools": "a list of objects (JSON schemas of functions)",
    "documents": "a list of objects, such as {'title': ..., 'text': ...}",
    "chat_template_kwargs": "an object of variables that the chat template reads",
}
"""Columns that the chat template gets beside the turns, and what each may be."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names of one field: transformers fills in the one that a template reads."""


@dataclass(frozen=True)
class Chat:
    """Turns for a chat template, what it gets beside them, and where they stand (for errors)."""

    where: str
    turns: list[dict[str, Any]]
    options: dict[str, Any]
    """Of :data:`OPTIONS`, those that say something."""

    @property
    def last(self) -> str:
        """The content of the last turn."""
        return self.turns[-1].get("content") or ""

    def prompt(self, tokenizer: PreTrainedTokenizerBase | None) -> str:
        """The turns up to where the answer starts."""
        return self._render(tokenizer, self.turns, add_generation_prompt=True)

    def answered(self, tokenizer: PreTrainedTokenizerBase | None, answers: int = 1) -> tuple[str, str]:
        """The prompt, with the generation prompt, and what follows it: the last turns with their end."""
        if not self.last.strip() and not self.turns[-1].get("tool_calls"):
            raise DataError(f"{self.where}: the last message was empty; allowed: a non-empty answer")
        prompt = self._render(tokenizer, self.turns[:-answers], add_generation_prompt=True)
        text = self._render(tokenizer, self.turns)
        if not text.startswith(prompt):
            raise DataError(
                f"{self.where}: the chat template does not render the chat as prompt + answer; "
                "use prompt, completion"
            )
        # An answer that is a tool call and nothing else must not become the lesson to say nothing.
        silent = {k: v for k, v in self.turns[-1].items() if k != "tool_calls"}
        if not self.last.strip() and self._same(tokenizer, [*self.turns[:-1], silent], self.turns):
            raise DataError(
                f"{self.where}: the chat template leaves out tool_calls, and the last message held nothing "
                "else; allowed: a chat template with tool calls, or prompt and completion"
            )
        # Templates write a newline after the end of turn; the model is stopped before it could say it.
        return prompt, text[len(prompt) :].rstrip()

    def left_out(self, tokenizer: PreTrainedTokenizerBase | None) -> set[str]:
        """What the chat template takes no notice of: options, fields of messages, roles."""
        # Some tokenizers have one more template, for chats with tools.
        source = str(cast("Any", tokenizer).get_chat_template(tools=self.options.get("tools")))

        def reads(name: object) -> bool:
            return re.search(rf"\b{re.escape(str(name))}\b", source) is not None

        unread = {repr(name) for name in ("tools", "documents") if name in self.options and not reads(name)}
        variables = self.options.get("chat_template_kwargs", {})
        unread |= {f"'chat_template_kwargs.{name}'" for name in variables if not reads(name)}
        if variables and not any(map(reads, variables)):
            unread.add("'chat_template_kwargs'")
        for name in {name for turn in self.turns for name in turn} - {"role", "content"}:
            if not any(map(reads, REASONING if name in REASONING else (name,))):
                unread.add(f"the messages' field {name!r}")
        for place, turn in enumerate(self.turns):
            # A template without the role's name may write every role, or pass over those it does not know.
            role, others = turn["role"], self.turns[:place] + self.turns[place + 1 :]
            if role in ("user", "assistant") or reads(role) or not others:
                continue
            if self._same(tokenizer, others, self.turns):
                unread.add(f"messages with role {role!r}")
        return unread

    def _same(self, tokenizer: PreTrainedTokenizerBase | None, some: list[Any], all_: list[Any]) -> bool:
        """Whether turns look like more of them; not when the template refuses them."""
        try:
            return self._render(tokenizer, some) == self._render(tokenizer, all_)
        except DataError:
            return False

    def _render(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        turns: list[dict[str, Any]],
        add_generation_prompt: bool = False,
    ) -> str:
        if tokenizer is None or not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"{self.where}: chats need a tokenizer with a chat template; allowed without: prompt (and "
                "completion) as strings"
            )
        options = dict(self.options)
        variables = options.pop("chat_template_kwargs", {})
        # Those choose another template, or ask for tokens: the text would not be what decoding shows.
        own = (
            {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages"} if variables else set()
        )
        if taken := sorted(own & set(variables)):
            raise DataError(
                f"{self.where}: chat_template_kwargs held {', '.join(map(repr, taken))}; "
                "allowed: variables of the chat template's own"
            )
        try:
            text = tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt, **options, **variables
            )
        except Exception as error:  # templates are programs of their own: jinja2 errors and any they raise
            why = " ".join(str(error).split())
            raise DataError(f"{self.where}: the chat template refused the messages: {why}") from error
        return str(text)


def read_chat(row: Mapping[str, Any], columns: Sequence[str], where: str) -> Chat:
    """The turns in ``columns`` of a row, one after the other, and its options; ``DataError`` if unusable."""
    turns = [
        _turn(turn, f"{where}: {name}[{place}]")
        for name in columns
        for place, turn in enumerate(_turns(row[name], name, where))
    ]
    options = {name: value for name in OPTIONS if (value := _option(row, name, where))}
    return Chat(where, turns, options)


def _turns(turns: Any, name: str, where: str) -> Sequence[Any]:
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        was = "empty" if turns in ([], "") else f"of type {type(turns).__name__}"
        verb = "were" if name == "messages" else "was"
        raise DataError(
            f"{where}: {name} {verb} not a chat ({was}); allowed: a list of objects with 'role' and 'content'"
        )
    return turns


def _turn(turn: Any, where: str) -> dict[str, Any]:
    """One message without what is null in it: to templates a null is not the same as nothing."""
    if not isinstance(turn, Mapping):
        raise DataError(f"{where} was of type {type(turn).__name__}; allowed: an object with role, content")
    turn = {name: value for name, value in turn.items() if value is not None}
    role, content, calls = (turn.get(name) for name in ("role", "content", "tool_calls"))
    if not isinstance(role, str) or not role.strip():
        raise DataError(f"{where}.role was {role!r}; allowed: a string such as 'user' or 'assistant'")
    if calls is not None and not _objects(calls):
        raise DataError(f"{where}.tool_calls was of type {type(calls).__name__}; allowed: a list of objects")
    if content is None and not (calls and role == "assistant"):
        raise DataError(
            f"{where}.content was missing or null; allowed: a string (none in a turn by the assistant with "
            "tool_calls)"
        )
    if content is not None and not isinstance(content, str):
        raise DataError(f"{where}.content was of type {type(content).__name__}; allowed: a string")
    return turn


def _option(row: Mapping[str, Any], name: str, where: str) -> Any:
    """The value of one of :data:`OPTIONS`; nothing for null, an empty one, and one that is not there."""
    value = row.get(name)
    if isinstance(value, str):  # how tables whose columns have one type store it
        value = parse_json(value, f"{where}: {name}") if value.strip() else None
    if value is None:
        return None
    mapping = name == "chat_template_kwargs"
    if not (isinstance(value, Mapping) if mapping else _objects(value)):
        raise DataError(
            f"{where}: {name} was {_short(value)}; allowed: {OPTIONS[name]}, or a JSON string of "
            f"{'one' if mapping else 'such a list'}"
        )
    return {str(key): item for key, item in value.items()} if mapping else [dict(item) for item in value]


def _objects(value: Any) -> bool:
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    return listed and all(isinstance(item, Mapping) for item in value)


def _short(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."
