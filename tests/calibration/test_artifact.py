"""The steering artifact: round trip, damage, misfit, and crashes in the middle of a save."""

import errno
import hashlib
import json
import math
import os
import shutil

import pytest
import torch

from svdk import load_adapter
from svdk.calibration import artifact
from svdk.calibration.artifact import JSON_NAME, STAGED_NAME, TENSORS_NAME, Steering
from svdk.errors import ArtifactError, InputError
from svdk.models.fingerprints import adapter_fingerprint, model_fingerprint, tokenizer_fingerprint
from tests.helpers import tiny


def example(strength: float = 1.5, **changes) -> Steering:
    values = {
        "gain": 0.25,
        "confidence_interval": (-0.5, math.inf),
        "estimator": "optimum",
        "objective": "nll",
        "metrics": {"tokens": 7, "nll_base": math.inf, "per_token_std": math.nan},
        "statistics": {"p": torch.rand(5), "tokens": torch.tensor([3, 2])},
    }
    return Steering(strength, **(values | changes))


def scalars(steering: Steering) -> str:
    return repr(steering)  # NaN-safe; tensors are not part of it


def reseal(record: dict) -> str:
    """What somebody who knows the format could write."""
    record.pop("checksum", None)
    record["checksum"] = artifact._checksum(record)
    return json.dumps(record)


@pytest.mark.parametrize("penalty", [-math.inf, -2.5])
def test_round_trip(tmp_path, penalty):
    steering = example(penalty=penalty)
    assert steering.save(tmp_path / "new" / "folder") == tmp_path / "new" / "folder" / JSON_NAME
    again = Steering.load(tmp_path / "new" / "folder")
    assert scalars(again) == scalars(steering)
    assert again.statistics.keys() == steering.statistics.keys()
    assert all(torch.equal(again.statistics[k], steering.statistics[k]) for k in again.statistics)
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == [JSON_NAME, TENSORS_NAME]


def test_static_vector_round_trip(tmp_path):
    vector = torch.randn(9)
    Steering(2.0, direction="vector", vector=vector, vocab_size=9).save(tmp_path)
    assert torch.equal(Steering.load(tmp_path).vector, vector)


def test_json_is_strict(tmp_path):
    example().save(tmp_path)

    def refuse(literal):
        raise AssertionError(literal)

    record = json.loads((tmp_path / JSON_NAME).read_text(), parse_constant=refuse)
    assert record["penalty"] == "-inf"
    assert record["confidence_interval"] == [-0.5, "inf"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"strength": math.nan}, "strength was nan"),
        ({"strength": "1"}, "strength was '1'"),
        ({"strength": -1.0, "strength_mode": "kl_budget"}, "kl_budget"),
        ({"alpha": 1.5}, r"alpha was 1.5; allowed: a number in \[0, 1\]"),
        ({"alpha": math.nan}, "alpha was nan"),
        ({"penalty": math.inf}, "penalty was inf"),
        ({"direction": "sideways"}, "direction was 'sideways'; allowed: 'kl_gradient'"),
        ({"strength_mode": "label"}, "strength_mode was 'label'"),
        ({"direction": "vector"}, "vector was absent"),
        ({"vector": torch.zeros(3)}, "vector was given"),
        (
            {"direction": "vector", "vector": torch.zeros(3), "vocab_size": 4},
            r"shape \(3,\); allowed: \(4,\)",
        ),
        ({"direction": "vector", "vector": torch.full((3,), math.nan)}, "finite"),
        ({"vocab_size": 0}, "vocab_size was 0"),
        ({"confidence_interval": (1.0,)}, "confidence_interval"),
        ({"metrics": {"x": "y"}}, "metrics"),
        ({"peft_type": 3}, "peft_type was 3"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(InputError, match=message):
        Steering(**({"strength": 1.0} | values))


def test_missing_artifact(tmp_path):
    with pytest.raises(ArtifactError, match=r"steering\.json does not exist: run `svdk calibrate`"):
        Steering.load(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1])
def test_truncated_tensors(tmp_path, keep):
    example().save(tmp_path)
    path = tmp_path / TENSORS_NAME
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match="truncated"):
        Steering.load(tmp_path)


def test_missing_tensors(tmp_path):
    example().save(tmp_path)
    (tmp_path / TENSORS_NAME).unlink()
    with pytest.raises(ArtifactError, match=r"steering\.safetensors does not exist"):
        Steering.load(tmp_path)


@pytest.mark.parametrize("place", [0, 7, 9, 40, -1])
def test_every_flipped_byte_is_noticed(tmp_path, place):
    example().save(tmp_path)
    path = tmp_path / TENSORS_NAME
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"SHA-256|header"):
        Steering.load(tmp_path)


