"""``evaluation.md`` and its figures from a results file: what was run, the answers, the tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from svdk.errors import InputError
from svdk.eval.report_answers import answers
from svdk.eval.report_cells import LIKELIHOOD, PEFTS, Results
from svdk.eval.report_figures import pictures
from svdk.eval.report_format import HEADLINES, LEAST_QUESTIONS, LEGEND, listed, setting_name
from svdk.eval.report_reading import read_results
from svdk.eval.report_style import Picture
from svdk.eval.report_tables import paper_table, tables
from svdk.utils.bootstrap import RESAMPLES
from svdk.utils.figures import check_matplotlib, png
from svdk.utils.files import write_file

NAME = "evaluation.md"
PAPER = (
    ("TruthfulQA, multiple choice", "“improves multiple-choice accuracy by up to 5 percentage points”"),
    ("TruthfulQA, open-ended", "“open-ended truthfulness by 2 percentage points”"),
    ("Commonsense", "“similar gains (1-2 percentage points) on commonsense datasets”"),
)
"""What the paper's abstract claims (arXiv 2509.15888), by kind of task."""


def write_report(
    results: str | Path,
    output: str | Path,
    *,
    command: str,
    paper: Sequence[tuple[str, str]] = PAPER,
    machine: Mapping[str, Any] | None = None,
    resamples: int = RESAMPLES,
) -> Path:
    """Write ``evaluation.md`` and its PNG figures into the folder ``output``; return the Markdown file.

    The same results give the same text on the same machine. Each file is replaced as a whole; the Markdown
    comes last.

    Args:
        results: RESULTS.jsonl; the curves are taken from CURVES.jsonl beside it if that exists.
        output: folder, made if needed.
        command: what made the results, as it is typed.
        paper: (kind of task, claim) to set beside ours.
        machine: what :func:`svdk.bench.machine.describe` said where the results were made (default: here).
        resamples: of every bootstrap.

    Raises:
        DataError: results that cannot be used; the message names file and line.
        InputError: matplotlib is missing, or ``output`` is a file.

    """
    check_matplotlib()
    found = replace(read_results(Path(results)), resamples=resamples)
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise InputError(f"output was {output}, which is a file; allowed: a folder")
    output.mkdir(parents=True, exist_ok=True)
    if machine is None:
        machine = _this_machine()
    summary, figures = pictures(found)
    for picture in [*([summary] if summary else []), *(p for group in figures.values() for p in group)]:
        write_file(output / file_name(picture), png(picture.figure))
    text = render(found, command, paper, machine, summary, figures)
    write_file(output / NAME, text)
    return output / NAME


def file_name(picture: Picture) -> str:
    """Of a figure, beside the Markdown file."""
    return f"evaluation-{picture.name}.png"


def _this_machine() -> dict[str, Any]:
    import torch

    from svdk.bench.machine import describe

    return describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def render(
    results: Results,
    command: str,
    paper: Sequence[tuple[str, str]],
    machine: Mapping[str, Any],
    summary: Picture | None,
    figures: Mapping[str, Sequence[Picture]],
) -> str:
    """The Markdown text."""
    parts = ["# Evaluation", what_was_run(results, command, machine)]
    parts.append(_image(summary) if summary else "No summary figure: no headline setting was measured.")
    parts.append("## Answers")
    for title, text in answers(results):
        parts += [f"### {title}", text]
    parts += ["## Beside the paper", _PAPER_NOTE, paper_table(results, paper)]
    parts.append("## Tables and figures in the paper's form")
    parts.append(_FORM_NOTE)
    for title, made in tables(results):
        parts += [f"### {title}", made or "Left out: the results have no cells for it."]
    for name, group in figures.items():
        parts.append(f"### {name}")
        parts += [_image(p) for p in group] or ["Left out: the results have no data for it."]
    parts += ["## How to read the numbers", method(results)]
    return "\n\n".join(parts) + "\n"


_PAPER_NOTE = (
    "Only the abstract of the paper was at hand, not its tables: these are its claims, for its models and "
    "data, and none of its cells is reproduced or compared with. Ours: each headline setting minus the warm "
    "start, in points."
)
_FORM_NOTE = (
    "The numbering is the paper's, the form follows the questions of its tables; every figure in them was "
    "measured here. " + LEGEND
)


