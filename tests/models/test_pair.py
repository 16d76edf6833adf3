"""The two views against PEFT's own forward and against the model before it had an adapter."""

from __future__ import annotations

import pytest
import torch
from peft import LNTuningConfig, LoHaConfig, LoraConfig, get_peft_model

from svdk.errors import InputError
from svdk.models.pair import ModelPair
from tests.helpers import tiny

LENGTHS = (9, 4, 6)
CASES = [(arch, kind) for arch in tiny.ARCHITECTURES for kind in tiny.PEFT_TYPES]


def left_padded(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(5, tiny.VOCAB_SIZE, (n,), generator=generator) for n in lengths]
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, -len(row) :] = row
        mask[i, -len(row) :] = 1
    return ids, mask, rows


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_views_are_the_peft_model_and_the_plain_model(arch, kind):
    peft_model, plain = tiny.tiny_peft(kind, arch), tiny.tiny_model(arch)
    pair = ModelPair(peft_model)
    ids, mask, rows = left_padded()
    warm, base = pair.teacher_forced(ids, mask, keep=4)
    assert warm.shape == base.shape == (3, 4, pair.vocab_size)
    assert (warm - base).abs().max() > 0.1
    with torch.no_grad():
        for i, row in enumerate(rows):  # PEFT and the plain model see each row alone, unpadded
            close(warm[i], peft_model(input_ids=row[None]).logits[0, -4:])
            close(base[i], plain(row[None]).logits[0, -4:])
        whole = left_padded((7, 7))[0]
        warm, base = pair.teacher_forced(whole, None, keep=7)
        close(warm, peft_model(whole, attention_mask=torch.ones_like(whole)).logits[:, -7:])
        close(base, plain(whole).logits)


@pytest.mark.parametrize("kind", ["lora", "ia3", "prefix_tuning"])
def test_left_padding_as_peft_does_it_with_position_ids(kind):
    peft_model = tiny.tiny_peft(kind, "gpt2")  # absolute positions: a shift would show
    ids, mask, _ = left_padded()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    warm, _ = ModelPair(peft_model).teacher_forced(ids, mask, keep=4)
    with torch.no_grad():
        close(warm, peft_model(ids, attention_mask=mask, position_ids=positions).logits[:, -4:])


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_cached_steps_equal_the_full_forward(arch, kind, implementation):
    pair = ModelPair(tiny.tiny_peft(kind, arch))
    ids, mask, _ = left_padded()
    caches = {view: pair.new_cache(view, implementation, ids.shape[1]) for view in ("warm", "base")}
    full = dict(zip(("warm", "base"), pair.teacher_forced(ids, mask, keep=4), strict=True))
    for view, cache in caches.items():
        forward = getattr(pair, view)
        forward(ids[:, :6], mask[:, :6], cache=cache)
        for t in range(6, 9):
            close(forward(ids[:, t : t + 1], mask[:, : t + 1], cache=cache)[:, 0], full[view][:, t - 9])
        assert cache.seen == 9


def test_other_layer_types_and_modules_to_save():
    plain = tiny.tiny_model()
    ids, mask, _ = left_padded()
    configs = [
        LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False, task_type="CAUSAL_LM"),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
    ]
    for config in configs:
        peft_model = get_peft_model(tiny.tiny_model(), config).eval()
        with torch.no_grad():
            if config.peft_type == "LORA":
                peft_model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
            want = plain(ids, attention_mask=mask).logits
            warm, base = ModelPair(peft_model).teacher_forced(ids, mask, keep=3)
            assert not torch.allclose(warm, base, atol=1e-2)
            close(base, want[:, -3:])


def test_adapter_inside_a_transformers_model():
    model = tiny.tiny_model()
    model.add_adapter(tiny.tiny_peft_config("lora"))
    pair = ModelPair(model.eval())
    ids, mask, _ = left_padded()
    assert pair.peft_type == "LORA"
    close(pair.teacher_forced(ids, mask, 2)[1], tiny.tiny_model()(ids, attention_mask=mask).logits[:, -2:])


