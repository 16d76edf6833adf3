"""``svdk generate`` on a tiny model: what is printed, and what is refused."""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys

import pytest
import torch

from svdk import cli
from svdk.calibration.artifact import Steering
from svdk.cli import generate as command
from svdk.cli.terminal import Printer, columns
from svdk.errors import DataError, InputError
from svdk.generation.choose import choose
from svdk.generation.generate import decode
from svdk.models.loading import load_adapter, load_model
from svdk.models.pair import ModelPair
from svdk.warmstart.data import encode_prompt, load_examples
from tests.helpers import tiny


@pytest.fixture(scope="module")
def adapter(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model, _ = load_model(tiny_folder, device="cpu")
    tiny.tiny_peft("lora", model=model).save_pretrained(folder)
    Steering(strength=2.0).save(folder)
    return folder


@pytest.fixture
def call(tiny_folder, adapter, capsys):
    def run(*options, folder=adapter):
        parser = argparse.ArgumentParser()
        command.add_parser(parser.add_subparsers())
        args = ["generate", "--model", tiny_folder, "--adapter", folder, "--device", "cpu", *options]
        args = parser.parse_args([str(arg) for arg in args])
        capsys.readouterr()
        assert args.run(args) == 0
        return capsys.readouterr()

    return run


def expected(tiny_folder, adapter, text, strength=2.0):
    model, tokenizer = load_model(tiny_folder, device="cpu")
    ids = torch.tensor([encode_prompt(tokenizer, text)])
    pair = ModelPair(load_adapter(model, adapter))
    tokens = decode(pair, ids, max_new_tokens=10, strength=strength, eos_token_id=2).sequences
    return tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)


def test_prints_the_steered_answer(call, tiny_folder, adapter):
    shown = call("--prompt", "say hi", "--raw", "--max-new-tokens", 10)
    assert shown.out == expected(tiny_folder, adapter, "say hi") + "\n"
    assert "10 tokens, " in shown.err
    shown = call("--prompt", "say hi", "--raw", "--max-new-tokens", 10, "--strength", 9, "--quiet")
    assert shown.out == expected(tiny_folder, adapter, "say hi", 9.0) + "\n"
    assert "ms a token" not in shown.err


def test_stop_strings_of_the_model_count(call, tiny_folder, adapter, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"stop_strings": ["#c"]}))
    free = expected(tiny_folder, adapter, "say hi")
    assert "#c" in free[:-2]
    shown = call("--prompt", "say hi", "--raw", "--max-new-tokens", 10, "--model", folder)
    assert shown.out == free[: free.index("#c") + 2] + "\n"


def test_chat_template_as_the_calibration_examples_have_it(call, tiny_folder, adapter):
    _, tokenizer = load_model(tiny_folder, device="cpu")
    chat = expected(tiny_folder, adapter, command.render(tokenizer, "say hi", None)) + "\n"
    raw = expected(tiny_folder, adapter, "say hi") + "\n"
    options = ("--prompt", "say hi", "--max-new-tokens", 10)
    held_out = adapter / "calibration.jsonl"
    try:
        assert call(*options).out == chat  # nothing known: the tokenizer has a template
        held_out.write_text(json.dumps({"prompt": "say ho", "completion": "ho"}), encoding="utf-8")
        assert call(*options).out == raw
        assert call(*options, "--chat").out == chat
        text = command.render(tokenizer, "say ho", "be brief")
        held_out.write_text(json.dumps({"prompt": text, "completion": "ho"}), encoding="utf-8")
        assert call(*options).out == chat
    finally:
        held_out.unlink()


def test_compare_shows_three_answers_for_every_prompt(call, tmp_path, monkeypatch):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one"}\n\n{"prompt": "two"}\n', encoding="utf-8")
    monkeypatch.setenv("COLUMNS", "40")
    options = ("--prompts", file, "--compare", "--max-new-tokens", 5, "--temperature", 0.7)
    shown = call(*options, "--seed", 1)
    assert shown.out.count("[base]") == shown.out.count("[warm]") == shown.out.count("[steered]") == 2
    assert "> one\n" in shown.out and "> two\n" in shown.out
    assert shown.out == call(*options, "--seed", 1).out
    assert shown.out != call(*options, "--seed", 2).out


def test_standard_input_is_a_prompt(call, monkeypatch, tiny_folder, adapter):
    monkeypatch.setattr("sys.stdin", io.StringIO("say hi\n"))
    assert call("--raw", "--max-new-tokens", 10).out == expected(tiny_folder, adapter, "say hi") + "\n"


def test_standard_input_is_read_as_files_are(monkeypatch):
    for content in ("\ufeffsay\x85hi\r\nü\n\n", "\ufeffsay\x85hi\nü"):
        monkeypatch.setattr("sys.stdin", io.StringIO(content, newline=""))
        assert command.read_prompts(None, None) == ["say\x85hi\nü"]
        # The locale may be another one: the bytes are UTF-8.
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content.encode()), encoding="latin-1"))
        assert command.read_prompts(None, None) == ["say\x85hi\nü"]
    for content, message in ((b"\xff", "was not UTF-8 text"), (b"\xef\xbb\xbf\n", "was empty")):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="latin-1"))
        with pytest.raises(DataError, match=f"standard input {message}"):
            command.read_prompts(None, None)


