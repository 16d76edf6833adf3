"""The one plot of a calibration: loss and accuracy along mu, the estimators marked, and the levers' gains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from svdk.utils import figures
from svdk.utils.files import write_file

if TYPE_CHECKING:
    from svdk.calibration.report import Report

MARKERS = {"mean": "s", "median": "D", "trimmed_mean": "v", "ratio": "^", "newton": "P", "optimum": "o"}
COLOURS = {
    "mean": figures.VERMILION,
    "median": figures.PURPLE,
    "trimmed_mean": figures.ORANGE,
    "ratio": figures.SKY,
    "newton": figures.GREEN,
    "optimum": figures.BLACK,
}


def plot_calibration(report: Report, path: str | Path) -> Path:
    """Write a PNG of ``report`` to ``path`` (atomically) and return it."""
    low, high = _span(report)
    strengths = np.linspace(low, high, 241)
    nll, accuracy = report.curve(strengths.tolist())
    chosen_among = report.objective == "choice"
    panels = [3.0, 2.0, *([0.6 + 0.3 * len(report.levers)] if report.levers else [])]
    figure = figures.new_figure(8.4, 1.0 + sum(panels), dpi=100)
    top, bottom, *rest = figure.subplots(len(panels), 1, height_ratios=panels)
    bottom.sharex(top)
    counted = "questions" if chosen_among else f"examples, {report.metrics['tokens']:.0f} tokens"
    figure.suptitle(
        f"{report.direction}, alpha {report.alpha:g}: {report.metrics['examples']:.0f} {counted}", fontsize=11
    )
    _panel(top, strengths, nll, report.metrics["nll_warm"], f"NLL (nats a {report.item})")
    # A loss that explodes at one end would flatten the part that matters.
    floor, warm = min(nll), report.metrics["nll_warm"]
    top.set_ylim(top=min(max(nll), warm + 3 * (warm - floor) + 0.05 * abs(warm)), bottom=None)
    kind = "accuracy" if chosen_among else "greedy token accuracy"
    _panel(bottom, strengths, accuracy, report.metrics["accuracy_warm"], kind)
    bottom.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")
    bottom.set_xlabel("steering strength μ")
    for row in report.rows:
        mark: dict[str, Any] = {
            "marker": MARKERS[row.estimator],
            "color": COLOURS[row.estimator],
            "markersize": 8,
            "markeredgecolor": "white",
            "linestyle": "none",
            "zorder": 3,
            "clip_on": True,
        }
        inside = low <= row.strength <= high
        label = f"{row.estimator}  {row.strength:.3g}" + ("" if inside else " (not shown)")
        top.plot([row.strength] if inside else [], [row.nll] if inside else [], label=label, **mark)
        bottom.plot([row.strength] if inside else [], [row.accuracy] if inside else [], **mark)
    for axes in rest:
        _levers(axes, report)
    handles, labels = top.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside right upper", title="estimator and μ", frameon=False, fontsize=9
    )
    write_file(path, figures.png(figure))
    return Path(path)


def _levers(axes: Any, report: Report) -> None:
    """Out-of-fold gain of each lever with its interval, the chosen one filled."""
    for place, row in enumerate(report.levers):
        low, high = row.interval
        colour = figures.BLUE if row is report.lever else "0.55"
        axes.plot([low, high], [place, place], color=colour, linewidth=2, solid_capstyle="butt")
        filled = colour if row is report.lever else "white"
        axes.plot([row.gain], [place], "o", color=colour, markerfacecolor=filled, markersize=7, zorder=3)
    axes.axvline(0, color="0.8", linewidth=1, zorder=0)
    axes.set_yticks(range(len(report.levers)), [row.fitted.lever for row in report.levers])
    axes.invert_yaxis()
    axes.set_ylim(len(report.levers) - 0.4, -0.6)
    unit = "share of tokens" if report.objective == "accuracy" else f"nats a {report.item}"
    axes.set_xlabel(f"levers: out-of-fold gain over the warm start, {unit} (95 % interval)")
    figures.plain(axes, "x")


def _span(report: Report) -> tuple[float, float]:
    """A range of mu with 0, the result, and the other estimators unless they lie far out."""
    chosen = report.chosen.strength
    low, high = min(0.0, chosen), max(0.0, chosen)
    width = max(0.5, high - low)
    near = [row.strength for row in report.rows if low - 2 * width <= row.strength <= high + 2 * width]
    low, high = min(low, *near) - 0.5 * width, max(high, *near) + 0.5 * width
    return max(low, report.view.limits[0]), min(high, report.view.limits[1])


def _panel(axes: Any, strengths: np.ndarray, values: list[float], warm: float, label: str) -> None:
    axes.plot(strengths, values, color=figures.BLUE, linewidth=2)
    axes.axhline(warm, color="0.45", linewidth=1, linestyle="--", zorder=1, label="warm start")
    axes.axvline(0, color="0.8", linewidth=1, zorder=0)
    axes.set_ylabel(label)
    figures.plain(axes)
