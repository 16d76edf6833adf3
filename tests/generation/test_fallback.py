"""What one forward for both models cannot do is done in two, said once, and leaves the model as it was."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, OPTConfig

from svdk.errors import BackendError, InputError
from svdk.generation.generate import decode
from svdk.models import paired_forward
from svdk.models.pair import ModelPair
from svdk.models.paired_forward import PairedForward, why_not_paired
from svdk.utils import notices
from svdk.warmstart.peft_configs import make_config
from tests.helpers import tiny
from tests.models.test_pair import left_padded
from tests.models.test_paired import columns_first

OPTIONS = {"max_new_tokens": 5, "strength": 2.0}


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(notices, "said", set())


def tokens(pair, **options):
    ids, mask, _ = left_padded()
    return decode(pair, ids, mask, **(OPTIONS | options)).sequences


def lora(model=None, **options):
    config = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "r": 2, "init_lora_weights": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return get_peft_model(model or tiny.tiny_model(), LoraConfig(**(config | options))).eval()


def saved_block():
    model = lora(modules_to_save=["self_attn"], target_modules=["up_proj"])
    for name, weight in model.named_parameters():
        if "modules_to_save" in name:
            weight.data += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    return model


def state(pair):
    """What a decoding call could leave behind in a model."""
    modules = dict(pair.module.named_modules())
    return {
        name: (
            {key for key in vars(m) if key not in ("_cached", "long_inv_freq")},
            m.training,
            list(m._forward_pre_hooks),
            vars(m).get("_disable_adapters"),
        )
        for name, m in modules.items()
    }


@pytest.mark.parametrize("build", [saved_block, columns_first], ids=["saved_block", "columns_first"])
def test_falls_back_with_one_warning(build):
    pair = ModelPair(build())
    before = state(pair)
    with pytest.warns(UserWarning, match="two forward passes a step, because") as said:
        got = tokens(pair)
    assert len(said) == 1
    assert torch.equal(got, tokens(pair, forward="two_pass"))
    assert not torch.equal(got, tokens(pair, forward="two_pass", strength=0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens(pair)  # neither said nor tried again
    with pytest.raises((InputError, BackendError), match="two_pass"):
        tokens(pair, forward="paired")
    assert state(pair) == before


@pytest.mark.parametrize("kind", ["ia3", "all-linear"])
def test_opt_is_paired(kind):
    """It flattens (B, T, hidden) before the MLP."""
    config = OPTConfig(
        vocab_size=tiny.VOCAB_SIZE, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, word_embed_proj_dim=32, init_std=0.3, dropout=0.0, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        if kind == "ia3":
            config = make_config("ia3", model)
            config.init_ia3_weights = False
        else:
            config = LoraConfig(
                task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules="all-linear"
            )
        pair = ModelPair(get_peft_model(model, config).eval())
    assert why_not_paired(pair) is None
    assert torch.equal(tokens(pair), tokens(pair, forward="two_pass"))


def test_autocast():
    pair = ModelPair(lora())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert why_not_paired(pair) is None
        ids, mask, _ = left_padded()
        paired, two = PairedForward(pair)(ids, mask), pair.teacher_forced(ids, mask, 1)
        for got, want in zip(paired, two, strict=True):
            assert got.dtype == want.dtype == torch.bfloat16
            torch.testing.assert_close(got, want, atol=0.05, rtol=0.05)
        tokens(pair)
    assert why_not_paired(pair) is None


def test_a_step_that_fails_late_is_done_again_in_two_passes(monkeypatch):
    pair = ModelPair(lora())
    want = tokens(pair)
    run, calls = PairedForward.__call__, []

    def fail(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 7:  # two of them are the probe's
            raise BackendError("an adapter layer got 5 rows")
        return run(self, *args, **kwargs)

    monkeypatch.setattr(paired_forward, "_probed", type(paired_forward._probed)())
    monkeypatch.setattr(PairedForward, "__call__", fail)
    with pytest.warns(UserWarning, match="because an adapter layer got 5 rows"):
        assert torch.equal(tokens(pair), want)
    assert len(calls) == 7


def test_memory_that_runs_out_is_not_a_reason(monkeypatch):
    def fail(self, *args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(PairedForward, "__call__", fail)
    with pytest.raises(MemoryError):
        why_not_paired(ModelPair(lora()))
