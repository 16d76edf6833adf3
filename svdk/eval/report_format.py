"""Names, units and marks of the evaluation report, and its Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from svdk.bench.tables import markdown
from svdk.calibration.loss_views import LIMIT
from svdk.eval.compare import Difference, family
from svdk.eval.report_cells import LIKELIHOOD, Cell, Setting, usual_penalty

MINUS = "−"
LEAST_QUESTIONS = 30
"""With fewer, percentile intervals are too narrow: nothing is claimed."""
SMALLEST = {"points": 0.05, "nats": 0.001}
"""A mean difference below this is no finding, however sure."""


class Metric(NamedTuple):
    """How a metric is shown."""

    label: str
    unit: str
    """Of a difference."""
    scale: float
    digits: int
    """Of a value; differences of ``nats`` have one more."""
    better: int
    """1 when more is better, -1 when less is."""


def _share(label: str) -> Metric:
    return Metric(label, "points", 100.0, 1, 1)


METRICS: Mapping[str, Metric] = {
    "mc1": _share("MC1"),
    "mc2": _share("MC2"),
    "mc3": _share("MC3"),
    "accuracy": _share("accuracy"),
    "generated_accuracy": _share("accuracy (generated)"),
    "truthful": _share("truthful"),
    "informative": _share("informative"),
    "truthful_informative": _share("truthful and informative"),
    "token_accuracy": _share("token accuracy"),
    "exact": _share("exact match"),
    "nll": Metric("NLL", "nats", 1.0, 3, -1),
}
CHOICE = ("mc1", "accuracy", "generated_accuracy", "truthful", "exact")
"""The answer metric of a test is the first of these that it has."""

Pattern = Mapping[str, Any]


class Headline(NamedTuple):
    """A setting fixed before any result was seen."""

    key: str
    name: str
    pattern: Pattern


_DEFAULT: Pattern = {
    "direction": "kl_gradient", "alpha": 0.1, "mode": "constant", "estimator": "optimum", "objective": "nll",
}  # fmt: skip
HEADLINES = (
    Headline("paper", "paper's setting", {**_DEFAULT, "estimator": "mean"}),
    Headline("default", "svdk's default", _DEFAULT),
    Headline("log_ratio", "log-ratio, no mask", {**_DEFAULT, "direction": "log_ratio", "alpha": 0.0}),
)


def choice_metric(metrics: Iterable[str]) -> str | None:
    """The answer metric among ``metrics``."""
    return next((name for name in CHOICE if name in set(metrics)), None)


def value(metric: str, x: float | None) -> str:
    """``31.2`` (percent) or ``2.543`` (nats); a dash where nothing was measured."""
    if x is None or math.isnan(x):
        return "–"
    known = METRICS[metric]
    return number(known.scale * x, known.digits)


def number(x: float, digits: int, *, signed: bool = False) -> str:
    """Fixed digits with a typographic minus; infinities as ``∞``."""
    text = f"{abs(x):.{digits}f}" if math.isfinite(x) else "∞"
    if x < 0 and any(c in "123456789∞" for c in text):
        return MINUS + text
    return f"+{text}" if signed else text


def difference(metric: str, found: Difference) -> str:
    """``+1.2 [−0.5, +2.9]``, in points or nats."""
    mean, low, high = _parts(metric, found)
    return f"{mean} [{low}, {high}]"


def phrase(metric: str, found: Difference) -> str:
    """``+1.2 points (95 % interval −0.5 to +2.9, n = 817)``."""
    mean, low, high = _parts(metric, found)
    return f"{mean} {METRICS[metric].unit} (95 % interval {low} to {high}, n = {found.n:,})"


def _parts(metric: str, found: Difference) -> tuple[str, str, str]:
    known = METRICS[metric]
    digits = known.digits + (known.unit == "nats")
    ends = [known.scale * x for x in (found.mean, found.low, found.high)]
    # An interval that excludes 0 must not read as one that touches it, unless it is all but 0 anyway.
    while verdict_sign(metric, found) and digits < 6 and any(float(f"{x:.{digits}f}") == 0 for x in ends):
        digits += 1
    mean, low, high = (number(x, digits, signed=True) for x in ends)
    return mean, low, high


def verdict_sign(metric: str, found: Difference) -> int:
    """1 when b is better than a, -1 when worse, 0 when the interval spans 0 or the mean is as good as 0."""
    known = METRICS[metric]
    if abs(known.scale * found.mean) < SMALLEST[known.unit]:
        return 0
    return found.sign * known.better


def holding(found: Sequence[Difference]) -> list[bool]:
    """Which of a family may be claimed: by Holm's correction, and only with enough questions."""
    return [kept and d.n >= LEAST_QUESTIONS for kept, d in zip(family(found), found, strict=True)]


