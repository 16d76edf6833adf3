"""Figures as PNG, in colours that colour-blind readers tell apart (Okabe and Ito); they need matplotlib."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from svdk.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLACK, BLUE, GREEN, ORANGE = "#000000", "#0072b2", "#009e73", "#e69f00"
PURPLE, SKY, VERMILION = "#cc79a7", "#56b4e9", "#d55e00"


def check_matplotlib() -> None:
    """``InputError`` when matplotlib is not installed; call it before a long run."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError("plot needs matplotlib, which is not installed: pip install 'svdk[plot]'") from error


def new_figure(width: float, height: float, title: str = "", *, dpi: int = 120) -> Figure:
    """An empty figure of this size in inches."""
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def plain(axes: Any, grid: str | None = "both") -> None:
    """Two spines, and a pale grid along ``grid`` ("x", "y", "both" or None) behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    if grid is not None:
        axes.grid(color="0.92", axis=grid)
        axes.set_axisbelow(True)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file; the same figure gives the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image, metadata={"Software": None})  # by default matplotlib's version
    return image.getvalue()
