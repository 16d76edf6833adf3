"""The one table of parameters, the ops made of it, and their registration with the dispatcher.

Everything that has to agree on the order of an op's flat arguments takes it from here: the dispatcher's
schemas, the public functions, the reference, the Triton kernels, and the tests that call the CUDA kernels on
the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

KL_GRADIENT, LOG_RATIO, VECTOR, PLAIN = range(4)
"""Directions; PLAIN means neither base nor vector: the warm distribution itself, no mask."""

CONSTANT, LABEL, KL_BUDGET = range(3)
"""Strength modes of ``steered_sample``; ``steered_logits`` has no labels."""

DIRECTIONS = {"kl_gradient": KL_GRADIENT, "log_ratio": LOG_RATIO}
STRENGTH_MODES = {"constant": CONSTANT, "label": LABEL, "kl_budget": KL_BUDGET}


class PerRow(NamedTuple):
    """One number for every row, or one a row."""

    scalar: float
    rows: Tensor | None = None
    """(B,); the scalar does not count then."""


@dataclass(frozen=True)
class Parameter:
    """A number that an op takes: ``float`` and ``int`` travel as :class:`PerRow`, a ``scalar`` alone."""

    name: str
    kind: str
    low: float
    high: float
    default: float


PARAMETERS = (
    Parameter("strength", "float", -math.inf, math.inf, 1.0),
    Parameter("alpha", "float", 0.0, 1.0, 0.1),
    Parameter("penalty", "scalar", -math.inf, math.inf, -math.inf),
    Parameter("temperature", "float", 0.0, math.inf, 1.0),
    Parameter("top_k", "int", 0, math.inf, 0),
    Parameter("top_p", "float", 0.0, 1.0, 1.0),
    Parameter("min_p", "float", 0.0, 1.0, 0.0),
    Parameter("seed", "int", -math.inf, math.inf, 0),
    Parameter("offset", "int", -math.inf, math.inf, 0),
)
"""In the order in which every op takes those that it has; bounds are inclusive, NaN and infinity are not
allowed but for a penalty of -inf. (A top_k is an int64, seed and offset are words of 64 bits.)"""
PARAMETER = {parameter.name: parameter for parameter in PARAMETERS}


class Operands(NamedTuple):
    """The rows of a call: what every op takes first."""

    warm: Tensor
    """(R, V) logits, last dimension contiguous."""
    base: Tensor | None
    """(R', V) logits of warm's dtype."""
    vector: Tensor | None
    """(V,) or (B, V) float32, contiguous."""
    warm_rows: Tensor | None
    base_rows: Tensor | None
    """int64 (B,) rows of ``warm`` and ``base``; None: all of them, in order."""
    vocab: int
    """Columns in use."""
    direction: int

    @property
    def batch(self) -> int:
        """The number of rows, B."""
        return batch_of(self)


def batch_of(operands: Operands) -> int:
    """``operands.batch`` for torch.compile: that of torch 2.10 knows no properties of named tuples."""
    return (operands.warm if operands.warm_rows is None else operands.warm_rows).shape[0]


_TYPES = ("Tensor", "Tensor?", "Tensor?", "Tensor?", "Tensor?", "int", "int")
_SCHEMA = {"float": "float {0}, Tensor? {0}_rows", "int": "int {0}, Tensor? {0}_rows", "scalar": "float {0}"}


@dataclass(frozen=True)
class Op:
    """An operation: operands, what comes before the parameters, these in the table's order, what follows."""

    name: str
    before: tuple[str, ...]
    """Declarations, as "bool info"."""
    parameters: tuple[Parameter, ...]
    after: tuple[str, ...]
    returns: str
    slots: tuple[tuple[str, bool], ...] = field(init=False)
    """Name of each argument after the operands, and whether it is a :class:`PerRow` (two flat arguments)."""

    def __post_init__(self) -> None:
        """Work out the slots once."""
        slots = [(declared.split()[1], False) for declared in self.before]
        slots += [(parameter.name, parameter.kind != "scalar") for parameter in self.parameters]
        slots += [(declared.split()[1], False) for declared in self.after]
        object.__setattr__(self, "slots", tuple(slots))

    @property
    def schema(self) -> str:
        """For the dispatcher."""
        operands = [f"{kind} {name}" for kind, name in zip(_TYPES, Operands._fields, strict=True)]
        parameters = [_SCHEMA[parameter.kind].format(parameter.name) for parameter in self.parameters]
        return f"({', '.join((*operands, *self.before, *parameters, *self.after))}) -> ({self.returns})"

    @property
    def names(self) -> tuple[str, ...]:
        """Of the flat arguments."""
        rest = [(name, f"{name}_rows") if per_row else (name,) for name, per_row in self.slots]
        return (*Operands._fields, *(name for names in rest for name in names))

    def flatten(self, operands: Operands, given: Mapping[str, Any]) -> list[Any]:
        """The flat arguments: the interface of every backend."""
        flat: list[Any] = list(operands)
        for name, per_row in self.slots:
            if per_row:
                flat.extend(given[name])
            else:
                flat.append(given[name])
        return flat

    def unpack(self, flat: Sequence[Any]) -> tuple[Operands, Any]:
        """The inverse of :meth:`flatten`; the second is a namespace."""
        place = len(Operands._fields)
        given: dict[str, Any] = {}
        for name, per_row in self.slots:
            given[name] = PerRow(flat[place], flat[place + 1]) if per_row else flat[place]
            place += 2 if per_row else 1
        if place != len(flat):
            raise TypeError(f"{self.name} takes {place} arguments; {len(flat)} were given")
        return Operands(*flat[: len(Operands._fields)]), SimpleNamespace(**given)


STEERED_SAMPLE = Op(
    "steered_sample",
    ("Tensor? logit_bias", "Tensor? bitmask", "Tensor? labels", "int strength_mode"),
    PARAMETERS,
    ("bool info",),
    "Tensor token, Tensor floats, Tensor ints",
)
STEERED_LOGPROB = Op(
    "steered_logprob",
    ("Tensor labels",),
    (PARAMETER["strength"], PARAMETER["alpha"], PARAMETER["penalty"]),
    ("Tensor? strengths",),
    "Tensor curves, Tensor greedy, Tensor rows, Tensor status",
)
EXTRACT = Op(
    "extract",
    (),
    (PARAMETER["alpha"],),
    (),
    "Tensor row_ptr, Tensor ids, Tensor p, Tensor delta, Tensor rows, Tensor status",
)
STEERED_LOGITS = Op(
    "steered_logits",
    ("int strength_mode",),  # not "mode": torch makes keywords of a mutable op's arguments, beside its own
    (PARAMETER["strength"], PARAMETER["alpha"], PARAMETER["penalty"]),
    ("Tensor? skip", "Tensor(a!) out"),
    "Tensor status",
)
OPS = {op.name: op for op in (STEERED_SAMPLE, STEERED_LOGPROB, EXTRACT, STEERED_LOGITS)}

# --- registration: schemas and fakes here, implementations in C++

LIBRARY = torch.library.Library("svdk", "DEF")
for _op in OPS.values():
    LIBRARY.define(_op.name + _op.schema, tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.register_fake("svdk::steered_sample", lib=LIBRARY)
def fake_steered_sample(*flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What ``steered_sample`` returns, without data."""
    operands, given = STEERED_SAMPLE.unpack(flat)
    warm, batch = operands.warm, operands.batch
    return (
        warm.new_empty(batch, dtype=torch.int64),
        warm.new_empty((5, batch) if given.info else (0,), dtype=torch.float32),
        warm.new_empty((2, batch) if given.info else (0,), dtype=torch.int32),
    )


@torch.library.register_fake("svdk::steered_logprob", lib=LIBRARY)
def fake_steered_logprob(*flat: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ``steered_logprob`` returns, without data."""
    operands, given = STEERED_LOGPROB.unpack(flat)
    warm, batch = operands.warm, operands.batch
    count = 1 if given.strengths is None else given.strengths.shape[0]
    return (
        warm.new_empty((3, batch, count), dtype=torch.float32),
        warm.new_empty((batch, count), dtype=torch.int64),
        warm.new_empty((6, batch), dtype=torch.float32),
        warm.new_empty(batch, dtype=torch.int32),
    )


@torch.library.register_fake("svdk::extract", lib=LIBRARY)
def fake_extract(*flat: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What ``extract`` returns, without data; the number of entries depends on it."""
    operands, _ = EXTRACT.unpack(flat)
    warm, batch, entries = operands.warm, operands.batch, torch.library.get_ctx().new_dynamic_size()
    return (
        warm.new_empty(batch + 1, dtype=torch.int64),
        warm.new_empty(entries, dtype=torch.int64),
        warm.new_empty(entries, dtype=torch.float32),
        warm.new_empty(entries, dtype=torch.float32),
        warm.new_empty((3, batch), dtype=torch.float32),
        warm.new_empty(batch, dtype=torch.int32),
    )


@torch.library.register_fake("svdk::steered_logits", lib=LIBRARY)
def fake_steered_logits(*flat: Any) -> Tensor:
    """What ``steered_logits`` returns beside what it writes to ``out``, without data."""
    operands, _ = STEERED_LOGITS.unpack(flat)
    return operands.warm.new_empty(operands.batch, dtype=torch.int32)


# --- for compiled code: a 64-bit integer as a tensor

LIBRARY.define("word_per_row(Tensor like, SymInt word, SymInt count) -> Tensor")


def word_per_row(like: Tensor, word: int, count: int) -> Tensor:
    """int64 (count,), all of them ``word``, on the device of ``like``."""
    return torch.full((count,), word, dtype=torch.int64, device=like.device)


LIBRARY.impl("word_per_row", word_per_row, "CompositeExplicitAutograd")
torch.library.register_fake("svdk::word_per_row", word_per_row, lib=LIBRARY)
