"""The picture of the demo's report: exact match by system, and calibration NLL along the strength."""

from __future__ import annotations

from typing import Any

import numpy as np

from svdk.demo.results import AUTO, LONGER, PAPER, POSITIONS, SCALE, SETTING, SHOTS, TUNED, Results
from svdk.utils import figures
from svdk.utils.views import BASE, WARM

COLOURS = {
    BASE: "#8a8f98",
    WARM: "#4c566a",
    PAPER: figures.VERMILION,
    TUNED: figures.ORANGE,
    AUTO: figures.BLUE,
    SHOTS: "#b9bec6",
    LONGER: "#6b7486",
    SCALE: figures.GREEN,
    POSITIONS: figures.PURPLE,
}


def draw(results: Results) -> bytes:
    """The picture as PNG: exact match by system, and calibration NLL along the strength."""
    figure = figures.new_figure(10.4, 4.6, dpi=144)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    _draw_matches(left, results)
    _draw_curves(right, results)
    return figures.png(figure)


def _draw_matches(axes: Any, results: Results) -> None:
    rows = results.rows
    for place, row in enumerate(rows):
        mean, low, high = (100 * getattr(row.means["exact"], name) for name in ("mean", "low", "high"))
        colour = COLOURS[row.system.key]
        axes.barh(place, mean, color=colour, alpha=0.85, height=0.62)
        axes.plot([low, high], [place, place], color="#1f2430", linewidth=1.6, solid_capstyle="butt")
        axes.annotate(
            f"{mean:.0f}%", (high, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9
        )
    axes.set_yticks(range(len(rows)), [row.system.label.replace("warm + ", "") for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, min(108.0, 12 + max(100 * row.means["exact"].high for row in rows)))
    axes.set_xlabel("exact match (%)")
    figures.plain(axes, None)
    axes.tick_params(axis="y", length=0)


def _draw_curves(axes: Any, results: Results) -> None:
    warm = results.calibrations[AUTO].metrics["nll_warm"]
    used = {key: results.strength(key) for key in (PAPER, TUNED)}
    used[AUTO] = results.calibrations[AUTO].chosen.strength  # whichever lever it took
    floor = warm
    for key in (TUNED, AUTO):
        report = results.calibrations[key]
        own = (0.0, used[key], used[PAPER]) if key == TUNED else (0.0, used[key])
        width = max(0.5, max(own) - min(own))
        low, high = max(min(own) - 0.3 * width, report.view.limits[0]), max(own) + 0.5 * width
        strengths = np.linspace(low, min(high, report.view.limits[1]), 161)
        nll, _ = report.curve(strengths.tolist())
        floor = min(floor, *nll)
        label = f"{SETTING[report.direction]}, α = {report.alpha:g}"
        axes.plot(strengths, nll, color=COLOURS[key], linewidth=2, label=label)
    for key, mu in used.items():
        (there,), _ = results.calibrations[key].curve([mu])
        name = "auto's setting" if key == AUTO else results.outcome(key).system.label.split(", ", 1)[1]
        axes.plot(
            [mu],
            [there],
            "o",
            color=COLOURS[key],
            markersize=9,
            markeredgecolor="white",
            zorder=3,
            label=f"{name}: μ = {mu:.2f}",
        )
    axes.axhline(warm, color="0.45", linewidth=1, linestyle="--", zorder=1)
    axes.annotate(
        "warm start",
        (1, warm),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 3),
        fontsize=8,
        textcoords="offset points",
        ha="right",
        color="0.35",
    )
    # A loss that explodes at one end would flatten the part that matters.
    axes.set_ylim(floor - 0.08 * (warm - floor) - 1e-6, warm + 0.6 * (warm - floor) + 1e-6)
    axes.set_xlabel("steering strength μ")
    axes.set_ylabel("calibration NLL (nats a token)")
    figures.plain(axes)
    axes.legend(frameon=False, fontsize=8.5)
