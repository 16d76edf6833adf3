"""What PEFT writes loads as PEFT loads it, and what changes the base model is refused."""

from __future__ import annotations

import dataclasses
import json

import peft
import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file, save_file

from svdk.errors import ArtifactError, InputError
from svdk.models.adapter_rules import check_config
from svdk.models.fingerprints import model_fingerprint
from svdk.models.loading import load_adapter
from svdk.models.pair import ModelPair
from tests.helpers import tiny

IDS = torch.tensor([[5, 6, 7, 8, 9]])
CAUSAL = {"task_type": "CAUSAL_LM"}
TARGETS = CAUSAL | {"target_modules": ["q_proj", "v_proj"]}
WEIGHTS = "adapter_model.safetensors"


def lora(**options):
    return LoraConfig(**({"r": 4} | TARGETS | options))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, -IDS.shape[1] :]


def trained(model, config):
    """A PEFT model whose trainable weights are all different from their start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        peft_model = get_peft_model(model, config).eval()
        with torch.no_grad():
            for p in peft_model.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn_like(p))
    return peft_model


def assert_refused(model, folder, message):
    """``load_adapter`` refuses and leaves modules, weights and flags of ``model`` as they were."""
    modules = [(name, id(module)) for name, module in model.named_modules()]
    weights = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    attributes = set(vars(model))
    with pytest.raises((ArtifactError, InputError), match=message):
        load_adapter(model, folder)
    assert modules == [(name, id(module)) for name, module in model.named_modules()]
    assert set(vars(model)) == attributes
    for name, p in model.named_parameters():
        value, flag = weights[name]
        assert torch.equal(p, value), name
        assert p.requires_grad == flag, name


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensor(folder, name):
    tensors = load_file(folder / WEIGHTS)
    tensors[name][-1, 3] += 1
    save_file(tensors, folder / WEIGHTS)


KINDS = {
    "plain": lora(),
    "rank-stabilised": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "dora on the embedding": lora(use_dora=True, target_modules=["q_proj", "embed_tokens"]),
    "lora_bias": lora(lora_bias=True),
    "patterns": lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}),
    "layers": lora(layers_to_transform=[1]),
    "regex": lora(target_modules=r".*\.1\..*(q|v)_proj"),
    "regex on the head": lora(target_modules=r".*(q_proj|lm_head)"),
    "excluded": lora(exclude_modules=["layers.0.self_attn.q_proj"]),
    "all-linear": lora(target_modules="all-linear"),
    "head": lora(target_modules=["q_proj", "lm_head"]),
    "embedding": lora(target_modules=["q_proj", "embed_tokens"]),
    "head and embedding": lora(target_modules=["embed_tokens", "lm_head"]),
    "tied on purpose": lora(target_modules=["embed_tokens"], ensure_weight_tying=True),
    "copies": lora(modules_to_save=["lm_head", "embed_tokens"]),
    "tokens": lora(trainable_token_indices=[7, 9]),
    "tokens of both": lora(trainable_token_indices={"embed_tokens": [7], "lm_head": [9]}),
    "parameters": lora(target_modules=[], target_parameters=["q_proj.weight"]),
    "bd-lora": lora(
        use_bdlora=peft.BdLoraConfig(
            target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"], nblocks=2
        )
    ),
    "monteclora": lora(monteclora_config=peft.MontecloraConfig()),
    "velora": lora(velora_config=peft.VeloraConfig()),
    "qa-lora": lora(use_qalora=True),
    "gaussian": lora(init_lora_weights="gaussian"),
    "orthogonal": lora(init_lora_weights="orthogonal"),
    "eva": lora(init_lora_weights="eva", eva_config=peft.EvaConfig()),
    "mica": lora(init_lora_weights="mica"),
    "random": lora(init_lora_weights=False),
    "ia3": IA3Config(feedforward_modules=["v_proj"], **TARGETS),
    "ia3 on the head": IA3Config(target_modules=["lm_head"], feedforward_modules=[], **CAUSAL),
    "adalora": AdaLoraConfig(total_step=10, init_lora_weights=False, **TARGETS),
    "loha": LoHaConfig(r=4, rank_pattern={"q_proj": 2}, **TARGETS),
    "lokr": LoKrConfig(r=4, init_weights="lycoris", **TARGETS),
    "lokr both": LoKrConfig(r=4, decompose_both=True, decompose_factor=4, **TARGETS),
    "prompt": PromptTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "prompt and copy": PromptTuningConfig(num_virtual_tokens=3, modules_to_save=["lm_head"], **CAUSAL),
    "p-tuning": PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16, **CAUSAL),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3, **CAUSAL),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("embeddings", ["auto", True])
@pytest.mark.parametrize("arch", ["llama", "qwen2"])  # qwen2: biases, and a head tied to the embedding
@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_writes_loads_as_peft_loads_it(tmp_path, kind, arch, embeddings):
    peft_model, plain = (
        trained(tiny.tiny_model(arch), dataclasses.replace(KINDS[kind])),
        tiny.tiny_model(arch),
    )
    peft_model.save_pretrained(tmp_path, save_embedding_layers=embeddings)
    loaded = load_adapter(tiny.tiny_model(arch), tmp_path)
    theirs = PeftModel.from_pretrained(tiny.tiny_model(arch), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(theirs))
    assert torch.equal(logits(loaded), logits(peft_model))
    assert model_fingerprint(loaded) == model_fingerprint(plain)
    for model in (loaded, peft_model):
        base = ModelPair(model).base(IDS, keep=IDS.shape[1])
        assert torch.equal(base, logits(plain))  # bit for bit: nothing of the adapter is left
        assert not torch.allclose(base, logits(model), atol=1e-2)


def test_each_of_several_adapters_loads_from_its_folder(tmp_path):
    peft_model = trained(tiny.tiny_model(), lora())
    peft_model.add_adapter("second", lora(target_modules=["k_proj", "lm_head"], init_lora_weights=False))
    peft_model.save_pretrained(tmp_path, save_embedding_layers=True)
    for name, folder in (("default", tmp_path), ("second", tmp_path / "second")):
        peft_model.set_adapter(name)
        assert torch.equal(logits(load_adapter(tiny.tiny_model(), folder)), logits(peft_model))
    peft_model.base_model.set_adapter(["default", "second"])
    pair = ModelPair(peft_model)
    assert torch.equal(pair.warm(IDS, keep=5), logits(peft_model))
    assert torch.equal(pair.base(IDS, keep=5), logits(tiny.tiny_model()))


def test_pruned_adalora_loads(tmp_path):
    config = AdaLoraConfig(total_step=6, init_r=6, target_r=2, tinit=1, tfinal=1, deltaT=1, **TARGETS)
    peft_model = get_peft_model(tiny.tiny_model(), config).train()
    optimizer = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=0.1)
    for step in range(7):
        peft_model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        peft_model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    peft_model.eval().save_pretrained(tmp_path)
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert not all(map(all, pattern.values()))
    loaded = load_adapter(tiny.tiny_model(), tmp_path)
    assert torch.equal(logits(loaded), logits(PeftModel.from_pretrained(tiny.tiny_model(), tmp_path).eval()))
    assert torch.equal(ModelPair(loaded).base(IDS, keep=5), logits(tiny.tiny_model()))
    for masks, message in (
        ({name: [10**9] for name in pattern}, "not all true or false"),
        ({name: [True] + [False] * 999 for name in pattern}, "leaves out too much"),
    ):
        edit_config(tmp_path, rank_pattern=masks)
        assert_refused(tiny.tiny_model(), tmp_path, message)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("kind", ["plain", "tokens", "prompt"])
def test_resized_vocabulary(tmp_path, kind, arch):
    from transformers import AutoModelForCausalLM

    tiny.save_tiny(tmp_path / "base", arch)

    def base(seed=None):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        if seed is not None:  # the new rows are random
            torch.manual_seed(seed)
            model.resize_token_embeddings(tiny.VOCAB_SIZE + 4)
        return model.eval()

    config = KINDS[kind]
    if kind != "prompt":
        changes = {"target_modules": ["c_attn"], "fan_in_fan_out": True} if arch == "gpt2" else {}
        changes |= {"trainable_token_indices": [262]} if kind == "tokens" else {}
        config = dataclasses.replace(config, **changes)
    peft_model = trained(base(1), config)
    peft_model.save_pretrained(tmp_path / "adapter")  # "auto": PEFT sees that the vocabulary is another
    written = load_file(tmp_path / "adapter" / WEIGHTS)
    names = [name for name in written if written[name].shape[0] == tiny.VOCAB_SIZE + 4]
    assert len(names) == 2
    loaded = load_adapter(base(1), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(peft_model))
    assert torch.equal(ModelPair(loaded).base(IDS, keep=5), logits(base(1)))
    small = (
        r"262; allowed: below 261"
        if kind == "tokens"
        else rf"{names[0]} has shape \(265, 32\), not \(261, 32\)"
    )
    assert_refused(base(), tmp_path / "adapter", small)
    assert_refused(base(2), tmp_path / "adapter", rf"{names[0]} is not that of the base model")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", ["head", "embedding", "plain", "copies", "prompt"])
def test_changed_embeddings_and_heads_are_refused_by_name(tmp_path, kind, arch):
    trained(tiny.tiny_model(arch), dataclasses.replace(KINDS[kind])).save_pretrained(
        tmp_path, save_embedding_layers=True
    )
    suffix = ("base_layer.weight", "original_module.weight", "lm_head.weight", "embed_tokens.weight")
    copies = ("lm_head.weight", "embed_tokens.weight") if kind == "copies" else ()
    names = [
        n for n in load_file(tmp_path / WEIGHTS) if n.endswith(suffix) and not n.endswith(copies or "\0")
    ]
    assert names
    for name in names:
        good = (tmp_path / WEIGHTS).read_bytes()
        edit_tensor(tmp_path, name)
        assert_refused(tiny.tiny_model(arch), tmp_path, f"the tensor {name} is not that of the base model")
        (tmp_path / WEIGHTS).write_bytes(good)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("file_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_head_in_another_type_is_the_same_head(tmp_path, dtype, file_dtype):
    trained(tiny.tiny_model().to(dtype), dataclasses.replace(KINDS["head"])).save_pretrained(tmp_path)
    tensors = {name: t.to(file_dtype) for name, t in load_file(tmp_path / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    loaded = load_adapter(tiny.tiny_model().to(dtype), tmp_path)
    assert torch.equal(ModelPair(loaded).base(IDS, keep=5), logits(tiny.tiny_model().to(dtype)))
    edit_tensor(tmp_path, "base_model.model.lm_head.base_layer.weight")
    assert_refused(tiny.tiny_model().to(dtype), tmp_path, "lm_head.base_layer.weight is not that")
    save_file(
        tensors | {"base_model.model.lm_head.base_layer.weight": torch.ones(261, 32).bool()},
        tmp_path / WEIGHTS,
    )
    assert_refused(tiny.tiny_model().to(dtype), tmp_path, "lm_head.base_layer.weight is not that")


# What rewrites the base


def prepared(init):
    """A model that is ready for an initialisation from data, and the configuration."""
    model = tiny.tiny_model()
    if init == "lora_ga":
        config = lora(init_lora_weights=init, lora_ga_config=peft.LoraGAConfig())
        peft.preprocess_loraga(model, config, lambda: model(input_ids=IDS, labels=IDS).loss.backward())
    elif init == "corda":
        from peft.tuners.lora.config import CordaConfig
        from peft.tuners.lora.corda import preprocess_corda

        config = lora(init_lora_weights=init, corda_config=CordaConfig())
        preprocess_corda(model, config, run_model=lambda: model(input_ids=IDS))
    else:
        config = lora(init_lora_weights=init)
    return model, config


REWRITING = ("pissa", "pissa_niter_4", "olora", "OLoRA", "lora_ga", "corda")


@pytest.mark.parametrize("init", REWRITING)
def test_initialisations_that_rewrite_the_base_are_refused(tmp_path, init):
    model, config = prepared(init)
    peft_model = trained(model, config)
    off = logits(tiny.tiny_model())
    with peft_model.disable_adapter():
        assert not torch.equal(logits(peft_model), off)
    message = f"init_lora_weights='{init}'; allowed: True, False, gaussian, orthogonal, eva, mica"
    with pytest.raises(InputError, match=message):
        ModelPair(peft_model)
    peft_model.save_pretrained(tmp_path)
    assert_refused(tiny.tiny_model(), tmp_path, message)
    peft_model.add_adapter("plain", lora())
    peft_model.set_adapter("plain")  # the trace of the other one stays
    with pytest.raises(InputError, match=message):
        ModelPair(peft_model)


@pytest.mark.parametrize("init", ["pissa", "olora", "lora_ga"])
def test_converted_adapters_are_plain_lora(tmp_path, init):
    model, config = prepared(init)
    peft_model = get_peft_model(model, config)
    peft_model.peft_config["default"].init_lora_weights = True  # as PEFT's documentation does it
    peft_model.save_pretrained(tmp_path / "start")
    peft_model.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for p in peft_model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    peft_model.eval().save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    loaded = load_adapter(tiny.tiny_model(), tmp_path / "plain")
    torch.testing.assert_close(logits(loaded), logits(peft_model), rtol=1e-4, atol=1e-4)
    assert torch.equal(ModelPair(loaded).base(IDS, keep=5), logits(tiny.tiny_model()))


@dataclasses.dataclass
class LaterLoraConfig(LoraConfig):
    """As a later version of PEFT may bring it."""

    scrambles_base: bool = False


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lora(bias="lora_only"), "bias='lora_only'; allowed: 'none'"),
        (lora(layer_replication=[(0, 2)]), "layer_replication=.*; allowed: None"),
        (lora(kasa_config=peft.KasaConfig()), "kasa_config=.*; allowed: None"),
        (lora(alora_invocation_tokens=[7]), "alora_invocation_tokens=.*; allowed: None"),
        (lora(init_lora_weights="newest"), "init_lora_weights='newest'; allowed: True, False, gaussian"),
        (lora(init_lora_weights=1), "init_lora_weights=1; allowed: True, False, gaussian"),
        (LoKrConfig(init_weights="newest", **TARGETS), "init_weights='newest'; allowed: True, False"),
        (
            IA3Config(init_ia3_weights="svd", feedforward_modules=[], **TARGETS),
            "init_ia3_weights='svd'; allowed",
        ),
        (LaterLoraConfig(scrambles_base=True, **TARGETS), "scrambles_base=True; allowed: False"),
        (AdaLoraConfig(total_step=9, bias="all", **TARGETS), "bias='all'; allowed: 'none'"),
    ],
)
def test_settings_not_known_to_be_harmless_are_refused(config, message):
    with pytest.raises(InputError, match=message):
        check_config(config)


@pytest.mark.parametrize(
    "config", [*KINDS.values(), lora(lora_ga_config=peft.LoraGAConfig()), LaterLoraConfig()]
)
def test_settings_that_are_harmless(config):
    check_config(config)


def test_adapter_that_changes_the_base_while_it_is_attached(tmp_path, monkeypatch):
    trained(tiny.tiny_model(), lora()).save_pretrained(tmp_path)
    reset = LoraLayer.reset_lora_parameters

    def as_if_new(layer, *args):
        weight = layer.get_base_layer().weight
        weight.data = weight.data * 1.01
        reset(layer, *args)

    monkeypatch.setattr(LoraLayer, "reset_lora_parameters", as_if_new)
    assert_refused(
        tiny.tiny_model(), tmp_path, r"changed the base weight model\.layers\.0\.self_attn\.q_proj"
    )
