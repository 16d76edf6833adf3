"""Forest plots of the evaluation report: the summary, and the paper's figure 4 in form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from svdk.eval.compare import Difference
from svdk.eval.report_cells import Benchmark, Cell, Results, Start
from svdk.eval.report_format import HEADLINES, METRICS, MINUS, choice_metric, verdict_sign
from svdk.eval.report_lines import figures_2, figures_3
from svdk.eval.report_style import COLOURS, MARKERS, Picture, handle, new_figure, plain
from svdk.eval.report_tables import shown_starts

LINEAR = 0.01
"""Nats up to which the axis of NLL differences is linear: they range over three powers of ten."""


class Point(NamedTuple):
    """A difference on a row of a forest plot."""

    row: str
    series: str
    label: str
    differences: dict[str, Difference]


def summary(results: Results) -> Picture | None:
    """Steered minus warm start for the headline settings, at three lengths of every warm start."""
    points = [
        Point(
            f"{results.label(test)}, {results.start_label(start)}",
            h.key,
            h.name,
            results.differences(warm, cell),
        )
        for test in results.tests
        for start in shown_starts(results, test)
        for h in HEADLINES
        if (cell := results.find(test, start, **h.pattern)) and (warm := results.warm(test, start))
    ]
    figure = forest(points, "steered minus warm start, test questions")
    text = "Steered minus warm start with 95 % intervals; filled: the interval excludes 0; right is better"
    return figure and Picture("summary", text, figure)


def figure_4(results: Results) -> Picture | None:
    """Static vector and KL budget beside steering step by step, all against the warm start."""
    kinds = {
        "log_ratio": ("step by step, log-ratio, no mask", HEADLINES[2].pattern),
        "default": ("step by step, svdk's default", HEADLINES[1].pattern),
        "vector": ("static vector", {**HEADLINES[1].pattern, "direction": "vector", "alpha": 0.0}),
        "kl_budget": (
            "KL budget, svdk's default otherwise",
            {"direction": "kl_gradient", "alpha": 0.1, "mode": "kl_budget"},
        ),
    }
    points = []
    for test in results.tests:
        for start in shown_starts(results, test):
            warm, row = results.listed(test, start), f"{results.label(test)}, {results.start_label(start)}"
            cells = {key: (name, _find(results, test, start, like)) for key, (name, like) in kinds.items()}
            budget = _find(
                results, test, start, {"direction": "kl_gradient", "mode": "kl_budget", "alpha": 0.1}
            )
            cells["kl_budget"] = ("KL budget, svdk's default otherwise", budget)
            if cells["vector"][1] or budget:
                points += [
                    Point(row, key, name, results.differences(warm, cell))
                    for key, (name, cell) in cells.items()
                    if cell
                ]
    figure = forest(points, "static vector and KL budget: difference to the warm start, test questions")
    text = (
        "Figure 4. Static vector, KL budget and a constant strength step by step, each minus the warm start; "
        "filled: the 95 % interval excludes 0; right is better"
    )
    return figure and Picture("figure-4", text, figure)


def _row(results: Results, test: Benchmark, start: Start) -> str:
    return f"{results.label(test)}, {results.start_label(start)}"


def _find(results: Results, test: Benchmark, start: Start, like: Mapping[str, Any]) -> Cell | None:
    """The first cell like that, whatever the penalty: a static vector has no mask to penalise."""
    for cell in results.steered(test, start):
        if all(getattr(cell.setting, name) == value for name, value in like.items()):
            return cell
    return None


def forest(points: Sequence[Point], title: str) -> Any | None:
    """Two panels, answers and NLL; a row a warm start, a colour a way to steer. Right is better in both."""
    points = [p for p in points if p.differences]
    if not points:
        return None
    rows, series = list(dict.fromkeys(p.row for p in points)), list(dict.fromkeys(p.series for p in points))
    step = 0.17 * len(series) + 0.12
    figure = new_figure(1.3 + step * len(rows), title)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, kind in zip(panels, ("answers", "nll"), strict=True):
        _forest_panel(axes, points, rows, series, kind)
    panels[0].set_yticks(range(len(rows)), rows, fontsize=8)
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    panels[0].set_xlabel("answers: points of MC1 or accuracy", fontsize=9)
    panels[1].set_xlabel(f"NLL: nats a token less (log beyond {LINEAR:g})", fontsize=9)
    handles = {p.series: p.label for p in points}
    figure.legend(
        [handle(key) for key in handles], list(handles.values()), loc="outside lower center",
        ncols=2 if len(handles) > 3 else 3, fontsize=8, frameon=False,
    )  # fmt: skip
    return figure


def _forest_panel(axes: Any, points: Sequence[Point], rows: list[str], series: list[str], kind: str) -> None:
    drawn = []
    for point in points:
        name = "nll" if kind == "nll" else choice_metric(point.differences)
        if name is None or (found := point.differences.get(name)) is None or not math.isfinite(found.low):
            continue
        known = METRICS[name]
        middle, *ends = (known.better * known.scale * x for x in (found.mean, found.low, found.high))
        y = rows.index(point.row) + 0.8 * ((series.index(point.series) + 0.5) / len(series) - 0.5)
        drawn.append((point, found, name, middle, min(ends), max(ends), y))
    limit = math.inf
    if kind == "nll":
        axes.set_xscale("symlog", linthresh=LINEAR, linscale=0.6)
    else:
        limit = _cut([abs(middle) for *_, middle, _, _, _ in drawn])
    for point, found, name, middle, low, high, y in drawn:
        colour = COLOURS[point.series]
        if abs(middle) > limit:
            side = math.copysign(limit, middle)
            text = f"{middle:+.3g}".replace("-", MINUS)
            axes.plot(side, y, marker=">" if side > 0 else "<", color=colour, markersize=5)
            axes.annotate(
                text, (side, y), xytext=(math.copysign(6, -side), 0), textcoords="offset points",
                va="center", ha="right" if side > 0 else "left", fontsize=7, color=colour,
            )  # fmt: skip
            continue
        axes.plot([max(low, -limit), min(high, limit)], [y, y], color=colour, linewidth=1.4)
        face = colour if verdict_sign(name, found) else "white"
        axes.plot(
            middle, y, marker=MARKERS[point.series], color=colour, markerfacecolor=face, markersize=5,
            linestyle="none",
        )  # fmt: skip
    axes.axvline(0, color="0.35", linewidth=1)
    if kind == "nll":
        _log_ticks(axes)
    for index in range(1, len(rows)):
        axes.axhline(index - 0.5, color="0.9", linewidth=0.8)
    plain(axes, "x")
    axes.tick_params(axis="y", length=0)


def _cut(sizes: Sequence[float]) -> float:
    """Where to cut the axis: one setting that fails by far would flatten all the others."""
    ordered = sorted(sizes)
    usual = ordered[int(0.8 * (len(ordered) - 1))] if ordered else 0.0
    return max(4 * usual, 5.0) if ordered and ordered[-1] > max(6 * usual, 10.0) else math.inf


def _log_ticks(axes: Any) -> None:
    """Powers of ten on either side, and nothing between them."""
    low, high = axes.get_xlim()
    powers = [LINEAR * 10**k for k in range(8) if LINEAR * 10**k <= max(-low, high)]
    ticks = [x for x in (*(-p for p in reversed(powers)), 0.0, *powers) if low <= x <= high]
    axes.set_xticks(ticks, [f"{x:g}".replace("-", MINUS) for x in ticks])
    axes.minorticks_off()


def pictures(results: Results) -> tuple[Picture | None, dict[str, list[Picture]]]:
    """The summary, and by name the paper's figures that the results have data for."""
    figure = figure_4(results)
    return summary(results), {
        "Figure 2": list(figures_2(results)),
        "Figure 3": list(figures_3(results)),
        "Figure 4": [figure] if figure else [],
    }
