"""The questions of the study, answered from the results by fixed rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from svdk.bench.tables import markdown
from svdk.eval.report_cells import LIKELIHOOD, PEFTS, Benchmark, Cell, Pair, Results, Start
from svdk.eval.report_format import HEADLINES, Headline, listed, setting_name, strengths
from svdk.eval.report_steps import steps_text
from svdk.eval.report_studies import (
    ANSWERS,
    Claim,
    Study,
    claims,
    column_name,
    rows_of,
    rows_table,
    study_text,
    verdict,
)

_OPTIMUM: Mapping[str, Any] = {"mode": "constant", "estimator": "optimum", "objective": "nll"}


def _studies(results: Results) -> list[Study]:
    masks = frozenset(c.setting.alpha for c in results.cells if c.setting and c.setting.alpha > 0)
    return [
        Study(
            "The paper's mean of per-token optima, or the minimiser of the NLL?",
            "`mean`", "`optimum`", {"estimator": "mean"}, {"estimator": "optimum"},
        ),
        Study(
            "`kl_gradient` or `log_ratio`?", "`kl_gradient`", "`log_ratio`",
            {**_OPTIMUM, "direction": "kl_gradient"}, {**_OPTIMUM, "direction": "log_ratio"},
        ),
        Study(
            "Mask or none?", "no mask", "the mask",
            {**_OPTIMUM, "alpha": 0.0}, {**_OPTIMUM, "alpha": masks},
        ),
        Study(
            "One static vector, or a vector for each step?", "steering step by step", "the static vector",
            {**_OPTIMUM, "direction": frozenset({"kl_gradient", "log_ratio"})},
            {**_OPTIMUM, "direction": "vector"}, ignore=("alpha", "penalty"),
        ),
        Study(
            "A constant μ, or a KL budget?", "the constant μ", "the KL budget",
            _OPTIMUM, {"mode": "kl_budget"}, ignore=("strength",),
        ),
        Study(
            "Calibrate for NLL or for token accuracy?",
            "calibrating for NLL", "calibrating for token accuracy",
            {**_OPTIMUM, "objective": "nll"}, {**_OPTIMUM, "objective": "accuracy"},
            metrics=("exact", "token_accuracy", ANSWERS, "nll"),
        ),
    ]  # fmt: skip


def answers(results: Results) -> list[tuple[str, str]]:
    """(question, answer in Markdown), in the order of the report; an unanswerable one says so."""
    found: list[tuple[str, str | None]] = [
        ("Does steering help?", help_text(results)),
        ("When is the calibrated optimum away from 0?", optimum_text(results)),
    ]
    for study in _studies(results):
        text = study_text(results, study)
        if study.b.get("objective") == "accuracy" and text:
            text = f"{carry_over(results)}\n{text}"
        found.append((study.title, text))
    found.append(("How many training steps is a steered short warm start worth?", steps_text(results)))
    return [
        (title, text or "Not answered: the results have no cells that compare this.") for title, text in found
    ]


def warm_pairs(
    results: Results, headline: Headline, *, generated: bool, pool: bool = False
) -> list[tuple[str, Pair]]:
    """(decoding, warm start against a headline setting); ``pool``: one context for all warm starts."""
    pairs = []
    for decoding in results.decodings() if generated else [LIKELIHOOD]:
        for test in results.tests:
            for start in results.starts(test, decoding):
                warm, cell = (
                    results.listed(test, start, decoding),
                    results.find(test, start, decoding, **headline.pattern),
                )
                if cell:
                    context = headline.name if pool else results.start_label(start)
                    context += f", {decoding}" if generated else ""
                    pairs.append((decoding, Pair(warm, cell, context)))
    return pairs


def help_text(results: Results) -> str | None:
    """Each headline setting against the warm start."""
    lines, pooled_rows = [], []
    for headline in HEADLINES:
        scored = [pair for _, pair in warm_pairs(results, headline, generated=False)]
        written = [pair for _, pair in warm_pairs(results, headline, generated=True)]
        if not scored and not written:
            lines.append(f"- **{headline.name}**: not measured.")
            continue
        example = (scored or written)[0].b
        name = setting_name(example.steering, example.decoding)
        shown = []
        for pairs, metrics, how in (
            (scored, (ANSWERS, "nll"), "by likelihood"),
            (written, (ANSWERS,), "generated"),
        ):
            if not pairs:
                continue
            found = claims(results, rows_of(results, pairs), metrics)
            for metric in metrics:
                title = f"answers, {how}" if metric == ANSWERS else column_name(metric)
                text = verdict("steering", "the warm start", title, found[metric])
                shown.append(text + _by_length(results, pairs, found[metric]))
        lines.append(f"- **{headline.name}** ({name}):\n" + "\n".join(f"  - {text}" for text in shown))
        for generated in (False, True):
            pairs = [p for _, p in warm_pairs(results, headline, generated=generated, pool=True)]
            pooled_rows += rows_of(results, pairs)
    if not pooled_rows:
        return None
    note = "Steered minus warm start, averaged over warm starts:"
    return "\n\n".join(["\n".join(lines), note, rows_table(results, pooled_rows, (ANSWERS, "nll"))])


def _by_length(results: Results, pairs: Sequence[Pair], found: Sequence[Claim]) -> str:
    """How many warm starts of each length are better or worse; "" where none is, or all have one length."""
    steps = {f"{results.label(p.a.test)}, {p.context}": p.a.start.steps for p in pairs if p.a.start}
    counts: dict[int, list[int]] = {}
    for claim in found:
        counts.setdefault(steps[claim.label], []).append(claim.sign)
    if len(counts) < 2 or not any(claim.sign for claim in found):
        return ""
    parts = []
    for length, signs in sorted(counts.items()):
        worse = f" ({signs.count(-1)} worse)" if -1 in signs else ""
        parts.append(f"{signs.count(1)} of {len(signs)}{worse} at {length} steps")
    return f" Better by length: {listed(parts)}."


def carry_over(results: Results) -> str:
    """What the strength of each objective does to exact match and token accuracy of the warm start."""
    lines = []
    for objective, name in (("nll", "NLL"), ("accuracy", "token accuracy")):
        pairs = []
        for cell in results.cells:
            setting = cell.setting
            if setting is None or (setting.estimator, setting.objective) != ("optimum", objective):
                continue
            if setting.mode == "constant" and (warm := results.warm(cell.test, cell.start, cell.decoding)):
                pairs.append(Pair(warm, cell, setting_name(setting, cell.decoding)))
        rows = rows_of(results, [p for p in pairs if p.a.finite("exact") and p.b.finite("exact")])
        found = claims(results, rows, ("exact", "token_accuracy"))
        for metric in ("exact", "token_accuracy"):
            subject = f"a strength calibrated for {name}"
            lines.append(f"- {verdict(subject, 'the warm start', column_name(metric), found[metric])}")
    return "\n".join(lines)


# --- when is the optimum away from 0 ---


def is_away(cell: Cell) -> bool:
    """Whether every fold's calibration gain, out of fold, has an interval above 0."""
    found = cell.calibration
    return found is not None and bool(found.interval) and all(low > 0 for low, _ in found.interval)


