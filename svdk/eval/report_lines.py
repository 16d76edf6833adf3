"""The paper's figures 2 and 3 in form: results along the length of the warm start, and along the strength."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from svdk.eval.report_cells import PEFTS, TASKS, Benchmark, Cell, Curve, Results, Start
from svdk.eval.report_format import HEADLINES, METRICS, choice_metric, verdict_sign
from svdk.eval.report_style import COLOURS, MARKERS, Picture, axis_label, handle, new_figure, plain, slug

# --- figure 2: warm-start length ---


def figures_2(results: Results) -> Iterator[Picture]:
    """Answers and NLL against the length of the warm start, a figure a test, a column a PEFT."""
    for test in results.tests:
        series: dict[tuple[str, int], list[Start]] = {}
        for start in results.starts(test):
            series.setdefault((start.peft, start.seed), []).append(start)
        columns = [starts for starts in series.values() if len(starts) > 1]
        if columns:
            yield _figure_2(results, test, columns)


def _figure_2(results: Results, test: Benchmark, columns: list[list[Start]]) -> Picture:
    label = results.label(test)
    answers = choice_metric(results.listed(test, columns[0][0]).scores)
    metrics = [m for m in (answers, "nll") if m]
    title = f"{label}: length of the warm start (n = {results.questions(test):,})"
    figure = new_figure(0.9 + 2.4 * len(metrics), title)
    panels = figure.subplots(len(metrics), len(columns), squeeze=False, sharex="col", sharey="row")
    names: dict[str, str] = {}
    for column, starts in enumerate(columns):
        for row, metric in enumerate(metrics):
            names |= _length_panel(panels[row][column], results, test, starts, metric)
        seed = f", seed {starts[0].seed}" * (len({s.seed for each in columns for s in each}) > 1)
        panels[0][column].set_title(PEFTS.get(starts[0].peft, starts[0].peft) + seed, fontsize=9)
        panels[-1][column].set_xlabel("warm-start steps", fontsize=9)
    for row, metric in enumerate(metrics):
        panels[row][0].set_ylabel(axis_label(METRICS[metric]), fontsize=9)
        _fit(panels[row], results, test, columns, metric)
    handles = [_base_handle() if key == "base" else handle(key) for key in names]
    figure.legend(
        handles, list(names.values()), loc="outside lower center", ncols=5, fontsize=8, frameon=False
    )
    text = (
        f"Figure 2, {label}. Answers and NLL against the length of the warm start, with and without "
        "steering; filled: the paired 95 % interval of the difference to the warm start excludes 0"
    )
    return Picture(f"figure-2-{slug(label)}", text, figure)


def _base_handle() -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color="0.55", linestyle="--", linewidth=1)


def _lines(
    results: Results, test: Benchmark, starts: Sequence[Start]
) -> Iterator[tuple[str, str, list[Cell | None]]]:
    yield "warm", "warm start", [results.warm(test, start) for start in starts]
    for h in HEADLINES:
        yield h.key, h.name, [results.find(test, start, **h.pattern) for start in starts]


def _shown(cell: Cell | None, metric: str) -> float | None:
    mean = cell.mean(metric) if cell else None
    return None if mean is None or not math.isfinite(mean) else METRICS[metric].scale * mean


def _length_panel(
    axes: Any, results: Results, test: Benchmark, starts: list[Start], metric: str
) -> dict[str, str]:
    """Draw the lines of one PEFT; the legend's names by key."""
    names = {}
    for key, name, cells in _lines(results, test, starts):
        found = [
            (start, y, cell)
            for start, cell in zip(starts, cells, strict=True)
            if cell is not None and (y := _shown(cell, metric)) is not None
        ]
        if not found:
            continue
        names[key] = name
        axes.plot(
            [start.steps for start, *_ in found], [y for _, y, _ in found], color=COLOURS[key], linewidth=1.5
        )
        for start, y, cell in found:
            gap = results.differences(results.listed(test, start), cell).get(metric)
            solid = key == "warm" or (gap is not None and verdict_sign(metric, gap) != 0)
            axes.plot(
                start.steps, y, marker=MARKERS[key], color=COLOURS[key], markersize=5, zorder=3,
                markerfacecolor=COLOURS[key] if solid else "white",
            )  # fmt: skip
    base = _shown(results.base(test), metric)
    if base is not None:
        axes.axhline(base, color="0.55", linestyle="--", linewidth=1, zorder=1)
        names["base"] = "base model"
    lengths = [start.steps for start in starts]
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{steps}" for steps in lengths])
    axes.minorticks_off()
    plain(axes, "both")
    return names


def _fit(
    axes: Sequence[Any], results: Results, test: Benchmark, columns: list[list[Start]], metric: str
) -> None:
    """The axis follows all but the paper's mean, which may lie anywhere: its line leaves the panel then."""
    seen = [_shown(results.base(test), metric)]
    for starts in columns:
        for key, _, cells in _lines(results, test, starts):
            seen += [_shown(cell, metric) for cell in cells if key != "paper"]
    values = [y for y in seen if y is not None]
    margin = 0.08 * (max(values) - min(values)) or 1.0
    axes[0].set_ylim(min(values) - margin, max(values) + margin)


# --- figure 3: the strength ---


def figures_3(results: Results) -> Iterator[Picture]:
    """NLL and answers along mu, a figure for each task and PEFT, a column for each direction and mask."""
    groups: dict[tuple[str, str], list[Curve]] = {}
    for curve in results.curves:
        groups.setdefault((curve.task, curve.peft), []).append(curve)
    for (task, peft), curves in groups.items():
        yield _figure_3(results, f"{TASKS.get(task, task)}, {PEFTS.get(peft, peft)}", curves)


