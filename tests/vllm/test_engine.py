"""The real engine, token for token against ``svdk.generate``; run by ``make vllm-test``."""

from __future__ import annotations

import importlib.util
import re

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here; `make vllm-test` has an environment", allow_module_level=True)

from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

import svdk
from svdk.calibration.artifact import Steering
from svdk.errors import ArtifactError
from tests.helpers.tiny import tiny_tokenizer
from tests.vllm import folders
from tests.vllm.reference import TOKENS, Models, prompts

MIXED = prompts(3, 100, 17, 50, 64, 5)
GREEDY = SamplingParams(temperature=0, max_tokens=TOKENS)


def ask(engine, asked, names, params=GREEDY):
    """The answers' ids; ``names``: an adapter, None for the base model, or one of them a prompt."""
    names = names if isinstance(names, list) else [names] * len(asked)
    requests = [None if name is None else engine.adapters[name] for name in names]
    rows = [{"prompt_token_ids": ids} for ids in asked]
    return [
        list(out.outputs[0].token_ids)
        for out in engine.generate(rows, params, lora_request=requests, use_tqdm=False)
    ]


def pairing(engine):
    return engine.llm_engine.model_executor.driver_worker.worker.model_runner.get_model().pairing


@pytest.mark.parametrize("name", ["a", "b", "positions", "one", "budget", "vector"])
def test_every_kind_of_steering(name, engine, llama, models):
    assert ask(engine, MIXED, name) == [models.answer(llama[1][name], p) for p in MIXED]


def test_the_adapters_own_scale(engine, llama, models):
    adapter = llama[1]["scale"]
    assert ask(engine, MIXED[:3], "scale") == [models.answer(adapter, p) for p in MIXED[:3]]
    assert ask(engine, MIXED[:3], "scale") != [models.warm_greedy(adapter, p) for p in MIXED[:3]]


def test_prefix_cache_hits(engine, llama, models):
    (prefix,) = prompts(96, seed=3)
    asked = [prefix + tail for tail in prompts(4, 9, 30, seed=4)]
    for name in ("a", None, "positions"):
        expected = [models.answer(llama[1].get(name), p) for p in asked]
        for ids, answer in zip(asked, expected, strict=True):
            assert ask(engine, [ids], name) == [answer]
    row = {"prompt_token_ids": asked[0]}
    (out,) = engine.generate(row, GREEDY, lora_request=engine.adapters["a"], use_tqdm=False)
    assert out.num_cached_tokens >= 64
    assert list(out.outputs[0].token_ids) == models.answer(llama[1]["a"], asked[0])


def mixed(engine):
    names = ["a", None, "b", "vector", None, "positions", "one", None, "scale", "a"]
    return names, prompts(3, 40, 17, 70, 5, 20, 9, 90, 33, 12, seed=5)


def test_steered_plain_and_other_adapters_in_one_batch(engine, llama, models):
    names, asked = mixed(engine)
    expected = [models.answer(llama[1].get(n), p) for n, p in zip(names, asked, strict=True)]
    assert ask(engine, asked, names) == expected


def test_the_adapter_of_the_last_slot_leaves_plain_rows_alone(engine, llama, models):
    """vLLM's CPU code adds it to them; without the remedy this is what comes out."""
    names, asked = mixed(engine)
    state = pairing(engine)
    assert None not in state.ids  # every slot is taken
    state.on_cpu = False
    try:
        engine.reset_prefix_cache()
        broken = ask(engine, asked, names)
    finally:
        state.on_cpu = True
        engine.reset_prefix_cache()
    plain = [i for i, name in enumerate(names) if name is None]
    expected = {i: models.answer(None, asked[i]) for i in plain}
    assert any(broken[i] != expected[i] for i in plain)
    assert all(ask(engine, asked, names)[i] == expected[i] for i in plain)


