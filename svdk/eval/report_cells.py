"""What a results file holds, and which of its cells may be compared with each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from svdk.eval.compare import Difference, summarise
from svdk.utils.bootstrap import RESAMPLES, draws

LIKELIHOOD = "likelihood"
GIVEN = (None, "fixed", "given")
"""Estimators of cells whose strength was set by hand: the strength is part of what the cell is."""


class Benchmark(NamedTuple):
    """What was asked: cells of one test have the same questions in the same order."""

    model: str
    task: str
    questions_hash: str
    folds: int


class Start(NamedTuple):
    """A warm start."""

    peft: str
    steps: int
    seed: int


class Setting(NamedTuple):
    """How a steered cell steers."""

    direction: str
    alpha: float
    penalty: float | None
    """None: -inf."""
    mode: str
    estimator: str | None
    objective: str
    strength: tuple[float, ...] | None = None
    """Only where it was given rather than calibrated."""


class Calibration(NamedTuple):
    """What the calibration of each fold found."""

    gain: tuple[float, ...]
    """Expected gain in the objective, out of fold: nats a token, or share of tokens."""
    interval: tuple[tuple[float, float], ...]
    per_token_std: tuple[float, ...]


@dataclass(frozen=True)
class Cell:
    """One line of RESULTS.jsonl."""

    id: str
    test: Benchmark
    questions: int
    start: Start | None
    """May be None for the base model."""
    system: str
    setting: Setting | None
    """None: not steered."""
    strength: tuple[float, ...]
    """One a fold."""
    decoding: str
    metrics: Mapping[str, float]
    scores: Mapping[str, Tensor]
    """(Q,) float64 by metric; NaN where the file has null."""
    calibration: Calibration | None
    seconds: float

    @property
    def steering(self) -> Setting:
        """The setting of a steered cell."""
        if self.setting is None:
            raise ValueError(f"cell {self.id} is not steered")
        return self.setting

    def mean(self, metric: str) -> float | None:
        """The mean over questions, or the file's figure where it has no scores; None when not measured."""
        if metric in self.scores:
            return float(self.scores[metric].mean())
        return self.metrics.get(metric)

    def finite(self, metric: str) -> bool:
        """Whether every question has a finite score."""
        return metric in self.scores and bool(self.scores[metric].isfinite().all())


@dataclass(frozen=True)
class Pair:
    """Two cells on the same test, warm start and decoding; what they share is ``context``."""

    a: Cell
    b: Cell
    context: str = ""


