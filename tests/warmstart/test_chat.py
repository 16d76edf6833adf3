"""Chats: what stands beside the turns reaches the chat template, or is named."""

from __future__ import annotations

import json

import pytest

from svdk.errors import DataError
from svdk.warmstart.data import Example, load_examples, save_examples
from tests.helpers import tiny

TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"a": "é<b>"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
ASK = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "22 degrees", "name": "weather", "tool_call_id": "c1"}
TEMPLATE = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}"
    "{% if documents %}DOCS {{ documents | tojson }}\n{% endif %}"
    "{% if thinking is defined %}THINKING {{ thinking }}\n{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}{% if m.name %} {{ m.name }} {{ m.tool_call_id }}{% endif %}>"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
    "{{ m['content'] }}{% if m.tool_calls %}CALLS {{ m.tool_calls | tojson }}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def load(tokenizer, *turns, **columns):
    (example,) = load_examples([{"messages": list(turns), **columns}], tokenizer)
    return example


def said(recwarn):
    return [str(w.message) for w in recwarn.list]


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), (TOOL,)])
def test_tools_reach_the_template(tokenizer, tools, recwarn, tmp_path):
    example = load(tokenizer, USER, ANSWER, tools=tools)
    want = tokenizer.apply_chat_template([USER], tools=[TOOL], tokenize=False, add_generation_prompt=True)
    assert example == Example(want, "yo<|im_end|>")
    assert want.startswith('TOOLS [{"type": "function"')
    save_examples([example], tmp_path / "calibration.jsonl")  # as a warm start leaves it
    assert load_examples(tmp_path / "calibration.jsonl") == [example]
    assert not recwarn.list


@pytest.mark.parametrize("tools", [None, [], "", " ", "[]", "null"])
def test_no_tools_are_none(tokenizer, tools, recwarn):
    assert load(tokenizer, USER, ANSWER, tools=tools) == load(tokenizer, USER, ANSWER)
    tokenizer = tiny.tiny_tokenizer()
    load(tokenizer, USER, ANSWER, tools=tools)
    assert not recwarn.list


def test_documents_and_variables_reach_the_template(tokenizer, recwarn):
    docs = [{"title": "t", "text": "x"}]
    example = load(tokenizer, USER, ANSWER, documents=docs, chat_template_kwargs={"thinking": False})
    assert example.prompt == f"DOCS {json.dumps(docs)}\nTHINKING False\n<user>hi<|im_end|>\n<assistant>"
    assert (
        load(tokenizer, USER, ANSWER, documents=docs, chat_template_kwargs='{"thinking": false}') == example
    )
    assert not recwarn.list


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"tools": "x"}, "tools was not valid JSON"),
        (
            {"tools": '{"a": 1}'},
            r"tools was \{'a': 1\}; allowed: a list of objects .*, or a JSON string of such",
        ),
        ({"tools": ["weather"]}, r"tools was \['weather'\]; allowed: a list of objects"),
        ({"tools": TOOL}, "tools was {'type': .*; allowed: a list of objects"),
        ({"tools": 0}, "tools was 0; allowed"),
        ({"tools": '["weather"]'}, r"tools was \['weather'\]; allowed"),
        ({"documents": {"title": "t"}}, "documents was {'title': 't'}; allowed: a list of objects"),
        ({"chat_template_kwargs": [1]}, r"chat_template_kwargs was \[1\]; allowed: an object of variables"),
        (
            {"chat_template_kwargs": {"chat_template": "x"}},
            "chat_template_kwargs held 'chat_template'; allowed",
        ),
        (
            {"chat_template_kwargs": {"tools": [], "tokenize": 1}},
            "chat_template_kwargs held 'tokenize', 'tools'; allowed",
        ),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs held 'messages'; allowed"),
    ],
)
def test_bad_options_are_named(tokenizer, columns, message, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": [USER, ANSWER], **columns}), encoding="utf-8")
    with pytest.raises(DataError, match=f"data.jsonl line 1: {message}"):
        load_examples(path, tokenizer)


def test_fields_of_turns_reach_the_template(tokenizer, recwarn):
    answer = {**ANSWER, "reasoning_content": "hm", "name": None}
    example = load(tokenizer, {"role": "developer", "content": "be brief"}, USER, ASK, RESULT, answer)
    calls = json.dumps([CALL])
    assert example.prompt == (
        "<developer>be brief<|im_end|>\n<user>hi<|im_end|>\n"
        f"<assistant>CALLS {calls}<|im_end|>\n<tool weather c1>22 degrees<|im_end|>\n<assistant>"
    )
    assert example.completion == "(hm)yo<|im_end|>"
    assert not recwarn.list


@pytest.mark.parametrize("content", [None, "", {}])
def test_the_answer_may_be_a_tool_call(tokenizer, content):
    ask = {"role": "assistant", "tool_calls": [CALL]} | ({} if content == {} else {"content": content})
    assert load(tokenizer, USER, ask).completion == f"CALLS {json.dumps([CALL])}<|im_end|>"
    with pytest.raises(DataError, match="example 0: the chat template leaves out tool_calls, and the last"):
        load(tiny.tiny_tokenizer(), USER, ask)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (["hi", ANSWER], r"messages\[0\] was of type str; allowed: an object"),
        ([{"content": "x"}, ANSWER], r"messages\[0\]\.role was None; allowed: a string"),
        ([{"role": "user"}, ANSWER], r"messages\[0\]\.content was missing or null; allowed: a string"),
        ([{"role": "user", "content": 1}, ANSWER], r"messages\[0\]\.content was of type int; allowed"),
        ([USER, {"role": "assistant", "content": None}], r"messages\[1\]\.content was missing or null"),
        ([USER, {**ASK, "tool_calls": []}], r"messages\[1\]\.content was missing or null"),
        ([USER, {**ASK, "tool_calls": "f()"}], r"messages\[1\]\.tool_calls was of type str; allowed: a list"),
        ([{**USER, "content": None, "tool_calls": [CALL]}, ANSWER], r"messages\[0\]\.content was missing"),
        ([USER, {"role": "assistant", "content": " "}], "the last message was empty"),
    ],
)
def test_bad_turns_are_named(tokenizer, turns, message):
    with pytest.raises(DataError, match=f"example 0: {message}"):
        load(tokenizer, *turns)


