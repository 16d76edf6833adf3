"""Options that transformers keeps from a callable: they work, or are refused by their own name."""

from __future__ import annotations

import functools
import queue
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    DynamicCache,
    LlamaForSequenceClassification,
    LlamaModel,
    MambaConfig,
    T5Config,
    TextIteratorStreamer,
)
from transformers.generation import GenerationConfig, LogitsProcessor, StopStringCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.models.auto import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import svdk
from svdk.errors import InputError
from svdk.generation import caller
from svdk.generation.generate import decode
from svdk.models.pair import ModelPair
from tests.helpers import tiny
from tests.models.test_pair import left_padded

STEPS = 8
STEERED = {"strength": 2.0, "max_new_tokens": STEPS, "eos_token_id": None}


def through_model(model, ids, **options):
    return model.generate(input_ids=ids, custom_generate=svdk.generate, **STEERED | options)


def direct(model, ids, **options):
    return svdk.generate(model, ids, **STEERED | options)


BOTH = pytest.mark.parametrize("call", [through_model, direct])


class Recorder(BaseStreamer):
    def __init__(self):
        self.put_, self.ends = [], 0

    def put(self, value):
        self.put_.append(value.tolist())

    def end(self):
        self.ends += 1


@BOTH
@pytest.mark.parametrize("name", ["streamer", "text_streamer"])
@pytest.mark.parametrize("kind", ["lora", "prefix_tuning"])
def test_a_streamer_gets_prompt_and_tokens_once(kind, name, call):
    model, ids, streamer = tiny.tiny_peft(kind), left_padded((5, 5))[0], Recorder()
    out = call(model, ids, **{name: streamer})
    assert streamer.put_ == [ids.tolist(), *out[:, 5:].T.tolist()]
    assert streamer.ends == 1


@BOTH
def test_an_iterator_streamer_ends(lora, tiny_tokenizer, call):
    streamer = TextIteratorStreamer(tiny_tokenizer, skip_prompt=True, timeout=10)
    ids = left_padded((5,))[0]
    out = call(lora, ids, streamer=streamer)
    assert "".join(streamer) == tiny_tokenizer.decode(out[0, 5:])


@BOTH
@pytest.mark.parametrize("wrong", [{"alpha": 2.0}, {"strength": torch.inf}, {"forward": "both"}])
def test_a_streamer_ends_after_an_error(lora, tiny_tokenizer, call, wrong):
    streamer = TextIteratorStreamer(tiny_tokenizer, timeout=10)
    with pytest.raises(InputError):
        call(lora, left_padded((5,))[0], streamer=streamer, **wrong)
    list(streamer)