@dataclass(frozen=True)
class Curve:
    """One line of CURVES.jsonl: test NLL and metrics along mu."""

    task: str
    peft: str
    steps: int
    direction: str
    alpha: float
    mu: tuple[float, ...]
    nll: tuple[float, ...]
    metrics: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Results:
    """Every cell of a results file, and the comparisons between them."""

    cells: tuple[Cell, ...]
    notes: tuple[str, ...] = ()
    """What a reader has to know about the file."""
    curves: tuple[Curve, ...] = ()
    resamples: int = RESAMPLES
    """Of every bootstrap."""
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def tests(self) -> list[Benchmark]:
        """In the order of the file."""
        return list(dict.fromkeys(cell.test for cell in self.cells))

    def starts(self, test: Benchmark, decoding: str = LIKELIHOOD) -> list[Start]:
        """Warm starts that have a warm cell, PEFTs in the order of the file, lengths ascending."""
        found = dict.fromkeys(
            c.start for c in self.cells if c.test == test and c.decoding == decoding and c.system == "warm"
        )
        pefts = list(dict.fromkeys(start.peft for start in found if start))
        return sorted((s for s in found if s), key=lambda s: (pefts.index(s.peft), s.steps, s.seed))

    def decodings(self) -> list[str]:
        """Other than likelihood, in the order of the file."""
        return list(dict.fromkeys(c.decoding for c in self.cells if c.decoding != LIKELIHOOD))

    def base(self, test: Benchmark, decoding: str = LIKELIHOOD) -> Cell | None:
        """The base model's cell."""
        wanted = (test, "base", decoding)
        return next((c for c in self.cells if (c.test, c.system, c.decoding) == wanted), None)

    def warm(self, test: Benchmark, start: Start | None, decoding: str = LIKELIHOOD) -> Cell | None:
        """The cell of a warm start without steering."""
        here = self._places().get((test, start, decoding), [])
        return next((c for c in here if c.system == "warm"), None)

    def listed(self, test: Benchmark, start: Start, decoding: str = LIKELIHOOD) -> Cell:
        """The cell of a warm start that :meth:`starts` has given, without steering."""
        if (found := self.warm(test, start, decoding)) is None:
            raise ValueError(f"{test.task} has no warm start {start}")
        return found

    def steered(self, test: Benchmark, start: Start, decoding: str = LIKELIHOOD) -> list[Cell]:
        """Every steered cell of a warm start."""
        return [c for c in self._places().get((test, start, decoding), []) if c.system == "steered"]

    def find(self, test: Benchmark, start: Start, decoding: str = LIKELIHOOD, **wanted: Any) -> Cell | None:
        """The steered cell with these fields of :class:`Setting` and the usual penalty; None without one."""
        wanted = {"penalty": usual_penalty(decoding), "strength": None, **wanted}
        found = [c for c in self.steered(test, start, decoding) if _has(c, wanted)]
        return found[0] if found else None

    def matched(
        self,
        a: Mapping[str, Any],
        b: Mapping[str, Any],
        *,
        ignore: Sequence[str] = (),
        label: Callable[[Cell, Cell], str],
    ) -> list[Pair]:
        """Pairs of steered cells, one with the fields ``a`` and one with ``b``, all their other fields equal.

        A frozenset allows any of its values. ``ignore`` names further fields that may differ; ``label`` words
        what stays apart when pairs are averaged.
        """
        free = {*a, *b, *ignore}
        pairs = []
        for cells in self._places().values():
            for first in cells:
                if first.setting is None or not _has(first, a):
                    continue
                shared = {k: v for k, v in first.setting._asdict().items() if k not in free}
                wanted = {**shared, **b}
                found = (second for second in cells if second is not first and _has(second, wanted))
                pairs += [Pair(first, second, label(first, second)) for second in found]
        return pairs

    def _places(self) -> dict[tuple[Benchmark, Start | None, str], list[Cell]]:
        if "places" not in self._cache:
            places: dict[Any, list[Cell]] = {}
            for cell in self.cells:
                places.setdefault((cell.test, cell.start, cell.decoding), []).append(cell)
            self._cache["places"] = places
        return self._cache["places"]

    def differences(self, a: Cell, b: Cell) -> dict[str, Difference]:
        """Differences b - a, for every metric that both have finite scores for."""
        key = (a.id, b.id)
        if key not in self._cache:
            self._cache[key] = self.pooled([Pair(a, b)])
        return self._cache[key]

    def pooled(self, pairs: Sequence[Pair]) -> dict[str, Difference]:
        """Differences b - a by metric, averaged question by question over pairs on one test.

        The questions are what is resampled: pairs that share them are not counted as independent evidence.
        """
        gaps = mean_gaps(pairs)
        if not gaps:
            return {}
        columns = torch.stack(list(gaps.values()), 1)
        drawn = draws(columns, resamples=self.resamples)
        return {
            metric: summarise(float(columns[:, i].mean()), drawn[:, i], len(columns))
            for i, metric in enumerate(gaps)
        }

    def label(self, test: Benchmark) -> str:
        """The task's name, with what sets the test apart from others of the same task."""
        # A run may generate answers to some of the questions only: such tests are told apart by decoding.
        scored = {c.test for c in self.cells if c.decoding == LIKELIHOOD}
        tests = [t for t in self.tests if (t in scored) == (test in scored)]
        same = [t for t in tests if t.task == test.task]
        parts = [TASKS.get(test.task, test.task)]
        if len({t.model for t in self.tests}) > 1:
            parts.append(test.model)
        clash = [t for t in same if t != test and t.model == test.model]
        if clash:
            parts.append(f"n = {self.questions(test):,}")
        if any(self.questions(t) == self.questions(test) for t in clash):
            parts.append(f"questions {test.questions_hash[:6]}")
        return ", ".join(parts)

    def questions(self, test: Benchmark) -> int:
        """How many questions a test has."""
        return next(c.questions for c in self.cells if c.test == test)

    def start_label(self, start: Start) -> str:
        """``LoRA, 16 steps``, with the seed where there are several."""
        seeds = {c.start.seed for c in self.cells if c.start}
        return f"{PEFTS.get(start.peft, start.peft)}, {start.steps} steps" + (
            f", seed {start.seed}" if len(seeds) > 1 else ""
        )


TASKS = {
    "truthfulqa": "TruthfulQA", "boolq": "BoolQ", "piqa": "PIQA", "siqa": "SIQA", "hellaswag": "HellaSwag",
    "winogrande": "WinoGrande", "arc_easy": "ARC-e", "arc_challenge": "ARC-c", "openbookqa": "OBQA",
}  # fmt: skip
PEFTS = {
    "lora": "LoRA", "ia3": "IA3", "prompt_tuning": "prompt tuning", "p_tuning": "p-tuning",
    "prefix_tuning": "prefix tuning",
}  # fmt: skip


def usual_penalty(decoding: str) -> float | None:
    """The penalty where nothing else was asked for: 0 for scoring, -inf (None) for generation."""
    return 0.0 if decoding == LIKELIHOOD else None


def mean_gaps(pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """Differences b - a by metric, (Q,) each, averaged over pairs on one test."""
    metrics = [m for m in pairs[0].a.scores if all(p.a.finite(m) and p.b.finite(m) for p in pairs)]
    return {m: torch.stack([p.b.scores[m] - p.a.scores[m] for p in pairs]).mean(0) for m in metrics}


def _has(cell: Cell, wanted: Mapping[str, Any]) -> bool:
    if cell.setting is None:
        return False
    found = ((getattr(cell.setting, name), value) for name, value in wanted.items())
    return all(x in value if isinstance(value, frozenset) else x == value for x, value in found)
