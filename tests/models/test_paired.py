"""One forward over both models' rows: against the two views, PEFT's own forward and two-pass decoding."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model

import svdk
from svdk.calibration.artifact import Steering
from svdk.errors import BackendError, InputError
from svdk.generation.generate import decode
from svdk.models.cpu_linear import ONEDNN_ROWS, TRANSPOSED_ROWS, fast_linears
from svdk.models.pair import ModelPair
from svdk.models.paired_forward import PairedForward, choose_forward, why_not_paired
from svdk.utils import notices
from tests.helpers import tiny
from tests.models.test_pair import CASES, close, left_padded

STEPS = 6
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.95, "seed": 3}


def lora_model(arch="llama", **options):
    config = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "r": 2, "init_lora_weights": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return get_peft_model(tiny.tiny_model(arch), LoraConfig(**(config | options))).eval()


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "unpadded"])
@pytest.mark.parametrize("implementation", ["dynamic", "static"])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_each_half_is_that_models_own_run(arch, kind, implementation, padded):
    pair = ModelPair(tiny.tiny_peft(kind, arch))
    ids, mask, _ = left_padded() if padded else left_padded((9, 9, 9))
    mask = mask if padded else None
    want = pair.teacher_forced(ids, mask, keep=4)
    forward = PairedForward(pair)
    cache = forward.new_cache(implementation, ids.shape[1])
    forward(ids[:, :6], None if mask is None else mask[:, :6], cache=cache)
    for t in range(6, 9):
        step = forward(ids[:, t : t + 1], None if mask is None else mask[:, : t + 1], cache=cache)
        assert step[0].untyped_storage().data_ptr() == step[1].untyped_storage().data_ptr()
        for got, view in zip(step, want, strict=True):
            close(got[:, 0], view[:, t - 9])
    assert cache.seen == 9


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
@pytest.mark.parametrize("kind", tiny.PEFT_TYPES)
def test_rows_that_attend_to_nothing_spoil_nothing(kind, implementation):
    """Under sdpa: the base rows' queries where the warm rows hold virtual tokens see no key at all."""
    model = tiny.tiny_peft(kind)
    model.base_model.set_attn_implementation("sdpa")
    pair = ModelPair(model)
    ids, mask, _ = left_padded()
    forward = PairedForward(pair)
    want = pair.teacher_forced(ids, mask, keep=1)
    for got, view in zip(forward(ids, mask, cache=forward.new_cache(implementation, 9)), want, strict=True):
        close(got, view)


@pytest.mark.parametrize("options", [{}, SAMPLING], ids=["greedy", "sampling"])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_tokens_equal_two_passes(arch, kind, options):
    pair = ModelPair(tiny.tiny_peft(kind, arch))
    ids, mask, _ = left_padded()
    options = options | {"max_new_tokens": STEPS, "strength": 2.0}
    for use_cache in (True, False):
        both = [
            decode(pair, ids, mask, forward=name, use_cache=use_cache, **options).sequences
            for name in ("paired", "two_pass")
        ]
        assert torch.equal(*both)


