"""The base view against the checkpoint that the model was loaded from."""

from __future__ import annotations

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from svdk.errors import InputError
from svdk.models import checkpoint
from svdk.models.pair import ModelPair
from tests.helpers import tiny

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def lora(arch="llama", **options):
    common = {"r": 4, "target_modules": tiny.LORA_TARGETS.get(arch, ["q_proj", "v_proj"])}
    common |= {"fan_in_fan_out": arch in tiny.FAN_IN_FAN_OUT, "task_type": "CAUSAL_LM"}
    return LoraConfig(**(common | options))


def rewritten(model, arch="llama", **options):
    """A PiSSA adapter whose configuration claims to be plain, as when it is edited before it is saved."""
    peft_model = get_peft_model(model, lora(arch, init_lora_weights="pissa", **options)).eval()
    peft_model.peft_config["default"].init_lora_weights = True
    return peft_model


@pytest.fixture(params=tiny.ARCHITECTURES)
def arch(request):
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 2])
def test_rewritten_base_is_found_in_the_checkpoint(tmp_path, arch, dtype, shards):
    tiny.tiny_model(arch).save_pretrained(tmp_path, max_shard_size="50KB" if shards > 1 else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards > 1)

    def load():
        return AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()

    for model in (load(), load().float(), load().to(torch.bfloat16).float()):
        ModelPair(get_peft_model(model, lora(arch)))
    with pytest.raises(
        InputError, match=r"base weight .*layers?\S*\.0\.\S+\.weight was not|base weight \S*h\.0\."
    ):
        ModelPair(rewritten(load(), arch))


@pytest.fixture
def folder(tmp_path):
    return tiny.save_tiny(tmp_path / "base")


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_every_way_to_a_rewritten_base(folder):
    def lora_ga(model):
        config = lora(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())
        peft.preprocess_loraga(model, config, lambda: model(input_ids=IDS, labels=IDS).loss.backward())
        peft_model = get_peft_model(model, config).eval()
        peft_model.peft_config["default"].init_lora_weights = True
        return peft_model

    def deleted(model):  # nothing of the first adapter is left, but its trace
        peft_model = get_peft_model(model, lora(init_lora_weights="olora"))
        peft_model.add_adapter("plain", lora())
        peft_model.set_adapter("plain")
        peft_model.delete_adapter("default")
        return peft_model.eval()

    def merged(model):
        return get_peft_model(rewritten(model).unload(), lora()).eval()

    def head(model):
        return rewritten(model, target_modules=["lm_head"])

    def only_inside(model):
        return rewritten(model).get_base_model()

    for build in (lora_ga, deleted, merged, head, only_inside):
        name = "lm_head.weight" if build is head else r"model\.layers\.0\.self_attn\.[qv]_proj\.weight"
        with pytest.raises(InputError, match=f"base weight {name} was not that of the checkpoint {folder}"):
            ModelPair(build(loaded(folder)))


def test_adapter_that_comes_later_is_seen(folder):
    peft_model = get_peft_model(loaded(folder), lora()).eval()
    ModelPair(peft_model)
    peft_model.add_adapter("second", lora(init_lora_weights="olora"))
    peft_model.peft_config["second"].init_lora_weights = True
    with pytest.raises(InputError, match="base weight"):
        ModelPair(peft_model)


def test_files_are_read_once(folder, monkeypatch):
    peft_model = get_peft_model(loaded(folder), lora()).eval()
    calls = []
    find = checkpoint._tensor_files
    monkeypatch.setattr(checkpoint, "_tensor_files", lambda *args: calls.append(args) or find(*args))
    for _ in range(3):
        ModelPair(peft_model)
    assert len(calls) == 1


def test_what_cannot_be_compared_is_left_alone(folder, tmp_path):
    model = loaded(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    other_names = {f"other.{name}": t for name, t in tensors.items()}
    other_types = {name: t.to(torch.float8_e4m3fn) for name, t in tensors.items()}
    for content in (other_names, other_types, {name: t[:5].clone() for name, t in tensors.items()}):
        save_file(content, path)
        ModelPair(rewritten(model))
        model = rewritten(model).unload()
    for damage in (b"", b"\x00" * 64):
        path.write_bytes(damage)
        ModelPair(rewritten(model))
        model = rewritten(model).unload()
    path.unlink()
    (folder / "model.safetensors.index.json").write_text("{")
    ModelPair(rewritten(model))


def test_models_that_are_not_the_checkpoint(folder):
    random = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
    ModelPair(get_peft_model(random, lora()).eval())
    tuned = loaded(folder)  # a full fine-tune of this process
    with torch.no_grad():
        for p in tuned.parameters():
            p.mul_(1.01)
    ModelPair(get_peft_model(tuned, lora()).eval())
    resized = loaded(folder)
    resized.resize_token_embeddings(tiny.VOCAB_SIZE + 8)
    ModelPair(get_peft_model(resized, lora(target_modules=["q_proj", "embed_tokens", "lm_head"])).eval())


def test_copies_and_tokens_are_compared_with_the_original(folder):
    options = ({"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [7]}, {"use_dora": True})
    for option in options:
        peft_model = get_peft_model(loaded(folder), lora(**option)).eval()
        with torch.no_grad():
            for p in peft_model.parameters():
                if p.requires_grad:
                    p.add_(0.1)
        ModelPair(peft_model)


def test_checkpoint_in_the_hub_cache(folder, monkeypatch):
    model = loaded(folder)
    model.config._name_or_path, model.config._commit_hash = "someone/model", "0" * 40
    found = []

    def cached(name, file, revision):
        found.append((name, file, revision))
        return str(folder / file)

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    with pytest.raises(InputError, match="base weight"):
        ModelPair(rewritten(model))
    assert found == [("someone/model", "config.json", "0" * 40)]
