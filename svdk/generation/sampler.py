"""What one decoding step needs beside the two rows of logits: steering, filters, seeds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svdk.errors import ArtifactError, InputError
from svdk.ops import api, arguments, backends, reference, seeds
from svdk.ops.configs import SamplingConfig, SteeringConfig
from svdk.ops.results import SampleInfo, Status
from svdk.utils.views import BASE, STEERED, WARM

if TYPE_CHECKING:
    from svdk.models.pair import ModelPair

VIEWS = {STEERED: (WARM, BASE), WARM: (WARM,), BASE: (BASE,)}
UNSTEERED = SteeringConfig(strength=0.0, alpha=0.0)
WITHOUT_BASE = ("none", "scale")
"""Levers that leave the logits of the adapter as they are."""
FIELDS = tuple(entry.name for entry in dataclasses.fields(SteeringConfig))


@dataclass(frozen=True, eq=False)
class SteeringOptions:
    """What a decoding call says about steering; None: as in ``steering``, else the default."""

    steering: SteeringConfig | Mapping[str, SteeringConfig] | None = None
    """A config or a calibrated artifact; with ``row_adapters`` also one an adapter, by name."""
    strength: float | Tensor | None = None
    strength_mode: str | None = None
    direction: str | None = None
    alpha: float | Tensor | None = None
    penalty: float | None = None
    vector: Tensor | None = None
    """(V,) or (B, V)"""
    strength_scale: float = 1.0
    """All strengths times this: 1 as calibrated, 0 the warm start, behind its mask where there is one."""
    seed: int | Tensor | None = None
    view: str = STEERED
    """Or "warm" or "base", to sample plainly from one model with the same filters and uniforms."""
    check: bool = False
    backend: str = "auto"

    def spread(self, pair: ModelPair, row_adapters: Sequence[str] | None) -> SteeringOptions:
        """One artifact an adapter replaced by ``strength`` and ``alpha`` (B,), row by row.

        What is overridden stays. Direction, penalty and strength mode are those of the batch.

        Raises:
            InputError: adapters without an artifact, or artifacts that one batch cannot hold together.
            ArtifactError: an artifact that does not fit the model.

        """
        if not isinstance(self.steering, Mapping):
            return self
        missing = sorted(set(row_adapters or ()) - set(self.steering))
        if row_adapters is None or missing:
            given = "row_adapters" if row_adapters is None else f"an artifact for {', '.join(missing)}"
            raise InputError(f"steering held one artifact an adapter; needed beside it: {given}")
        artifacts = [self.steering[name] for name in row_adapters]
        for artifact in artifacts:
            check_fit(artifact, pair)
        merged: dict[str, Any] = {}
        for name in ("direction", "penalty", "strength_mode"):
            values = {getattr(artifact, name) for artifact in artifacts}
            if getattr(self, name) is None and len(values) > 1:
                found = ", ".join(sorted(map(str, values)))
                raise InputError(
                    f"{name} of the artifacts was {found}; allowed: the same for all rows, or {name}="
                )
            merged[name] = values.pop()
        if merged["direction"] == "vector" and self.direction is None:
            raise InputError("direction of the artifacts was vector; allowed with row_adapters: the others")
        if any(artifact.scale != 1 for artifact in artifacts):
            raise InputError("scale of the artifacts was not 1; allowed with row_adapters: levers that steer")
        overrides = self.given()
        if "strength" not in overrides and any(artifact.classes is not None for artifact in artifacts):
            raise InputError(
                "classes was given by an artifact; allowed with row_adapters: one strength, or one a position"
            )
        for name in ("strength", "alpha"):
            merged[name] = torch.tensor([getattr(artifact, name) for artifact in artifacts]).to(pair.device)
        longest = max(len(artifact.positions) for artifact in artifacts)
        if longest:
            rows = [[artifact.strength_at(step) for step in range(longest)] for artifact in artifacts]
            merged["positions"] = torch.tensor(rows).to(pair.device)
        if "strength" in overrides:
            merged.pop("positions", None)
        return dataclasses.replace(self, steering=SteeringConfig(**merged | overrides))

    def given(self) -> dict[str, Any]:
        """What overrides ``steering``, by name."""
        found = {name: getattr(self, name, None) for name in FIELDS}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True, eq=False)
class Sampler:
    """Draws tokens: everything about a decoding call that does not change from step to step."""

    steering: SteeringConfig
    vector: Tensor | None
    """(V,) or (B, V) for a fixed steering vector; no base model is run then."""
    sampling: SamplingConfig
    """Temperature 0 and seed 0 for greedy decoding; else seeds (B,) int64."""
    views: tuple[str, ...] = ("warm", "base")
    """The forwards that a step needs; the first one's logits are steered."""
    backend: str = "auto"
    check: bool = False

    def draw(
        self, warm: Tensor, base: Tensor | None, step: int, return_info: bool
    ) -> tuple[Tensor, SampleInfo | None]:
        """The tokens (B,) of output position ``step`` from logits (B, V), with diagnostics if asked for."""
        steering = self.steering.values(step, warm)
        rows = arguments.operands(warm, base, self.vector, steering["direction"])
        values = steering | self.sampling.values() | {"offset": step}
        return api.sample(rows, values, check=self.check, return_info=return_info, backend=self.backend)

    def steered(self, warm: Tensor, base: Tensor | None, step: int | None = None) -> Tensor:
        """Steered logits float32 (B, V), before temperature and filters; NaN on invalid rows.

        ``step``: their output position; None: one beyond the listed ones.
        """
        return api.steered_logits(
            warm,
            base,
            vector=self.vector,
            check=self.check,
            backend=self.backend,
            **self.steering.values(step, warm),
        )

    def scores(self, warm: Tensor, base: Tensor | None, info: SampleInfo) -> Tensor:
        """Steered logits float32 (B, V) after temperature and filters, -inf where a token was cut.

        ``info``: what the draw from these rows said. NaN on rows that it marked INVALID.
        """
        invalid = (info.status & int(Status.INVALID)) != 0
        mu = torch.where(invalid, 0.0, info.strength)  # of any strength mode
        used = self.steering.with_one_strength(mu, strength_mode="constant")
        z = dataclasses.replace(self, steering=used, check=False).steered(warm, base)
        z = torch.where(invalid[:, None], 0.0, z)
        row = torch.ones(warm.shape[0], dtype=torch.float64, device=warm.device)
        sampling = self.sampling
        temperature = row * sampling.temperature
        greedy = temperature == 0
        temperature = torch.where(greedy, 1.0, temperature)
        if sampling.filters:
            cuts = (row * sampling.top_k, row * sampling.top_p, row * sampling.min_p)
            keep = reference.filter_row(z.double(), temperature, *cuts) | greedy[:, None]
            z = torch.where(keep, z, -math.inf)
        return torch.where(invalid[:, None], math.nan, z / temperature[:, None]).float()


