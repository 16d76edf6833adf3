"""Loading models and adapters, and their fingerprints."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdk.errors import ArtifactError, InputError
from svdk.models import gguf
from svdk.models.fingerprints import adapter_fingerprint, model_fingerprint, tokenizer_fingerprint
from svdk.models.loading import SMOLLM2, SMOLLM2_HUB, detach, load_adapter, load_model, resolve_model
from tests.helpers import tiny

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def logits(model):
    """(1, 5, V); those of virtual tokens in front left out."""
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, -IDS.shape[1] :]


def assert_same_logits(a, b):
    # A loaded model runs another attention kernel than the one built in code.
    torch.testing.assert_close(logits(a), logits(b), rtol=1e-5, atol=1e-5)


@pytest.fixture
def adapter(tmp_path):
    """``adapter(peft_type, arch)`` saves a tiny adapter; its folder and the logits it gives."""

    def build(peft_type, arch="llama"):
        peft_model = tiny.tiny_peft(peft_type, arch)
        peft_model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        return tmp_path / "adapter", logits(peft_model)

    return build


def test_load_model_from_a_folder(tiny_folder, tiny_model):
    model, tokenizer = load_model(tiny_folder, device="cpu")
    assert_same_logits(model, tiny_model)
    assert (model.training, model.dtype, model.name_or_path) == (False, torch.float32, str(tiny_folder))
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", "<pad>")
    assert load_model(str(tiny_folder), dtype="bfloat16", device="cpu")[0].dtype == torch.bfloat16


def test_missing_pad_token_becomes_eos(tmp_path):
    tiny.save_tiny(tmp_path)
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_model(tmp_path, device="cpu")[1].pad_token == "<eos>"


def test_unusable_models_are_named(tmp_path, adapter, tiny_folder):
    with pytest.raises(InputError, match="model no/such-model cannot be loaded"):
        load_model("no/such-model")
    with pytest.raises(InputError, match=r"none\.gguf', a file that does not exist"):
        load_model(tmp_path / "none.gguf")
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"allowed: a \.gguf file, a folder or a hub name"):
        load_model(tmp_path / "weights.bin")
    with pytest.raises(InputError, match="an adapter folder; allowed: the base model"):
        load_model(adapter("lora")[0])
    with pytest.raises(InputError, match="dtype was 'int8'; allowed: auto, float32"):
        load_model(tiny_folder, dtype="int8")
    shutil.copytree(tiny_folder, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="cut cannot be loaded"):
        load_model(tmp_path / "cut")


def test_smollm2_comes_from_the_hub_without_the_wheel(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert resolve_model(SMOLLM2) == SMOLLM2_HUB


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
@pytest.mark.parametrize("peft_type", tiny.PEFT_TYPES)
def test_adapter_loads_and_comes_off_again(adapter, peft_type, arch):
    folder, expected = adapter(peft_type, arch)
    model = tiny.tiny_model(arch)
    base, fingerprint = logits(model), model_fingerprint(model)
    peft_model = load_adapter(model, folder)
    torch.testing.assert_close(logits(peft_model), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, base, atol=1e-2)
    assert not peft_model.training
    assert model_fingerprint(peft_model) == fingerprint
    assert model_fingerprint(model) == fingerprint  # the base model with layers injected into it
    assert detach(peft_model) is model
    assert torch.equal(logits(model), base)


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_adapter_of_another_shape_is_refused_and_the_model_left_alone(adapter):
    folder, _ = adapter("lora")
    model = tiny.tiny_model("gpt2")
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(ArtifactError, match="does not fit the model GPT2LMHeadModel: Target modules"):
        load_adapter(model, folder)
    edit_config(folder, r=8)
    model = tiny.tiny_model()
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(ArtifactError, match=r"has shape \(4, 32\), not \(8, 32\)"):
        load_adapter(model, folder)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert torch.equal(logits(model), logits(tiny.tiny_model()))


@pytest.mark.parametrize("peft_type", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_virtual_tokens_of_another_width_are_refused(adapter, peft_type):
    folder, _ = adapter(peft_type)
    config = tiny.tiny_config()
    config.hidden_size, config.head_dim = 48, 12
    from transformers import AutoModelForCausalLM

    with pytest.raises(ArtifactError, match="does not fit the model"):
        load_adapter(AutoModelForCausalLM.from_config(config), folder)


def test_damaged_adapters_are_refused(adapter, tiny_model, tmp_path):
    folder, _ = adapter("lora")
    weights = folder / "adapter_model.safetensors"
    good = load_file(weights)

    save_file({n: t for i, (n, t) in enumerate(good.items()) if i}, weights)
    with pytest.raises(ArtifactError, match=r"the tensor .* is missing"):
        load_adapter(tiny_model, folder)
    save_file(good | {"surplus": torch.zeros(1)}, weights)
    with pytest.raises(ArtifactError, match="no place for the tensor surplus"):
        load_adapter(tiny_model, folder)
    save_file(good, weights)
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(ArtifactError, match=r"adapter_model\.safetensors is damaged"):
        load_adapter(tiny_model, folder)
    weights.rename(folder / "adapter_model.bin")  # pickle is never read
    with pytest.raises(ArtifactError, match=r"has no adapter_model\.safetensors"):
        load_adapter(tiny_model, folder)
    (folder / "adapter_config.json").write_text("{")
    save_file(good, weights)
    with pytest.raises(ArtifactError, match=r"adapter_config\.json is damaged"):
        load_adapter(tiny_model, folder)
    with pytest.raises(ArtifactError, match=r"none has no adapter_config\.json"):
        load_adapter(tiny_model, tmp_path / "none")


def test_second_adapter_is_refused(adapter):
    folder, _ = adapter("lora")
    peft_model = load_adapter(tiny.tiny_model(), folder)
    for model in (peft_model, peft_model.get_base_model()):
        with pytest.raises(InputError, match="model had an adapter attached"):
            load_adapter(model, folder)


def test_model_fingerprint_tells_models_apart_but_not_dtypes(tiny_model):
    fingerprint = model_fingerprint(tiny_model)
    assert model_fingerprint(tiny.tiny_model()) == fingerprint
    assert model_fingerprint(tiny.tiny_model().to(torch.bfloat16)) == fingerprint
    others = [tiny.tiny_model(seed=1), tiny.tiny_model("qwen2"), tiny.tiny_model(vocab_size=272)]
    fingerprints = {model_fingerprint(m) for m in others}
    assert len(fingerprints) == 3
    assert fingerprint not in fingerprints
    tuned = tiny.tiny_model()  # a light full fine-tune: every weight a little
    with torch.no_grad():
        for p in tuned.parameters():
            p.mul_(1.003)
    assert model_fingerprint(tuned) != fingerprint


def test_tokenizer_fingerprint_is_of_what_ids_mean(tiny_tokenizer):
    fingerprint = tokenizer_fingerprint(tiny_tokenizer)
    other = tiny.tiny_tokenizer()
    other.padding_side = "right"
    other.chat_template = None
    other(["a", "bcd"], padding=True, truncation=True, max_length=2)  # leaves padding state behind
    assert tokenizer_fingerprint(other) == fingerprint
    other.eos_token = "<bos>"
    assert tokenizer_fingerprint(other) != fingerprint
    other = tiny.tiny_tokenizer()
    other.add_tokens(["hello"])
    assert tokenizer_fingerprint(other) != fingerprint


def test_adapter_fingerprint_is_of_what_it_computes(adapter):
    folder, _ = adapter("lora")
    fingerprint = adapter_fingerprint(folder)
    edit_config(folder, base_model_name_or_path="/elsewhere", inference_mode=False)
    assert adapter_fingerprint(folder) == fingerprint
    edit_config(folder, lora_alpha=9)
    changed = adapter_fingerprint(folder)
    assert changed != fingerprint
    weights = folder / "adapter_model.safetensors"
    save_file({n: t * 2 for n, t in load_file(weights).items()}, weights)
    assert adapter_fingerprint(folder) != changed


@pytest.fixture
def fake_gguf(tmp_path, monkeypatch):
    """A .gguf file whose conversion gives the tiny model; the list of conversions made; the cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    conversions = []

    def convert(path):
        conversions.append(path)
        return tiny.tiny_model(), tiny.tiny_tokenizer()

    monkeypatch.setattr(gguf, "_convert", convert)
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    return path, conversions, tmp_path / "cache" / "svdk"


