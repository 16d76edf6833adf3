"""The paper's tables in form: each returns Markdown, or None where the results lack its cells."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product

from svdk.bench.tables import markdown
from svdk.eval.compare import macro
from svdk.eval.report_answers import is_away
from svdk.eval.report_cells import (
    LIKELIHOOD,
    Benchmark,
    Cell,
    Pair,
    Results,
    Setting,
    Start,
    mean_gaps,
)
from svdk.eval.report_format import (
    HEADLINES,
    METRICS,
    Entry,
    choice_metric,
    difference,
    entries,
    number,
    setting_name,
    strengths,
    table,
    thinned,
)

TRUTHFULQA = "truthfulqa"


def tables(results: Results) -> list[tuple[str, str | None]]:
    """(title, Markdown or None), in the paper's order."""
    builders: tuple[tuple[str, Callable[[Results], str | None]], ...] = (
        ("Table 1. TruthfulQA: warm start and steering by PEFT", table_1),
        ("Table 2. Commonsense accuracy by task", table_2),
        ("Table 3. Decoding strategies", table_3),
        ("Table 5. Every setting against the warm start", table_5),
        ("Table 12. Calibrated strengths", table_12),
    )
    return [(title, build(results)) for title, build in builders]


def systems(
    results: Results, test: Benchmark, start: Start, decoding: str = LIKELIHOOD
) -> Iterator[tuple[str, Cell]]:
    """The warm start and the headline settings that were measured on it."""
    warm = results.warm(test, start, decoding)
    if warm:
        yield "warm start", warm
    for headline in HEADLINES:
        cell = results.find(test, start, decoding, **headline.pattern)
        if cell:
            yield headline.name, cell


def shown_starts(results: Results, test: Benchmark, decoding: str = LIKELIHOOD) -> list[Start]:
    """Per PEFT and seed at most three lengths: the shortest, the middle one and the longest."""
    starts = results.starts(test, decoding)
    lengths: dict[tuple[str, int], list[int]] = {}
    for start in starts:
        lengths.setdefault((start.peft, start.seed), []).append(start.steps)
    return [start for start in starts if start.steps in thinned(lengths[start.peft, start.seed])]


def entry(results: Results, cell: Cell, warm: Cell | None, metric: str) -> Entry | str:
    """A metric of ``cell`` with its difference to ``warm``."""
    mean = cell.mean(metric)
    if mean is None:
        return "–"
    known = {} if warm is None or cell is warm else results.differences(warm, cell)
    return Entry(metric, mean, known.get(metric))


def names(results: Results, start: Start) -> list[str]:
    """PEFT and steps as two cells."""
    peft, steps = results.start_label(start).split(", ", 1)
    return [peft, steps.replace(" steps", "")]


def _metrics_of(cells: Sequence[Cell]) -> list[str]:
    measured = {name for cell in cells for name in (*cell.scores, *cell.metrics)}
    return [name for name in METRICS if name in measured]


def _system_rows(
    results: Results, test: Benchmark, decoding: str, columns: Sequence[str]
) -> list[list[str | Entry]]:
    rows: list[list[str | Entry]] = []
    base = results.base(test, decoding)
    if base:
        rows.append(["–", "–", "base", *(entry(results, base, None, m) for m in columns)])
    for start in shown_starts(results, test, decoding):
        warm = results.warm(test, start, decoding)
        for name, cell in systems(results, test, start, decoding):
            rows.append([*names(results, start), name, *(entry(results, cell, warm, m) for m in columns)])
    return rows


def _by_test(results: Results, decoding: str, keep: Callable[[Benchmark], bool]) -> str | None:
    parts = []
    for test in filter(keep, results.tests):
        here = [c for c in results.cells if c.test == test and c.decoding == decoding]
        columns = [m for m in _metrics_of(here) if m not in ("token_accuracy", "exact")]
        if any(c.system == "warm" for c in here):
            head = ["PEFT", "steps", "system", *(_head(m) for m in columns)]
            how = "scored by likelihood" if decoding == LIKELIHOOD else f"generated, {decoding}"
            title = f"{results.label(test)}, {how}, n = {results.questions(test):,}"
            parts += [
                f"{title}; differences to the warm start:",
                table(head, _system_rows(results, test, decoding, columns)),
            ]
    return "\n\n".join(parts) or None