@pytest.mark.parametrize("header", [2**63, 10**12, 10**6])
def test_absurd_header_size_with_a_matching_checksum(tmp_path, header):
    example().save(tmp_path)
    path = tmp_path / TENSORS_NAME
    data = header.to_bytes(8, "little") + path.read_bytes()[8:]
    path.write_bytes(data)
    record = json.loads((tmp_path / JSON_NAME).read_text())
    record["tensors"]["sha256"] = hashlib.sha256(data).hexdigest()
    (tmp_path / JSON_NAME).write_text(reseal(record))
    with pytest.raises(ArtifactError, match=f"header of {header} bytes"):
        Steering.load(tmp_path)


def test_broken_safetensors_with_a_matching_checksum(tmp_path):
    example().save(tmp_path)
    data = bytearray((tmp_path / TENSORS_NAME).read_bytes())
    data[8:12] = b"}}}}"
    (tmp_path / TENSORS_NAME).write_bytes(data)
    record = json.loads((tmp_path / JSON_NAME).read_text())
    record["tensors"]["sha256"] = hashlib.sha256(data).hexdigest()
    (tmp_path / JSON_NAME).write_text(reseal(record))
    with pytest.raises(ArtifactError, match="damaged"):
        Steering.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is damaged"),
        ("[" * 100000, "is damaged"),
        ("{}", "not a steering artifact"),
        ('{"format": "svdk-steering", "strength": NaN}', "NaN is not strict JSON"),
        (b"\xff\xfe".decode("latin-1"), "is damaged"),
        ("[1]", "is damaged: it holds no JSON object"),
        (" " * (1 << 20) + "{}", "at most"),
    ],
)
def test_json_that_is_no_artifact(tmp_path, text, message):
    example().save(tmp_path)
    (tmp_path / JSON_NAME).write_text(text)
    with pytest.raises(ArtifactError, match=message):
        Steering.load(tmp_path)


def test_edited_json_is_refused(tmp_path):
    example().save(tmp_path)
    path = tmp_path / JSON_NAME
    path.write_text(path.read_text().replace('"strength": 1.5', '"strength": 50.0'))
    with pytest.raises(ArtifactError, match="changed after it was written"):
        Steering.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 3}, "format_version was 3; this svdk reads 1 and 2"),
        ({"lever": "magic"}, "lever was 'magic'"),
        ({"positions": [1.0, "nan"]}, "positions was"),
        ({"positions": 3.0}, "positions was"),
        ({"scale": "inf"}, "scale was 'inf'"),
        ({"format_version": True}, "format_version was True"),
        ({"strength": "inf"}, "strength was inf"),
        ({"strength": None}, "strength was None"),
        ({"alpha": "0.1"}, "alpha was '0.1'"),
        ({"confidence_interval": [1, 2, 3]}, "confidence_interval"),
        ({"metrics": {"x": []}}, "metrics"),
        ({"surplus": 1}, "surplus"),
        ({"tensors": {"file": "../../etc/passwd", "bytes": 1, "sha256": ""}}, "tensors was"),
        ({"svdk_version": 3}, "svdk_version was 3"),
    ],
)
def test_well_sealed_nonsense_is_refused(tmp_path, change, message):
    example().save(tmp_path)
    record = json.loads((tmp_path / JSON_NAME).read_text()) | change
    (tmp_path / JSON_NAME).write_text(reseal(record))
    with pytest.raises(ArtifactError, match=message):
        Steering.load(tmp_path)


def test_format_1_is_still_read(tmp_path):
    example().save(tmp_path)
    record = json.loads((tmp_path / JSON_NAME).read_text())
    for name in ("lever", "positions", "scale", "options", "bias", "classes"):
        del record[name]
    (tmp_path / JSON_NAME).write_text(reseal(record | {"format_version": 1}))
    old = Steering.load(tmp_path)
    assert (old.lever, old.positions, old.scale) == (None, (), 1.0)
    assert old.strength == example().strength and old.format_version == 2
    old.save(tmp_path)
    assert json.loads((tmp_path / JSON_NAME).read_text())["format_version"] == 2


@pytest.mark.parametrize("absent", [("options", "bias", "classes"), ("classes",)])
def test_the_first_artifacts_of_format_2_are_still_read(tmp_path, absent):
    example().save(tmp_path)
    record = json.loads((tmp_path / JSON_NAME).read_text())
    for name in absent:
        del record[name]
    (tmp_path / JSON_NAME).write_text(reseal(record))
    old = Steering.load(tmp_path)
    assert (old.options, old.bias, old.classes) == ((), (), None)
    for name in ("options", "bias"):  # together or not at all
        half = {key: value for key, value in record.items() if key not in ("options", "bias", name)}
        (tmp_path / JSON_NAME).write_text(reseal(half | {"bias" if name == "options" else "options": []}))
        with pytest.raises(ArtifactError, match=f"missing or unknown entries: .*{name}"):
            Steering.load(tmp_path)
    del record["scale"]
    (tmp_path / JSON_NAME).write_text(reseal(record))
    with pytest.raises(ArtifactError, match="scale"):
        Steering.load(tmp_path)