def make_sampler(pair: ModelPair, rows: int, **options: Any) -> Sampler:
    """:func:`build_sampler` from keywords; see :func:`split_options`."""
    return build_sampler(pair, rows, *split_options(options))


def split_options(options: Mapping[str, Any]) -> tuple[SteeringOptions, dict[str, Any] | None]:
    """The fields of :class:`SteeringOptions`, and the filters of transformers; None for greedy decoding.

    ``do_sample`` (False), ``temperature``, ``top_k``, ``top_p`` and ``min_p``: as there.
    """
    rest = dict(options)
    names = ("temperature", "top_k", "top_p", "min_p")
    filters: dict[str, Any] = {name: rest.pop(name) for name in names if name in rest}
    sampled = rest.pop("do_sample", False)
    return SteeringOptions(**rest), filters if sampled else None


def build_sampler(
    pair: ModelPair,
    rows: int,
    given: SteeringOptions,
    filters: Mapping[str, Any] | None = None,
    copies: int = 1,
) -> Sampler:
    """The sampler of a call; everything is checked here, before any forward.

    ``filters``: temperature, top_k, top_p and min_p by name; None: greedy. ``copies``: how many neighbouring
    rows came from one prompt (``num_return_sequences``); tensors with one entry a prompt are spread over
    them.

    Raises:
        InputError: a value out of range, or of the wrong shape.
        ArtifactError: ``steering`` was made for another PEFT type or vocabulary.

    """
    steering, vector, views = _steering(pair, rows, copies, given)
    if filters is None:
        # Greedy decoding draws nothing: torch's generator is left alone, as transformers does.
        sampling = SamplingConfig(temperature=0.0)
    else:
        like = torch.empty(0, device=pair.device)
        for name, value in filters.items():
            arguments.checked(name, value, rows, like)
        sampling = SamplingConfig(**filters, seed=row_seeds(given.seed, rows, copies).to(pair.device))
    return Sampler(steering, vector, sampling, views, given.backend, given.check)


