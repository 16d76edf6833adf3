"""docs/algorithm.md: its naive row against the reference, and the story against the code that it tells of."""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import svdk
from svdk.ops import arguments, schema

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())
DOCUMENT = (ROOT / "docs" / "algorithm.md").read_text()
NAIVE = DOCUMENT.split("```python\n")[-1].split("```")[0]
STEPS = [
    "validate",
    "first sweep",
    "merge",
    "constants",
    "confidence set",
    "direction",
    "moments",
    "strength",
    "steer",
    "filters",
    "draw",
    "describe",
]
DEFAULTS = {"direction": "kl_gradient", "label": 0, "mode": "constant"}
DEFAULTS |= {parameter.name: parameter.default for parameter in schema.PARAMETERS}
INF, NAN = math.inf, math.nan
VOCAB = 300  # two slices of the naive row


def naive_row(code: str = NAIVE) -> Callable:
    """The function that a code block defines."""
    names: dict[str, Any] = {}
    exec(code, names)
    return names["naive_row"]


def solve(row: Callable, problem: Problem) -> list[float]:
    """What the naive row makes of a problem."""
    arrays = (None if x is None else x.numpy() for x in problem[:3])
    with np.errstate(all="ignore"):
        return [float(x) for x in row(*arrays, tuple((DEFAULTS | problem.options).values()))]


def numbered(text: str, pattern: str) -> list[tuple[int, str]]:
    """(number, name) of every step that a pattern finds; "2 and 3: first sweep, merge" is two steps."""
    found = re.findall(pattern, text, re.MULTILINE)
    pairs = ((re.findall(r"\d+", numbers), names.lower().split(", ")) for numbers, names in found)
    return [(int(n), name) for numbers, names in pairs for n, name in zip(numbers, names, strict=True)]


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        pytest.param(DOCUMENT, r"^\*\*(\d+) ([a-z ]+)\.\*\*", id="document"),
        pytest.param(NAIVE, r"^ +# (\d+)\. ([A-Za-z]+(?: [a-z]+)?)", id="naive_row"),
        pytest.param(
            inspect.getsource(svdk.reference), r"^# Steps? (\d+(?: and \d+)?): ([a-z ,]+)\.", id="reference"
        ),
    ],
)
def test_the_twelve_steps_are_numbered_in_order(text, pattern):
    assert numbered(text, pattern) == list(enumerate(STEPS, 1))


def test_the_naive_row_is_short():
    lines = NAIVE.splitlines()
    assert 30 < len(lines) <= 60
    assert max(map(len, lines)) <= 115
    assert not re.search("svdk|torch", NAIVE), "numpy alone"
    assert f"{', '.join(DEFAULTS)} = given" in NAIVE, "the order of the schema"


