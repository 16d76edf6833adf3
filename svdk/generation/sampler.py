"""What one decoding step needs beside the two rows of logits: steering, filters, seeds, processors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from svdk import ops
from svdk.errors import ArtifactError, InputError
from svdk.ops import arguments, backends, reference
from svdk.ops.results import SampleInfo, Status
from svdk.ops.schema import DIRECTIONS, PLAIN, STRENGTH_MODES, VECTOR

if TYPE_CHECKING:
    from svdk.calibration.artifact import Steering
    from svdk.models.pair import ModelPair

GOLDEN = 0x9E3779B97F4A7C15
"""2**64 / golden ratio, odd: its multiples are far apart, so copies of a row get far-apart seeds."""

VIEWS = {"steered": ("warm", "base"), "warm": ("warm",), "base": ("base",)}
UNSTEERED = {"strength": 0.0, "direction": "kl_gradient", "alpha": 0.0, "penalty": -math.inf}

# In the kernel already; transformers appends one of each to the processors when sampling.
_IN_KERNEL = {
    TemperatureLogitsWarper: "temperature",
    TopKLogitsWarper: "top_k",
    TopPLogitsWarper: "top_p",
    MinPLogitsWarper: "min_p",
}
# These cut the distribution that is sampled from, which exists only inside the kernel.
_REFUSED = {
    TopHLogitsWarper: "top_h",
    TypicalLogitsWarper: "typical_p",
    EpsilonLogitsWarper: "epsilon_cutoff",
    EtaLogitsWarper: "eta_cutoff",
    UnbatchedClassifierFreeGuidanceLogitsProcessor: "guidance_scale",
}


@dataclass(frozen=True)
class Sampler:
    """Draws tokens: everything about a decoding call that does not change from step to step."""

    steering: dict[str, Any]
    """strength, strength_mode, direction, alpha, penalty of :func:`svdk.steered_sample`."""
    vector: Tensor | None
    """(V,) or (B, V) for a fixed steering vector; no base model is run then."""
    filters: dict[str, Any]
    """temperature (0: greedy), top_k, top_p, min_p."""
    seeds: Tensor | int
    """(B,) int64, or 0 for greedy decoding."""
    views: tuple[str, ...] = ("warm", "base")
    """The forwards that a step needs; the first one's logits are steered."""
    backend: str = "auto"
    check: bool = False

    def draw(
        self, warm: Tensor, base: Tensor | None, step: int, return_info: bool
    ) -> tuple[Tensor, SampleInfo | None]:
        """Tokens (B,) from logits (B, V), with diagnostics if asked for."""
        drawn = ops.steered_sample(
            warm, base, vector=self.vector, **self.steering, **self.filters, seed=self.seeds, offset=step,
            check=self.check, return_info=return_info, backend=self.backend,
        )  # fmt: skip
        return drawn if return_info else (drawn, None)

    def scores(self, warm: Tensor, base: Tensor | None, info: SampleInfo) -> Tensor:
        """Steered logits float32 (B, V) after temperature and filters, -inf where a token was cut.

        NaN on rows that the op marked INVALID.
        """
        vocab, batch = warm.shape[1], warm.shape[0]
        row = torch.ones(batch, dtype=torch.float64, device=warm.device)
        invalid = (info.status & int(Status.INVALID)) != 0
        direction = VECTOR if self.vector is not None else DIRECTIONS[self.steering["direction"]]
        direction = PLAIN if self.vector is None and base is None else direction
        alpha = row * self.steering["alpha"]
        rows = reference.steering_rows(
            warm, base, self.vector, None, None, vocab, direction, alpha, invalid
        )  # fmt: skip
        strength = torch.where(invalid, 0.0, info.strength.double())
        z = reference.steer(rows, strength, self.steering["penalty"])
        temperature, *cuts = (row * self.filters[name] for name in ("temperature", "top_k", "top_p", "min_p"))
        greedy = temperature == 0
        temperature = torch.where(greedy, 1.0, temperature)
        keep = reference.keep_top(z, temperature, *cuts) | greedy[:, None]
        scores = torch.where(keep, z / temperature[:, None], -math.inf)
        return torch.where(invalid[:, None], math.nan, scores).float()