def _head(metric: str) -> str:
    known = METRICS[metric]
    return f"{known.label} ({'nats' if known.unit == 'nats' else '%'})"


def table_1(results: Results) -> str | None:
    """MC1, MC2, MC3, NLL by PEFT and length, and the judge's verdicts on greedy answers."""
    parts = [
        _by_test(results, decoding, lambda test: test.task == TRUTHFULQA)
        for decoding in (LIKELIHOOD, "greedy")
    ]
    return "\n\n".join(part for part in parts if part) or None


def table_2(results: Results) -> str | None:
    """Accuracy by option likelihood, a column a task, and the mean over tasks where all were measured."""
    parts = []
    for model in dict.fromkeys(test.model for test in results.tests):
        tests = [t for t in results.tests if t.model == model and t.task != TRUTHFULQA and results.starts(t)]
        if tests:
            parts.append(_commonsense(results, tests))
    return "\n\n".join(parts) or None


def _commonsense(results: Results, tests: list[Benchmark]) -> str:
    metric = "accuracy"
    rows: list[list[str | Entry]] = []
    average = len(tests) > 1
    bases = [results.base(test) for test in tests]
    if any(bases):
        cells = [entry(results, base, None, metric) if base else "–" for base in bases]
        rows.append(["–", "–", "base", *cells, *_average(results, bases, bases, metric)[: int(average)]])
    for start in dict.fromkeys(s for test in tests for s in shown_starts(results, test)):
        by_test = [dict(systems(results, test, start)) for test in tests]
        for name in dict.fromkeys(name for found in by_test for name in found):
            mine, warm = [f.get(name) for f in by_test], [f.get("warm start") for f in by_test]
            cells = [
                entry(results, cell, own, metric) if cell else "–"
                for cell, own in zip(mine, warm, strict=True)
            ]
            last = _average(results, mine, warm, metric)[: int(average)]
            rows.append([*names(results, start), name, *cells, *last])
    labels = [f"{results.label(t)} (n = {results.questions(t):,})" for t in tests]
    head = ["PEFT", "steps", "system", *labels, *["mean over tasks"][: int(average)]]
    return f"Accuracy in %, {tests[0].model}; differences to the warm start:\n\n{table(head, rows)}"


def _average(
    results: Results, mine: Sequence[Cell | None], warm: Sequence[Cell | None], metric: str
) -> list[Entry | str]:
    means = [mean for cell in mine if cell and (mean := cell.mean(metric)) is not None]
    if len(means) < len(mine):
        return ["–"]
    pairs = [Pair(a, b) for a, b in zip(warm, mine, strict=True) if a and b and a is not b]
    gaps = [gap for pair in pairs if (gap := mean_gaps([pair]).get(metric)) is not None]
    complete = len(gaps) == len(mine)
    return [
        Entry(metric, sum(means) / len(means), macro(gaps, resamples=results.resamples) if complete else None)
    ]


def table_3(results: Results) -> str | None:
    """Answers by generation, a block a decoding strategy."""
    if len(results.decodings()) < 2:
        return None
    parts = [_by_test(results, decoding, lambda _: True) for decoding in results.decodings()]
    return "\n\n".join(part for part in parts if part) or None


def table_5(results: Results) -> str | None:
    """Every steered setting, averaged over the warm starts that it was measured on."""
    parts = []
    for test in results.tests:
        groups: dict[tuple[Setting, str], list[Pair]] = {}
        for cell in results.cells:
            warm = cell.start and results.warm(test, cell.start, cell.decoding)
            if cell.test == test and cell.setting and warm:
                groups.setdefault((cell.setting, cell.decoding), []).append(Pair(warm, cell))
        if not groups:
            continue
        found = [(key, pairs, results.pooled(pairs)) for key, pairs in groups.items()]
        answers = choice_metric({m for _, _, differences in found for m in differences})
        columns = [m for m in (answers, "mc2", "token_accuracy", "exact", "nll") if m]
        columns = [m for m in dict.fromkeys(columns) if any(m in d for _, _, d in found)]
        rows: list[list[str | Entry]] = []
        for (setting, decoding), pairs, differences in found:
            name = setting_name(setting, decoding) + (f", {decoding}" if decoding != LIKELIHOOD else "")
            cells = [Entry(m, difference=differences[m]) if m in differences else "–" for m in columns]
            rows.append([name, str(len(pairs)), *cells])
        head = ["setting", "warm starts", *(f"{METRICS[m].label} ({METRICS[m].unit})" for m in columns)]
        parts += [f"{results.label(test)}, n = {results.questions(test):,}:", table(head, rows)]
    return "\n\n".join(parts) or None