def logits(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A warm and a base row of some kind."""
    generator = torch.Generator().manual_seed(len(kind))
    warm = 3 * torch.randn(VOCAB, generator=generator)
    base = warm + 0.5 * torch.randn(VOCAB, generator=generator)
    top = int(warm.argmax())
    if kind == "flat":
        warm, base = torch.full_like(warm, 2.0), torch.full_like(base, -3.0)
    elif kind == "one_hot":
        warm = torch.where(torch.arange(VOCAB) == 280, 0.5, -INF)
    elif kind == "rising":
        warm = warm + torch.linspace(-20, 0, VOCAB)
    elif kind == "confident":
        warm[17] += 30
    elif kind == "large":
        warm, base = warm + 1e6, base - 1e6
    elif kind == "first_slice_masked":
        warm[:256] = -INF
    elif kind == "base_slice_masked":
        base[:256] = -INF
    elif kind == "base_all_masked":
        base[:] = -INF
    elif kind == "masked":
        warm[[3, top]], base[[4, 5, 7]] = -INF, -INF
        warm[5] = -INF
    elif kind == "warm_nan":
        warm[256] = NAN
    elif kind == "base_inf":
        base[3] = INF
    elif kind == "warm_all_masked":
        warm[:] = -INF
    return warm, base


KINDS = [
    "ordinary",
    "flat",
    "one_hot",
    "rising",
    "confident",
    "large",
    "first_slice_masked",
    "base_slice_masked",
    "base_all_masked",
    "masked",
    "warm_nan",
    "base_inf",
    "warm_all_masked",
]
USES = ("kl_gradient", "log_ratio", "vector", "plain")
MODES = (("constant", 1.0), ("constant", -4.0), ("label", 1.0), ("kl_budget", 0.05))
FILTERS = (
    {},
    {"top_k": 5},
    {"top_p": 0.6},
    {"min_p": 0.1},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.05},
    {"top_p": 0.0},
)
TEMPERATURES = (1.0, 0.0, 0.6, 4.0)


class Problem(NamedTuple):
    """A row, as positional and keyword arguments of the naive row."""

    warm: torch.Tensor
    base: torch.Tensor | None
    vector: torch.Tensor | None
    options: dict[str, Any]


def problems(kind: str, use: str) -> Iterator[Problem]:
    """Masks, penalties and modes in all combinations; what the draw takes changes from one to the next."""
    warm, base = logits(kind)
    vector = torch.randn(VOCAB, generator=torch.Generator().manual_seed(9)) + 1.0
    if use == "vector" and kind == "base_inf":
        vector[3] = INF
    modes = MODES if use != "plain" else MODES[:2]
    grid = itertools.product((0.1, 0.0, 1.0), (-INF, 0.0, -1.5), modes)
    for i, (alpha, penalty, (mode, strength)) in enumerate(grid):
        turn = i + len(kind) + len(use)
        options = {"alpha": alpha, "penalty": penalty, "mode": mode, "strength": strength}
        options |= FILTERS[turn % len(FILTERS)] | {"temperature": TEMPERATURES[turn // 4 % len(TEMPERATURES)]}
        options |= {"seed": 7919 * turn - 2**40, "offset": 2**33 + turn}
        options["label"] = int(base.nan_to_num(-9, -9, -9).argmax()) if turn % 2 else turn
        if use in ("kl_gradient", "log_ratio"):
            yield Problem(warm, base, None, options | {"direction": use})
        else:
            yield Problem(warm, None, vector if use == "vector" else None, options)


def reference(problem: Problem) -> list[float]:
    """Token, strength, K, log-probabilities (steered, warm, base), size of C, status."""
    options = dict(problem.options)
    mode, label = options.pop("mode"), options.pop("label")
    token, info = svdk.steered_sample(
        problem.warm[None],
        None if problem.base is None else problem.base[None],
        vector=problem.vector,
        strength_mode=mode,
        labels=torch.tensor([label]) if mode == "label" else None,
        backend="reference",
        return_info=True,
        **options,
    )
    return [float(token[0]), *(float(getattr(info, name)[0]) for name in info.__dataclass_fields__)]


def mismatches(row: Callable, kind: str, use: str) -> Iterator[str]:
    """Every problem that the naive row solves differently."""
    for problem in problems(kind, use):
        want = reference(problem)
        try:
            got = solve(row, problem)
        except IndexError as error:  # no token
            yield f"{problem.options}: {error}"
            continue
        if not np.allclose(got, want, rtol=1e-5, atol=1e-6, equal_nan=True):
            yield f"{problem.options}: {got}, the reference: {want}"


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", KINDS)
def test_naive_row_equals_the_reference(kind, use):
    assert list(itertools.islice(mismatches(naive_row(), kind, use), 3)) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alpha", 2.0),
        ("alpha", NAN),
        ("temperature", -1.0),
        ("temperature", INF),
        ("top_k", -1),
        ("top_p", NAN),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("strength", NAN),
        ("strength", INF),
        ("strength", -1.0),
        ("label", -1),
        ("label", VOCAB),
    ],
)
def test_parameters_out_of_range(name, value, monkeypatch):
    monkeypatch.setattr(arguments, "host_values", lambda rows: False)  # as on a device: nobody looks
    warm, base = logits("ordinary")
    options = {"mode": "label" if name == "label" else "kl_budget", "strength": 0.1, "label": 0}
    wrong = torch.tensor([value])
    want = reference(Problem(warm, base, None, options | {name: value if name == "label" else wrong}))
    got = solve(naive_row(), Problem(warm, base, None, options | {name: value}))
    assert got[-1] == svdk.Status.INVALID
    assert np.array_equal(got, want, equal_nan=True)


MUTANTS = (
    (1, "(b < inf).all()", "True", "base_inf", "kl_gradient"),
    (1, "np.isfinite(w), w", "np.isfinite(w), -w", "warm_nan", "kl_gradient"),
    (2, ">= log_alpha\n    # 3", "> log_alpha + 1\n    # 3", "ordinary", "kl_gradient"),
    (3, "(max_bs - max_b))\n", "0.0)\n", "rising", "kl_gradient"),
    (4, "usable * (log_zb - log_zw)", "(log_zb - log_zw)", "base_slice_masked", "log_ratio"),
    (5, "near & (w - max_w >= log_alpha)", "near", "rising", "vector"),
    (6, "p * delta if", "delta if", "ordinary", "kl_gradient"),
    (7, "delta - mean", "delta", "ordinary", "vector"),
    (8, "delta[label] - mean", "delta[label]", "ordinary", "log_ratio"),
    (9, "w + mu * penalty if", "w + penalty if", "ordinary", "kl_gradient"),
    (10, "m.sum()) - m / m.sum()", "m.sum())", "ordinary", "vector"),
    (11, "c[0] << 21", "c[1] << 21", "ordinary", "plain"),
    (12, "z[token] - z.max()) - np", "z[token] - z.max()) / t - np", "ordinary", "plain"),
)


@pytest.mark.parametrize(("step", "old", "new", "kind", "use"), MUTANTS, ids=lambda x: str(x)[:20])
def test_a_mistake_in_any_step_is_found(step, old, new, kind, use):
    assert NAIVE.count(old) == 1, old
    assert NAIVE.index(f"# {step}.") < NAIVE.index(old) < (NAIVE + "# 13.").index(f"# {step + 1}.")
    assert next(mismatches(naive_row(NAIVE.replace(old, new)), kind, use), None), "the mistake went unnoticed"