def _figure_3(results: Results, label: str, curves: list[Curve]) -> Picture:
    columns = list(dict.fromkeys((c.direction, c.alpha) for c in curves))
    lengths = sorted({c.steps for c in curves})
    answers = choice_metric(curves[0].metrics)
    rows = ["nll", *([answers] if answers else [])]
    figure = new_figure(1.1 + 2.3 * len(rows), f"{label}: test questions along the strength μ")
    panels = figure.subplots(len(rows), len(columns), squeeze=False, sharex="col", sharey="row")
    floor, top = _nll_range(curves)
    for column, (direction, alpha) in enumerate(columns):
        mine = sorted(
            (c for c in curves if (c.direction, c.alpha) == (direction, alpha)), key=lambda c: c.steps
        )
        for row, metric in enumerate(rows):
            for curve in mine:
                _strength_line(panels[row][column], results, curve, metric, lengths)
            panels[row][column].axvline(0, color="0.6", linewidth=1, zorder=0)
            plain(panels[row][column], "both")
        panels[0][column].set_title(f"{direction}, {f'α = {alpha:g}' if alpha else 'no mask'}", fontsize=9)
        panels[-1][column].set_xlim(*_mu_range(mine, top))
        panels[-1][column].set_xlabel("μ", fontsize=9)
    for row, metric in enumerate(rows):
        panels[row][0].set_ylabel(axis_label(METRICS[metric]), fontsize=9)
    panels[0][0].set_ylim(floor, top)
    figure.legend(
        *_length_legend(lengths), loc="outside lower center", ncols=min(8, len(lengths)), fontsize=8,
        frameon=False, title="warm-start steps", title_fontsize=8,
    )  # fmt: skip
    text = (
        f"Figure 3, {label}. NLL and answers on the test questions along the strength μ; μ = 0 is the warm "
        "start. Ring: the calibrated optimum, where it lies in the panel; dot: the least NLL on the test "
        "questions, known only afterwards"
    )
    return Picture(f"figure-3-{slug(label)}", text, figure)


def _shade(steps: int, lengths: Sequence[int]) -> Any:
    from matplotlib import colormaps

    place = lengths.index(steps) / max(1, len(lengths) - 1)
    return colormaps["viridis"](0.88 * place)  # ordered in lightness, so that it reads without colour too


def _length_legend(lengths: Sequence[int]) -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=_shade(steps, lengths), linewidth=2) for steps in lengths]
    return handles, [f"{steps}" for steps in lengths]


def _strength_line(axes: Any, results: Results, curve: Curve, metric: str, lengths: Sequence[int]) -> None:
    values = curve.nll if metric == "nll" else curve.metrics.get(metric, ())
    scale = METRICS[metric].scale
    points = sorted((mu, scale * y) for mu, y in zip(curve.mu, values, strict=False) if math.isfinite(y))
    if not points:
        return
    colour = _shade(curve.steps, lengths)
    axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.6)
    best = min(points, key=lambda p: p[1])
    if metric == "nll" and best not in (points[0], points[-1]):  # at an end it is not known to be the least
        axes.plot(*best, marker="o", color=colour, markersize=4)
    for strength in _calibrated(results, curve):
        axes.plot(
            strength, _between(points, strength), marker="o", color=colour, markersize=7,
            markerfacecolor="none", markeredgewidth=1.2,
        )  # fmt: skip


def _calibrated(results: Results, curve: Curve) -> list[float]:
    """The strengths of ``optimum`` for this curve, averaged over folds, one a seed of the warm start."""
    like: Mapping[str, Any] = {**HEADLINES[1].pattern, "direction": curve.direction, "alpha": curve.alpha}
    found = []
    for test in results.tests:
        for start in results.starts(test):
            if (test.task, start.peft, start.steps) == (curve.task, curve.peft, curve.steps):
                cell = results.find(test, start, **like)
                found += [sum(cell.strength) / len(cell.strength)] if cell and cell.strength else []
    return found


def _between(points: Sequence[tuple[float, float]], x: float) -> float:
    """Linear between the points, NaN (not drawn) outside of them."""
    place = bisect_left([mu for mu, _ in points], x)
    if place == len(points) or (place == 0 and x < points[0][0]):
        return math.nan
    if place == 0:
        return points[0][1]
    (x0, y0), (x1, y1) = points[place - 1], points[place]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def _nll_range(curves: Sequence[Curve]) -> tuple[float, float]:
    """A loss that explodes at one end would flatten the part that matters."""
    floor = min((y for c in curves for y in c.nll if math.isfinite(y)), default=0.0)
    warm = [_between(sorted(zip(c.mu, c.nll, strict=True)), 0.0) for c in curves]
    top = max((y for y in warm if math.isfinite(y)), default=floor + 1.0)
    height = max(top - floor, 0.05)
    return floor - 0.06 * height, top + 0.4 * height


def _mu_range(curves: Sequence[Curve], top: float) -> tuple[float, float]:
    """Strengths at which some curve is still in the panel, and one grid point more on either side."""
    low, high = 0.0, 0.0
    for curve in curves:
        inside = [i for i, y in enumerate(curve.nll) if y <= top]
        if inside:
            low = min(low, curve.mu[max(0, inside[0] - 1)])
            high = max(high, curve.mu[min(len(curve.mu) - 1, inside[-1] + 1)])
    return (low, high) if low < high else (-1.0, 1.0)
