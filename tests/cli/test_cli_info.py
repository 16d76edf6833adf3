"""``svdk info``: versions, backends, and which decoding path a model and an adapter take."""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model

import svdk
from svdk.calibration.artifact import Steering
from svdk.cli import main
from svdk.models import paired_forward
from svdk.ops import backends
from svdk.ops.configs import ClassStrengths
from tests.helpers import tiny


def test_versions_and_backends(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert svdk.__version__ in out
    for name, status in backends.status().items():
        assert f"{name}" in out and status in out
    assert "decoding" not in out


@pytest.mark.parametrize("kind", ["lora", "prefix_tuning"])
def test_paired_path(kind, tiny_folder, tmp_path, capsys):
    tiny.tiny_peft(kind).save_pretrained(tmp_path)
    assert main(["info", "--model", str(tiny_folder), "--adapter", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "path     paired" in out
    assert ("8 adapter layers" if kind == "lora" else "4 virtual tokens") in out


def test_two_pass_path_says_why(tiny_folder, tmp_path, capsys, monkeypatch):
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny.tiny_model(), config).save_pretrained(tmp_path)
    monkeypatch.setattr(paired_forward, "route", lambda layer, rows, adapters: "no reason at all")
    assert main(["info", "--model", str(tiny_folder), "--adapter", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "path     two_pass" in out
    assert "layer model.layers.0.self_attn.q_proj: no reason at all" in out


def test_half_a_question(capsys):
    assert main(["info", "--model", "x"]) == 2
    assert "--adapter was absent" in capsys.readouterr().err


def test_what_steers_a_calibrated_adapter(tmp_path, capsys):
    Steering(strength=1.5, positions=(2.0, -0.5), lever="positions").save(tmp_path)
    assert main(["info", "--adapter", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "2 -0.5, then 1.5" in out and "not calibrated" in out
    Steering(strength=1.5, classes=ClassStrengths(-0.5, 2.0, (3,), (0,)), lever="classes").save(tmp_path)
    assert main(["info", "--adapter", str(tmp_path)]) == 0
    assert "content 1.5, template -0.5, stop 2" in capsys.readouterr().out
    assert main(["info", "--adapter", str(tmp_path / "other")]) == 2
    assert "without --model; allowed: a calibrated adapter" in capsys.readouterr().err
