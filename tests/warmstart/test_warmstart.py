"""The warm start: it learns, resumes to the same adapter, writes all or nothing, names what is wrong."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from transformers import TrainerCallback

from svdk.cli import main
from svdk.errors import ArtifactError, DataError, InputError
from svdk.models.fingerprints import adapter_fingerprint, model_fingerprint, tokenizer_fingerprint
from svdk.models.loading import load_adapter
from svdk.warmstart import api
from svdk.warmstart.api import warm_start
from svdk.warmstart.data import encode, load_examples, split
from svdk.warmstart.peft_configs import make_config
from svdk.warmstart.training import Collator
from tests.helpers import tiny

EXAMPLES = tiny.tiny_examples(40)
# High enough for a random tiny model to learn in a few steps.
LEARNING_RATES = {
    "lora": 1e-2,
    "ia3": 5e-2,
    "prompt_tuning": 5e-2,
    "p_tuning": 1e-2,
    "prefix_tuning": 5e-2,
}


def run(tmp_path, name="out", *, model=None, data=EXAMPLES, peft="lora", **options):
    """A short warm start of the tiny model into ``tmp_path / name``."""
    options = {"learning_rate": LEARNING_RATES.get(peft, 1e-2), "progress": False} | options
    model = model or (tiny.tiny_model(), tiny.tiny_tokenizer())
    return warm_start(model, data, output_dir=tmp_path / name, peft=peft, **options)


def completion_loss(model, examples):
    """Mean NLL of the completion tokens, written apart from the code under test: one example at a time."""
    tokenizer = tiny.tiny_tokenizer()
    total, count = 0.0, 0
    for e in load_examples(examples):
        encoded = encode(tokenizer, e)
        n = len(encoded.input_ids) - encoded.prompt_length
        ids = torch.tensor([encoded.input_ids])
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        total += torch.nn.functional.cross_entropy(logits[-n - 1 : -1], ids[0, -n:], reduction="sum").item()
        count += n
    return total / count


@pytest.mark.parametrize("peft_type", tiny.PEFT_TYPES)
def test_training_lowers_the_loss_and_gives_the_model_back(tmp_path, peft_type):
    model, tokenizer = tiny.tiny_model(), tiny.tiny_tokenizer()
    before = completion_loss(model, EXAMPLES)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    config, attributes = model.config.to_dict(), set(vars(model))
    generator = torch.get_rng_state()

    folder = run(tmp_path, model=(model, tokenizer), peft=peft_type, epochs=6)

    assert model.config.to_dict() == config
    assert set(vars(model)) == attributes
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert not model.training
    assert torch.equal(torch.get_rng_state(), generator)

    adapted = PeftModel.from_pretrained(model, folder)  # an ordinary adapter
    assert completion_loss(adapted, EXAMPLES) < before - 0.1
    assert not (tmp_path / "out.partial").exists()


def test_folder_says_what_it_was_made_of(tmp_path, tiny_model, tiny_tokenizer, capfd):
    folder = run(tmp_path, model=tiny_model, tokenizer=tiny_tokenizer, max_steps=2, seed=3)
    train, calibration = split(load_examples(EXAMPLES), 0.2, seed=3)
    assert load_examples(folder / "calibration.jsonl") == calibration
    record = json.loads((folder / "warmstart.json").read_text())
    assert record["base_model_fingerprint"] == model_fingerprint(tiny_model)
    assert record["tokenizer_fingerprint"] == tokenizer_fingerprint(tiny_tokenizer)
    assert (record["train_examples"], record["calibration_examples"]) == (len(train), len(calibration))
    assert [step for step, _ in record["loss_history"]] == [1, 2]
    assert capfd.readouterr().err.count("warm start") == 0


def test_progress_bar_on_stderr(tmp_path, capfd):
    run(tmp_path, max_steps=2, progress=True)
    captured = capfd.readouterr()
    assert "warm start: 100%" in captured.err
    assert "loss=" in captured.err
    assert captured.out == ""


def test_defaults_are_the_paper_s(tiny_model):
    lora = make_config("lora", tiny_model)
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (8, 16, 0.1)
    assert set(lora.target_modules) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    for peft in ("prompt_tuning", "p_tuning", "prefix_tuning"):
        assert make_config(peft, tiny_model).num_virtual_tokens == 20
    p_tuning = make_config("p_tuning", tiny_model)
    assert (p_tuning.encoder_hidden_size, p_tuning.encoder_num_layers) == (128, 2)
    ia3 = make_config("ia3", tiny_model)
    assert set(ia3.target_modules) == {"k_proj", "v_proj", "down_proj"}
    assert set(ia3.feedforward_modules) == {"down_proj"}


@pytest.mark.parametrize("peft_type", ["lora", "ia3"])
@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_targets_follow_the_architecture(tmp_path, arch, peft_type):
    model = tiny.tiny_model(arch)
    folder = run(tmp_path, model=(model, tiny.tiny_tokenizer()), peft=peft_type, max_steps=1)
    names = load_adapter(model, folder).state_dict()
    touched = {n.split(".lora_")[0].split(".ia3_")[0] for n in names if "lora_" in n or "ia3_" in n}
    kinds = {"gpt2": (2, 2)}.get(arch, (4, 3))  # modules a layer: LoRA, IA3
    assert len(touched) == kinds[peft_type == "ia3"] * model.config.num_hidden_layers


def test_targets_unknown_or_wrong_are_named(tiny_model):
    with pytest.raises(InputError, match=r"held 'query'.*this model has .*q_proj"):
        make_config("lora", tiny_model, target_modules=["query"])
    with pytest.raises(InputError, match="which prompt_tuning has no use for"):
        make_config("prompt_tuning", tiny_model, target_modules=["q_proj"])

    class Odd(torch.nn.Module):
        config = type("Config", (), {"model_type": "odd"})

        def __init__(self):
            super().__init__()
            self.mix = torch.nn.Linear(2, 2)

    for peft in ("lora", "ia3"):
        with pytest.raises(InputError, match=r"model of type odd has no known names .*: mix"):
            make_config(peft, Odd())


def test_only_completions_carry_loss(tiny_tokenizer):
    batch = [encode(tiny_tokenizer, e) for e in load_examples(EXAMPLES[:3])]
    out = Collator(pad_id=0)(batch)
    for row, e in enumerate(batch):
        n = len(e.input_ids)
        assert out["input_ids"][row, :n].tolist() == e.input_ids
        assert out["attention_mask"][row].sum() == n
        labels = out["labels"][row]
        assert (labels[: e.prompt_length] == -100).all()
        assert labels[e.prompt_length : n].tolist() == e.input_ids[e.prompt_length :]
        assert (labels[n:] == -100).all()


class InterruptAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("peft_type", tiny.PEFT_TYPES)
def test_interrupted_run_ends_with_the_same_adapter(tmp_path, peft_type):
    options = {"peft": peft_type, "epochs": 3, "lora_dropout": 0.1}  # 12 steps, a checkpoint every second
    whole = run(tmp_path, "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "cut", callbacks=[InterruptAt(7)], **options)
    assert not (tmp_path / "cut").exists()
    assert (tmp_path / "cut.partial" / "checkpoint-6").exists()
    steps = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    cut = run(tmp_path, "cut", callbacks=[Count()], **options)
    assert steps == list(range(7, 13))
    assert adapter_fingerprint(cut) == adapter_fingerprint(whole)
    for name in ("warmstart.json", "calibration.jsonl"):
        assert (cut / name).read_text() == (whole / name).read_text()


def test_a_run_that_was_cut_after_its_last_step_trains_no_further(tmp_path, monkeypatch):
    options = {"max_steps": 3, "lr_scheduler": "constant"}  # within an epoch
    whole = run(tmp_path, "whole", **options)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(api, "_write_adapter", interrupted)
        run(tmp_path, "cut", **options)
    assert (tmp_path / "cut.partial" / "checkpoint-3").exists()
    cut = run(tmp_path, "cut", **options)
    assert adapter_fingerprint(cut) == adapter_fingerprint(whole)
    assert (cut / "warmstart.json").read_text() == (whole / "warmstart.json").read_text()


def interrupted(*_):
    raise KeyboardInterrupt


def test_half_written_checkpoint_is_not_resumed_from(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, epochs=3, callbacks=[InterruptAt(7)])
    state = tmp_path / "out.partial" / "checkpoint-6" / "trainer_state.json"
    state.write_text(state.read_text()[:50])
    whole = run(tmp_path, "whole", epochs=3)
    assert adapter_fingerprint(run(tmp_path, epochs=3)) == adapter_fingerprint(whole)


def test_resuming_with_other_settings_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"resume was True, and .* holds no interrupted run"):
        run(tmp_path, resume=True)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, epochs=3, callbacks=[InterruptAt(7)])
    with pytest.raises(InputError, match=r"other settings \(epochs was 3, is 2\); .* resume=False"):
        run(tmp_path, epochs=2)
    with pytest.raises(InputError, match="train_data_hash was"):
        run(tmp_path, epochs=3, data=EXAMPLES[:39])
    whole = run(tmp_path, "whole", epochs=2)
    assert adapter_fingerprint(run(tmp_path, epochs=2, resume=False)) == adapter_fingerprint(whole)


def test_interruption_before_a_checkpoint_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, epochs=3, callbacks=[InterruptAt(1)])
    assert list(tmp_path.iterdir()) == []


def test_output_in_use_is_only_replaced_when_it_is_an_adapter_and_asked_for(tmp_path):
    first = adapter_fingerprint(run(tmp_path, max_steps=1))
    (tmp_path / "out" / "steering.json").write_text("{}")  # of the old adapter
    with pytest.raises(InputError, match="holds an adapter; overwrite replaces it"):
        run(tmp_path, max_steps=2)
    assert adapter_fingerprint(tmp_path / "out") == first
    assert adapter_fingerprint(run(tmp_path, max_steps=2, overwrite=True)) != first
    assert not (tmp_path / "out" / "steering.json").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="which is in use; allowed: a new or empty folder"):
        run(tmp_path, "mine", overwrite=True)
    (tmp_path / "mine").rename(tmp_path / "new.partial")
    with pytest.raises(InputError, match=r"new\.partial is in the way"):
        run(tmp_path, "new", resume=False)
    assert (tmp_path / "new.partial" / "thesis.txt").exists()


def test_own_calibration_file(tmp_path):
    folder = run(tmp_path, data=EXAMPLES[:30], calibration=EXAMPLES[30:], max_steps=1)
    assert load_examples(folder / "calibration.jsonl") == load_examples(EXAMPLES[30:])
    assert json.loads((folder / "warmstart.json").read_text())["train_examples"] == 30
    folder = run(tmp_path, "none", calibration_fraction=0.0, max_steps=1)
    assert not (folder / "calibration.jsonl").exists()


def test_adapter_is_refused_on_another_base_model(tmp_path):
    folder = run(tmp_path, max_steps=1)
    load_adapter(tiny.tiny_model(), folder)
    with pytest.raises(ArtifactError, match=r"was made on the base model Llama.*; .* weights differ"):
        load_adapter(tiny.tiny_model(seed=1), folder)  # the same shapes: only the fingerprint tells
    (folder / "warmstart.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"warmstart\.json is damaged"):
        load_adapter(tiny.tiny_model(), folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft": "qlora"}, "peft was 'qlora'; allowed: lora, ia3, prompt_tuning, p_tuning, prefix_tuning"),
        ({"epochs": 0}, r"epochs was 0; allowed: a number in \(0, inf\)"),
        ({"learning_rate": float("nan")}, r"learning_rate was nan; allowed: a number in \(0, inf\)"),
        ({"batch_size": 0.5}, "batch_size was 0.5; allowed: an integer"),
        ({"max_length": 0}, "max_length was 0; allowed: an integer of at least 2"),
        ({"calibration_fraction": 1}, "calibration_fraction was 1; allowed"),
        ({"lora_rank": 0}, "lora_rank was 0; allowed: an integer of at least 1"),
        ({"lora_dropout": 1.0}, r"lora_dropout was 1.0; allowed: a number in \[0, 1\)"),
        ({"lr_scheduler": "bouncy"}, "lr_scheduler was 'bouncy'; allowed: linear, cosine"),
        ({"seed": -1}, "seed was -1"),
        ({"resume": "yes"}, "resume was 'yes'; allowed: True, False, 'auto'"),
        ({"max_length": 8}, "40 of 40 examples had more than max_length = 8 tokens"),
        ({"data": [{"prompt": "a", "answer": "b"}]}, "columns were 'prompt', 'answer'; needed"),
        ({"data": [{"prompt": "a", "completion": " "}]}, "completion was empty"),
        ({"data": []}, "data held 0 examples"),
        (
            {"peft": "prompt_tuning", "virtual_tokens": 500},
            r"had 5\d\d tokens \(500 of them virtual\)",
        ),
    ],
)
def test_unusable_arguments_are_named_and_nothing_is_written(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_unusable_models_are_named(tmp_path):
    with pytest.raises(InputError, match="tokenizer was None"):
        run(tmp_path, model=tiny.tiny_model())
    with pytest.raises(InputError, match="model had an adapter attached"):
        run(tmp_path, model=(tiny.tiny_peft("lora"), tiny.tiny_tokenizer()))
    with pytest.raises(InputError, match=r"tokenizer had 261 tokens; allowed: at most .* 200"):
        run(tmp_path, model=(tiny.tiny_model(vocab_size=200), tiny.tiny_tokenizer()))


def test_too_long_examples_can_be_left_out(tmp_path):
    data = [*EXAMPLES, {"prompt": "a" * 200, "completion": "b"}]
    with pytest.raises(DataError, match="1 of 41 examples"):
        run(tmp_path, data=data, max_length=64)
    folder = run(tmp_path, data=data, max_length=64, too_long="skip", max_steps=1)
    assert json.loads((folder / "warmstart.json").read_text())["skipped_examples"] == 1


@pytest.fixture
def data_file(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(e) + "\n" for e in EXAMPLES))
    return path


def test_command_line(tiny_folder, data_file, tmp_path, capsys):
    output = tmp_path / "adapter"
    command = ["warmstart", "--model", str(tiny_folder), "--data", str(data_file), "--output", str(output)]
    options = ["--peft", "p_tuning", "--virtual-tokens", "4", "--learning-rate", "0.01", "--device", "cpu"]
    assert main([*command, *options]) == 0
    captured = capsys.readouterr()
    assert "trained p_tuning on 32 examples in 4 steps: loss " in captured.out
    assert f"svdk calibrate --model {tiny_folder} --adapter {output}" in captured.out
    assert "warm start: 100%" in captured.err
    assert load_adapter(tiny.tiny_model(), output).active_peft_config.num_virtual_tokens == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--peft", "adapters"], "peft was 'adapters'; allowed: lora, ia3, prompt_tuning, p_tuning"),
        (["--data", "none.jsonl"], "data file none.jsonl does not exist"),
        (["--model", "no/model"], "model no/model cannot be loaded"),
        (["--max-length", "8"], "40 of 40 examples had more than max_length = 8 tokens"),
    ],
)
def test_command_line_errors(tiny_folder, data_file, tmp_path, capsys, change, message):
    command = ["warmstart", "--model", str(tiny_folder), "--data", str(data_file), "--device", "cpu"]
    assert main([*command, "--output", str(tmp_path / "adapter"), *change]) == 2
    captured = capsys.readouterr()
    assert f"svdk warmstart: error: {message}" in captured.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.jsonl"]


@pytest.mark.parametrize("limit", [6_000, 24_000])  # bytes a file: too few for the weights, for the optimiser
def test_failed_write_leaves_nothing(tiny_folder, data_file, tmp_path, limit):
    """A limit on file sizes fails as a full disk does, within safetensors and torch as well."""
    command = [sys.executable, "-m", "svdk", "warmstart", "--model", tiny_folder, "--data", data_file]
    done = subprocess.run(
        [*command, "--output", tmp_path / "adapter", "--device", "cpu", "--quiet"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "svdk warmstart: error: " in done.stderr
    assert str(tmp_path / "adapter") in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.jsonl"]