def test_what_the_template_leaves_out_is_named_once(recwarn):
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] in ('user', 'assistant') %}{{ m['content'] }}<|im_end|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{% endif %}"
    )
    turns = [{"role": "system", "content": "s"}, {**USER, "name": "Ann"}, ANSWER]
    row = {"messages": turns, "tools": [TOOL], "documents": [{}], "id": 1}
    load_examples([{**row, "chat_template_kwargs": {"deep": True}}] * 2, tokenizer)
    assert said(recwarn) == [
        "data: columns 'chat_template_kwargs', 'documents', 'id', 'tools' are ignored; used: 'messages'; "
        "the chat template leaves out 'chat_template_kwargs', 'chat_template_kwargs.deep', 'documents', "
        "'tools', messages with role 'system', the messages' field 'name'"
    ]


def test_a_template_for_tools_of_its_own(recwarn):
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = {"default": tiny.CHAT_TEMPLATE, "tool_use": TEMPLATE}
    assert load(tokenizer, USER, ANSWER, tools=[TOOL]).prompt.startswith("TOOLS ")
    assert load(tokenizer, USER, ANSWER).prompt.startswith("<|im_start|>user")
    assert not recwarn.list


def test_chats_in_prompt_and_completion(tokenizer, recwarn):
    row = {"prompt": [USER, ASK, RESULT], "completion": [ANSWER], "tools": [TOOL]}
    want = load(tokenizer, USER, ASK, RESULT, ANSWER, tools=[TOOL])
    assert load_examples([row], tokenizer) == [want]
    twice = load_examples([{"prompt": [USER], "completion": [ASK, ANSWER]}], tokenizer)
    assert twice[0].completion == f"CALLS {json.dumps([CALL])}<|im_end|>\n<assistant>yo<|im_end|>"
    assert not recwarn.list
    for prompt, completion in (([USER], [ASK, RESULT, ANSWER]), ([USER], [USER]), ([USER, ASK], [ANSWER])):
        with pytest.raises(DataError, match="example 0: completion was not an answer; allowed: turns by"):
            load_examples([{"prompt": prompt, "completion": completion}], tokenizer)
    with pytest.raises(DataError, match=r"completion\[0\]\.role was None"):
        load_examples([{"prompt": [USER], "completion": [{"content": "x"}]}], tokenizer)


def test_a_template_that_refuses_a_role_is_one_line(tokenizer):
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no\ntools') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(DataError, match="example 0: the chat template refused the messages: no tools"):
        load(tokenizer, USER, ASK, RESULT, ANSWER)