def test_levers_survive_the_files(tmp_path):
    given = Steering(strength=1.5, positions=(2.0, -0.5), lever="positions", scale=1.25)
    given.save(tmp_path)
    found = Steering.load(tmp_path)
    assert (found.lever, found.positions, found.scale) == ("positions", (2.0, -0.5), 1.25)


class Crash(BaseException):
    """Stands for a kill: no handler of Exception sees it."""


@pytest.mark.parametrize("step", [1, 2, 3])
def test_crash_at_any_rename_leaves_a_usable_artifact(tmp_path, monkeypatch, step):
    """Whatever rename the crash precedes, the old or the new artifact loads, and the next save works."""
    example(1.0).save(tmp_path)
    replace, calls = os.replace, []

    def crashing(source, target):
        calls.append(target)
        if len(calls) == step:
            raise Crash
        replace(source, target)

    monkeypatch.setattr(os, "replace", crashing)
    with pytest.raises(Crash):
        example(2.0, statistics={"p": torch.rand(50)}).save(tmp_path)
    monkeypatch.undo()
    assert Steering.load(tmp_path).strength == (2.0 if step == 3 else 1.0)
    # Another save that dies before its own commit must not harm what the crash left either.
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            example(3.0).save(tmp_path)
    assert Steering.load(tmp_path).strength == (2.0 if step == 3 else 1.0)
    example(4.0).save(tmp_path)
    assert Steering.load(tmp_path).strength == 4.0
    assert sorted(os.listdir(tmp_path)) == [JSON_NAME, TENSORS_NAME]


def test_power_loss_after_the_commit(tmp_path):
    """No handler ran at all: the staged file lies there, the tensors still have their old contents."""
    example(1.0).save(tmp_path)
    old = (tmp_path / TENSORS_NAME).read_bytes()
    example(2.0).save(tmp_path)
    os.replace(tmp_path / TENSORS_NAME, tmp_path / STAGED_NAME)
    (tmp_path / TENSORS_NAME).write_bytes(old)
    assert Steering.load(tmp_path).strength == 2.0


def test_full_disk_leaves_the_old_artifact(tmp_path, monkeypatch):
    example(1.0).save(tmp_path)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            example(2.0).save(tmp_path)
    assert Steering.load(tmp_path).strength == 1.0
    assert sorted(os.listdir(tmp_path)) == [JSON_NAME, TENSORS_NAME]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """An adapter folder with an artifact made for it."""
    folder = tmp_path_factory.mktemp("adapter")
    model = tiny.tiny_peft("lora")
    model.save_pretrained(folder)
    Steering(
        1.0,
        peft_type="LORA",
        base_model_fingerprint=model_fingerprint(model),
        adapter_fingerprint=adapter_fingerprint(folder),
        tokenizer_fingerprint=tokenizer_fingerprint(tiny.tiny_tokenizer()),
        vocab_size=tiny.VOCAB_SIZE,
    ).save(folder)
    return folder


def test_load_accepts_what_it_was_made_for(fitted):
    base = tiny.tiny_model()
    assert Steering.load(fitted, model=base, tokenizer=tiny.tiny_tokenizer()).strength == 1.0
    peft_model = load_adapter(base, fitted)
    assert Steering.load(fitted, model=peft_model).strength == 1.0


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: tiny.tiny_model(seed=1), "base model does not match"),
        (lambda: tiny.tiny_model("gpt2"), "base model does not match"),
        (lambda: tiny.tiny_model(vocab_size=300), "vocabulary size.* made for 261, this one is 300"),
        (lambda: tiny.tiny_peft("ia3"), "PEFT type.* made for LORA, this one is IA3"),
    ],
)
def test_another_model_is_refused(fitted, model, message):
    with pytest.raises(ArtifactError, match=message):
        Steering.load(fitted, model=model())


def test_another_tokenizer_is_refused(fitted):
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.add_tokens(["new"])
    with pytest.raises(
        ArtifactError, match=r"tokenizer does not match: the artifact was made for [0-9a-f]+, "
    ):
        Steering.load(fitted, tokenizer=tokenizer)


def test_another_adapter_is_refused(fitted, tmp_path):
    other = shutil.copytree(fitted, tmp_path / "other")
    tiny.tiny_peft("lora", seed=1).save_pretrained(other)
    with pytest.raises(ArtifactError, match="adapter does not match"):
        Steering.load(other)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"confidence_interval": (0.01, 0.4)}, "steering helps: kl_gradient, alpha 0.1, strength 1.5"),
        ({"confidence_interval": (-0.01, 0.4)}, "steering does not help on this data"),
        ({"confidence_interval": (-0.3, -0.1), "gain": -0.2}, "steering does not help on this data"),
        ({"confidence_interval": (0.01, 0.4), "objective": "accuracy"}, "gain 25 points"),
        ({"confidence_interval": (0.01, 0.4), "at_bound": True}, "still improves"),
        ({"gain": None}, "not calibrated"),
    ],
)
def test_verdict(values, message):
    steering = example(**values)
    assert message in steering.verdict()
    assert steering.helps == (steering.confidence_interval[0] > 0)