def _steering(
    pair: ModelPair, rows: int, copies: int, given: SteeringOptions
) -> tuple[SteeringConfig, Tensor | None, tuple[str, ...]]:
    """The artifact, the overrides and the defaults, merged; the vector; the views that a step needs."""
    config = SteeringConfig() if given.steering is None else given.steering
    if isinstance(config, Mapping):
        raise InputError(
            "steering held one artifact an adapter; allowed: row_adapters beside it, or one artifact"
        )
    check_fit(config, pair)
    if getattr(config, "lever", None) == "bias":
        raise InputError(
            "steering was a bias on options, which does not steer free text; allowed: svdk.choose, or a "
            "calibration with another lever"
        )
    changes = given.given()
    anew = "strength" in changes or changes.get("strength_mode") == "kl_budget"
    vector = given.vector
    if vector is not None:
        if given.direction not in (None, "vector"):
            raise InputError(f"direction was {given.direction!r} with a vector; allowed: 'vector'")
        changes["direction"] = "vector"
    # Those by position and by class belong to the strength that was calibrated.
    merged = (config.with_one_strength(config.strength) if anew else config).override(**changes)
    by = arguments.float_value("strength_scale", given.strength_scale, "a finite number")
    if not math.isfinite(by):
        raise InputError(f"strength_scale was {by}; allowed: a finite number")
    merged = merged if by == 1 else merged.scaled(by)
    a_row = {n: _spread(getattr(merged, n), copies, rows) for n in ("strength", "alpha", "positions")}
    merged = merged.override(**a_row)
    if merged.direction == "vector":
        vector = getattr(config, "vector", None) if vector is None else vector
        if vector is None:
            raise InputError("vector was None with direction 'vector'; allowed: a (V,) tensor")
        vector = vector.to(pair.device)
    like = torch.empty(0, device=pair.device)
    low = 0.0 if merged.strength_mode == "kl_budget" else -math.inf
    arguments.parameter("strength", merged.strength, rows, like, low)
    arguments.checked("alpha", merged.alpha, rows, like)
    arguments.penalty_value(merged.penalty)
    backends.resolve(given.backend, like)
    arguments.choice("view", given.view, tuple(VIEWS))
    if isinstance(merged.positions, Tensor) and merged.positions.shape[0] != rows:
        raise InputError(f"positions had shape {tuple(merged.positions.shape)}; allowed: ({rows}, P)")
    if given.view != STEERED:
        return UNSTEERED, None, VIEWS[given.view]
    if getattr(config, "lever", None) in WITHOUT_BASE and not merged.steers:
        return UNSTEERED.override(scale=merged.scale), None, VIEWS[WARM]
    return merged, vector, VIEWS[STEERED if vector is None else WARM]


def row_seeds(seed: int | Tensor | None, rows: int, copies: int = 1) -> Tensor:
    """One int64 seed a row, (rows,).

    None: from torch's global generator. An integer is spread over the rows as in :func:`svdk.steered_sample`.
    A tensor of ``rows / copies``: each its own, spread likewise over the copies of a prompt.
    """
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (rows,), dtype=torch.int64)
    cpu = torch.empty(0)
    if not isinstance(seed, Tensor):
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise InputError(f"seed was {seed!r}; allowed: an integer or a ({rows // copies},) tensor")
        return seeds.spread(int(arguments.word64("seed", seed, rows, cpu).scalar), rows, cpu.device)
    given = arguments.word64("seed", seed.cpu(), rows // copies, cpu).rows
    assert given is not None
    return (given[:, None] + seeds.spread(0, copies, cpu.device)).flatten()


def check_fit(steering: SteeringConfig, pair: ModelPair) -> None:
    """``ArtifactError`` when an artifact was made for another PEFT type or vocabulary than the pair's."""
    for name, mine in (("peft_type", pair.peft_type), ("vocab_size", pair.vocab_size)):
        theirs = getattr(steering, name, None)  # an artifact's; a config by itself says nothing
        if theirs is not None and theirs != mine:
            raise ArtifactError(f"{name} does not match: the artifact was made for {theirs}, this is {mine}")


def _spread(value: Any, copies: int, rows: int) -> Any:
    per_prompt = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] * copies == rows
    return value.repeat_interleave(copies, 0) if per_prompt else value
