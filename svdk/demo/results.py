"""What the demo found: the rows of its table, its conclusion in words, and the examples it shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from svdk.calibration.report import Report
from svdk.demo.evaluate import Interval, Outcome, System, difference, mean_of
from svdk.utils.views import WARM
from svdk.warmstart.data import Example

PAPER, TUNED, AUTO = "paper", "tuned", "auto"
SHOTS, LONGER, SCALE, POSITIONS = "shots", "longer", "scale", "positions"
ALTERNATIVES = (SHOTS, LONGER, SCALE, POSITIONS)
"""What auto is compared with, beside the warm start."""
SETTING = {"kl_gradient": "KL gradient", "log_ratio": "log-ratio", "vector": "static vector"}
MEASURES = ("exact", "right", "valid", "nll")


@dataclass(frozen=True)
class Row:
    """One system: means with intervals, and paired differences to the warm start."""

    system: System
    means: Mapping[str, Interval]
    """By measure: ``exact``, ``right`` and ``valid`` as shares, ``nll`` in nats a token."""
    versus_warm: Mapping[str, Interval]
    """The same; empty for the warm start itself."""
    seconds_per_token: float


@dataclass(frozen=True)
class Pick:
    """An example to show, and why this one."""

    reason: str
    index: int


@dataclass(frozen=True)
class Results:
    """Everything that the report is made from."""

    model: str
    seed: int
    settings: Mapping[str, Any]
    held_out: list[Example]
    outcomes: list[Outcome]
    calibrations: Mapping[str, Report]
    """By key of the steered systems."""
    seconds: Mapping[str, float]
    """Wall time by stage."""
    resamples: int

    def outcome(self, key: str) -> Outcome:
        """The outcome of the system ``key``."""
        return next(o for o in self.outcomes if o.system.key == key)

    @cached_property
    def rows(self) -> list[Row]:
        """One row a system, in the order of evaluation."""
        draw = {"resamples": self.resamples, "seed": self.seed}
        warm = self.outcome(WARM)
        return [
            Row(
                o.system,
                {m: mean_of(o, m, **draw) for m in MEASURES},
                {m: difference(o, warm, m, **draw) for m in MEASURES} if o is not warm else {},
                o.seconds_per_token,
            )
            for o in self.outcomes
        ]

    def row(self, key: str) -> Row:
        """The row of the system ``key``."""
        return next(row for row in self.rows if row.system.key == key)

    def strength(self, key: str) -> float:
        """The strength of the steered system ``key``."""
        steering = self.outcome(key).system.steering
        if steering is None:
            raise ValueError(f"system {key} is not steered")
        return steering.strength

    @property
    def verdict(self) -> str:
        """``helps``, ``hurts`` or ``does not help``: auto against the warm start, by exact match."""
        return {1: "helps", -1: "hurts", 0: "does not help"}[self.row(AUTO).versus_warm["exact"].sign]

    def conclusion(self) -> list[str]:
        """Plain sentences, the answer first; nothing is called better whose interval spans zero."""
        warm, auto = self.row(WARM), self.row(AUTO)
        what = auto.system.steering.setting() if auto.system.steering else ""
        lines = [
            f"Calibration {self.verdict} on this task: what auto took ({what}) {self._exact_match(auto)}."
        ]
        nll = auto.versus_warm["nll"]
        trend = {-1: "falls", 1: "rises", 0: "does not change demonstrably"}[nll.sign]
        before, after = warm.means["nll"].mean, auto.means["nll"].mean
        lines.append(f"Its NLL {trend}: {before:.3f} to {after:.3f} nats a token, {signed(nll, 1, 3)}.")
        right, valid = auto.versus_warm["right"], auto.versus_warm["valid"]
        if self.verdict == "helps" and right.sign != 1 and valid.sign == 1:
            lines.append(
                "What it adds is form: answers that are a date and nothing else go from "
                f"{percent(warm.means['valid'])} to {percent(auto.means['valid'])}. Answers that start with "
                f"the right date do not become demonstrably more: {percent(warm.means['right'])} to "
                f"{percent(auto.means['right'])}, {points(right)}."
            )
        for key, name in ((PAPER, "the paper's setting"), (TUNED, "the paper's direction and mask")):
            strength = self.strength(key)
            lines.append(
                f"With {name} and strength {strength:.2f} ({self._estimator(key)}), SVDecode "
                f"{self._exact_match(self.row(key))}."
            )
        for key in ALTERNATIVES:
            one = self.outcome(key)
            if auto.system.same_as(one.system):
                continue
            change = difference(self.outcome(AUTO), one, "exact", resamples=self.resamples, seed=self.seed)
            lines.append(
                f"Beside it: {one.system.label}, {percent(self.row(key).means['exact'])} "
                f"({1000 * one.seconds_per_token:.0f} ms a token; auto {1000 * auto.seconds_per_token:.0f}); "
                f"against it auto makes {points(change)}."
            )
        return [*lines, "A confidence mask alone changes no greedy answer, so it has no row."]

    def _exact_match(self, row: Row) -> str:
        change = row.versus_warm["exact"]
        before, after = percent(self.row(WARM).means["exact"]), percent(row.means["exact"])
        verb = {1: "raises", -1: "lowers", 0: "does not demonstrably change"}[change.sign]
        return f"{verb} exact match: {before} to {after}, {points(change)}"

    def _estimator(self, key: str) -> str:
        if key != PAPER:
            return "the least calibration NLL"
        spread = self.calibrations[key].metrics["per_token_std"]
        return f"the mean of per-token optima, whose standard deviation is {spread:.1f}"

    def changes(self) -> tuple[int, int]:
        """On how many examples auto is right where the warm start is wrong, and the other way round."""
        pairs = zip(self.outcome(WARM).scores, self.outcome(AUTO).scores, strict=True)
        both = [(warm.exact, auto.exact) for warm, auto in pairs]
        return both.count((False, True)), both.count((True, False))

    def picks(self, count: int = 3) -> list[Pick]:
        """The first example of each kind, so that what steering breaks is shown beside what it mends."""
        pairs = zip(self.outcome(WARM).scores, self.outcome(AUTO).scores, strict=True)
        kinds = {
            (False, True): "steering mends it",
            (True, False): "steering breaks it",
            (False, False): "wrong either way",
            (True, True): "right either way",
        }
        first: dict[tuple[bool, bool], int] = {}
        for index, (warm, auto) in enumerate(pairs):
            first.setdefault((warm.exact, auto.exact), index)
        chosen = [Pick(reason, first[kind]) for kind, reason in kinds.items() if kind in first][:count]
        used = {pick.index for pick in chosen}
        rest = [Pick("next in order", i) for i in range(len(self.held_out)) if i not in used]
        return chosen + rest[: count - len(chosen)]

    def as_json(self) -> dict[str, Any]:
        """All figures and answers as plain numbers and strings."""
        return {
            "model": self.model,
            "seed": self.seed,
            "settings": dict(self.settings),
            "verdict": self.verdict,
            "conclusion": self.conclusion(),
            "seconds": dict(self.seconds),
            "systems": {row.system.key: self._system_json(row) for row in self.rows},
            "examples": [asdict(example) for example in self.held_out],
        }

    def _system_json(self, row: Row) -> dict[str, Any]:
        steering, key = row.system.steering, row.system.key
        fields = ("lever", "direction", "alpha", "strength", "positions", "scale", "estimator", "objective")
        return {
            "label": row.system.label,
            "steering": steering and {name: getattr(steering, name) for name in fields},
            "means": {name: asdict(value) for name, value in row.means.items()},
            "versus_warm": {name: asdict(value) for name, value in row.versus_warm.items()},
            "seconds_per_token": row.seconds_per_token,
            "answers": self.outcome(key).answers,
        }


def percent(interval: Interval) -> str:
    """The mean as a share: ``45.0%``."""
    return f"{100 * interval.mean:.1f}%"


def points(interval: Interval) -> str:
    """A difference of shares: ``+25.0 points (95% interval +15.0 to +35.0)``."""
    return signed(interval, 100, 1).replace(" (", " points (", 1)


def signed(interval: Interval, scale: float, digits: int) -> str:
    """A difference with its interval, all signed: ``+0.10 (95% interval +0.05 to +0.15)``."""
    mean, low, high = (
        f"{scale * value:+.{digits}f}" for value in (interval.mean, interval.low, interval.high)
    )
    return f"{mean} (95% interval {low} to {high})"