SEPARATORS = "a\u2028b\u2029c\x85d"


def test_a_file_of_prompts_is_read_as_data_is(tmp_path):
    rows = [{"prompt": SEPARATORS, "completion": "x"}, {"prompt": "é", "completion": "x"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    for name in ("data.jsonl", "DATA.JSONL"):
        path = tmp_path / name
        path.write_bytes(("\ufeff" + "\r\n\n".join(lines)).encode())
        assert command.read_prompts(None, str(path)) == [e.prompt for e in load_examples(path)]
    path = tmp_path / "prompts.txt"
    path.write_bytes(f"\ufeff{SEPARATORS}\r\n\n \none\x0cprompt\x1c\x0b \rlast".encode())
    assert command.read_prompts(None, str(path)) == [SEPARATORS, "one\x0cprompt\x1c\x0b ", "last"]


def test_chats_in_a_file_of_prompts(call, tiny_folder, adapter, tmp_path):
    _, tokenizer = load_model(tiny_folder, device="cpu")
    turns = [{"role": "user", "content": "say ho"}, {"role": "assistant", "content": "ho"}]
    turns.append({"role": "user", "content": "say hi"})
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    answer = expected(tiny_folder, adapter, text)
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ({"messages": turns}, {"prompt": turns})))
    options = ("--prompts", path, "--max-new-tokens", 10)
    assert call(*options).out == f"> say hi\n{answer}\n\n> say hi\n{answer}\n"
    for option in (("--raw",), ("--system", "s")):
        with pytest.raises(
            DataError, match=rf"line 1 held a chat; allowed with {option[0]}: prompts as text"
        ):
            call(*options, *option)
    path.write_text(json.dumps({"messages": turns, "tools": [{"name": "f"}], "id": 1}))
    with pytest.warns(UserWarning) as caught:
        assert call(*options).out == answer + "\n"
    said = [str(w.message) for w in caught if w.category is UserWarning]
    assert said[0].endswith("prompts.jsonl: column 'id' is ignored; used: 'messages', 'tools'")
    assert said[1].endswith("prompts.jsonl: the chat template leaves out 'tools'")


def test_a_variable_of_the_template_does_not_hide_that_examples_are_chats(call, tiny_folder, adapter):
    _, tokenizer = load_model(tiny_folder, device="cpu")
    held_out = adapter / "calibration.jsonl"
    text = command.render(tokenizer, "say ho", None) + "<think></think>"
    chat = expected(tiny_folder, adapter, command.render(tokenizer, "say hi", None)) + "\n"
    try:
        held_out.write_text(json.dumps({"prompt": text, "completion": "ho"}), encoding="utf-8")
        assert call("--prompt", "say hi", "--max-new-tokens", 10).out == chat
    finally:
        held_out.unlink()


def test_a_chat_template_that_refuses_is_a_data_error(tiny_tokenizer):
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(DataError, match="prompt 'hi': the chat template refused the messages: no system"):
        command.render(tokenizer, "hi", "be brief")


def test_stop_strings_end_an_answer_and_stay_in_it(call, tiny_folder, adapter):
    options = ("--prompt", "say hi", "--raw", "--max-new-tokens", 10)
    whole = call(*options).out.rstrip("\n")
    stop = whole[3:5]
    end = whole.index(stop) + 2
    assert end < len(whole)
    assert call(*options, "--stop", "not there", "--stop", stop).out == whole[:end] + "\n"
    assert call(*options, "--stop", "\n\n").out == whole + "\n"  # blank text is a usual one
    for bad, message in (("", "--stop was empty"), ("\udcff", "--stop held a lone surrogate")):
        with pytest.raises(DataError, match=message):
            call(*options, "--stop", bad)


def test_forward_reaches_decode(call, monkeypatch):
    given = []
    real = decode

    def spy(*args, **options):
        given.append(options["forward"])
        return real(*args, **options)

    monkeypatch.setattr(sys.modules[decode.__module__], "decode", spy)
    options = ("--prompt", "say hi", "--raw", "--max-new-tokens", 3)
    answers = {call(*options, *more).out for more in ((), ("--forward", "paired"), ("--forward", "two_pass"))}
    assert given == ["auto", "paired", "two_pass"]
    assert len(answers) == 1
    with pytest.raises(InputError, match="forward was 'both'; allowed: auto, paired, two_pass"):
        call(*options, "--forward", "both")


def test_a_forward_that_cannot_be_is_refused_before_the_first_answer(call, monkeypatch, capsys):
    monkeypatch.setattr("svdk.models.paired_forward._routes", lambda *_: ("it is odd", []))
    with pytest.raises(InputError, match="forward was 'paired'; allowed for this model: 'two_pass'"):
        call("--prompt", "a", "--prompt", "b", "--forward", "paired")
    assert capsys.readouterr().out == ""