def test_plain_batches_run_one_row_a_token(engine, monkeypatch):
    rows, state = [], pairing(engine)
    close = state.close
    monkeypatch.setattr(state, "close", lambda hidden: rows.append(hidden.shape[0]) or close(hidden))
    engine.reset_prefix_cache()
    ask(engine, [MIXED[2]], None)
    plain, rows[:] = list(rows), []
    engine.reset_prefix_cache()
    ask(engine, [MIXED[2]], "vector")
    alone, rows[:] = list(rows), []
    ask(engine, [MIXED[2]], "a")
    assert plain[0] == alone[0] == 17 and rows[0] == 34


def test_dials_of_requests(engine, llama, models):
    scales = [0.0, 0.5, 1.0, -1.0, 2.0, 1.0]
    for name in ("a", "positions", "budget"):
        params = [
            SamplingParams(temperature=0, max_tokens=TOKENS, extra_args={"svdk_strength_scale": x})
            for x in scales
        ]
        expected = [
            models.answer(llama[1][name], p, strength_scale=x) for p, x in zip(MIXED, scales, strict=True)
        ]
        assert ask(engine, MIXED, name, params) == expected
        assert len({tuple(x) for x in ask(engine, [MIXED[0]] * 6, name, params)}) > 1


@pytest.mark.parametrize("value", ["2", 101, float("nan"), True, None])
def test_a_bad_dial_is_refused(value, engine):
    params = SamplingParams(temperature=0, max_tokens=2, extra_args={"svdk_strength_scale": value})
    with pytest.raises(
        VLLMValidationError, match=r"svdk_strength_scale was .*allowed: a number in \[-100, 100\]"
    ):
        ask(engine, [[5, 6]], "a", params)
    with pytest.raises(VLLMValidationError, match="svdk_scale was given"):
        ask(engine, [[5, 6]], "a", SamplingParams(max_tokens=2, extra_args={"svdk_scale": 1}))
    assert ask(engine, [[5, 6]], "a")


def test_bans_outside_the_mask_go_by_the_warm_order(engine, llama, models):
    """The set C of this adapter is one token: with -inf around it, a ban would leave a row without any."""
    adapter, allowed = llama[1]["one"], list(range(40, 60))
    others = [i for i in range(261) if i not in allowed]
    expected = [models.banned(adapter, p, lambda step: others) for p in MIXED[:3]]
    params = SamplingParams(temperature=0, max_tokens=TOKENS, allowed_token_ids=allowed)
    assert ask(engine, MIXED[:3], "one", params) == expected


def test_min_tokens(engine, llama, models):
    adapter, (ids,) = llama[1]["one"], prompts(11, seed=7)
    stop = models.answer(adapter, ids)[0]
    params = SamplingParams(temperature=0, max_tokens=TOKENS, min_tokens=8, stop_token_ids=[stop])
    expected = models.banned(adapter, ids, lambda step: [stop, 2] if step < 8 else [])
    cut = next((i + 1 for i, x in enumerate(expected) if x in (stop, 2)), TOKENS)
    (answer,) = ask(engine, [ids], "one", params)
    assert answer == expected[:cut] and len(answer) >= 8


def test_a_grammar(engine, llama, models):
    wanted = StructuredOutputsParams(regex="[ab]{4}c[de]{3}")
    params = SamplingParams(temperature=0, max_tokens=TOKENS, structured_outputs=wanted)
    tokenizer = tiny_tokenizer()
    spelled = [
        tokenizer.convert_tokens_to_ids(list(x)) for x in ("ab", "ab", "ab", "ab", "c", "de", "de", "de")
    ]
    everything = set(range(261))
    for name in ("one", "a"):
        answers = ask(engine, MIXED[:3], name, params)
        for ids, answer in zip(MIXED[:3], answers, strict=True):
            text = tokenizer.decode([i for i in answer if i != 2])
            assert re.fullmatch("[ab]{4}c[de]{3}", text)
            ban = lambda step: sorted(everything - set(spelled[step]))  # noqa: E731
            assert answer[:8] == models.banned(llama[1][name], ids, ban, 8)


