"""Steered decoding of one tiny model against a slow loop, for every family and kind of adapter.

The slow loop is what "right" means: each row alone, whole, without cache or padding, through two separate
models, and the reference formulas on float64 logits.
"""

from __future__ import annotations

import functools
import inspect
import traceback
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import svdk
from svdk.errors import InputError
from svdk.warmstart.peft_configs import make_config
from tests.helpers.family_configs import FAMILIES, LAYERS, VOCAB, CannotBuild, tiny_family

__all__ = ["FAMILIES", "FORWARDS", "KINDS", "CannotBuild", "NotAttachable", "Verdict", "verdict"]

KINDS = ("lora", "ia3", "prompt", "prefix")
FORWARDS = ("paired", "two_pass")
PROCESSOR = "processor"
"""Beside these: a plain ``generate`` with a SteeringLogitsProcessor."""
LENGTHS = (9, 4, 2)
"""Prompt tokens a row: the short rows have more padding than a sliding window has slots."""
STEPS = 5
"""New tokens a row; with the prompt, more than a window too."""
STRENGTH, ALPHA = 2.0, 0.1
VIRTUAL = 3
MAMBA = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
EXCLUDED = {
    **{name: ["out_proj", "conv1d"] for name in MAMBA},
    "llama4": ["router"],
    "llama4_text": ["router"],
    "phimoe": ["router"],
    "deepseek_v4": ["o_a_proj"],
}
"""Linear layers that PEFT refuses, or that are not quite linear: it cannot run the model with them."""
NOT_ITS_TEXT = ("git",)
"""Where the known names for IA3 are those of the vision tower."""
PREFIX_SHAPES = {"falcon": {"num_attention_heads": 1, "token_dim": 8}}
"""The keys' heads and their width in all, where PEFT guesses wrong."""
NEAR_TIE = 1e-3
"""Rows are compared up to the first step whose two best steered logits lie closer than this."""
CHOICE_TIE = 1e-4
"""Two scores are a tie in a model's own choice where they differ by less than this share of the largest."""
ROUNDING = 2e-3
"""Largest difference of logits, as a share of the largest, that is put down to float32."""


class NotAttachable(Exception):  # noqa: N818
    """What PEFT itself says when it cannot attach an adapter, or run the model with it."""


@dataclass(frozen=True)
class Verdict:
    """What came of one family, kind of adapter and forward.

    ``verdict``: "equal", "refused" (an InputError), "wrong", "error" (any other), "not generating" (a plain
    ``generate`` raises, too), "not attachable" (PEFT) or "not buildable"; ``detail``: why; ``alone``: the
    verdict of the rows alone, "" where there is none.
    """

    family: str
    kind: str
    forward: str
    verdict: str
    detail: str = ""
    alone: str = ""


@dataclass(frozen=True)
class SlowRow:
    """What the slow loop found for one prompt, a step at a time."""

    tokens: Tensor
    """(STEPS,)"""
    warm: Tensor
    """(STEPS, V) float64 logits of the model with its adapter."""
    steered: Tensor
    """(STEPS, V) float64, -inf outside the confidence set."""
    sure: int
    """Steps before the first near tie of tokens."""
    clear: int
    """Steps before the first near tie in what the model itself chooses: experts, keys to attend to."""