def test_the_reason_for_two_passes_is_one_line(tiny_folder, adapter, monkeypatch, capsys):
    reason = "layer 0: for a test of the command line"
    monkeypatch.setattr("svdk.models.paired_forward._routes", lambda *_: (reason, []))
    args = ["generate", "--model", tiny_folder, "--adapter", adapter, "--device", "cpu", "--prompt", "hi"]
    args = [*map(str, args), "--max-new-tokens", "2", "--quiet"]
    capsys.readouterr()
    assert cli.main(args) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [x for x in lines if x.startswith("svdk: ")] == [
        f"svdk: svdk decodes with two forward passes a step, because {reason}"
    ]
    assert cli.main([*args, "--forward", "tree"]) == 2
    shown = capsys.readouterr()
    assert shown.err == "svdk generate: error: forward was 'tree'; allowed: auto, paired, two_pass\n"


def test_columns_wrap_and_give_way():
    answers = {"base": "a b c\n\n" + "x" * 40, "warm": "", "steered": "y"}
    wide = columns(answers, 96).splitlines()
    assert wide[0].split() == ["base", "|", "warm", "|", "steered"]
    assert wide[2].split() == ["a", "b", "c", "|", "|", "y"]
    assert "".join(line.split("|")[0].strip() for line in wide[4:]) == "x" * 40
    assert columns(answers, 40).splitlines()[:2] == ["[base]", "a b c"]


def test_printer_holds_back_half_a_character(tiny_tokenizer, capsys):
    printer = Printer(tiny_tokenizer)
    shown = []
    for ids in ([7, 8], *([i] for i in encode_prompt(tiny_tokenizer, "a é"))):
        printer.put(torch.tensor(ids))
        shown.append(capsys.readouterr().out)
    printer.end()
    assert shown == ["", "a", " ", "", "é"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", " "), "--prompt 1 was empty"),
        (("--prompt", "x" * 600), "had 619 tokens; allowed: at most 384 with --max-new-tokens 128"),
        (("--prompt", "x", "--alpha", "1.5"), "alpha was 1.5"),
        (("--prompt", "x", "--temperature", "-1"), "temperature was -1.0"),
        (("--prompt", "x", "--max-new-tokens", "0"), "max_new_tokens was 0"),
        (("--prompt", "x", "--raw", "--system", "s"), "--system was given with --raw"),
    ],
)
def test_bad_arguments(call, options, message):
    with pytest.raises(InputError, match=message):
        call(*options)


def test_bad_files(call, tmp_path):
    for name, content, message in (
        ("a.txt", b"", "held 0 prompts"),
        ("b.txt", b"\xff", "was not UTF-8"),
        ("c.jsonl", b'{"text": "x"}', "line 1: columns were 'text'; needed: 'prompt' or 'messages'"),
        ("d.jsonl", b"{", "line 1 was not valid JSON"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            call("--prompts", tmp_path / name)
    with pytest.raises(InputError, match="adapter_config"):
        call("--prompt", "x", folder=tmp_path)


def test_an_uncalibrated_adapter_needs_a_strength(call, tiny_folder, tmp_path):
    model, _ = load_model(tiny_folder, device="cpu")
    tiny.tiny_peft("ia3", model=model).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="run `svdk calibrate`"):
        call("--prompt", "x", folder=tmp_path)
    assert call("--prompt", "x", "--strength", "1", "--max-new-tokens", "3", folder=tmp_path).out


def test_options_are_answered_with_how_likely_each_is(call, tiny_folder, adapter):
    model, tokenizer = load_model(tiny_folder, device="cpu")
    pair = ModelPair(load_adapter(model, adapter))
    steering = Steering.load(adapter)
    answer = choose(pair, "say hi", (" yes", " no"), tokenizer=tokenizer, steering=steering)
    first, second = call("--prompt", "say hi", "--raw", "--options", " yes", " no").out.splitlines()
    assert first.startswith(answer.option) and first.endswith(f"{float(answer.probabilities.max()):.2%}")
    assert second.startswith(answer.options[1 - answer.label])
    shown = call("--prompt", "one", "--prompt", "two", "--raw", "--compare", "--options", " yes", " no").out
    assert shown.count("> one\n") == shown.count("> two\n") == 1
    assert [shown.count(f"{view:<8}") for view in ("base", "warm", "steered")] == [4, 4, 4]


@pytest.mark.parametrize("wrong", [("--temperature", 0.5), ("--stop", "x"), ("--strength-mode", "kl_budget")])
def test_options_are_not_sampled(call, wrong):
    with pytest.raises(InputError, match="--options was given with --temperature, --stop"):
        call("--prompt", "a", "--options", " yes", " no", *wrong)
    with pytest.raises(InputError, match="at least two texts"):
        call("--prompt", "a", "--options", " yes")
