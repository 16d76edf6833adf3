"""Figures: the same bytes each time, and a clear word where matplotlib is missing."""

from __future__ import annotations

import sys

import pytest

from svdk.errors import InputError
from svdk.utils import figures


def test_the_same_figure_gives_the_same_bytes():
    pytest.importorskip("matplotlib")

    def drawn() -> bytes:
        figure = figures.new_figure(2.0, 1.5, "title", dpi=100)
        axes = figure.subplots()
        axes.plot([0, 1], [1, 0], color=figures.BLUE)
        figures.plain(axes, "x")
        return figures.png(figure)

    image = drawn()
    assert image == drawn()
    assert image.startswith(b"\x89PNG")
    assert (int.from_bytes(image[16:20], "big"), int.from_bytes(image[20:24], "big")) == (200, 150)
    assert b"Matplotlib" not in image


def test_no_grid():
    pytest.importorskip("matplotlib")
    figure = figures.new_figure(2.0, 1.5)
    left, right = figure.subplots(1, 2)
    figures.plain(left, None)
    figures.plain(right)
    assert not any(line.get_visible() for line in left.get_xgridlines())
    assert all(line.get_visible() for line in right.get_xgridlines())
    assert not left.spines["top"].get_visible()


def test_a_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for needs in (figures.check_matplotlib, lambda: figures.new_figure(1.0, 1.0)):
        with pytest.raises(
            InputError, match=r"matplotlib, which is not installed: pip install 'svdk\[plot\]'"
        ):
            needs()


def test_colours_are_told_apart():
    names = ("BLACK", "BLUE", "GREEN", "ORANGE", "PURPLE", "SKY", "VERMILION")
    colours = {getattr(figures, name) for name in names}
    assert len(colours) == len(names)
