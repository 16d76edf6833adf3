"""Comparisons of two ways to steer, setting by setting, and the sentences that may be said about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from svdk.eval.compare import Difference
from svdk.eval.report_cells import LIKELIHOOD, Benchmark, Cell, Pair, Results, usual_penalty
from svdk.eval.report_format import (
    METRICS,
    Entry,
    choice_metric,
    holding,
    phrase,
    setting_name,
    table,
    verdict_sign,
)

ANSWERS = "answers"
"""Stands for the answer metric of each test."""


class Claim(NamedTuple):
    """One comparison that a sentence counts."""

    label: str
    metric: str
    difference: Difference
    holds: bool
    """Whether it stays significant in its family."""

    @property
    def sign(self) -> int:
        """1 when the subject is better, -1 when worse, 0 when undecided."""
        return verdict_sign(self.metric, self.difference) if self.holds else 0


@dataclass(frozen=True)
class Study:
    """``b`` against ``a``: fields of :class:`~svdk.eval.report_cells.Setting`, all others equal."""

    title: str
    a_name: str
    b_name: str
    a: Mapping[str, Any]
    b: Mapping[str, Any]
    ignore: tuple[str, ...] = ()
    metrics: tuple[str, ...] = (ANSWERS, "nll")

    def pairs(self, results: Results) -> list[Pair]:
        """Every pair in the results."""
        found = results.matched(self.a, self.b, ignore=self.ignore, label=self._context)
        if "penalty" not in self.ignore:
            return found
        # Where it may differ, it has to be the usual one on one side at least.
        return [p for p in found if p.a.steering.penalty == usual_penalty(p.a.decoding)]

    def _context(self, a: Cell, b: Cell) -> str:
        ours, theirs = a.steering, b.steering
        hidden = [name for name in self.a if not isinstance(self.a[name], frozenset)]
        parts = [setting_name(ours, a.decoding, without=hidden)]
        if isinstance(self.b.get("alpha"), frozenset):
            parts.append(f"α = {theirs.alpha:g}")
        if theirs.strength is not None and ours.strength is None:
            shown = setting_name(theirs, b.decoding)
            parts.append(shown[shown.rindex(", ") + 2 :])
        if a.decoding != LIKELIHOOD:
            parts.append(a.decoding)
        return ", ".join(part for part in parts if part)


class Row(NamedTuple):
    """Pairs on one test in one context, averaged over warm starts."""

    test: Benchmark
    context: str
    starts: int
    differences: Mapping[str, Difference]


def rows_of(results: Results, pairs: Sequence[Pair]) -> list[Row]:
    """One row for each test and context, in the order of the pairs."""
    groups: dict[tuple[Benchmark, str], list[Pair]] = {}
    for pair in pairs:
        groups.setdefault((pair.a.test, pair.context), []).append(pair)
    return [
        Row(test, context, len(group), results.pooled(group)) for (test, context), group in groups.items()
    ]


def resolve(metric: str, measured: Mapping[str, Any]) -> str | None:
    """The metric that a column shows for a test: itself, or the test's answer metric."""
    found = choice_metric(measured) if metric == ANSWERS else metric
    return found if found in measured else None


def claims(results: Results, rows: Sequence[Row], metrics: Sequence[str]) -> dict[str, list[Claim]]:
    """By column, every comparison of ``rows``; they are one family for Holm's correction."""
    flat = [
        (column, row, name)
        for row in rows
        for column in metrics
        if (name := resolve(column, row.differences)) is not None
    ]
    kept = holding([row.differences[name] for _, row, name in flat])
    found: dict[str, list[Claim]] = {column: [] for column in metrics}
    for (column, row, name), holds in zip(flat, kept, strict=True):
        label = f"{results.label(row.test)}, {row.context}" if row.context else results.label(row.test)
        found[column].append(Claim(label, name, row.differences[name], holds))
    return found


def verdict(subject: str, versus: str, what: str, found: Sequence[Claim]) -> str:
    """One sentence that claims no more than the comparisons show."""
    better = [claim for claim in found if claim.sign > 0]
    worse = [claim for claim in found if claim.sign < 0]
    total = f"{len(found)} comparisons" if len(found) != 1 else "1 comparison"
    if not found:
        return f"{what}: not measured."
    if better and worse:
        text = (
            f"{what}: mixed. Of {total}, {subject} is better than {versus} in {len(better)} (most: "
            f"{_largest(better)}) and worse in {len(worse)} (most: {_largest(worse)})."
        )
    elif better or worse:
        some, side, other = (better, "better", "worse") if better else (worse, "worse", "better")
        text = (
            f"{what}: {subject} is {side} than {versus} in {len(some)} of {total} (most: {_largest(some)}), "
            f"demonstrably {other} in none."
        )
    else:
        text = f"{what}: no demonstrable difference between {subject} and {versus} in {total}."
    hints = [c for c in found if not c.holds and verdict_sign(c.metric, c.difference)]
    if hints:
        up = sum(verdict_sign(c.metric, c.difference) > 0 for c in hints)
        text += f" Hints (intervals that exclude 0, uncorrected): {up} better, {len(hints) - up} worse."
    return text


def _largest(found: Sequence[Claim]) -> str:
    most = max(found, key=lambda claim: abs(claim.difference.mean))
    return f"{METRICS[most.metric].label} {phrase(most.metric, most.difference)}, {most.label}"


def column_name(metric: str) -> str:
    """What a verdict or a table head calls a column."""
    return {"nll": "NLL", ANSWERS: "Answers"}.get(metric) or METRICS[metric].label.capitalize()


def study_text(results: Results, study: Study) -> str | None:
    """Verdicts and table of a study; None where the results have no pair for it."""
    rows = rows_of(results, study.pairs(results))
    if not rows:
        return None
    found = claims(results, rows, study.metrics)
    lines = [f"- {verdict(study.b_name, study.a_name, column_name(m), found[m])}" for m in study.metrics]
    note = f"{study.b_name} minus {study.a_name}, all else equal, averaged over warm starts:"
    return (
        "\n".join(lines) + f"\n\n{note[0].upper()}{note[1:]}\n\n" + rows_table(results, rows, study.metrics)
    )


def rows_table(results: Results, rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """The differences of ``rows`` as a Markdown table."""
    units = {m: "points" if m == ANSWERS else METRICS[m].unit for m in metrics}
    head = [
        "task (answers by)",
        "setting",
        "warm starts",
        *(f"{column_name(m)} ({units[m]})" for m in metrics),
    ]
    lines: list[list[str | Entry]] = []
    for row in rows:
        answers = choice_metric(row.differences)
        label = results.label(row.test) + (f" ({METRICS[answers].label})" if answers else "")
        cells: list[str | Entry] = [label, row.context or "–", str(row.starts)]
        for column in metrics:
            name = resolve(column, row.differences)
            cells.append("–" if name is None else Entry(name, difference=row.differences[name]))
        lines.append(cells)
    return table(head, lines)