def prompts() -> tuple[Tensor, Tensor, list[Tensor]]:
    """Left-padded ids and mask (3, 9), and the rows without padding."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(5, VOCAB, (n,), generator=generator) for n in LENGTHS]
    ids = torch.zeros(len(rows), max(LENGTHS), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, -len(row) :] = row
        mask[i, -len(row) :] = 1
    return ids, mask, rows


def adapter_config(model: PreTrainedModel, kind: str) -> PeftConfig:
    """The config of ``kind`` for ``model``; LoRA and IA3 start at random, non-zero values."""
    if kind == "lora":
        return LoraConfig(
            r=4,
            target_modules="all-linear",
            exclude_modules=EXCLUDED.get(model.config.model_type),
            lora_dropout=0.0,
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
    if kind == "ia3":
        if model.config.model_type in NOT_ITS_TEXT:
            return _ia3_everywhere(model)
        try:
            config = make_config("ia3", model)
            config.init_ia3_weights = False
            return config
        except InputError:  # no known names: all linear layers
            return _ia3_everywhere(model)
    make = {"prompt": PromptTuningConfig, "prefix": PrefixTuningConfig}[kind]
    shape = PREFIX_SHAPES.get(model.config.model_type, {}) if kind == "prefix" else {}
    config = make(num_virtual_tokens=VIRTUAL, task_type="CAUSAL_LM", **shape)
    # What PEFT cannot read from this configuration has to be said.
    text = model.config.get_text_config(decoder=True)
    known = text.to_dict()
    if not known.keys() & {"num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"}:
        config.num_attention_heads = getattr(text, "num_attention_heads", 1)
    if not known.keys() & {"hidden_size", "n_embd", "d_model"}:
        config.token_dim = model.get_input_embeddings().weight.shape[1]
    if not hasattr(text, "num_hidden_layers"):
        config.num_layers = LAYERS
    return config


def _ia3_everywhere(model: PreTrainedModel) -> IA3Config:
    head = model.get_output_embeddings()
    linear = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head}
    transposed = any(isinstance(m, Conv1D) for m in linear.values())
    kind = Conv1D if transposed else nn.Linear
    without = tuple(EXCLUDED.get(model.config.model_type, ()))
    return IA3Config(
        target_modules=[
            name for name, m in linear.items() if isinstance(m, kind) and not name.endswith(without)
        ],
        feedforward_modules=[],
        fan_in_fan_out=transposed,
        init_ia3_weights=False,
        task_type="CAUSAL_LM",
    )


def family_adapters(model_type: str, kind: str) -> PeftModel:
    """A fresh tiny model of ``model_type`` with a random adapter.

    Raises:
        CannotBuild, NotAttachable: with the reason.

    """
    model = tiny_family(model_type)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        try:
            return get_peft_model(model, adapter_config(model, kind)).eval()
        except Exception as error:
            raise NotAttachable(f"PEFT: {_first_line(error)}") from error


@functools.lru_cache(maxsize=4)
def slow_case(model_type: str, kind: str) -> list[SlowRow]:
    """The slow loop's answer to the three prompts.

    Raises:
        CannotBuild, NotAttachable: the plain model, or the one with the adapter, cannot run an unpadded row.

    """
    warm, base = family_adapters(model_type, kind), tiny_family(model_type)
    try:
        last_logits(base, prompts()[2][0])
    except Exception as error:
        raise CannotBuild(f"its own forward fails: {_first_line(error)}") from error
    try:
        return slow_rows(warm, base, prompts()[2], STEPS)
    except NotAttachable:
        raise
    except Exception as error:
        raise NotAttachable(f"PEFT: {_first_line(error)}") from error


def last_logits(model: nn.Module, row: Tensor) -> Tensor:
    """(V,) float64 at the last position of ``row`` (T,), which runs whole, alone and without cache."""
    return all_logits(model, row)[-1]


@torch.no_grad()
def all_logits(model: nn.Module, row: Tensor) -> Tensor:
    """(T, V) float64 of ``row`` (T,), which runs whole, alone and without cache."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    cached = "use_cache" in inspect.signature(inner.forward).parameters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(input_ids=row[None], **({"use_cache": False} if cached else {})).logits[0].double()


