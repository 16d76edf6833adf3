"""The page docs/families.md: one row a family, written from verdicts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import peft
import transformers

from tests.helpers.families import KINDS, LENGTHS, PROCESSOR, STEPS, Verdict

EQUAL, TWO_PASSES, REFUSED = "equal (paired)", "equal (two passes)", "refused"
PADDED, ATTACH, BUILD = "refused when padded", "not attachable by PEFT", "not buildable"
FAILS = "transformers' generate fails"
HEAD = "| family | LoRA | IA3 | prompt tuning | prefix tuning | logits processor |"
SAME = "the same"
FAULTS = ("wrong", "error")

Cell = tuple[str, tuple[str, ...]]
"""Words, and the reasons for them."""
Kinds = Mapping[str, Sequence[Verdict]]
"""The verdicts of one family, a forward each, by kind of adapter."""


def cells(kinds: Kinds) -> list[Cell]:
    """A cell for each kind, and one for the logits processor."""
    return [*(cell(kinds[kind]) for kind in KINDS), processor_cell(kinds)]


def cell(verdicts: Sequence[Verdict]) -> Cell:
    """One family and kind, from the verdicts of its forwards."""
    paired, two_pass = (_of(verdicts, name) for name in ("paired", "two_pass"))
    words = (paired.verdict, two_pass.verdict)
    if words == ("equal", "equal"):
        return EQUAL, ()
    if words == ("refused", "equal"):
        return TWO_PASSES, (reason(paired),)
    bad = next((v for v in (two_pass, paired) if v.verdict not in ("equal", "refused")), two_pass)
    return _word(bad), (reason(bad),)


def processor_cell(kinds: Kinds) -> Cell:
    """What a plain ``generate`` with the logits processor does otherwise than ``svdk.generate``."""
    found: dict[str, list[str]] = {}
    reasons = []
    for kind in KINDS:
        processor, two_pass = (_of(kinds[kind], name) for name in (PROCESSOR, "two_pass"))
        if (processor.verdict, processor.alone) != (two_pass.verdict, two_pass.alone):
            found.setdefault(_word(processor), []).append(kind)
            reasons.append(reason(processor))
    words = "; ".join(f"{word} ({', '.join(names)})" for word, names in found.items())
    return words or SAME, tuple(dict.fromkeys(reasons))


def _of(verdicts: Sequence[Verdict], forward: str) -> Verdict:
    return next(verdict for verdict in verdicts if verdict.forward == forward)


def _word(verdict: Verdict) -> str:
    if verdict.verdict == "refused" and verdict.alone == "equal":
        return PADDED
    return {"not generating": FAILS, "not attachable": ATTACH, "not buildable": BUILD}.get(
        verdict.verdict, verdict.verdict
    )


def reason(verdict: Verdict) -> str:
    """The detail of a verdict without what differs from family to family."""
    text = verdict.detail
    text = re.sub(r"^[a-z0-9, ]*(batch|alone)\b[^:]*: |; \((padded|row).*$", "", text)
    text = re.sub(r" @ \S+$", "", re.sub(r"; row \d.*$", "", text))
    text = re.sub(r"^forward was 'paired'; allowed for this model: 'two_pass', because ", "", text)
    text = re.sub(r"layer \S+: ", "", text)
    text = re.sub(r"\b(model was|allowed for) \w+", r"\1 ...", text)
    text = re.sub(r"prefix to layer \d+", "prefix to a layer", text)
    return text.replace("|", "/").replace("PEFT: ", "").strip()


def render(results: Mapping[str, Kinds]) -> str:
    """The whole page; ``results``: the verdicts of each family."""
    found = {family: cells(kinds) for family, kinds in sorted(results.items())}
    numbers: dict[str, int] = {}
    rows = []
    for family, row in found.items():
        texts = [
            " ".join([word, *(f"[{numbers.setdefault(why, len(numbers) + 1)}]" for why in reasons)])
            for word, reasons in row
        ]
        rows.append(f"| {family} | {' | '.join(texts)} |")
    lines = [
        "# Model families",
        "",
        f"Every type that transformers {transformers.__version__} registers as a causal language model "
        f"({len(found)}), as a tiny",
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
        f"- **{BUILD}**: no tiny model of this type could be made",
        "",
        "The last column: what a plain `generate` with `SteeringLogitsProcessor` does otherwise; its warm",
        "logits are what transformers and PEFT make of them.",
        "",
        "Written by `SVDK_LONG=1 SVDK_WRITE=1 python -m pytest tests/generation/test_families.py`.",
        "",
        "| | " + " | ".join(HEAD.strip("| ").split(" | ")[1:]) + " |",
        "|---|---|---|---|---|---|",
        *_counts(found),
        "",
        HEAD,
        "|---|---|---|---|---|---|",
        *rows,
        "",
        "## Reasons",
        "",
        *(f"{number}. {why}" for why, number in numbers.items()),
        "",
    ]
    return "\n".join(lines)


def _counts(found: Mapping[str, Sequence[Cell]]) -> list[str]:
    columns = range(len(KINDS) + 1)
    # In the processor's column a cell may hold several words, each with the kinds that it is about.
    counts = Counter(
        (i, word)
        for row in found.values()
        for i, (words, _) in enumerate(row)
        for word in dict.fromkeys(re.sub(r" \((?!paired|two).*?\)", "", words).split("; "))
    )
    order = [EQUAL, TWO_PASSES, SAME, PADDED, REFUSED, FAILS, ATTACH, BUILD]
    words = order + sorted({word for _, word in counts} - set(order))
    return [
        f"| {word} | {' | '.join(str(counts[i, word] or '') for i in columns)} |"
        for word in words
        if any(counts[i, word] for i in columns)
    ]


def parse(page: str) -> dict[str, list[Cell]]:
    """The cells of a written page, by family, as :func:`cells` gives them."""
    table, _, notes = page.partition(HEAD)[2].partition("## Reasons")
    reasons = dict(re.findall(r"(?m)^(\d+)\. (.*)$", notes))
    found = {}
    for line in table.splitlines()[2:]:
        if line.startswith("| "):
            family, *texts = (part.strip() for part in line.strip("|").split("|"))
            found[family] = [
                (
                    re.sub(r"( \[\d+\])+$", "", text),
                    tuple(reasons[n] for n in re.findall(r" \[(\d+)\]", text)),
                )
                for text in texts
            ]
    return found
