"""Markdown tables of the filters on one row of logits, and of calls beside busy loops."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from svdk.bench import figures, tables
from svdk.bench.cases import FILTERS, SETTINGS

Row = dict[str, Any]
ALONE = tuple(name for name in FILTERS if name != "plain")
"""The settings that only :func:`filters` shows."""


def filters(found: dict[str, Any]) -> list[str]:
    """Every filter beside plain sampling of the same shape, and the best that PyTorch offers for each."""
    points = [(p, rows) for p, rows in tables.points(found["micro"]) if p["setting"] in FILTERS]
    filtered = {_shape(point) for point, _ in points if point["setting"] in ALONE}
    if not filtered:
        return []
    points = [(point, rows) for point, rows in points if _shape(point) in filtered]
    plain = {_shape(p): tables.best_of_ours(rows) for p, rows in points if p["setting"] == "plain"}
    lines = []
    for point, rows in sorted(points, key=lambda x: (*_shape(x[0]), FILTERS.index(x[0]["setting"]))):
        ours, best = tables.best_of_ours(rows), best_of_theirs(rows)
        if ours is None:
            continue
        beside = plain.get(_shape(point))
        cells = [point["dtype"], point["logits"], f"{point['vocab']:,}", str(point["batch"])]
        cells += [SETTINGS[point["setting"]].what.removeprefix("not steered, "), micros(ours)]
        cells.append("" if beside is None else tables.times(ours["median_s"] / beside["median_s"]))
        lines.append(cells + _against(best, ours))
    head = [
        "dtype",
        "logits",
        "V",
        "B",
        "sampling",
        "svdk µs",
        "of plain",
        "best of PyTorch",
        "µs",
        "svdk is faster by",
    ]
    title = (
        '**Filters on logits alone** (no steering; "of plain": svdk\'s time over its own of temperature 1):'
    )
    return [title, tables.markdown(head, lines)]


def busy(rows: Iterable[Row]) -> list[str]:
    """Median times without and with busy loops beside them."""
    points = tables.points(rows)
    quiet = {_key(p): found for p, found in points if not p["busy"]}
    lines = []
    for point, found in points:
        before = quiet.get(_key(point))
        if not point["busy"] or before is None:
            continue
        cells = [point["setting"], f"{point['vocab']:,}", str(point["batch"])]
        for pick in (tables.best_of_ours, best_of_theirs):
            cells += _both(pick, before, found)
        lines.append(cells)
    if not lines:
        return []
    loops = max(p["busy"] for p, _ in points)
    head = ["setting", "V", "B", "svdk quiet µs", "busy", "ratio", "PyTorch quiet µs", "busy", "ratio"]
    return [
        f"**On a busy machine** ({loops} busy loops beside the calls, medians):",
        tables.markdown(head, lines),
    ]


def best_of_theirs(rows: list[Row]) -> Row | None:
    """The fastest baseline of a point."""
    theirs = [row for row in rows if not row["contestant"].startswith("svdk")]
    return min(theirs, key=lambda row: row["median_s"], default=None)


def micros(row: Row) -> str:
    """Three significant digits, in microseconds."""
    value = float(f"{row['median_s'] * 1e6:.3g}")
    return f"{value:,.0f}" if value >= 100 else f"{value:g}"


def _shape(point: Row) -> tuple[Any, ...]:
    return tuple(point[name] for name in ("dtype", "logits", "vocab", "batch", "cache"))


def _key(point: Row) -> tuple[Any, ...]:
    return (point["setting"], *_shape(point))


def _against(best: Row | None, ours: Row) -> list[str]:
    if best is None:
        return ["", "", ""]
    ratio = "same" if tables.same(best, ours) else f"{tables.times(best['median_s'] / ours['median_s'])}×"
    return [figures.NAMES[figures.family(best["contestant"])], micros(best), ratio]


def _both(pick: Callable[[list[Row]], Row | None], quiet: list[Row], busy: list[Row]) -> list[str]:
    before, after = pick(quiet), pick(busy)
    if before is None or after is None:
        return ["", "", ""]
    return [micros(before), micros(after), tables.times(after["median_s"] / before["median_s"])]
