"""What the figures of the evaluation report share: size, colours and markers."""

from __future__ import annotations

from typing import Any, NamedTuple

from svdk.eval.report_format import Metric
from svdk.utils import figures

COLOURS = {
    "warm": figures.BLACK, "paper": figures.VERMILION, "default": figures.BLUE, "log_ratio": figures.GREEN,
    "vector": figures.PURPLE, "kl_budget": figures.ORANGE,
}  # fmt: skip
MARKERS = {"warm": "o", "paper": "s", "default": "o", "log_ratio": "D", "vector": "v", "kl_budget": "^"}
WIDTH = 7.5
"""Inches: 900 pixels."""


class Picture(NamedTuple):
    """A figure to be written as ``evaluation-NAME.png``."""

    name: str
    title: str
    """What the reader sees, and the marks; the alternative text too."""
    figure: Any


def new_figure(height: float, title: str) -> Any:
    """An empty figure of the report's width, ``height`` in inches."""
    return figures.new_figure(WIDTH, height, title)


def plain(axes: Any, grid: str) -> None:
    """Two spines, a pale grid along ``grid`` ("x", "y" or "both"), small ticks."""
    figures.plain(axes, grid)
    axes.tick_params(labelsize=8)


def handle(key: str) -> Any:
    """The legend entry of a system."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color=COLOURS[key], marker=MARKERS[key], markersize=5, linewidth=1.5)


def axis_label(known: Metric) -> str:
    """The metric and its unit."""
    return f"{known.label} (nats a token)" if known.unit == "nats" else f"{known.label} (%)"


def slug(label: str) -> str:
    """A file name's part: letters and digits, single dashes between."""
    return "-".join("".join(c if c.isalnum() else " " for c in label.lower()).split())
