"""The settings that are measured: what svdk is asked for, and which baselines do the same work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import svdk
from svdk.bench import baselines
from svdk.bench.logits import Operands
from svdk.ops import backends

Draw = Callable[..., torch.Tensor]
FILTERS = ("plain_greedy", "plain", "plain_top_k", "plain_top_p", "plain_top_k_top_p", "plain_min_p")
"""The settings of the ``filters`` grid: one row of logits, whatever is done with it."""
GRID = tuple(k / 4 for k in range(16))
"""The strengths of the ``logprob_grid`` setting."""


@dataclass(frozen=True)
class Setting:
    """One row of the case table. ``options`` go to svdk and to the baselines alike."""

    name: str
    op: str  # "steered_sample" | "steered_logprob" | "extract"
    what: str
    options: dict[str, Any] = field(default_factory=dict)
    steered: bool = True  # False: the base row is not read
    baselines: tuple[str, ...] = ("eager", "compile")
    capture: bool = True  # whether a CUDA graph can hold it (no host sync)


SETTINGS: dict[str, Setting] = {
    s.name: s
    for s in (
        Setting("sample", "steered_sample", "steered, mask 0.1, temperature 1",
                baselines=("eager", "compile", "race")),
        Setting("greedy", "steered_sample", "steered, mask 0.1, greedy", {"temperature": 0.0}),
        Setting("top_k_top_p", "steered_sample", "steered, mask 0.1, top-k 50, top-p 0.9",
                {"top_k": 50, "top_p": 0.9}, baselines=("warpers",)),
        Setting("label", "steered_sample", "steered, strength from a label", {"strength_mode": "label"}),
        Setting("kl_budget", "steered_sample", "steered, strength from a KL budget",
                {"strength_mode": "kl_budget", "strength": 0.05}),
        Setting("no_mask", "steered_sample", "steered, no mask", {"alpha": 0.0},
                baselines=("eager", "compile", "race")),
        Setting("log_ratio", "steered_sample", "steered by the log-ratio, no mask",
                {"alpha": 0.0, "direction": "log_ratio"}, baselines=("eager", "compile", "race")),
        Setting("plain", "steered_sample", "not steered, temperature 1", steered=False,
                baselines=("softmax+multinomial", "one uniform", "compile", "race", "flashinfer")),
        Setting("plain_top_k_top_p", "steered_sample", "not steered, top-k 50, top-p 0.9",
                {"top_k": 50, "top_p": 0.9}, steered=False,
                baselines=("filtered", "compile", "warpers", "flashinfer")),
        Setting("plain_greedy", "steered_sample", "not steered, greedy", {"temperature": 0.0},
                steered=False, baselines=("argmax", "compile")),
        Setting("plain_top_k", "steered_sample", "not steered, top-k 50", {"top_k": 50}, steered=False,
                baselines=("filtered", "compile", "warpers", "flashinfer")),
        Setting("plain_top_p", "steered_sample", "not steered, top-p 0.9", {"top_p": 0.9}, steered=False,
                baselines=("filtered", "compile", "warpers", "flashinfer")),
        Setting("plain_min_p", "steered_sample", "not steered, min-p 0.05", {"min_p": 0.05}, steered=False,
                baselines=("filtered", "compile", "warpers")),
        Setting("logprob", "steered_logprob", "log-probability of a label at one strength"),
        Setting("logprob_grid", "steered_logprob", f"the same at {len(GRID)} strengths",
                {"strengths": GRID}),
        Setting("extract", "extract", "steering vectors on the mask", capture=False),
    )
}  # fmt: skip


def bytes_moved(setting: Setting, batch: int, vocab: int, dtype: torch.dtype) -> int:
    """Bytes that any implementation must move: each logit once in, one int64 a row out."""
    return batch * vocab * dtype.itemsize * (1 + setting.steered) + 8 * batch


def svdk_call(setting: Setting, backend: str, device: torch.device) -> Callable[[Operands], Any]:
    """The svdk side; a new offset at every call, as decoding does."""
    options = dict(setting.options)
    step = iter(range(1 << 62))
    if setting.op == "steered_sample":
        label = options.get("strength_mode") == "label"

        def sample(x: Operands) -> Any:
            return svdk.steered_sample(
                x.warm,
                x.base if setting.steered else None,
                labels=x.labels if label else None,
                seed=x.seeds,
                offset=next(step),
                backend=backend,
                **options,
            )

        return sample
    if setting.op == "steered_logprob":
        strengths = torch.tensor(options.pop("strengths", (1.0,)), device=device)
        return lambda x: svdk.steered_logprob(
            x.warm, x.base, x.labels, strengths=strengths, backend=backend, **options
        )
    return lambda x: svdk.extract(x.warm, x.base, backend=backend, **options)


def baseline_call(setting: Setting, name: str, device: torch.device) -> Callable[[Operands], Any]:
    """A baseline by name; ``compile`` here is the function that torch.compile is given."""
    options = dict(setting.options)
    if setting.op == "steered_logprob":
        strengths = torch.tensor(options.pop("strengths", (1.0,)), device=device)
        return lambda x: baselines.logprob(x.warm, x.base, x.labels, strengths=strengths, **options)
    if setting.op == "extract":
        return lambda x: baselines.extract(x.warm, x.base, **options)
    if name == "flashinfer":
        return lambda x: baselines.flashinfer(
            x.warm, seed=x.seeds, offset=torch.zeros_like(x.seeds), **options
        )
    if not setting.steered:
        plain: dict[str, Draw] = {
            "race": baselines.exponential_race,
            "warpers": baselines.warpers,
            "filtered": baselines.filtered,
            "softmax+multinomial": baselines.multinomial,
        }
        function = plain.get(name, baselines.one_uniform)
        return lambda x: function(x.warm, **options)
    steered: dict[str, Draw] = {"race": baselines.eager_race, "warpers": baselines.warpers}
    function = steered.get(name, baselines.eager)
    if options.get("strength_mode") == "label":
        return lambda x: function(x.warm, x.base, labels=x.labels, **options)
    return lambda x: function(x.warm, x.base, **options)


def compiled(
    setting: Setting, mode: str, device: torch.device, race: bool = False
) -> Callable[[Operands], Any]:
    """``torch.compile`` of the eager baseline, specialised to the shapes of its first call.

    ``race``: of its exponential-race form, which draws without a sum over the row.
    """
    options = dict(setting.options)
    if setting.op == "steered_logprob":
        strengths = torch.tensor(options.pop("strengths", (1.0,)), device=device)
        function: Callable[..., Any] = torch.compile(baselines.logprob, mode=mode, dynamic=False)
        return lambda x: function(x.warm, x.base, x.labels, strengths=strengths, **options)
    if setting.op == "extract":
        function = torch.compile(baselines.extract, mode=mode, dynamic=False)
        return lambda x: function(x.warm, x.base, **options)
    alone: Draw = baselines.filtered if "filtered" in setting.baselines else baselines.one_uniform
    eager: Draw = baselines.eager if setting.steered else alone
    if race:
        eager = baselines.eager_race if setting.steered else baselines.exponential_race
    function = torch.compile(eager, mode=mode, dynamic=False)
    if not setting.steered:
        return lambda x: function(x.warm, **options)
    if options.get("strength_mode") == "label":
        return lambda x: function(x.warm, x.base, labels=x.labels, **options)
    return lambda x: function(x.warm, x.base, **options)


def available_backends(device: torch.device, names: tuple[str, ...] | None = None) -> list[str]:
    """Backends to measure on ``device``: those asked for, else every one that runs there but the reference.

    Raises:
        BackendError, InputError: a backend that was asked for cannot run or does not exist.
    """
    if names:
        like = torch.empty(0, device=device)
        for name in names:
            backends.resolve(name, like)
        return list(names)
    status = backends.status()
    names = tuple(
        b.name for b in backends.TABLE.values() if status[b.name] == "available" and b.serves(device.type)
    )
    # On a CPU, Triton is its interpreter: a test tool. The reference is float64 and slow on purpose.
    slow = ("reference", "triton") if device.type == "cpu" else ("reference",)
    return [name for name in names if name not in slow] or ["reference"]