def test_stop_strings(engine, llama, models):
    tokenizer = tiny_tokenizer()
    for ids in prompts(*range(4, 30), seed=8):
        answer = models.answer(llama[1]["a"], ids)
        text = [tokenizer.decode([i]) for i in answer]
        at = next((k for k, x in enumerate(text) if k > 2 and x.isascii() and x.isalpha()), None)
        if at is not None and text.index(text[at]) == at:
            break
    else:
        raise AssertionError("no answer held a letter")
    expected = models.answer(llama[1]["a"], ids, stop_strings=[text[at]], tokenizer=tokenizer)
    assert len(expected) == at + 1 < TOKENS
    assert ask(engine, [ids], "a", SamplingParams(temperature=0, max_tokens=TOKENS, stop=[text[at]])) == [
        expected
    ]


def test_logprobs_are_those_of_the_steered_row(engine, llama, models):
    adapter, ids = llama[1]["positions"], MIXED[2]
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=8)
    row = {"prompt_token_ids": ids}
    (out,) = engine.generate(row, params, lora_request=engine.adapters["positions"], use_tqdm=False)
    steering, seen = Steering.load(adapter), list(ids)
    for step, found in enumerate(out.outputs[0].logprobs):
        warm, base = models.logits(adapter, seen)
        expected = svdk.steered_logits(warm, base, **steering.values(step))[0].log_softmax(-1)
        inside = {i: x.logprob for i, x in found.items() if expected[i] > -1e3}
        assert inside and torch.allclose(
            torch.tensor(list(inside.values())), expected[list(inside)], atol=2e-4, rtol=0
        )
        assert all(x.logprob < -1e3 for i, x in found.items() if i not in inside)
        seen.append(out.outputs[0].token_ids[step])


def test_seeds_and_several_answers(engine):
    params = SamplingParams(temperature=1.5, max_tokens=12, n=2, seed=11)
    row = {"prompt_token_ids": MIXED[0]}

    def both(rows):
        outs = engine.generate(rows, params, lora_request=engine.adapters["b"], use_tqdm=False)
        return [list(x.token_ids) for x in outs[0].outputs]

    alone = both([row])
    assert alone[0] != alone[1]
    # All of it in one chunk: this vLLM cannot take back the noise of a chunk that it drops on the CPU.
    assert both([row, {"prompt_token_ids": MIXED[5]}]) == alone


def test_drawn_tokens_stay_in_the_mask(engine, llama, models):
    params, ids = SamplingParams(temperature=2.0, max_tokens=1, n=16, seed=3), MIXED[0]
    row = {"prompt_token_ids": ids}
    (out,) = engine.generate(row, params, lora_request=engine.adapters["b"], use_tqdm=False)
    warm, _ = models.logits(llama[1]["b"], ids)
    inside = (warm[0] >= warm.max() + torch.log(torch.tensor(0.02))).nonzero().flatten().tolist()
    drawn = {x.token_ids[0] for x in out.outputs}
    assert drawn <= set(inside) and len(drawn) > 1


def test_rows_with_nan_fall_back_to_the_warm_row_and_are_counted(engine, llama, models, monkeypatch):
    table = pairing(engine).table
    steer = table.steer

    def broken(warm, base, rows):
        base[0, 3] = float("nan")
        return steer(warm, base, rows)

    before = engine.counters()
    monkeypatch.setattr(table, "steer", broken)
    assert ask(engine, [MIXED[0]], "a") == [models.warm_greedy(llama[1]["a"], MIXED[0])]
    after = engine.counters()
    assert after["fallen_rows"] - before["fallen_rows"] == TOKENS
    assert after["steered_rows"] - before["steered_rows"] == TOKENS


# From here on every test starts an engine of its own, which ends the shared one.