@BOTH
def test_a_streamer_ends_after_any_exception(lora, tiny_tokenizer, call):
    class Stop(LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise KeyboardInterrupt

    streamer = TextIteratorStreamer(tiny_tokenizer, timeout=10)
    with pytest.raises(KeyboardInterrupt):
        call(lora, left_padded((5,))[0], streamer=streamer, logits_processor=[Stop()])
    list(streamer)


def test_a_streamer_ends_when_transformers_raises(lora, tiny_tokenizer):
    streamer = TextIteratorStreamer(tiny_tokenizer, timeout=10)
    with pytest.raises(ValueError, match="typo"):
        direct(lora, left_padded((5,))[0], streamer=streamer, typo=1)
    list(streamer)


def test_a_streamer_of_decode_ends_too(lora, tiny_tokenizer):
    for wrong in ({"max_new_tokens": 0}, {"alpha": 2.0}, {"forward": "both"}, {"typo": 1}):
        streamer = TextIteratorStreamer(tiny_tokenizer, timeout=10)
        with pytest.raises((InputError, TypeError)):
            decode(
                ModelPair(lora), torch.tensor([[7]]), text_streamer=streamer, **{"max_new_tokens": 1} | wrong
            )
        list(streamer)


@BOTH
def test_two_streamers_are_refused_and_both_end(lora, call):
    one, other = Recorder(), Recorder()
    with pytest.raises(InputError, match="streamer was given beside text_streamer"):
        call(lora, left_padded((5,))[0], streamer=one, text_streamer=other)
    assert one.ends == other.ends == 1


def test_a_streamer_of_another_call_is_left_alone(lora):
    """Steered decoding inside another ``generate``: of another model, or of the same one."""
    ids = left_padded((5,))[0]
    want = through_model(lora, ids)
    for outer in (tiny.tiny_model(seed=3), lora):
        for call in (through_model, direct):

            class Inside(LogitsProcessor):
                inside = call

                def __call__(self, input_ids, scores):
                    inner, call = Recorder(), type(self).inside
                    assert torch.equal(call(lora, ids), want)
                    assert torch.equal(call(lora, ids, streamer=inner), want)
                    assert len(inner.put_) == 1 + STEPS
                    return scores

            streamer = Recorder()
            out = outer.generate(ids, streamer=streamer, logits_processor=[Inside()], max_new_tokens=2)
            assert len(streamer.put_) == out.shape[1] - 5 + 1
            assert streamer.ends == 1


def test_a_wrapped_callable_still_finds_the_streamer(lora):
    def wrapped(model, input_ids, generation_config=None, **rest):
        return functools.partial(svdk.generate, strength=2.0)(
            model, input_ids.clone(), generation_config=generation_config, **rest
        )

    ids, streamer = left_padded((5,))[0], Recorder()
    options = {"max_new_tokens": STEPS, "eos_token_id": None, "streamer": streamer}
    out = lora.generate(input_ids=ids, custom_generate=wrapped, **options)
    assert torch.equal(out, through_model(lora, ids))
    assert streamer.ends == 1


def text(model, vocabulary, ids, call=direct, **options):
    """New tokens, letters only: (steps,)"""
    return call(model, ids, suppress_tokens=tiny.ids_but_letters(vocabulary), **options)[0, ids.shape[1] :]


@pytest.mark.parametrize("where", ["argument", "list", "config", "model", "model_and_config"])
def test_stop_strings_in_a_direct_call(tiny_tokenizer, where):
    model, ids = tiny.tiny_peft("lora"), left_padded((5,))[0]
    free = text(model, tiny_tokenizer, ids)
    stop = tiny_tokenizer.decode(free[2:4])
    options = {}
    if where == "argument":
        options = {"stop_strings": stop}
    if where == "list":
        options = {"stop_strings": ["#", stop]}
    if where.endswith("config"):
        options = {"generation_config": GenerationConfig(stop_strings=[stop], max_new_tokens=STEPS)}
    if where.startswith("model"):
        model.get_base_model().generation_config.stop_strings = "#" if where.endswith("config") else stop
    configs = [options.get("generation_config"), model.get_base_model().generation_config]
    before = [config and config.stop_strings for config in configs]
    assert torch.equal(text(model, tiny_tokenizer, ids, tokenizer=tiny_tokenizer, **options), free[:4])
    assert [config and config.stop_strings for config in configs] == before  # nobody's object is changed
    with pytest.raises(InputError, match="tokenizer was None; allowed with stop_strings"):
        direct(model, ids, **options)
    assert torch.equal(text(model, tiny_tokenizer, ids, **options | {"stop_strings": None}), free)


def test_a_stop_string_criterion_works_everywhere(lora, tiny_tokenizer):
    ids = left_padded((5,))[0]
    free = text(lora, tiny_tokenizer, ids)
    stop = StopStringCriteria(tiny_tokenizer, tiny_tokenizer.decode(free[2:4]))
    for call in (through_model, direct):
        assert torch.equal(text(lora, tiny_tokenizer, ids, call, stopping_criteria=[stop]), free[:4])


@pytest.mark.parametrize("strings", [[], "", ["a", ""], 3, [3]])
def test_wrong_stop_strings(lora, tiny_tokenizer, strings):
    with pytest.raises(InputError, match="stop_strings was"):
        direct(lora, left_padded((5,))[0], stop_strings=strings, tokenizer=tiny_tokenizer)


def test_a_wrong_tokenizer(lora):
    with pytest.raises(InputError, match="tokenizer was str; allowed with stop_strings"):
        direct(lora, left_padded((5,))[0], stop_strings="a", tokenizer="gpt2")


def test_a_tokenizer_alone_changes_nothing(lora, tiny_tokenizer):
    ids = left_padded((5,))[0]
    assert torch.equal(direct(lora, ids, tokenizer=tiny_tokenizer), direct(lora, ids))


@BOTH
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"assistant_model": tiny.tiny_model(seed=3)}, "assistant_model was given; allowed while steering"),
        ({"synced_gpus": True}, "synced_gpus was given"),
        ({"negative_prompt_ids": torch.tensor([[7, 8]])}, "negative_prompt_ids was given"),
        ({"prompt_lookup_num_tokens": 3}, "generation mode was assisted_generation"),
        ({"assistant_early_exit": 1}, "generation mode was assisted_generation"),
        ({"num_beams": 2, "streamer": Recorder()}, "generation mode was beam_search"),
        ({"inputs_embeds": torch.zeros(1, 5, tiny.HIDDEN)}, "generate was given inputs_embeds"),
        ({"past_key_values": DynamicCache()}, "past_key_values was given"),
        ({"output_hidden_states": True}, "output_hidden_states was True"),
        ({"output_attentions": True}, "output_attentions was True"),
        ({"position_ids": torch.arange(5)[None] + 1}, "position_ids counted differently"),
        ({"cache_implementation": "quantised"}, "cache_implementation"),
    ],
)
def test_what_is_not_steered_is_refused_by_name(lora, call, options, message):
    with pytest.raises((InputError, ValueError), match=message):
        call(lora, left_padded((5,))[0], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"custom_generate": svdk.generate}, "custom_generate was given"),
        ({"inputs": torch.tensor([[7]])}, "inputs was given beside input_ids"),
        ({"token_healing": True}, "token_healing was True"),
        ({"generation_config": GenerationConfig(token_healing=True)}, "token_healing was True"),
        ({"cache_implementation": "paged"}, "cache_implementation was 'paged'"),
        ({"assistant_tokenizer": "x"}, "assistant_tokenizer was given"),
    ],
)
def test_what_a_direct_call_cannot_have(lora, options, message):
    with pytest.raises(InputError, match=message):
        direct(lora, left_padded((5,))[0], **options)