def table_12(results: Results) -> str | None:
    """Strengths by task, PEFT and length, the spread of the per-token optimum, the calibration's gain."""
    rows = []
    for test in results.tests:
        for start in results.starts(test):
            found = {h.key: results.find(test, start, **h.pattern) for h in HEADLINES}
            if not any(found.values()):
                continue
            row = [results.label(test), *names(results, start)]
            row.append(strengths(found["paper"].strength) if found["paper"] else "–")
            spread = next((c.calibration.per_token_std for c in found.values() if c and c.calibration), ())
            row.append(strengths(spread) if spread else "–")
            for key in ("default", "log_ratio"):
                cell = found[key]
                row += [strengths(cell.strength), _gain(cell)] if cell else ["–", "–"]
            rows.append(row)
    if not rows:
        return None
    head = [
        "task", "PEFT", "steps", "μ mean", "spread of per-token μ*", "μ optimum", "gain (nats)",
        "μ log-ratio", "gain (nats)",
    ]  # fmt: skip
    note = (
        "One value a fold. μ mean and the spread (standard deviation) are those of the paper's estimator "
        "over calibration tokens, μ optimum is that of svdk's default; the gain is out of fold, on "
        "calibration examples, with its 95 % interval; ●: above 0 in every fold."
    )
    return f"{note}\n\n{markdown(head, rows)}"


def _gain(cell: Cell) -> str:
    if cell.calibration is None:
        return "–"
    folds = zip(cell.calibration.gain, cell.calibration.interval, strict=True)
    shown = [
        f"{number(g, 3, signed=True)} [{number(lo, 3, signed=True)}, {number(hi, 3, signed=True)}]"
        for g, (lo, hi) in folds
    ]
    return " / ".join(shown) + (" ●" if is_away(cell) else "")


_OURS = {
    "TruthfulQA, multiple choice": "mc1",
    "TruthfulQA, open-ended": "truthful",
    "Commonsense": "accuracy",
}


def paper_table(results: Results, paper: Sequence[tuple[str, str]]) -> str:
    """What the paper claims, in its words, beside the same quantity here."""
    rows = [[what, claim, *_ours(results, _OURS.get(what, "accuracy"))] for what, claim in paper]
    head = [
        "",
        "the paper (theirs, other models)",
        "here, mean over warm starts",
        "here, most at one warm start",
    ]
    return markdown(head, rows)


def _ours(results: Results, metric: str) -> tuple[str, str]:
    labels, means, single = [], [], []
    for headline in HEADLINES:
        groups: dict[tuple[Benchmark, str], list[Pair]] = {}
        for test, how in product(results.tests, [LIKELIHOOD, *results.decodings()]):
            for start in results.starts(test, how):
                warm, cell = (
                    results.listed(test, start, how),
                    results.find(test, start, how, **headline.pattern),
                )
                if cell and metric in (found := results.differences(warm, cell)):
                    groups.setdefault((test, how), []).append(Pair(warm, cell))
                    single.append((found[metric], f"{headline.name}, {results.label(test)}", start))
        for (test, how), pairs in groups.items():
            labels.append(f"{headline.name}, {results.label(test)}{'' if how == LIKELIHOOD else f', {how}'}")
            means.append(Entry(metric, difference=results.pooled(pairs)[metric]))
    if not means:
        return "not measured", "not measured"
    most, where, start = max(single, key=lambda found: found[0].mean)
    shown = [f"{label}: {text}" for label, text in zip(labels, entries(means), strict=True)]
    text = f"{difference(metric, most)}: {where}, {results.start_label(start)}"
    return "<br>".join(shown), f"{text} (picked as the largest of {len(single)}, so too large on average)"
