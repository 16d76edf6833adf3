"""The page docs/families.md: one row a family, written from verdicts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import peft
import transformers

from tests.helpers.families import KINDS, LENGTHS, STEPS, Verdict

EQUAL, TWO_PASSES, REFUSED = "equal (paired)", "equal (two passes)", "refused"
PADDED, ATTACH, BUILD = "refused when padded", "not attachable by PEFT", "not buildable"
FAILS = "transformers' generate fails"
HEAD = "| family | LoRA | IA3 | prompt tuning | prefix tuning |"


def cell(verdicts: Sequence[Verdict]) -> tuple[str, str]:
    """A word and a reason ("" for none) for one family and kind, from its forwards' verdicts."""
    paired, two_pass = (next(v for v in verdicts if v.forward == name) for name in ("paired", "two_pass"))
    words = (paired.verdict, two_pass.verdict)
    if words == ("equal", "equal"):
        return EQUAL, ""
    if words == ("refused", "equal"):
        return TWO_PASSES, reason(paired)
    bad = next((v for v in (two_pass, paired) if v.verdict not in ("equal", "refused")), two_pass)
    if bad.verdict == "refused":
        return (PADDED if bad.alone == "equal" else REFUSED), reason(bad)
    known = {"not generating": FAILS, "not attachable": ATTACH, "not buildable": BUILD}
    return known.get(bad.verdict, bad.verdict), reason(bad)


def reason(verdict: Verdict) -> str:
    """The detail of a verdict without what differs from family to family."""
    text = verdict.detail
    if verdict.verdict == "wrong":
        return (
            "padded rows differ from the slow loop" if verdict.alone == "equal" else "rows differ, also alone"
        )
    text = re.sub(r"^[a-z0-9, ]*(batch|alone)\b[^:]*: |; \((padded|row).*$", "", text)
    text = re.sub(r" @ \S+$", "", re.sub(r"; row \d.*$", "", text))
    text = re.sub(r"^forward was 'paired'; allowed for this model: 'two_pass', because ", "", text)
    text = re.sub(r"layer \S+: ", "", text)
    return text.replace("|", "/").replace("PEFT: ", "").strip()


def render(results: Mapping[str, Mapping[str, Sequence[Verdict]]]) -> str:
    """The whole page; ``results``: family, kind, its verdicts."""
    cells = {family: [cell(kinds[kind]) for kind in KINDS] for family, kinds in sorted(results.items())}
    numbers: dict[str, int] = {}
    rows = []
    for family, found in cells.items():
        texts = []
        for word, why in found:
            note = f" [{numbers.setdefault(why, len(numbers) + 1)}]" if why else ""
            texts.append(word + note)
        rows.append(f"| {family} | {' | '.join(texts)} |")
    lines = [
        "# Model families",
        "",
        f"Every type that transformers {transformers.__version__} registers as a causal language model "
        f"({len(cells)}), as a tiny",
        "random model with every kind of layer of its family, under four kinds of adapter of PEFT "
        f"{peft.__version__}. Steered greedy",
        f"decoding of prompts of {', '.join(map(str, LENGTHS))} tokens, {STEPS} new ones each, in one "
        "left-padded batch and each row alone, is",
        "compared with a slow loop: each row alone, whole at every step, without cache or padding, through",
        "two separate models, with the float64 reference.",
        "",
        f"- **{EQUAL}**: same tokens and logits, with both models in one forward and with one forward each",
        f'- **{TWO_PASSES}**: `forward="auto"` runs one forward a model, and says why',
        f"- **{REFUSED}**, **{PADDED}**: an `InputError` that says why; nothing is decoded",
        f"- **{ATTACH}**: PEFT raises, or cannot run one row with its adapter; svdk had no part in it",
        f"- **{FAILS}**: without svdk, too",
        "- **wrong**, **error**: faults, each on the list of `tests/generation/family_exceptions.py`",
        f"- **{BUILD}**: no tiny model of this type could be made",
        "",
        "Written by `SVDK_LONG=1 SVDK_WRITE=1 python -m pytest tests/generation/test_families.py`.",
        "",
        "| | " + " | ".join(HEAD.strip("| ").split(" | ")[1:]) + " |",
        "|---|---|---|---|---|",
        *_counts(cells),
        "",
        HEAD,
        "|---|---|---|---|---|",
        *rows,
        "",
        "## Reasons",
        "",
        *(f"{number}. {why}" for why, number in numbers.items()),
        "",
    ]
    return "\n".join(lines)


def _counts(cells: Mapping[str, Sequence[tuple[str, str]]]) -> list[str]:
    counts = Counter((i, word) for found in cells.values() for i, (word, _) in enumerate(found))
    order = [EQUAL, TWO_PASSES, PADDED, REFUSED, FAILS, ATTACH, BUILD]
    words = order + sorted({word for _, word in counts} - set(order))
    columns = range(len(KINDS))
    return [
        f"| {word} | {' | '.join(str(counts[i, word]) for i in columns)} |"
        for word in words
        if any(counts[i, word] for i in columns)
    ]


def parse(page: str) -> dict[str, list[tuple[str, str]]]:
    """The cells of a written page, by family, as :func:`cell` gives them."""
    table, _, notes = page.partition(HEAD)[2].partition("## Reasons")
    reasons = dict(re.findall(r"(?m)^(\d+)\. (.*)$", notes))
    found = {}
    for line in table.splitlines()[2:]:
        if line.startswith("| "):
            family, *texts = (part.strip() for part in line.strip("|").split("|"))
            found[family] = [_parsed(text, reasons) for text in texts]
    return found


def _parsed(text: str, reasons: Mapping[str, str]) -> tuple[str, str]:
    match = re.fullmatch(r"(.*?)(?: \[(\d+)\])?", text)
    assert match is not None
    return match[1], reasons[match[2]] if match[2] else ""


def all_of(verdicts: Iterable[Verdict]) -> dict[str, dict[str, list[Verdict]]]:
    """Verdicts by family and kind."""
    found: dict[str, dict[str, list[Verdict]]] = {}
    for v in verdicts:
        found.setdefault(v.family, {}).setdefault(v.kind, []).append(v)
    return found
