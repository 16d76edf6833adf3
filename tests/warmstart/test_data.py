"""Examples: reading, refusing, tokenising, splitting."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svdk.errors import DataError, InputError
from svdk.warmstart.data import (
    Example,
    data_hash,
    encode,
    encode_all,
    encode_prompt,
    load_examples,
    load_prompts,
    save_examples,
    split,
)
from tests.helpers import tiny

CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "so long "},
]


def write(path, *rows):
    path.write_text(
        "".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows), encoding="utf-8"
    )
    return path


def test_jsonl_file_and_list_give_the_same_examples(tmp_path):
    rows = [{"prompt": "a", "completion": "b\u2028c"}, {"prompt": "é", "completion": "ü"}]
    expected = [Example("a", "b\u2028c"), Example("é", "ü")]
    assert load_examples(rows) == expected
    # Raw U+2028, a blank line, a byte order mark and CRLF must not split or break rows.
    text = "\ufeff" + "\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n"
    path = tmp_path / "data.jsonl"
    path.write_bytes(text.encode())
    assert load_examples(path) == expected
    assert load_examples(str(path)) == expected
    assert load_examples(expected) == expected


def test_chat_becomes_prompt_and_last_turn_with_its_end(tiny_tokenizer):
    (example,) = load_examples([{"messages": CHAT}], tiny_tokenizer)
    assert example.prompt == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
        "<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n"
    )
    assert example.completion == "so long <|im_end|>"
    encoded = encode(tiny_tokenizer, example)
    assert encoded.input_ids[-1] == tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")  # no EOS after it


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "a", "answer": "b"},
            "line 2: columns were 'question', 'answer'; needed: 'prompt' and",
        ),
        ({"prompt": "a"}, "columns were 'prompt'; needed"),
        ({"prompt": "a", "completion": ""}, "line 2: completion was empty"),
        ({"prompt": " \n", "completion": "b"}, "line 2: prompt was empty"),
        ({"prompt": "a", "completion": None}, "completion was of type NoneType; allowed: a string"),
        ({"prompt": "a", "completion": "\ud800"}, "lone surrogate"),
        ([1], "line 2 was a list; allowed: an object"),
        ('{"prompt": "a"\n', r"line 2 was not valid JSON: .* at column"),
        ({"messages": CHAT[:3]}, "the last one with role 'assistant'"),
        ({"messages": CHAT[1:2]}, "at least two objects"),
        ({"messages": "hi"}, "messages were not a chat"),
        ({"messages": []}, r"messages were not a chat \(empty\)"),
        ({"messages": None}, r"messages were not a chat \(of type NoneType\)"),
        ({"prompt": CHAT[:1], "completion": "b"}, "prompt was of type list and completion was of type str"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": " "}]}, "last message was empty"),
    ],
)
def test_bad_row_is_named(tmp_path, tiny_tokenizer, row, message):
    path = write(tmp_path / "data.jsonl", {"prompt": "a", "completion": "b"}, row)
    with pytest.raises(DataError, match=message):
        load_examples(path, tiny_tokenizer)


def test_nulls_are_as_if_the_column_were_not_there(tiny_tokenizer, recwarn):
    chat = {"prompt": None, "completion": None, "messages": CHAT, "tools": None}
    text = {"prompt": "a", "completion": "b", "messages": None, "tools": None}
    (want,) = load_examples([{"messages": CHAT}], tiny_tokenizer)
    assert load_examples([chat, text], tiny_tokenizer) == [want, Example("a", "b")]
    assert not recwarn.list


def test_ignored_columns_are_named_once(tmp_path):
    rows = [
        {"prompt": "a", "completion": "b", "source": "s", "id": 1},
        {"prompt": "a", "completion": "c", "id": 2, "messages": CHAT, "tools": [{}], "no": None},
    ]
    path = write(tmp_path / "data.jsonl", *rows)
    for source, name in ((rows, "data"), (path, str(path))):
        with pytest.warns(UserWarning) as caught:
            assert load_examples(source) == [Example("a", "b"), Example("a", "c")]
        assert [str(w.message) for w in caught] == [
            f"{name}: columns 'id', 'messages', 'source', 'tools' are ignored; used: 'completion', 'prompt'"
        ]
        assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=r"^data: column 'x\\ny' is ignored; used"):
        load_examples([{"prompt": "a", "completion": "b", "x\ny": 1}])


def test_chat_needs_a_template():
    for row in ({"messages": CHAT}, {"prompt": CHAT[:1], "completion": CHAT[1:2]}):
        with pytest.raises(DataError, match="example 0: chats need a tokenizer with a chat template"):
            load_examples([row])


def test_chat_template_that_refuses_or_is_no_prefix():
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="refused the messages: roles must alternate"):
        load_examples([{"messages": CHAT}], tokenizer)
    tokenizer.chat_template = "{{ messages | length }}{{ messages[-1]['content'] }}"
    with pytest.raises(DataError, match="does not render the chat as prompt"):
        load_examples([{"messages": CHAT}], tokenizer)


def test_unusable_files(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl does not exist"):
        load_examples(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        load_examples(tmp_path)
    (tmp_path / "latin").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(DataError, match="not UTF-8"):
        load_examples(tmp_path / "latin")
    with pytest.raises(DataError, match=r"empty\.jsonl held 0 examples"):
        load_examples(write(tmp_path / "empty.jsonl", "\n"))


def test_encode_is_prompt_then_completion_then_eos(tiny_tokenizer):
    e = encode(tiny_tokenizer, Example("say: ", "YES"))
    assert e.prompt_length == 5
    assert tiny_tokenizer.decode(e.input_ids[: e.prompt_length]) == "say: "
    assert tiny_tokenizer.decode(e.input_ids[e.prompt_length :]) == "YES<eos>"
    assert encode(tiny_tokenizer, Example("say: ", "YES<eos>")).input_ids == e.input_ids


def test_bos_comes_once_and_no_eos_after_the_prompt():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.tiny_tokenizer()
    specials = [("<bos>", 1), ("<eos>", 2)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", pair="<bos> $A $B <eos>", special_tokens=specials
    )
    ids = encode_prompt(tokenizer, "ab")
    assert ids[0] == 1
    assert len(ids) == 3
    assert encode_prompt(tokenizer, "<bos>ab") == ids
    assert encode(tokenizer, Example("ab", "c")).input_ids == [*ids, *encode_prompt(tokenizer, "c")[1:], 2]


def test_prompt_keeps_its_tokens_where_the_boundary_would_merge():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<eos>": 0, "a": 1, "b": 2, "ab": 3, "c": 4, "bc": 5}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), ("b", "c")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")
    assert encode(tokenizer, Example("a", "bc")).input_ids == [1, 5, 0]  # joint would be ab, c
    assert encode(tokenizer, Example("ab", "c")).input_ids == [3, 4, 0]


def test_too_long_examples_are_an_error_or_left_out_whole(tiny_tokenizer):
    examples = [Example("a" * n, "b") for n in (3, 30, 40)]  # a completion has two tokens: b, EOS
    with pytest.raises(DataError, match="had 32 tokens; allowed: at most 31"):
        encode(tiny_tokenizer, examples[1], max_length=31)
    with pytest.raises(DataError, match=r"2 of 3 examples had more than max_length = 31 tokens .*32 tokens"):
        encode_all(tiny_tokenizer, examples, max_length=31)
    encoded, skipped = encode_all(tiny_tokenizer, examples, max_length=32, too_long="skip")
    assert skipped == [2]
    assert [len(e.input_ids) for e in encoded] == [5, 32]
    with pytest.raises(DataError, match="3 of 3"):
        encode_all(tiny_tokenizer, examples, max_length=4, too_long="skip")
    with pytest.raises(InputError, match="too_long was 'cut'; allowed: error, skip"):
        encode_all(tiny_tokenizer, examples, max_length=32, too_long="cut")


def test_tokenizer_without_eos_is_refused():
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="tokenizer had no EOS"):
        encode(tokenizer, Example("a", "b"))


@given(
    prompts=st.lists(st.integers(0, 8), min_size=2, max_size=40),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 3),
)
def test_split_parts_keep_order_and_share_no_prompt(prompts, fraction, seed):
    examples = [Example(f"p{p}", f"c{i}") for i, p in enumerate(prompts)]
    train, calibration = split(examples, fraction, seed)
    assert train
    assert calibration
    assert sorted(train + calibration, key=examples.index) == examples
    for part in (train, calibration):
        assert part == sorted(part, key=examples.index)
    if len(set(prompts)) > 1:
        assert not {e.prompt for e in train} & {e.prompt for e in calibration}
    assert split(examples, fraction, seed) == (train, calibration)


def test_split_size_and_seed():
    examples = load_examples(tiny.tiny_examples(100))
    parts = [split(examples, 0.2, seed)[1] for seed in (0, 1)]
    assert [len(p) for p in parts] == [20, 20]
    assert parts[0] != parts[1]
    assert split(examples, 0.0) == (examples, [])
    # The contents decide, not the order of the file.
    assert {e.prompt for e in split(examples[::-1], 0.2, 0)[1]} == {e.prompt for e in parts[0]}


def test_split_refuses_what_cannot_be_split():
    with pytest.raises(InputError, match=r"calibration_fraction was 1.0; allowed: a number in \[0, 1\)"):
        split([Example("a", "b")] * 2, 1.0)
    with pytest.raises(DataError, match="2 examples with 1 different contents"):
        split([Example("a", "b")] * 2, 0.5)


def test_prompts_of_a_file(tmp_path):
    lines = [
        json.dumps({"prompt": "a\u2028b\x85c", "completion": "d"}, ensure_ascii=False) + "\r\n",
        {"messages": CHAT[:3]},
        {"prompt": CHAT[:1], "messages": None},
    ]
    path = write(tmp_path / "prompts.jsonl", "\ufeff", *lines)
    text, chat, other = load_prompts(path)
    assert text == "a\u2028b\x85c"
    assert (chat.turns, chat.last, other.turns) == (CHAT[:3], "bye", CHAT[:1])
    write(path, {"prompt": "a", "id": 1}, {"messages": CHAT[:1], "tools": [], "source": 1})
    with pytest.warns(
        UserWarning, match=r"prompts\.jsonl: columns 'id', 'source' are ignored; used: 'messages', "
    ):
        load_prompts(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "line 2: columns were 'text'; needed: 'prompt' or 'messages'"),
        ([1], "line 2 was a list; allowed: an object with columns 'prompt' or 'messages'"),
        ("{", "line 2 was not valid JSON"),
        ({"prompt": " "}, "line 2: prompt was empty; allowed: a non-empty string"),
        ({"prompt": None}, "line 2: prompt was of type NoneType; allowed: a string"),
        ({"prompt": "\ud800"}, "line 2: prompt held a lone surrogate"),
        ({"messages": CHAT}, "line 2: the last turn of messages was by 'assistant'"),
        ({"messages": "x"}, "line 2: messages were not a chat"),
        ({"prompt": []}, r"line 2: prompt was not a chat \(empty\)"),
    ],
)
def test_bad_prompt_is_named(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        load_prompts(write(tmp_path / "prompts.jsonl", {"prompt": "a"}, row))


def test_save_load_and_hash(tmp_path):
    examples = [Example("é\n", "a\u2028b"), Example("x", "y")]
    save_examples(examples, tmp_path / "out.jsonl")
    assert load_examples(tmp_path / "out.jsonl") == examples
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]
    assert data_hash(examples) == data_hash(load_examples(tmp_path / "out.jsonl"))
    assert data_hash(examples) != data_hash(examples[::-1])
    assert data_hash([Example("ab", "c")]) != data_hash([Example("a", "bc")])