@pytest.mark.parametrize(
    "build",
    [
        lambda: lora_model(use_rslora=True),
        lambda: lora_model(use_dora=True),
        lambda: lora_model(lora_bias=True),
        lambda: lora_model(target_modules=["q_proj", "embed_tokens"]),
        lambda: lora_model(modules_to_save=["embed_tokens"]),
        lambda: lora_model(modules_to_save=["lm_head"]),
        lambda: lora_model("gpt2", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
        lambda: get_peft_model(
            tiny.tiny_model(), LoHaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        ),
        lambda: get_peft_model(
            tiny.tiny_model("qwen2"),
            IA3Config(
                target_modules=["q_proj"],
                feedforward_modules=[],
                init_ia3_weights=False,
                task_type="CAUSAL_LM",
            ),
        ),
        lambda: get_peft_model(
            tiny.tiny_model(),
            IA3Config(
                target_modules=["gate_proj", "up_proj"],
                feedforward_modules=["gate_proj"],
                init_ia3_weights=False,
                task_type="CAUSAL_LM",
            ),
        ),
        lambda: tiny.tiny_peft("lora").to(torch.bfloat16),
        lambda: mixed_dtypes(),
    ],
    ids=[
        "rslora", "dora", "lora_bias", "embedding", "saved_embedding", "saved_head", "conv1d", "loha", "bias",
        "shared_input", "bfloat16", "mixed_dtypes",
    ],
)  # fmt: skip
def test_layer_kinds(build):
    pair = ModelPair(build().eval())
    for layer in pair.layers.values():  # what was trained may still be at its first value
        for name, weight in layer.named_parameters():
            if "modules_to_save" in name or "lora_bias" in name or "hada" in name:
                weight.data += 0.1
    ids, mask, _ = left_padded()
    assert why_not_paired(pair) is None
    tolerance = 0.1 if pair.module.dtype == torch.bfloat16 else 1e-4
    for got, want in zip(
        PairedForward(pair)(ids, mask, keep=3), pair.teacher_forced(ids, mask, 3), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def mixed_dtypes():
    """A bfloat16 model with a float32 adapter, as PEFT loads one."""
    model = tiny.tiny_model().to(torch.bfloat16)
    return tiny.tiny_peft("lora", model=model)


def test_the_model_is_as_it_was_afterwards_and_after_an_error(monkeypatch):
    pair = ModelPair(tiny.tiny_peft("lora"))
    ids, mask, _ = left_padded()
    want = pair.warm(ids, mask)

    def fail(*args, **kwargs):
        raise RuntimeError("no memory")

    forward = PairedForward(pair)
    forward(ids, mask)
    with monkeypatch.context() as patch:
        patch.setattr(pair.module.model.norm, "forward", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            forward(ids[:1, -1:])
    assert not any("forward" in vars(module) for module in pair.module.modules())
    assert torch.equal(pair.warm(ids, mask), want)


@pytest.mark.parametrize(
    "rows", [0, 1, 2, TRANSPOSED_ROWS, TRANSPOSED_ROWS + 1, ONEDNN_ROWS, ONEDNN_ROWS + 1]
)
@pytest.mark.parametrize("bias", [True, False])
def test_fast_linear_is_linear(rows, bias):
    torch.manual_seed(0)
    layer = torch.nn.Linear(48, 80, bias=bias).requires_grad_(False)
    found = fast_linears(torch.nn.Sequential(layer, torch.nn.Conv1d(1, 1, 1), torch.nn.Linear(3, 3).half()))
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        assert not found
        return
    ((same, forward),) = found
    x = torch.randn(rows, 2, 48)[:, 1:]  # strided
    assert same is layer
    assert forward(x).is_contiguous()
    torch.testing.assert_close(forward(x), layer(x))


def test_every_linear_layer_is_fast_inside_and_none_outside():
    pair = ModelPair(tiny.tiny_peft("lora"))
    forward = PairedForward(pair)
    linears = [m for m in pair.module.modules() if type(m) is torch.nn.Linear]
    seen = []

    def look(module, args):
        seen.append(["forward" in vars(m) for m in linears])

    hook = pair.module.model.norm.register_forward_pre_hook(look)
    forward(left_padded((5,))[0])
    hook.remove()
    assert all(seen[0]) == (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available())
    assert not any("forward" in vars(m) for m in pair.module.modules())


def experts():
    model = lora_model()
    model.base_model.model.model.experts = model.base_model.model.model.layers[0].self_attn
    del model.base_model.model.model.layers[0].self_attn
    return model


def patched():
    model = lora_model()
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    layer.forward = layer.forward
    return model


def odd_base():
    model = lora_model()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj

    class Quantised(torch.nn.Module):
        pass

    layer.base_layer = Quantised()
    return model


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (experts, "mixture of experts"),
        (patched, "layers.1.self_attn.q_proj: its forward is already replaced"),
        (odd_base, "layers.0.self_attn.q_proj: no paired forward for a lora.layer.Linear layer"),
    ],
)
def test_reasons(build, reason):
    pair = ModelPair(build())
    assert reason in why_not_paired(pair)
    with pytest.raises(InputError, match="forward was 'paired'; allowed for this model: 'two_pass'"):
        choose_forward(pair, "paired")


@pytest.mark.parametrize("change", ["merge_adapter", "disable_adapter_layers"])
def test_adapters_changed_after_the_pair_was_made(change):
    model = lora_model()
    pair = ModelPair(model)
    assert why_not_paired(pair) is None
    getattr(model.base_model, change)()
    assert "merged or disabled since" in why_not_paired(pair)


def test_fallback_is_said_once(monkeypatch):
    monkeypatch.setattr(notices, "said", set())
    model, sound = patched(), lora_model()
    ids, mask, _ = left_padded()
    with pytest.warns(UserWarning, match="two forward passes a step, because layer .* already replaced"):
        got = decode(ModelPair(model), ids, mask, max_new_tokens=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(ModelPair(model), ids, mask, max_new_tokens=2)
        want = decode(ModelPair(sound), ids, mask, max_new_tokens=2, forward="two_pass")
    assert torch.equal(got.sequences, want.sequences)


class Columns(torch.nn.Module):
    """A layer that gets its input with rows and columns exchanged, as no model here has it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


def columns_first():
    model = tiny.tiny_peft("lora")
    attention = model.base_model.model.model.layers[0].self_attn
    attention.q_proj = Columns(attention.q_proj)
    return model


def test_rows_in_another_layout_are_an_error():
    with pytest.raises(BackendError, match="an adapter layer got 9 rows in a paired forward over 6"):
        PairedForward(ModelPair(columns_first()))(*left_padded()[:2])


def test_rows_side_by_side_are_rows():
    """As OPT has them: (rows * tokens, hidden)."""
    model = tiny.tiny_peft("lora")
    mlp = model.base_model.model.model.layers[0].self_attn
    mlp.o_proj = torch.nn.Sequential(torch.nn.Flatten(0, 1), mlp.o_proj, torch.nn.Unflatten(0, (-1, 9)))
    ids, mask, _ = left_padded()
    pair = ModelPair(model)
    for got, want in zip(PairedForward(pair)(ids, mask), pair.teacher_forced(ids, mask, 1), strict=True):
        close(got, want)


@pytest.mark.parametrize("kind", tiny.PEFT_TYPES)
def test_verify_passes_when_right_and_raises_when_wrong(kind, monkeypatch):
    pair = ModelPair(tiny.tiny_peft(kind))
    ids, mask, _ = left_padded()
    options = {"max_new_tokens": 2, "verify_forward": True}
    decode(pair, ids, mask, **options)
    forward_rows = ModelPair.forward_rows
    for view, wrong in (("warm", slice(0, 3)), ("base", slice(3, 6))):

        def swapped(self, *args, wrong=wrong, **kwargs):
            logits = forward_rows(self, *args, **kwargs)
            if len(logits) == 6:  # both views in one forward
                logits[wrong] = logits[wrong].flip(-1)
            return logits

        with monkeypatch.context() as patch:
            patch.setattr(ModelPair, "forward_rows", swapped)
            with pytest.raises(BackendError, match=f"{view} rows differ from the {view} model's own"):
                decode(pair, ids, mask, **options)


@pytest.fixture(scope="module")
def three():
    """One model with adapters a, b and c, and the same adapters one a model."""
    many = tiny.tiny_peft("lora")
    config = tiny.tiny_peft_config("lora")
    state = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        for name in "abc":
            many.add_adapter(name, config)
            state[name] = {
                key.replace(f".{name}.", ".default."): value
                for key, value in many.state_dict().items()
                if f".{name}." in key
            }
    alone = {}
    for name in "abc":
        alone[name] = tiny.tiny_peft("lora")
        missing = alone[name].load_state_dict(state[name], strict=False)
        assert not missing.unexpected_keys
    return many.eval(), alone


def test_rows_with_different_adapters_and_parameters(three):
    many, alone = three
    adapters = ["b", "a", "c", "a", "b"]
    ids, mask, rows = left_padded((9, 4, 6, 3, 7))
    settings = {
        "strength": torch.tensor([0.0, 1.0, 2.0, 3.0, -1.0]),
        "alpha": torch.tensor([0.0, 0.1, 0.2, 0.05, 0.3]),
        "temperature": torch.tensor([0.0, 1.0, 0.7, 1.3, 0.0]),
        "top_k": torch.tensor([0, 5, 50, 0, 3]),
        "top_p": torch.tensor([1.0, 0.9, 0.8, 1.0, 0.5]),
        "seed": torch.tensor([1, 2, 3, 4, 5]),
    }
    sequences = decode(
        ModelPair(many), ids, mask, max_new_tokens=STEPS, row_adapters=adapters, do_sample=True, **settings
    ).sequences
    for i, (name, row) in enumerate(zip(adapters, rows, strict=True)):
        mine = {key: value[i : i + 1] for key, value in settings.items()}
        want = decode(ModelPair(alone[name]), row[None], max_new_tokens=STEPS, do_sample=True, **mine)
        assert torch.equal(sequences[i, 9:], want.sequences[0, len(row) :])
    shared = {"seed": settings["seed"], "strength": settings["strength"], "row_adapters": adapters}
    shared |= {"do_sample": True, "max_new_tokens": STEPS}
    through = many.generate(
        input_ids=ids, attention_mask=mask, custom_generate=svdk.generate, num_return_sequences=2, top_k=0,
        **shared,
    )  # fmt: skip
    assert torch.equal(through[::2], decode(ModelPair(many), ids, mask, **shared).sequences)


def test_one_artifact_an_adapter(three):
    model = three[0]
    ids, mask, _ = left_padded()
    adapters = ["b", "a", "b"]
    artifacts = {
        "a": Steering(strength=3.0, direction="log_ratio", alpha=0.0),
        "b": Steering(strength=-1.0, direction="log_ratio", alpha=0.3, vocab_size=tiny.VOCAB_SIZE),
        "c": Steering(strength=1.0, direction="kl_gradient"),
    }
    common = {"max_new_tokens": STEPS, "row_adapters": adapters}
    strength, alpha = torch.tensor([-1.0, 3.0, -1.0]), torch.tensor([0.3, 0.0, 0.3])
    spelled = {"strength": strength, "alpha": alpha, "direction": "log_ratio"}
    want = decode(ModelPair(model), ids, mask, **common, **spelled).sequences
    assert torch.equal(decode(ModelPair(model), ids, mask, steering=artifacts, **common).sequences, want)
    through = model.generate(
        input_ids=ids, attention_mask=mask, custom_generate=svdk.generate, steering=artifacts,
        eos_token_id=None, **common,
    )  # fmt: skip
    assert torch.equal(through, want)
    want = decode(ModelPair(model), ids, mask, **common, **(spelled | {"alpha": 0.0})).sequences
    got = decode(ModelPair(model), ids, mask, steering=artifacts, alpha=0.0, **common).sequences
    assert torch.equal(got, want)
    for wrong, message in (
        ({"row_adapters": None}, "needed beside it: row_adapters"),
        ({"steering": {"a": artifacts["a"]}}, "needed beside it: an artifact for b"),
        ({"row_adapters": ["a", "c", "a"]}, "direction of the artifacts was kl_gradient, log_ratio"),
        (
            {"steering": {name: Steering(strength=1.0, peft_type="IA3") for name in "ab"}},
            "peft_type does not",
        ),
    ):
        with pytest.raises(InputError, match=message):
            decode(ModelPair(model), ids, mask, **({"steering": artifacts} | common | wrong))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"row_adapters": ["a", "x", "a"]}, r"row_adapters was \['a', 'x', 'a'\]; allowed: one a row, of"),
        ({"row_adapters": ["a"]}, "row_adapters had 1 names; allowed: one for each of 3 rows"),
        ({"row_adapters": []}, "row_adapters was"),
        ({"row_adapters": ["a"] * 3, "forward": "two_pass"}, "forward was 'two_pass' with row_adapters"),
        ({"row_adapters": ["a"] * 3, "view": "base"}, "row_adapters was given"),
        ({"forward": "both"}, "forward was 'both'; allowed: auto, paired, two_pass"),
    ],
)
def test_bad_arguments(three, options, message):
    with pytest.raises(InputError, match=message):
        decode(ModelPair(three[0]), *left_padded()[:2], max_new_tokens=1, **options)


def test_different_adapters_need_lora():
    with pytest.raises(InputError, match="row_adapters was"):
        decode(
            ModelPair(tiny.tiny_peft("ia3")), left_padded((4,))[0], max_new_tokens=1, row_adapters=["default"]
        )


@pytest.mark.real_model
def test_real_model_paired_equals_two_passes(real_model):
    model, tokenizer = real_model
    import copy

    config = LoraConfig(
        r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pair = ModelPair(get_peft_model(copy.deepcopy(model), config))
    batch = tokenizer(["The capital of France", "Once upon a time there"], return_tensors="pt", padding=True)
    both = [
        decode(pair, **batch, max_new_tokens=12, forward=name).sequences for name in ("paired", "two_pass")
    ]
    assert torch.equal(*both)