def optimum_text(results: Results) -> str | None:
    """Strengths by warm-start length, and whether calibration data can tell them from 0."""
    parts, lines = [], []
    for headline in HEADLINES:
        if headline.pattern["estimator"] != "optimum":
            continue
        cells = {
            (test, start): cell
            for test in results.tests
            for start in results.starts(test)
            if (cell := results.find(test, start, **headline.pattern)) and cell.calibration
        }
        if cells:
            lines.append(f"- **{headline.name}**: {_away_sentence(cells)}")
            parts += _away_rows(results, headline, cells)
    if not parts:
        return None
    lengths = sorted({start.steps for _, _, _, by in parts for start in by})
    head = ["task", "PEFT", "setting", *(f"{steps} steps" for steps in lengths)]
    rows = []
    for task, peft, name, by in parts:
        cells_by_steps = {start.steps: cell for start, cell in by.items()}
        shown = [_away_cell(cells_by_steps.get(steps)) for steps in lengths]
        rows.append([task, peft, name, *shown])
    note = (
        "Calibrated μ, one value a fold. ●: away from 0, that is, the gain on calibration examples that the "
        "strength was not fitted on has a 95 % interval above 0 in every fold."
    )
    return "\n\n".join(["\n".join(lines), note, markdown(head, rows)])


def _away_cell(cell: Cell | None) -> str:
    return "–" if cell is None else strengths(cell.strength) + (" ●" if is_away(cell) else "")


_Series = dict[Start, Cell]
_Cells = Mapping[tuple[Benchmark, Start], Cell]


def _series(
    cells: Mapping[tuple[Benchmark, Start], Cell],
) -> dict[tuple[Benchmark, str, int], dict[Start, Cell]]:
    found: dict[tuple[Benchmark, str, int], _Series] = {}
    for (test, start), cell in cells.items():
        found.setdefault((test, start.peft, start.seed), {})[start] = cell
    return found


def _away_rows(results: Results, headline: Headline, cells: _Cells) -> list[tuple[str, str, str, _Series]]:
    several = len({start.seed for _, start in cells}) > 1
    return [
        (
            results.label(test),
            PEFTS.get(peft, peft) + (f", seed {seed}" if several else ""),
            headline.name,
            by,
        )
        for (test, peft, seed), by in _series(cells).items()
    ]


def _away_sentence(cells: _Cells) -> str:
    counts = []
    for steps in sorted({start.steps for _, start in cells}):
        mine = [is_away(cell) for (_, start), cell in cells.items() if start.steps == steps]
        counts.append(f"{sum(mine)} of {len(mine)} warm starts of {steps} steps")
    text = f"the optimum is away from 0 at {listed(counts)}."
    ends = [_ends(by) for by in _series(cells).values() if len(by) > 1]
    if ends:
        kinds = [(is_away(first), is_away(last)) for first, last in ends]
        smaller = sum(_size(last) < _size(first) for first, last in ends)
        text += (
            f" Of {len(ends)} series from the shortest to the longest warm start, it is away from 0 at the "
            f"shortest only in {kinds.count((True, False))}, at both ends in {kinds.count((True, True))}, at "
            f"the longest only in {kinds.count((False, True))}, at neither in {kinds.count((False, False))}; "
            f"|μ| is smaller at the longest in {smaller}."
        )
    negative = sum(sum(cell.strength) < 0 for cell in cells.values())
    return text + f" It is negative at {negative} of {len(cells)} warm starts."


def _ends(by: Mapping[Start, Cell]) -> tuple[Cell, Cell]:
    ordered: Sequence[Start] = sorted(by, key=lambda start: start.steps)
    return by[ordered[0]], by[ordered[-1]]


def _size(cell: Cell) -> float:
    return abs(sum(cell.strength)) / max(1, len(cell.strength))