def _image(picture: Picture) -> str:
    return f"![{picture.title}]({file_name(picture)})\n\n*{picture.title}.*"


def what_was_run(results: Results, command: str, machine: Mapping[str, Any]) -> str:
    """Models, tasks, warm starts, the command and the machine."""
    models = listed(list(dict.fromkeys(f"`{cell.test.model}`" for cell in results.cells)))
    lines = [f"- Model: {models}."]
    for test in results.tests:
        here = [cell for cell in results.cells if cell.test == test]
        starts: dict[str, list[int]] = {}
        for cell in here:
            if cell.start:
                starts.setdefault(cell.start.peft, []).append(cell.start.steps)
        pefts = [
            f"{PEFTS.get(peft, peft)} ({', '.join(map(str, sorted(set(steps))))} steps)"
            for peft, steps in starts.items()
        ]
        folds = f", in {test.folds} folds, each judged by adapters trained on the others" * (test.folds > 1)
        how = [] if any(c.decoding == LIKELIHOOD for c in here) else ["generated"]
        how += list(dict.fromkeys(c.decoding for c in here if c.decoding != LIKELIHOOD))
        lines.append(
            f"- {results.label(test)}{f' ({listed(how)})' * bool(how)}: {results.questions(test):,} test "
            f"questions{folds}; {listed(pefts) or 'base model only'}; {len(here)} cells."
        )
    place = machine.get("gpu") or f"{machine.get('cpu')}, {machine.get('threads')} threads"
    lines.append(
        f"- Machine: {place}, torch {machine.get('torch')}, transformers {machine.get('transformers')}, svdk "
        f"{machine.get('svdk')} (commit {machine.get('commit') or 'unknown'})."
    )
    lines.append(f"- Time in the cells: {sum(cell.seconds for cell in results.cells):,.0f} s.")
    lines += [f"- {note}" for note in results.notes]
    return "Made by\n\n```bash\n" + command.strip() + "\n```\n\n" + "\n".join(lines)


def method(results: Results) -> str:
    """What the intervals, the marks and the headline settings are."""
    settings = {c.setting._replace(penalty=0.0): c for c in results.cells if c.setting}
    names = []
    for headline in HEADLINES:
        like = [s for s in settings if all(getattr(s, k) == v for k, v in headline.pattern.items())]
        names.append(f"{headline.name} ({setting_name(like[0]) if like else 'not measured'})")
    few = [results.label(t) for t in results.tests if results.questions(t) < LEAST_QUESTIONS]
    seeds = _seeds(results)
    lines = [
        f"- Headline settings, fixed in the report's code, not picked by these results: {listed(names)}.",
        f"- Every difference is paired: both systems on the same questions, resampled together "
        f"({results.resamples:,} bootstrap resamples of the questions, percentile interval, 95 %).",
        "- Several warm starts are averaged question by question before resampling: sharing the questions, "
        "they are not independent evidence.",
        "- Holm's correction runs over each table, and in the answers over each setting or question. A "
        "sentence calls something better or worse only where it survives; elsewhere it says that nothing was "
        "shown, which is not the same as no difference.",
        "- The intervals cover the choice of the test questions, not the seed of a warm start, of which "
        f"there {'was one' if seeds == 1 else f'were {seeds}'} for each.",
        "- Values are means over questions. NLL: nats a token of the gold answer. Points: percentage points.",
    ]
    if any(test.task == "truthfulqa" and test.folds > 1 for test in results.tests):
        lines.append(
            "- TruthfulQA has questions that differ in a few words, and answers that several questions "
            "share. They may stand in different folds: part of what a warm start gains there can be such an "
            "answer."
        )
    if few:
        lines.append(
            f"- Fewer than {LEAST_QUESTIONS} questions in {listed(few)}: percentile intervals are too narrow "
            "there, and nothing is claimed."
        )
    return "\n".join(lines)


def _seeds(results: Results) -> int:
    return len({cell.start.seed for cell in results.cells if cell.start}) or 1