class Entry(NamedTuple):
    """A table cell: a value, and its difference to what the table compares with."""

    metric: str
    mean: float | None = None
    difference: Difference | None = None


def table(head: Sequence[str], rows: Sequence[Sequence[str | Entry]]) -> str:
    """A Markdown table. Marks: see :data:`LEGEND`; Holm's correction runs over the whole table."""
    shown = iter(entries([cell for row in rows for cell in row if isinstance(cell, Entry)]))
    return markdown(
        head, [[next(shown) if isinstance(cell, Entry) else cell for cell in row] for row in rows]
    )


def entries(cells: Sequence[Entry]) -> list[str]:
    """The cells as text, their differences marked as one family."""
    kept = iter(holding([cell.difference for cell in cells if cell.difference]))
    return [_entry(cell, cell.difference is not None and next(kept)) for cell in cells]


LEGEND = (
    "In brackets: 95 % bootstrap interval over questions, paired. ▲ better, ▼ worse: the interval excludes "
    "0, and still does when all comparisons of the table are judged together (Holm). △ better, ▽ worse: only "
    "by itself, or on fewer than 30 questions, so read it as a hint. No mark: no demonstrable difference, or "
    "one below 0.05 points or 0.001 nats."
)


def _entry(cell: Entry, holds: bool) -> str:
    shown = [] if cell.mean is None and cell.difference else [value(cell.metric, cell.mean)]
    if cell.difference:
        text = difference(cell.metric, cell.difference)
        shown.append(f"({text})" if shown else text)
        if sign := verdict_sign(cell.metric, cell.difference):
            shown.append({(1, True): "▲", (-1, True): "▼", (1, False): "△", (-1, False): "▽"}[sign, holds])
    return " ".join(shown)


def setting_name(setting: Setting, decoding: str = LIKELIHOOD, *, without: Sequence[str] = ()) -> str:
    """``kl_gradient, α = 0.1, optimum``: every field that is not the usual one, less those in ``without``."""
    parts = []
    if "direction" not in without:
        parts.append(f"`{setting.direction}`")
    if "alpha" not in without:
        parts.append(f"α = {setting.alpha:g}" if setting.alpha else "no mask")
    if "penalty" not in without and setting.penalty != usual_penalty(decoding):
        shown = f"{MINUS}∞" if setting.penalty is None else f"{setting.penalty:g}".replace("-", MINUS)
        parts.append(f"λ = {shown}")
    if "mode" not in without and setting.mode != "constant":
        parts.append(f"`{setting.mode}`")
    if "estimator" not in without and setting.estimator and setting.strength is None:
        parts.append(f"`{setting.estimator}`")
    if "objective" not in without and setting.objective != "nll":
        parts.append(f"for {setting.objective}")
    if setting.strength is not None:
        parts.append(f"{'κ' if setting.mode == 'kl_budget' else 'μ'} = {strengths(setting.strength)}")
    return ", ".join(parts)


def strengths(values: Sequence[float]) -> str:
    """One value a fold, ``0.51 / 0.47``, or one if all are the same; ``≥ 64`` at the end of the range."""
    ends = {LIMIT: "≥ ", -LIMIT: "≤ "}
    shown = [ends.get(x, "") + f"{x:.3g}".replace("-", MINUS) for x in values]
    return shown[0] if len(set(shown)) == 1 else " / ".join(shown)


def cell_name(cell: Cell) -> str:
    """The system of a cell in words."""
    if cell.setting is None:
        return {"base": "base", "warm": "warm start"}[cell.system]
    return setting_name(cell.setting, cell.decoding)


def listed(items: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else list(items))


def thinned(lengths: Sequence[int]) -> list[int]:
    """At most three of the ascending lengths: the shortest, the middle one and the longest."""
    ordered = sorted(set(lengths))
    return sorted({ordered[0], ordered[len(ordered) // 2], ordered[-1]}) if ordered else []
