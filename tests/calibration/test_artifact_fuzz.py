"""Artifacts and adapters from strangers: whatever the bytes, they load as written or raise ArtifactError.

What the design asks of each single kind of damage is in test_artifact.py and test_models.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from svdk import Steering
from svdk.calibration.artifact import JSON_NAME, LOCK_NAME, MAX_TENSORS_BYTES, TENSORS_NAME, _checksum
from svdk.calibration.calibrate import recalibrate
from svdk.errors import ArtifactError, SvdkError
from svdk.models.adapter_files import MAX_CONFIG_BYTES
from svdk.models.fingerprints import adapter_fingerprint
from svdk.models.loading import attach, load_adapter
from tests import ROOT
from tests.helpers import tiny

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EDITS = st.lists(
    st.tuples(
        st.sampled_from(("flip", "insert", "delete", "double", "cut")),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=4,
)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from((0, -1, 10**9, 10**400, 1e308, "inf", "-inf", "LORA", "IA3", "(", "all-linear")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip


def edited(data: bytes, edits: list[tuple[str, float, int]]) -> bytes:
    """``data`` after small accidents at relative places."""
    out = bytearray(data)
    for what, where, value in edits:
        at = int(where * len(out))
        if what == "flip" and out:
            out[at] ^= value or 1
        elif what == "insert":
            out[at:at] = bytes([value]) * (1 + value % 4)
        elif what == "delete":
            del out[at : at + 1 + value % 8]
        elif what == "double":
            out[at:at] = out[at : at + value]
        elif what == "cut":
            del out[at:]
    return bytes(out)


class Folder:
    """A folder whose files can be spoilt one at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.good = {p.name: p.read_bytes() for p in path.iterdir()}

    def put(self, **files: bytes) -> Path:
        """Everything as it was but for ``files`` (a dot in a name is written as two underscores)."""
        for name, data in {**self.good, **{n.replace("__", "."): d for n, d in files.items()}}.items():
            (self.path / name).write_bytes(data)
        return self.path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """An artifact with real calibration statistics, of both masked and full settings."""
    folder = tmp_path_factory.mktemp("artifact")
    adapter = folder / "adapter"
    tiny.tiny_peft("lora").save_pretrained(adapter, save_embedding_layers=False)
    from svdk import calibrate

    steering = calibrate(
        tiny.tiny_model(), adapter, tiny.tiny_examples(6), tokenizer=tiny.tiny_tokenizer(), direction="auto",
        resamples=20, folds=2,
    )  # fmt: skip
    steering.save(folder / "artifact")
    return Folder(folder / "artifact")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Folder by PEFT type, each with a record of the warm start that fits the tiny model."""
    from svdk.models.adapter_files import WARMSTART_FILE
    from svdk.models.fingerprints import model_fingerprint

    found = {}
    for kind in tiny.PEFT_TYPES:
        folder = tmp_path_factory.mktemp("adapters") / kind
        tiny.tiny_peft(kind).save_pretrained(folder, save_embedding_layers=False)
        record = {"base_model": "tiny", "base_model_fingerprint": model_fingerprint(tiny.tiny_model())}
        (folder / WARMSTART_FILE).write_text(json.dumps(record))
        (folder / "README.md").unlink(missing_ok=True)
        found[kind] = Folder(folder)
    return found


def same(a: Steering, b: Steering) -> bool:
    return repr(a) == repr(b) and all(torch.equal(a.statistics[k], b.statistics[k]) for k in a.statistics)


# --- steering.json, steering.safetensors


@pytest.mark.parametrize("name", [JSON_NAME, TENSORS_NAME])
@given(edits=EDITS)
def test_mutated_bytes_load_as_written_or_are_refused(artifact, name, edits):
    original = Steering.load(artifact.put())
    data = edited(artifact.good[name], edits)
    (artifact.put() / name).write_bytes(data)
    try:
        found = Steering.load(artifact.path)
    except ArtifactError:
        assert data != artifact.good[name]
    else:
        assert same(found, original)


def resealed(record: dict) -> bytes:
    record = {k: v for k, v in record.items() if k != "checksum"}
    record["checksum"] = _checksum(record)
    return json.dumps(record).encode()


def use(folder: Path) -> None:
    """What is done with an artifact that was accepted."""
    steering = Steering.load(folder)
    steering.verdict()
    steering.save(folder.with_name("again"))
    recalibrate(folder, resamples=5)


@settings(max_examples=100)
@given(data=st.data())
def test_sealed_records_of_any_content_are_used_or_refused(artifact, data):
    record = json.loads(artifact.good[JSON_NAME])
    name = data.draw(st.sampled_from(sorted(record)))
    record[name] = data.draw(JSON_VALUES)
    if name == "metrics":
        record[name] = {"seed": record[name], "tokens": record[name]}
    artifact.put(steering__json=resealed(record))
    with contextlib.suppress(SvdkError):
        use(artifact.path)


@pytest.mark.parametrize("field", ["strength", "gain", "vocab_size", "alpha", "penalty"])
def test_numbers_that_no_float_holds_are_refused(artifact, field):
    record = json.loads(artifact.good[JSON_NAME]) | {field: 10**400}
    artifact.put(steering__json=resealed(record))
    with pytest.raises(ArtifactError, match=f"{field} was 1000"):
        Steering.load(artifact.path)


@settings(max_examples=150)
@given(edits=EDITS, header_only=st.booleans())
def test_sealed_tensors_of_any_content_are_used_or_refused(artifact, edits, header_only):
    good = artifact.good[TENSORS_NAME]
    end = 8 + int.from_bytes(good[:8], "little") if header_only else len(good)
    tensors = edited(good[:end], edits) + good[end:]
    record = json.loads(artifact.good[JSON_NAME])
    record["tensors"] |= {"bytes": len(tensors), "sha256": hashlib.sha256(tensors).hexdigest()}
    artifact.put(steering__json=resealed(record), steering__safetensors=tensors)
    with contextlib.suppress(SvdkError):
        use(artifact.path)


# --- adapters


def untouched(model) -> bool:
    fresh = tiny.tiny_model()
    state = model.state_dict()
    return (
        {n: p.requires_grad for n, p in model.named_parameters()}
        == {n: p.requires_grad for n, p in fresh.named_parameters()}
        and set(vars(model)) == set(vars(fresh))
        and all(torch.equal(t, state[n]) for n, t in fresh.state_dict().items())
    )


def loads_or_refuses(model, folder: Path) -> bool:
    """Whether it loaded; after a refusal the model is as before."""
    try:
        load_adapter(model, folder)
    except ArtifactError:
        assert untouched(model)
        return False
    return True


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "warmstart.json"])
@settings(max_examples=40)
@given(edits=EDITS, kind=st.sampled_from(tiny.PEFT_TYPES))
def test_mutated_adapters_load_or_are_refused(adapters, name, edits, kind):
    folder = adapters[kind].put()
    (folder / name).write_bytes(edited(adapters[kind].good[name], edits))
    loads_or_refuses(tiny.tiny_model(), folder)
    if name != "warmstart.json":
        with contextlib.suppress(ArtifactError):
            adapter_fingerprint(folder)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150)
@given(kind=st.sampled_from(tiny.PEFT_TYPES), data=st.data())
def test_adapter_configurations_of_any_content_load_or_are_refused(adapters, kind, data):
    config = json.loads(adapters[kind].good[CONFIG])
    name = data.draw(st.sampled_from(sorted(config)))
    config[name] = data.draw(JSON_VALUES)
    folder = adapters[kind].put(adapter_config__json=json.dumps(config).encode())
    loads_or_refuses(tiny.tiny_model(), folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'.*leave the base weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
        ({"bias": "all"}, "bias='all'"),
        ({"target_modules": ["q_proj", "mlp"]}, "does not fit the model"),  # fails half way
        ({"target_modules": "("}, "does not fit the model"),
        ({"modules_to_save": [""]}, "does not fit the model"),  # a model inside itself
        ({"peft_type": "XLORA"}, "PEFT type was 'XLORA'; allowed: LORA"),
        ({"megatron_config": {"a": 1}, "megatron_core": "megatron.core"}, "no code is imported"),
    ],
)
def test_a_refused_configuration_leaves_the_base_model_alone(adapters, changes, message):
    config = json.loads(adapters["lora"].good[CONFIG]) | changes
    folder = adapters["lora"].put(adapter_config__json=json.dumps(config).encode())
    model = tiny.tiny_model()
    with pytest.raises(ArtifactError, match=message):
        load_adapter(model, folder)
    assert untouched(model)
    assert "megatron" not in sys.modules


def test_attaching_that_fails_half_way_is_undone():
    model = tiny.tiny_model()
    with pytest.raises(ValueError, match="not supported"):
        attach(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "mlp"]))
    assert untouched(model)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[]", "3", '"runtime_config"', " " * MAX_CONFIG_BYTES + "{}"]
)
@pytest.mark.parametrize("name", [CONFIG, "warmstart.json"])
def test_json_that_is_no_configuration(adapters, name, text):
    folder = adapters["lora"].put(**{name.replace(".", "__"): text.encode()})
    with pytest.raises(ArtifactError, match=rf"{name} (is damaged|has \d+ bytes)"):
        load_adapter(tiny.tiny_model(), folder)


# --- memory


def sparse(path: Path, size: int, start: bytes = b"") -> None:
    path.write_bytes(start)
    os.truncate(path, size)


def test_absurd_sizes_are_refused_in_little_memory(adapters, artifact, tmp_path):
    """Files of 8 TB (sparse), ranks of 10^9 and headers to match: ArtifactError, not a full memory."""
    huge = 1 << 43

    def copy_of(kind: str, name: str, **changes) -> Path:
        folder = shutil.copytree(adapters[kind].put(), tmp_path / name)
        config = json.loads((folder / CONFIG).read_text()) | changes
        (folder / CONFIG).write_text(json.dumps(config))
        return folder

    copy_of("lora", "good")
    for number in (10**7, 10**9, 10**15):
        copy_of("lora", f"rank_{number}", r=number)
        copy_of("prompt_tuning", f"virtual_tokens_{number}", num_virtual_tokens=number)
        copy_of("prompt_tuning", f"width_{number}", token_dim=number)
        copy_of("prefix_tuning", f"layers_{number}", num_layers=number)
        copy_of("p_tuning", f"submodules_{number}", num_transformer_submodules=number)
    copy_of("lora", "rank_pattern", rank_pattern={"q_proj": 10**10})
    sparse(copy_of("lora", "huge_config") / CONFIG, huge, b"{}")
    sparse(copy_of("lora", "huge_record") / "warmstart.json", huge, b"{}")
    for name, header in (("header_of_all", huge - 8), ("header_of_more", 2**63), ("header_of_some", 10**9)):
        sparse(copy_of("lora", name) / WEIGHTS, huge, header.to_bytes(8, "little") + b"{")
    text = json.dumps({"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    short = copy_of("lora", "tensor_beyond_the_file") / WEIGHTS
    short.write_bytes(len(text).to_bytes(8, "little") + text)

    folder = shutil.copytree(artifact.put(), tmp_path / "steering_json")
    sparse(folder / JSON_NAME, huge, b"{}")
    for name, size in (("steering_tensors", huge), ("steering_beyond", MAX_TENSORS_BYTES + 1)):
        folder = shutil.copytree(artifact.put(), tmp_path / name)
        record = json.loads((folder / JSON_NAME).read_text())
        record["tensors"]["bytes"] = size
        (folder / JSON_NAME).write_bytes(resealed(record))
        sparse(folder / TENSORS_NAME, size)
    output = torture("bounds", tmp_path)
    assert output.count("\n") == len(list(tmp_path.iterdir())) - 1
    assert f"steering.safetensors has {huge} bytes; allowed: at most" in output


# --- crashes and crowds


def torture(what: str, folder: Path) -> str:
    command = [sys.executable, "-W", "ignore", "-m", "tests.helpers.artifact_torture", what, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_kill_at_any_step_of_a_save_leaves_an_artifact_that_loads(tmp_path):
    steps = int(torture("kills", tmp_path).split()[0])
    assert steps > 20, "the program must have died at every call that touches a file"


def test_saves_and_loads_at_once_never_mix(tmp_path):
    assert torture("crowd", tmp_path) == "consistent\n"


def test_a_lock_left_by_a_killed_process_holds_nobody_up(tmp_path):
    (tmp_path / LOCK_NAME).touch()
    Steering(1.0).save(tmp_path)
    assert Steering.load(tmp_path).strength == 1.0
    assert not (tmp_path / LOCK_NAME).exists()


def test_the_edits_change_what_they_should():
    assert edited(b"abc", [("flip", 0.5, 2)]) == b"a`c"
    assert edited(b"abc", [("cut", 0.4, 2)]) == b"a"
    assert edited(b"abc", [("insert", 0.0, 66)]) == b"BBBabc"
    assert edited(b"abc", [("delete", 0.4, 0), ("double", 0.0, 2)]) == b"acac"