@pytest.mark.parametrize("family", sorted(folders.CONFIGS))
def test_every_family_in_chunks_and_one_batch(family, start, tmp_path):
    model = folders.save_model(tmp_path / "model", family)
    adapter = folders.save_adapter(tmp_path / "a", model)
    engine, models = start(model, {"a": adapter}), Models(model)
    steered = ask(engine, MIXED, "a")
    assert steered == [models.answer(adapter, p) for p in MIXED]
    assert steered != [models.warm_greedy(adapter, p) for p in MIXED]
    assert ask(engine, MIXED, None) == [models.answer(None, p) for p in MIXED]


def test_preemption(start, llama, models):
    adapter = llama[1]["a"]
    engine = start(llama[0], {"a": adapter}, kv_cache_memory_bytes=1 << 20, enable_prefix_caching=False)
    asked = prompts(*[40 + 5 * i for i in range(10)], seed=6)
    assert ask(engine, asked, "a", SamplingParams(temperature=0, max_tokens=60)) == [
        models.answer(adapter, p, 60) for p in asked
    ]
    found = {metric.name: metric for metric in engine.get_metrics()}
    assert found["vllm:num_preemptions"].value > 0


def bad_adapters(root, model):
    """Name -> folder and a word of the reason."""
    from peft import IA3Config, LoraConfig

    common = {"r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    plain = folders.save_adapter(root / "uncalibrated", model)
    (plain / "steering.json").unlink()
    head = LoraConfig(target_modules=["q_proj", "lm_head"], **common)
    dora = LoraConfig(target_modules=["q_proj"], use_dora=True, **common)
    wide = LoraConfig(target_modules=["q_proj"], r=24, init_lora_weights=False, task_type="CAUSAL_LM")
    ia3 = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    other = folders.save_model(root / "other", seed=5)
    changed = folders.save_adapter(root / "changed", model)
    folders.save_adapter(root / "changed2", model, seed=8)
    (root / "changed2" / "adapter_model.safetensors").rename(changed / "adapter_model.safetensors")
    damaged = folders.save_adapter(root / "damaged", model)
    (damaged / "steering.json").write_text('{"format": "svdk-steering"}')
    bias = folders.save_adapter(root / "bias", model)
    folders.resteer(bias, lever="bias", options=(" a", " b"), bias=(0.5, 0.0))
    return {
        plain: "svdk calibrate",
        folders.save_adapter(root / "head", model, config=head): "lm_head",
        folders.save_adapter(root / "dora", model, config=dora): "use_dora",
        folders.save_adapter(root / "wide", model, config=wide): "rank",
        folders.save_adapter(root / "ia3", model, config=ia3): "PEFT type was IA3",
        folders.save_adapter(root / "elsewhere", other): "base model does not match",
        changed: "adapter does not match",
        damaged: "format_version",
        bias: "lever was 'bias'",
    }


def test_bad_adapters_are_refused_and_the_engine_goes_on(start, llama, models, tmp_path):
    engine = start(llama[0], {"a": llama[1]["a"]}, max_loras=2)
    for folder, reason in bad_adapters(tmp_path, llama[0]).items():
        with pytest.raises(ArtifactError, match=f"svdk refused the adapter {folder}: .*{reason}"):
            engine.add_adapter(folder.name, folder)
    assert ask(engine, MIXED[:2], "a") == [models.answer(llama[1]["a"], p) for p in MIXED[:2]]
    engine.add_adapter("b", llama[1]["b"])
    assert ask(engine, MIXED[:2], "b") == [models.answer(llama[1]["b"], p) for p in MIXED[:2]]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"enable_lora": False}, "enable_lora was False"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative_config was"),
        ({"fully_sharded_loras": True}, "fully_sharded_loras was True"),
        ({"enable_prompt_embeds": True}, "enable_prompt_embeds was True"),
        ({"hf_overrides": {"is_causal": False}}, r"layer model.layers.0.self_attn.attn of Svdk\w+ is a Enc"),
    ],
)
def test_what_has_no_twin_is_refused_at_the_start(options, reason, start, llama):
    with pytest.raises(Exception, match=reason):
        start(llama[0], **options)