class Choices(TorchFunctionMode):
    """Watches what models choose with ``topk``: after a near tie, other rounding means other logits."""

    def __init__(self) -> None:
        """No tie so far."""
        super().__init__()
        self.tied = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Run ``func``, and look for a tie between the last that is chosen and the first that is not."""
        kwargs = kwargs or {}
        if func in (torch.topk, Tensor.topk):
            scores, k = args[0], (args[1] if len(args) > 1 else kwargs["k"])
            if k < scores.shape[-1]:
                top = scores.float().topk(k + 1).values
                real = top[..., -1] > -1e30  # not masked
                gap = (top[..., -2] - top[..., -1])[real]
                self.tied |= bool((gap <= CHOICE_TIE * top[top > -1e30].abs().max()).any())
        return func(*args, **kwargs)


def slow_rows(warm: nn.Module, base: nn.Module, rows: list[Tensor], steps: int) -> list[SlowRow]:
    """Greedy steered decoding, the plain way: see the module's first lines.

    Raises:
        NotAttachable: the adapter changes no logit.

    """
    found, effect = [], 0.0
    for row in rows:
        ids, warm_logits, steered, sure, clear = row, [], [], [], []
        for _ in range(steps):
            with Choices() as choices:
                w, b = last_logits(warm, ids), last_logits(base, ids)
            z, certain = _steer(w, b)
            token = svdk.steered_sample(
                w[None], b[None], strength=STRENGTH, temperature=0.0, backend="reference"
            )
            assert int(z.argmax()) == int(token), "the reference disagrees with the formula"
            effect = max(effect, float((w - b).abs().max()))
            warm_logits.append(w)
            steered.append(z)
            sure.append(certain)
            clear.append(not choices.tied)
            ids = torch.cat([ids, token])
        first, tied = (flags.index(False) if False in flags else steps for flags in (sure, clear))
        found.append(SlowRow(ids[len(row) :], torch.stack(warm_logits), torch.stack(steered), first, tied))
    if effect < 1e-4:
        raise NotAttachable("PEFT: the adapter changes no logit")
    return found


def _steer(warm: Tensor, base: Tensor) -> tuple[Tensor, bool]:
    """Steered logits (V,) along the KL gradient, and whether their largest is beyond doubt."""
    log_p, log_q = warm.log_softmax(-1), base.log_softmax(-1)
    p = log_p.exp()
    ratio = log_p - log_q
    moved = warm + STRENGTH * p * (ratio - (p * ratio).sum())
    z, strict, lax = (
        moved.masked_fill(p < share * ALPHA * p.max(), -torch.inf) for share in (1.0, 1 + 1e-3, 1 - 1e-3)
    )
    top = lax.topk(2).values
    same = int(z.argmax()) == int(strict.argmax()) == int(lax.argmax())
    return z, same and float(top[0] - top[1]) >= NEAR_TIE


def verdict(model_type: str, kind: str, forward: str) -> Verdict:
    """Decode the padded batch and each row alone with ``forward``, and compare with the slow loop."""
    try:
        slow = slow_case(model_type, kind)
    except CannotBuild as error:
        return Verdict(model_type, kind, forward, "not buildable", str(error))
    except NotAttachable as error:
        return Verdict(model_type, kind, forward, "not attachable", str(error))
    ids, mask, rows = prompts()
    calls = {"padded batch": (ids, mask, slow)}
    for i, row in enumerate(rows):
        calls[f"row {i} alone"] = (row[None], torch.ones_like(row[None]), [slow[i]])
    found: dict[str, dict[str, list[str]]] = {}
    model = None
    for name, (tokens, real, want) in calls.items():
        model = model or family_adapters(model_type, kind)
        word, detail = _decode(model, tokens, real, want, forward)
        found.setdefault(word, {}).setdefault(detail, []).append(name)
        if word == "error":
            model = None  # who knows what it left behind
    worst, alone = _worst(found, calls), _worst(found, [name for name in calls if "alone" in name])
    if len(found[worst]) == 1 and len(found) == 1:  # the same for all
        return Verdict(model_type, kind, forward, worst, next(iter(found[worst])), alone)
    parts = [f"{', '.join(names)}: {detail}" for detail, names in found[worst].items()]
    others = {w: [n for names in ds.values() for n in names] for w, ds in found.items() if w != worst}
    rest = "; ".join(f"{', '.join(names)}: {word}" for word, names in others.items())
    detail = "; ".join(parts) + (f"; ({rest})" if rest else "")
    return Verdict(model_type, kind, forward, worst, detail, alone)


def _worst(found: dict[str, dict[str, list[str]]], names: Iterable[str]) -> str:
    words = {word for word, ds in found.items() for called in ds.values() if set(called) & set(names)}
    return next(word for word in ("error", "wrong", "not generating", "refused", "equal") if word in words)


def _decode(
    model: PeftModel, ids: Tensor, mask: Tensor, want: list[SlowRow], forward: str
) -> tuple[str, str]:
    """A verdict's word and detail for one call of ``generate``."""
    steering = {"strength": STRENGTH, "alpha": ALPHA}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options: dict[str, Any] = {"custom_generate": svdk.generate, "forward": forward} | steering
            if forward == PROCESSOR:
                options = {"logits_processor": [svdk.SteeringLogitsProcessor(model, **steering)]}
            out: Any = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=STEPS, do_sample=False, eos_token_id=None,
                return_dict_in_generate=True, output_scores=True, output_logits=True, **options,
            )  # fmt: skip
    except InputError as error:
        return "refused", _first_line(error, kind=False)
    except Exception as error:
        if (theirs := _fails_without_svdk(model, ids, mask)) is not None:
            return "not generating", theirs
        return "error", f"{_first_line(error)} @ {_place(error)}"
    new = out.sequences[:, ids.shape[1] :]
    warm, scores = (torch.stack(x, 1).double() for x in (out.logits, out.scores))
    faults = []
    for i, slow in enumerate(want):
        if forward == PROCESSOR:  # its scores are log-probabilities
            both = scores[i].isfinite() & slow.steered.isfinite()
            scores[i] += torch.where(both, slow.steered - scores[i], 0).sum(-1, True) / both.sum(-1, True)
        fault = _fault(new[i], warm[i], scores[i], slow)
        if fault:
            faults.append(fault if len(want) == 1 else f"row {i} {fault}")
    return ("wrong", ", ".join(faults)) if faults else ("equal", "")


def _fails_without_svdk(model: PeftModel, ids: Tensor, mask: Tensor) -> str | None:
    """What a plain ``generate`` of PEFT and transformers raises; None: it does not."""
    try:
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2, do_sample=False)
    except Exception as error:
        return _first_line(error)
    return None


def _fault(tokens: Tensor, warm: Tensor, scores: Tensor, slow: SlowRow) -> str:
    """Where a row first differs, "" when nowhere."""
    for step in range(slow.clear):
        for name, got, want in (
            ("warm", warm[step], slow.warm[step]),
            ("steered", scores[step], slow.steered[step]),
        ):
            both = got.isfinite() & want.isfinite()
            off = float((got - want)[both].abs().max() / want[both].abs().max())
            if not off <= ROUNDING:
                return f"step {step} {name} logits off by {off:.1g}"
        if step >= slow.sure:
            break
        if int(tokens[step]) != int(slow.tokens[step]):
            return f"step {step} token"
    return ""


def _first_line(error: BaseException, kind: bool = True) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    return f"{type(error).__name__}: {text}" if kind else text


def _place(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    path = Path(frame.filename)
    return f"{path.parent.name}/{path.name}:{frame.lineno}"