def make_sampler(
    pair: ModelPair,
    rows: int,
    *,
    steering: Steering | None = None,
    strength: float | Tensor | None = None,
    strength_mode: str | None = None,
    direction: str | None = None,
    alpha: float | Tensor | None = None,
    penalty: float | None = None,
    vector: Tensor | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | Tensor | None = None,
    view: str = "steered",
    copies: int = 1,
    backend: str = "auto",
    check: bool = False,
) -> Sampler:
    """Merge the artifact, the overrides and the defaults, and check all of it before any forward.

    ``view``: "steered", or "warm" or "base" to sample plainly from one model with the same filters
    and noise. ``copies``: how many neighbouring rows came from one prompt (``num_return_sequences``); tensors
    with one entry a prompt are spread over its copies.

    Raises:
        InputError: a value out of range, or of the wrong shape.
        ArtifactError: ``steering`` was made for another PEFT type or vocabulary.

    """
    if steering is not None:
        _check_fit(steering, pair)
    like = torch.empty(0, device=pair.device)
    merged: dict[str, Any] = {}
    given = {
        "strength": (strength, 1.0),
        "strength_mode": (strength_mode, "constant"),
        "direction": (direction, "kl_gradient"),
        "alpha": (alpha, 0.1),
        "penalty": (penalty, -math.inf),
    }
    for name, (override, default) in given.items():
        value = override if override is not None else getattr(steering, name, default)
        merged[name] = _spread(value, copies, rows)
    if vector is None and merged["direction"] == "vector":
        vector = getattr(steering, "vector", None)
        if vector is None:
            raise InputError("vector was None with direction 'vector'; allowed: a (V,) tensor")
    if vector is not None:
        if direction not in (None, "vector"):
            raise InputError(f"direction was {direction!r} with a vector; allowed: 'vector'")
        merged["direction"] = "kl_gradient"  # the op takes the direction from the vector alone
        vector = vector.to(pair.device)
    arguments.choice("direction", merged["direction"], DIRECTIONS)
    arguments.choice(
        "strength_mode", merged["strength_mode"], tuple(m for m in STRENGTH_MODES if m != "label")
    )
    low = 0.0 if merged["strength_mode"] == "kl_budget" else -math.inf
    arguments.parameter("strength", merged["strength"], rows, like, low)
    arguments.parameter("alpha", merged["alpha"], rows, like, 0.0, 1.0)
    arguments.penalty_value(merged["penalty"])
    backends.resolve(backend, like)
    arguments.choice("view", view, tuple(VIEWS))
    views = VIEWS[view] if vector is None else ("warm",)
    if view != "steered":
        merged, vector, views = dict(UNSTEERED), None, VIEWS[view]

    filters = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    if do_sample:
        filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        arguments.parameter("temperature", temperature, rows, like, 0.0)
        arguments.parameter("top_k", top_k, rows, like, 0, integer=True)
        arguments.parameter("top_p", top_p, rows, like, 0.0, 1.0)
        arguments.parameter("min_p", min_p, rows, like, 0.0, 1.0)
    # Greedy decoding draws nothing: torch's generator is left alone, as transformers does.
    seeds = row_seeds(seed, rows, copies).to(pair.device) if do_sample else 0
    return Sampler(merged, vector, filters, seeds, views, backend, check)


