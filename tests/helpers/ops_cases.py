"""Inputs and comparisons shared by every backend's tests: one body, parametrised over what runs here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import svdk
from svdk.ops import backends, reference, schema

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VOCABS = (1, 31, 32, 999, 32000, 49152, 128256, 151936)
INF, NAN = math.inf, math.nan


def kernels() -> list[str]:
    """Backends under test: all that run here, but for the reference that they are compared with."""
    return [name for name, why in backends.status().items() if why == "available" and name != "reference"]


def device_of(backend: str) -> str:
    """Where a backend's tensors live on this machine."""
    return "cuda" if "cpu" not in backends.TABLE[backend].devices and torch.cuda.is_available() else "cpu"


def interpreted(backend: str) -> bool:
    """Whether a backend runs under an interpreter here, thousands of times slower than it should."""
    return backend == "triton" and device_of(backend) == "cpu"


def vocabs(backend: str) -> tuple[int, ...]:
    """Vocabularies to test; an interpreter is too slow for the large ones."""
    return tuple(v for v in VOCABS if v < 5000) if interpreted(backend) else VOCABS


@dataclass
class Case:
    """Keyword arguments of one use of ``steered_sample``; ``uses`` names the second operand."""

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    uses: str = "base"  # "base" | "vector" | "nothing"


CASES = (
    Case("default"),
    Case("log_ratio", {"direction": "log_ratio", "strength": 0.8}),
    Case("log_ratio_everywhere", {"direction": "log_ratio", "alpha": 0.0, "strength": 1.5}),
    Case("kl_everywhere", {"alpha": 0.0, "strength": 3.0}),
    Case("negative", {"strength": -2.0}),
    Case("finite_penalty", {"penalty": -1.5, "strength": 2.0}),
    Case("zero", {"strength": 0.0, "penalty": 0.0}),
    Case("greedy", {"temperature": 0.0, "strength": 4.0}),
    Case("greedy_everywhere", {"temperature": 0.0, "alpha": 0.0, "direction": "log_ratio"}),
    Case("cold_top_p", {"temperature": 0.6, "top_p": 0.8, "min_p": 0.02}),
    Case("top_k_p_everywhere", {"alpha": 0.0, "top_k": 40, "top_p": 0.9, "temperature": 1.3}),
    Case("top_p_penalty", {"penalty": -0.5, "top_p": 0.7, "strength": 2.0}),
    Case("kl_budget", {"strength_mode": "kl_budget", "strength": 0.1}),
    Case("kl_budget_everywhere", {"strength_mode": "kl_budget", "strength": 0.05, "alpha": 0.0}),
    Case("label", {"strength_mode": "label"}),
    Case("only_the_best", {"alpha": 1.0}),
    Case("vector", {"strength": 1.5}, "vector"),
    Case("vector_everywhere", {"strength": 1.5, "alpha": 0.0, "top_k": 30}, "vector"),
    Case("plain", {}, "nothing"),
    Case("plain_greedy", {"temperature": 0.0}, "nothing"),
    Case("plain_top_k", {"top_k": 50}, "nothing"),
    Case("plain_top_p", {"top_p": 0.9, "temperature": 1.4}, "nothing"),
    Case("plain_min_p", {"min_p": 0.05}, "nothing"),
    Case("plain_wide_top_k", {"top_k": 6000, "top_p": 0.99, "temperature": 2.0}, "nothing"),
)


def logits(
    batch: int, vocab: int, dtype=torch.float32, seed: int = 0, scale: float = 3.0
) -> tuple[Tensor, Tensor]:
    """Warm and base logits that differ by half a nat or so."""
    generator = torch.Generator().manual_seed(seed)
    warm = torch.randn(batch, vocab, generator=generator) * scale
    return warm.to(dtype), (warm + torch.randn(batch, vocab, generator=generator) * 0.5).to(dtype)