@BOTH
def test_absent_options_are_no_options(lora, call):
    ids = left_padded((5,))[0]
    none = (
        "assistant_model",
        "streamer",
        "tokenizer",
        "stop_strings",
        "negative_prompt_ids",
        "inputs_embeds",
    )
    assert torch.equal(call(lora, ids, synced_gpus=False, **dict.fromkeys(none)), call(lora, ids))


@BOTH
def test_allowed_tokens_work(lora, call):
    ids = left_padded((5, 5))[0]
    out = call(lora, ids, prefix_allowed_tokens_fn=lambda row, prefix: [10 + row, 20 + row])[:, 5:]
    assert all(set(row.tolist()) <= {10 + i, 20 + i} for i, row in enumerate(out))


def test_inputs_is_a_name_of_input_ids(lora):
    ids = left_padded((5,))[0]
    want = direct(lora, ids)
    assert torch.equal(svdk.generate(lora, inputs=ids, **STEERED), want)
    assert torch.equal(lora.generate(ids, custom_generate=svdk.generate, **STEERED), want)


def test_no_prompt_is_the_first_token(lora):
    want = direct(lora, torch.tensor([[1]]))
    assert torch.equal(svdk.generate(lora, **STEERED), want)


def t5():
    config = T5Config(
        vocab_size=tiny.VOCAB_SIZE,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    lora = LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, target_modules=["q", "v"])
    return get_peft_model(AutoModelForSeq2SeqLM.from_config(config), lora).eval()


def classifier():
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])
    return get_peft_model(LlamaForSequenceClassification(tiny.tiny_config()), lora)


def features():
    lora = LoraConfig(task_type="FEATURE_EXTRACTION", target_modules=["q_proj"])
    return get_peft_model(LlamaModel(tiny.tiny_config()), lora)


def own_module():
    return get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (t5, "T5ForConditionalGeneration"),
        (classifier, "LlamaForSequenceClassification"),
        (features, "LlamaModel"),
        (own_module, "Sequential"),
        (lambda: nn.Linear(2, 2), "Linear"),
        (tiny.tiny_model, "LlamaForCausalLM"),
        (lambda: "gpt2", "str"),
    ],
)
def test_a_model_that_cannot_be_steered_is_what_is_named(make, name):
    model, ids = make(), left_padded((5,))[0]
    calls = [direct, lambda model, ids: svdk.SteeringLogitsProcessor(model)]
    if callable(getattr(model, "generate", None)) and name[:5] not in ("Linea", "Seque"):
        calls.append(through_model)
    for call in calls:
        try:
            call(model, ids)
        except AttributeError:
            assert call is through_model  # PEFT's own: there is no generate behind it
        except InputError as error:
            assert str(error).startswith(f"model was {name}")
        else:
            raise AssertionError(call)


@BOTH
def test_a_state_space_model_is_steered(call):
    """Its cache, which transformers makes, is nothing that somebody gave."""
    config = MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=8, pad_token_id=0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["x_proj", "in_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_config(config), lora).eval()
    out = call(model, torch.tensor([[7, 8]]))
    assert torch.equal(out[0, :2], torch.tensor([7, 8]))
    assert torch.equal(out, call(model, torch.tensor([[7, 8]]), use_cache=False))


@BOTH
def test_adapters_of_several_types_at_once(call):
    model, ids = tiny.tiny_mixed(), left_padded((5,))[0]
    want = []
    for _ in range(STEPS):
        whole = torch.cat([ids, torch.tensor([want], dtype=torch.long)], dim=1)
        with torch.no_grad():
            warm, base = (m(input_ids=whole).logits[:, -1] for m in (model, tiny.tiny_model()))
        want += svdk.steered_sample(warm, base, strength=2.0, temperature=0.0).tolist()
    assert call(model, ids)[0, 5:].tolist() == want


def test_looking_at_a_frame_keeps_nothing_alive():
    """Until Python 3.12 a frame keeps what ``f_locals`` showed: the first step's logits, say."""

    def loop(self, generation_config, model_kwargs):
        logits = torch.zeros(1)
        seen = []
        caller._find(lambda values: seen.append("logits" in values))
        reference = weakref.ref(logits)
        del logits
        return seen, reference() is None

    names = loop.__globals__ | {"__name__": "transformers.generation.utils"}
    assert type(loop)(loop.__code__, names)(None, None, {}) == ([True], True)


def test_queue_is_what_an_endless_stream_raises(tiny_tokenizer):
    """What the tests above would see if a streamer were left open."""
    with pytest.raises(queue.Empty):
        list(TextIteratorStreamer(tiny_tokenizer, timeout=0.01))
