"""Reading RESULTS.jsonl and CURVES.jsonl; every complaint names file, line and field."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from svdk.errors import DataError
from svdk.eval.report_cells import (
    GIVEN,
    Benchmark,
    Calibration,
    Cell,
    Curve,
    Results,
    Setting,
    Start,
)
from svdk.utils.checks import is_number
from svdk.utils.files import read_text
from svdk.utils.views import VIEWS

FORMAT_VERSION = 1


def read_results(path: Path) -> Results:
    """The cells of a RESULTS.jsonl, and the curves of a CURVES.jsonl beside it.

    An unfinished last line is left out with a note: a run that was stopped leaves one.

    Raises:
        DataError: no such file, nothing in it, a line that is not JSON or not a cell of this format, or a
            cell that stands there twice; the message names file and line.
    """
    cells: list[Cell] = []
    ids: dict[Any, int] = {}
    lines, notes = _lines(path)
    for number, row in lines:
        where = f"{path}:{number}"
        if row.get("format_version") != FORMAT_VERSION:
            raise DataError(
                f"{where}: format_version was {row.get('format_version')!r}; allowed: {FORMAT_VERSION}"
            )
        cell = _cell(row, where)
        for key in (cell.id, (cell.test, cell.start, cell.system, cell.setting, cell.decoding)):
            if key in ids:
                raise DataError(f"{where}: cell {cell.id} was already on line {ids[key]}; allowed: once")
            ids[key] = number
        other = next((c for c in cells if c.test == cell.test), cell)
        if other.questions != cell.questions:
            raise DataError(f"{where}: test_questions was {cell.questions}; allowed: {other.questions}")
        cells.append(cell)
    if not cells:
        raise DataError(f"{path} held 0 cells; allowed: at least 1")
    curves: list[Curve] = []
    beside = path.with_name(path.name.replace("RESULTS", "CURVES"))
    if beside != path and beside.exists():
        lines, more = _lines(beside)
        notes += more
        curves = [_curve(row, f"{beside}:{number}") for number, row in lines]
    return Results(tuple(cells), tuple(notes), tuple(curves))


def _lines(path: Path) -> tuple[list[tuple[int, dict[str, Any]]], list[str]]:
    found: list[tuple[int, dict[str, Any]]] = []
    lines = read_text(path, "results file", "make one with svdk eval").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # no newline at its end: the writer was stopped
                return found, [f"Line {number} of {path.name} was cut short and is left out."]
            raise DataError(f"{path}:{number} was not a JSON object: {error}") from None
        found.append((number, row))
    return found, []


class _Reader:
    """The fields of one line, with errors that name file, line and field."""

    def __init__(self, row: Mapping[str, Any], where: str) -> None:
        self.row, self.where = row, where

    def fail(self, name: str, value: object, allowed: str) -> DataError:
        text = repr(value)
        return DataError(
            f"{self.where}: {name} was {text[:60]}{'...' * (len(text) > 60)}; allowed: {allowed}"
        )

    def get(self, name: str, kind: type | tuple[type, ...], allowed: str, *, null: bool = False) -> Any:
        if name not in self.row:
            raise DataError(f"{self.where}: {name} was missing; allowed: {allowed}")
        value = self.row[name]
        if value is None and null:
            return None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.fail(name, value, allowed + " or null" * null)
        return value

    def text(self, name: str, *, null: bool = False) -> Any:
        return self.get(name, str, "a string", null=null)

    def number(self, name: str, *, null: bool = False) -> Any:
        value = self.get(name, (int, float), "a number", null=null)
        return None if value is None else float(value)

    def integer(self, name: str, least: int, *, null: bool = False) -> Any:
        value = self.get(name, int, "an integer", null=null)
        if value is not None and value < least:
            raise self.fail(name, value, f"at least {least}")
        return value

    def numbers(self, name: str, value: object, count: int | None = None) -> tuple[float, ...]:
        """Null becomes NaN."""
        if not isinstance(value, list) or not all(x is None or is_number(x) for x in value):
            raise self.fail(name, value, "a list of numbers")
        if count is not None and len(value) != count:
            raise self.fail(name, f"{len(value)} numbers", str(count))
        return tuple(math.nan if x is None else float(x) for x in value)


def _cell(row: Mapping[str, Any], where: str) -> Cell:
    read = _Reader(row, where)
    system = read.text("system")
    if system not in VIEWS:
        raise read.fail("system", system, ", ".join(VIEWS))
    questions, folds = read.integer("test_questions", 1), read.integer("folds", 1)
    base = system == "base"
    peft, steps = read.text("peft", null=base), read.integer("steps", 0, null=base)
    seed = read.integer("train_seed", 0, null=base) or 0
    metrics = read.get("metrics", dict, "an object")
    for name, value in metrics.items():
        if value is not None and not is_number(value):
            raise read.fail(f"metrics.{name}", value, "a number or null")
    scores = read.get("scores", dict, "an object")
    strength = read.get("strength", list, "a list", null=True)
    strengths = () if strength is None else read.numbers("strength", strength)
    return Cell(
        id=read.text("cell"),
        test=Benchmark(read.text("model"), read.text("task"), read.text("question_ids_hash"), folds),
        questions=questions,
        start=None if peft is None or steps is None else Start(peft, steps, seed),
        system=system,
        setting=_setting(read, strengths) if system == "steered" else None,
        strength=strengths,
        decoding=read.text("decoding"),
        metrics={name: float(value) for name, value in metrics.items() if value is not None},
        scores={
            name: torch.tensor(read.numbers(f"scores.{name}", values, questions), dtype=torch.float64)
            for name, values in scores.items()
        },
        calibration=_calibration(read),
        seconds=read.number("seconds", null=True) or 0.0,
    )


def _setting(read: _Reader, strengths: tuple[float, ...]) -> Setting:
    # Where an estimator has no objective (the mean of per-token optima), it stands for the NLL's.
    setting = Setting(
        direction=read.text("direction"),
        alpha=read.number("alpha", null=True) or 0.0,
        penalty=read.number("penalty", null=True),
        mode=read.text("strength_mode", null=True) or "constant",
        estimator=read.text("estimator", null=True),
        objective=read.text("objective", null=True) or "nll",
    )
    if setting.estimator not in GIVEN:
        return setting
    if not strengths:
        raise read.fail("strength", None, "a list of numbers where the estimator is null")
    return setting._replace(strength=strengths)


def _calibration(read: _Reader) -> Calibration | None:
    found = read.get("calibration", dict, "an object", null=True)
    if found is None:
        return None
    gain = read.numbers("calibration.gain", found.get("gain", []))
    intervals = found.get("interval", [])
    if not isinstance(intervals, list):
        raise read.fail("calibration.interval", intervals, "a list of pairs")
    pairs = tuple(read.numbers("calibration.interval", pair, 2) for pair in intervals)
    std = read.numbers("calibration.per_token_std", found.get("per_token_std") or [])
    return Calibration(gain, pairs, std)  # type: ignore[arg-type]


def _curve(row: Mapping[str, Any], where: str) -> Curve:
    read = _Reader(row, where)
    mu = read.numbers("mu", read.get("mu", list, "a list"))
    metrics = read.get("metrics", dict, "an object")
    return Curve(
        read.text("task"),
        read.text("peft"),
        read.integer("steps", 0),
        read.text("direction"),
        read.number("alpha", null=True) or 0.0,
        mu,
        read.numbers("nll", read.get("nll", list, "a list"), len(mu)),
        {name: read.numbers(f"metrics.{name}", values, len(mu)) for name, values in metrics.items()},
    )