def operands(case: Case, warm: Tensor, base: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Positional and keyword arguments of a case for these logits."""
    kwargs = dict(case.kwargs)
    if kwargs.get("strength_mode") == "label":
        kwargs["labels"] = warm.float().nan_to_num(-1e4, -1e4, -1e4).argmax(1)
    if case.uses == "vector":
        generator = torch.Generator().manual_seed(9)
        kwargs["vector"] = torch.randn(warm.shape[1], generator=generator).to(warm.device)
    return ((warm, base) if case.uses == "base" else (warm,)), kwargs


def flat(op: schema.Op, warm: Tensor, base: Tensor | None, **given: Any) -> list[Any]:
    """The flat arguments of a raw call, the table's defaults where nothing is given.

    ``given``: operands and parameters by name; a parameter is a number or a (B,) tensor.
    """
    fields = {name: given.pop(name, None) for name in ("vector", "warm_rows", "base_rows")}
    vocab = given.pop("vocab", warm.shape[1])
    direction = given.pop("direction", schema.KL_GRADIENT if base is not None else schema.PLAIN)
    operands = schema.Operands(warm, base, **fields, vocab=vocab, direction=direction)
    values: dict[str, Any] = {
        "logit_bias": None,
        "bitmask": None,
        "labels": None,
        "strength_mode": schema.CONSTANT,
        "strengths": None,
        "info": False,
    }
    values |= {"skip": None, "out": None}
    for parameter in schema.PARAMETERS:
        value = given.pop(parameter.name, parameter.default)
        rows = value if isinstance(value, Tensor) else None
        per_row = schema.PerRow(parameter.default if rows is not None else value, rows)
        values[parameter.name] = value if parameter.kind == "scalar" else per_row
    assert not set(given) - set(values), given
    return op.flatten(operands, values | given)


def flat_arguments(args, kwargs) -> tuple:
    """The flat op arguments that a public call turns into."""
    caught: list[tuple] = []

    class Recorder:
        @staticmethod
        def steered_sample(*flat):
            caught.append(flat)
            return reference.steered_sample(*flat)

    with mock.patch.object(backends, "resolve", lambda *_: Recorder):
        svdk.steered_sample(*args, **kwargs)
    return caught[0]


PLAIN_ROUNDING = 2e-7
"""Of a plain row's mass. Its logits are exact, a float's rounding of what one lacks to the largest is
relative to that, and beyond some nats there is no mass: at any size and temperature a mass is off by few
units of 2^-24 of itself. Measured with seeds near boundaries (300 tokens, logits up to 1e30): 1.5e-8 on the
CPU, 5e-9 on the shim and in Triton's interpreter; a GPU's ``ex2.approx`` is off by 2^-22: 1.2e-7 at most."""
STEERED_ROUNDING = 1e-6
"""Of the size of the steered logits, floats of that size, over the temperature; if greedy, in nats."""


def assert_same_tokens(got: Tensor, args, kwargs, want: Tensor | None = None) -> None:
    """Equal to the reference's tokens, except where the uniform lands within rounding of a boundary.

    A greedy plain row has no exception.
    """
    if want is None:
        want = svdk.steered_sample(*args, **kwargs, backend="reference")
    different = (got.cpu() != want.cpu()).nonzero()[:, 0].tolist()
    if not different:
        return
    flat = flat_arguments(args, kwargs)
    given, rows, _, z, masses = reference.steered_rows(*flat)
    plain = rows.c.direction == schema.PLAIN
    uniform = reference.row_uniforms(given.seed, given.offset)
    for row in different:
        token, other, t = int(got[row]), int(want[row]), float(given.temperature[row])
        rounding = STEERED_ROUNDING * (1 + float(z[row][torch.isfinite(z[row])].abs().max()))
        if t == 0:
            a, b = float(z[row, token]), float(z[row, other])
            assert not plain, f"row {row}: token {token} has {a}, {other} {b}"
            assert b - a <= rounding, f"row {row}: token {token} has {a}, {other} {b}"
            continue
        assert masses[row, token] > 0, f"row {row}: token {token} may not be drawn"
        off = boundary_distance(masses[row], token, float(uniform[row]))
        message = f"row {row}: token {token} for {other}, {off:.2g} of the mass away"
        assert off <= (PLAIN_ROUNDING if plain else rounding / t), message


def assert_the_last_with_mass(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Draws of a backend in which a uniform of exactly 1 was planted; here it is planted in the reference."""
    monkeypatch.setattr(reference, "row_uniforms", lambda seed, _: torch.ones(len(seed), dtype=torch.float64))
    warm, base = logits(3, 400, seed=7)
    warm[0, -150:] = -INF
    warm[1, -1] = -40.0
    for case in CASES:
        args, kwargs = operands(case, warm, base)
        assert_same_tokens(svdk.steered_sample(*args, **kwargs, backend=backend), args, kwargs)


def boundary_distance(masses: Tensor, token: int, uniform: float) -> float:
    """How far, as a share of all of ``masses`` (V,), the uniform is from the token's share of them."""
    before, mass, all_of = float(masses[:token].sum()), float(masses[token]), float(masses.sum())
    target = uniform * all_of
    return max(before - target, target - (before + mass), 0.0) / all_of


def assert_close(got: Tensor, want: Tensor, name: str, rtol: float = 2e-4, atol: float = 2e-5) -> None:
    """allclose with infinities and NaNs in the same places."""
    torch.testing.assert_close(
        got.cpu(),
        want.cpu(),
        rtol=rtol,
        atol=atol,
        equal_nan=True,
        check_dtype=True,
        msg=lambda m: f"{name}: {m}",
    )


def odd_rows() -> Iterator[Any]:
    """(name, warm, base, status) of rows that hold something other than finite numbers; V = 37."""
    warm, base = logits(1, 37, seed=5)
    w, b = warm.clone(), base.clone()
    yield pytest.param(w, b, 0, id="ordinary")
    for name, row, column, value, status in (
        ("warm_minus_inf", "w", 3, -INF, 0),
        ("base_minus_inf", "b", 4, -INF, 2),
        ("both_minus_inf", "wb", 5, -INF, 0),
        ("warm_nan", "w", 6, NAN, 1),
        ("base_nan", "b", 7, NAN, 1),
        ("warm_inf", "w", 8, INF, 1),
        ("base_inf", "b", 9, INF, 1),
        ("warm_huge", "w", 10, 1e30, 0),
        ("base_huge", "b", 11, 1e30, 0),
        ("warm_tiny", "w", 12, -1e30, 0),
        ("base_tiny", "b", 13, -1e30, 0),
    ):
        w, b = warm.clone(), base.clone()
        for target in row:
            (w if target == "w" else b)[0, column] = value
        yield pytest.param(w, b, status, id=name)
    yield pytest.param(torch.full_like(warm, -INF), base, 1, id="warm_all_minus_inf")
    yield pytest.param(torch.full_like(warm, NAN), base, 1, id="warm_all_nan")
    yield pytest.param(warm, torch.full_like(base, -INF), 2, id="base_all_minus_inf")
    one = torch.full_like(warm, -INF)
    one[0, 20] = 0.5
    yield pytest.param(one, base, 0, id="warm_one_hot")
    yield pytest.param(torch.full_like(warm, 2.0), torch.full_like(base, -3.0), 0, id="both_flat")