def spread_artifacts(
    pair: ModelPair, options: dict[str, Any], row_adapters: Sequence[str] | None
) -> dict[str, Any]:
    """``options`` with one artifact an adapter replaced by ``strength`` and ``alpha`` (B,), row by row.

    What ``options`` overrides stays. Direction, penalty and strength mode are those of the batch.

    Raises:
        InputError: adapters without an artifact, or artifacts that one batch cannot hold together.
        ArtifactError: an artifact that does not fit the model.

    """
    artifacts = options.get("steering")
    if not isinstance(artifacts, Mapping):
        return options
    missing = sorted(set(row_adapters or ()) - set(artifacts))
    if row_adapters is None or missing:
        given = "row_adapters" if row_adapters is None else f"an artifact for {', '.join(missing)}"
        raise InputError(f"steering held one artifact an adapter; needed beside it: {given}")
    rows = [artifacts[name] for name in row_adapters]
    for artifact in rows:
        _check_fit(artifact, pair)
    merged: dict[str, Any] = {}
    for name in ("direction", "penalty", "strength_mode"):
        values = {getattr(artifact, name) for artifact in rows}
        if options.get(name) is None and len(values) > 1:
            found = ", ".join(sorted(map(str, values)))
            raise InputError(
                f"{name} of the artifacts was {found}; allowed: the same for all rows, or {name}="
            )
        merged[name] = values.pop()
    if merged["direction"] == "vector" and options.get("direction") is None:
        raise InputError("direction of the artifacts was vector; allowed with row_adapters: the others")
    for name in ("strength", "alpha"):
        merged[name] = torch.tensor([getattr(artifact, name) for artifact in rows], device=pair.device)
    overrides = {name: value for name, value in options.items() if value is not None}
    return options | merged | overrides | {"steering": None}


def row_seeds(seed: int | Tensor | None, rows: int, copies: int = 1) -> Tensor:
    """One int64 seed a row, (rows,).

    None: from torch's global generator. An integer: row r gets ``seed + r``. A tensor of
    ``rows / copies``: each its own; copy j of a prompt gets ``seed + j * GOLDEN``.
    """
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (rows,), dtype=torch.int64)
    if not isinstance(seed, Tensor):
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise InputError(f"seed was {seed!r}; allowed: an integer or a ({rows // copies},) tensor")
        arguments.word64("seed", seed, rows, torch.empty(0))
        return torch.tensor([_signed(seed + row) for row in range(rows)])
    prompts = rows // copies
    _, given = arguments.word64("seed", seed.cpu(), prompts, torch.empty(0))
    if copies == 1:
        return given
    jump = torch.tensor([_signed(j * GOLDEN) for j in range(copies)])
    return (given[:, None] + jump).flatten()  # int64 wraps around, as wanted


def split_processors(processors: LogitsProcessorList, config: GenerationConfig) -> LogitsProcessorList:
    """The processors that run before steering: all but those that the kernel does itself.

    Raises:
        InputError: a filter that has to see the steered distribution and is not in the kernel, or
            one of the kernel's given as an object.

    """
    kept, seen = LogitsProcessorList(), set()
    for processor in processors:
        kind = type(processor)
        if kind in _REFUSED:
            raise InputError(
                f"{_REFUSED[kind]} was set; allowed while steering: {', '.join(_IN_KERNEL.values())}"
            )
        if kind not in _IN_KERNEL:
            kept.append(processor)
        elif kind in seen or not config.do_sample:
            name = _IN_KERNEL[kind]
            raise InputError(
                f"logits_processor held a {kind.__name__}; allowed: {name}=... with do_sample=True instead"
            )
        else:
            seen.add(kind)
    return kept


def process(
    processors: LogitsProcessorList, input_ids: Tensor, warm: Tensor, base: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Run the processors on the warm row and carry what they did over to the base row; float32.

    So the log-ratio stays what the warm start changed: a repetition penalty is not steered twice, and
    a token that a constraint bans is banned in both rows. They run once a step, since some keep state.
    """
    if not processors:
        return warm, base
    before = warm.float()
    after = processors(input_ids, before.clone())
    if base is None:
        return after, None
    change = torch.where(after.isfinite() & before.isfinite(), after - before, 0.0)
    return after, torch.where(after == -math.inf, -math.inf, base.float() + change)


def _check_fit(steering: Steering, pair: ModelPair) -> None:
    for name, mine in (("peft_type", pair.peft_type), ("vocab_size", pair.vocab_size)):
        theirs = getattr(steering, name)
        if theirs is not None and theirs != mine:
            raise ArtifactError(f"{name} does not match: the artifact was made for {theirs}, this is {mine}")


def _spread(value: Any, copies: int, rows: int) -> Any:
    per_prompt = isinstance(value, Tensor) and value.dim() == 1 and value.shape[0] * copies == rows
    return value.repeat_interleave(copies) if per_prompt else value


def _signed(value: int) -> int:
    return ((value + (1 << 63)) % (1 << 64)) - (1 << 63)