def test_flags_and_gradients_survive_an_error_in_the_base_forward(monkeypatch):
    peft_model = tiny.tiny_peft("lora")
    pair = ModelPair(peft_model)
    trainable = [name for name, p in peft_model.named_parameters() if p.requires_grad]
    ids, mask, _ = left_padded()
    before = pair.warm(ids, mask)

    def fail(*args, **kwargs):
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(pair.module.lm_head, "forward", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            pair.base(ids, mask)
    assert torch.equal(pair.warm(ids, mask), before)
    assert trainable == [name for name, p in peft_model.named_parameters() if p.requires_grad]


def test_no_dropout_in_teacher_forcing_and_modes_are_restored():
    config = LoraConfig(
        r=2, lora_dropout=0.5, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    peft_model = get_peft_model(tiny.tiny_model(), config).train()
    peft_model.base_model.model.lm_head.eval()
    ids, mask, _ = left_padded()
    pair = ModelPair(peft_model)
    first, second = (pair.teacher_forced(ids, mask, 1)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert peft_model.training and not peft_model.base_model.model.lm_head.training


def merged():
    model = tiny.tiny_peft("lora")
    model.merge_adapter()
    return model


def disabled():
    model = tiny.tiny_peft("lora")
    model.base_model.disable_adapter_layers()
    return model


def absent():
    model = tiny.tiny_peft("lora")
    for layer in model.modules():
        if hasattr(layer, "_active_adapter"):
            layer._active_adapter = ["other"]
    return model


def lora(**options):
    config = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "r": 2} | options
    return get_peft_model(tiny.tiny_model(), LoraConfig(**config))


def norms():
    return get_peft_model(tiny.tiny_model(), LNTuningConfig(target_modules=["norm"], task_type="CAUSAL_LM"))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (merged, "merged"),
        (disabled, "disabled"),
        (absent, r"active adapter was \['other'\]"),
        (tiny.tiny_model, "without a PEFT adapter"),
        (lambda: tiny.tiny_peft("prompt_tuning").base_model, "without a PEFT adapter"),
        (norms, "PEFT type was 'LN_TUNING'"),
        (lambda: lora(bias="all"), "bias='all'"),
        (lambda: lora(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (lambda: lora(layer_replication=[(0, 2), (1, 2)]), "layer_replication"),
        (lambda: lora(alora_invocation_tokens=[7]), "alora_invocation_tokens"),
    ],
)
def test_models_without_a_usable_base_view_are_refused(build, message):
    with pytest.raises(InputError, match=message):
        ModelPair(build())


def test_disabled_prompt_adapter_is_refused():
    peft_model = tiny.tiny_peft("p_tuning")
    with peft_model.disable_adapter(), pytest.raises(InputError, match="disabled"):
        ModelPair(peft_model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 0}, "keep was 0"),
        ({"keep": 10}, "keep was 10"),
        ({"attention_mask": torch.tensor([[1] * 8 + [0]] * 3)}, "padding on the left only"),
        ({"attention_mask": torch.zeros(3, 9)}, "empty row"),
        ({"attention_mask": torch.ones(3, 8)}, r"shape \(3, 8\)"),
        ({"input_ids": torch.zeros(3, 0, dtype=torch.long)}, "input_ids was"),
        ({"input_ids": torch.zeros(3, 9)}, "input_ids was"),
    ],
)
def test_bad_inputs(change, message):
    ids, mask, _ = left_padded()
    pair = ModelPair(tiny.tiny_peft("lora"))
    with pytest.raises(InputError, match=message):
        pair.teacher_forced(**({"input_ids": ids, "attention_mask": mask, "keep": 2} | change))


def test_bad_caches():
    pair = ModelPair(tiny.tiny_peft("lora"))
    with pytest.raises(InputError, match="cache_implementation was 'quantized'"):
        pair.new_cache("warm", "quantized")
    with pytest.raises(InputError, match="max_length was None"):
        pair.new_cache("warm", "static")