def test_gguf_is_converted_once_for_its_contents(fake_gguf, tiny_model):
    path, conversions, cache = fake_gguf
    for _ in range(2):
        model, tokenizer = load_model(path, device="cpu")
        assert_same_logits(model, tiny_model)
        assert tokenizer("a").input_ids == tiny.tiny_tokenizer()("a").input_ids
        assert model.name_or_path == str(path)
    assert len(conversions) == 1
    (folder,) = cache.iterdir()
    path.write_bytes(b"other weights")
    load_model(path, device="cpu")
    assert len(conversions) == 2
    (folder / "model.safetensors").write_bytes(b"")
    path.write_bytes(b"weights")
    with pytest.raises(InputError, match="is damaged, delete it"):
        load_model(path, device="cpu")


def test_gguf_loads_where_the_cache_cannot_be_written(fake_gguf, tiny_model):
    path, _, cache = fake_gguf
    cache.parent.mkdir()
    cache.write_text("in the way")
    with pytest.warns(UserWarning, match=r"cannot keep the de-quantised model\.gguf"):
        model, _ = load_model(path, device="cpu")
    assert_same_logits(model, tiny_model)


def test_file_that_is_no_gguf(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(InputError, match=r"model\.gguf cannot be read as GGUF"):
        load_model(tmp_path / "model.gguf", device="cpu")
    assert not (tmp_path / "cache").exists()


@pytest.mark.real_model
def test_real_model_answers_and_is_an_ordinary_model(real_model, tmp_path):
    model, tokenizer = real_model
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."
    assert (tokenizer.eos_token, len(tokenizer)) == ("<|im_end|>", 49152)
    assert not hasattr(model.config, "quantization_config")
    assert not getattr(model, "is_quantized", False)
