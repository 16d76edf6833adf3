"""``svdk serve``: the command line that it builds, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import sys

import pytest

from svdk.cli import main
from tests.helpers import tiny


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    tiny.tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(tmp_path):
    tiny.tiny_peft("lora").save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def printed(capsys) -> list[str]:
    return shlex.split(capsys.readouterr().out)


def test_the_command_line_of_vllms_server(model, adapter, capsys):
    more = ["--port", "8001", "--max-loras", "3"]
    given = ["serve", str(model), "--adapter", f"task={adapter}", "--print-only", "--", *more]
    assert main(given) == 0
    command = printed(capsys)
    assert command[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    assert command[command.index("--model") + 1] == str(model)
    assert command[command.index("--lora-modules") + 1] == f"task={adapter}"
    overrides = json.loads(command[command.index("--hf-overrides") + 1])
    assert overrides == {"architectures": ["SvdkLlamaForCausalLM"]}
    assert command[-4:] == more  # last, so that they win
    assert main(["serve", str(model), "--print-only"]) == 0
    assert "--lora-modules" not in printed(capsys)


def test_it_becomes_that_process(model, capsys, monkeypatch):
    ran = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(os, "execv", lambda path, command: ran.append((path, command)) or 0)
    assert main(["serve", str(model), "--", "--port", "1"]) == 0
    ((path, command),) = ran
    assert path == sys.executable and command == printed(capsys) and command[-2:] == ["--port", "1"]


def test_without_vllm_it_says_how_to_get_it(model, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["serve", str(model)]) == 2
    assert "vllm is not installed; allowed: an environment with it" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["task", "task=", "=folder", "a=x a=y"])
def test_bad_adapters_are_refused(model, given, capsys):
    adapters = [word for one in given.split() for word in ("--adapter", one)]
    assert main(["serve", str(model), *adapters, "--print-only"]) == 2
    assert "allowed: NAME=FOLDER, each name once" in capsys.readouterr().err


def test_a_model_without_a_twin_or_an_adapter_of_another_type(model, tmp_path, capsys):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))
    assert main(["serve", str(model), "--print-only"]) == 2
    assert "MambaForCausalLM" in capsys.readouterr().err
    (model / "config.json").write_text(json.dumps(config))
    tiny.tiny_peft("ia3").save_pretrained(tmp_path / "ia3")
    assert main(["serve", str(model), "--adapter", f"x={tmp_path / 'ia3'}", "--print-only"]) == 2
    assert "allowed: LORA" in capsys.readouterr().err
