"""How many training steps a steered warm start is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svdk.bench.tables import markdown
from svdk.eval.report_cells import PEFTS, Benchmark, Results, Start
from svdk.eval.report_format import HEADLINES, METRICS, Headline, choice_metric, number
from svdk.utils.bootstrap import draws, quantiles


def equivalent_steps(lengths: Sequence[int], warm: Tensor, target: Tensor) -> Tensor:
    """The number of steps after which training alone first does as well as ``target``.

    Between the measured lengths, linear in the logarithm of the steps. ``warm`` (R, S): a score, more is
    better, at each of the S ascending ``lengths``; ``target`` (R,). The result (R,) is 0 where the shortest
    length does better already, and infinite where none reaches it.
    """
    reached = warm >= target[:, None]
    first = reached.to(torch.int8).argmax(1)
    log = torch.tensor(lengths, dtype=torch.float64).log2()
    before = (first - 1).clamp(min=0)
    low, high = (warm.gather(1, index[:, None])[:, 0] for index in (before, first))
    share = ((target - low) / (high - low).clamp(min=1e-300)).clamp(0, 1)
    steps = torch.exp2(log[before] + share * (log[first] - log[before]))
    below = torch.where(target < warm[:, 0], 0.0, float(lengths[0]))
    steps = torch.where(first == 0, below, steps)
    return torch.where(reached.any(1), steps, math.inf)


@dataclass(frozen=True)
class Worth:
    """What steering is worth for one warm start, in training steps."""

    test: Benchmark
    start: Start
    headline: Headline
    metric: str
    lengths: tuple[int, ...]
    steps: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 when demonstrably worth more steps than it took, -1 when fewer."""
        return 1 if self.low > self.start.steps else -1 if self.high < self.start.steps else 0

    def __str__(self) -> str:
        """``9.1 [6.8, 12.3]``."""
        return f"{self._shown(self.steps)} [{self._shown(self.low)}, {self._shown(self.high)}]"

    def _shown(self, steps: float) -> str:
        if steps == 0:
            return f"< {self.lengths[0]}"
        if math.isinf(steps):
            return f"> {self.lengths[-1]}"
        return number(steps, 1 if steps < 100 else 0)


def worths(results: Results) -> list[Worth]:
    """For every warm start that has a longer one to compare with, in NLL and in answers."""
    found = []
    for test in results.tests:
        series: dict[tuple[str, int], list[Start]] = {}
        for start in results.starts(test):
            series.setdefault((start.peft, start.seed), []).append(start)
        for starts in series.values():
            if len(starts) > 1:
                found += _of_series(results, test, starts)
    return found


def _of_series(results: Results, test: Benchmark, starts: list[Start]) -> list[Worth]:
    warm = [results.listed(test, start) for start in starts]
    lengths = tuple(start.steps for start in starts)
    answers = choice_metric(warm[0].scores)
    found = []
    for metric in [m for m in ("nll", answers) if m and all(cell.finite(m) for cell in warm)]:
        sign = METRICS[metric].better
        curve = torch.stack([sign * cell.scores[metric] for cell in warm], 1)  # (Q, S)
        best = int(curve.mean(0).argmax())
        drawn = draws(curve, resamples=results.resamples)
        for headline in HEADLINES:
            if headline.key == "paper":
                continue
            # Beyond the best length training alone makes it worse: there, "worth fewer steps" is no finding.
            for start in starts[: min(best + 1, len(starts) - 1)]:
                cell = results.find(test, start, **headline.pattern)
                if cell is None or not cell.finite(metric):
                    continue
                target = sign * cell.scores[metric]
                steps = float(equivalent_steps(lengths, curve.mean(0)[None], target.mean()[None]))
                low, high = quantiles(
                    equivalent_steps(lengths, drawn, draws(target, resamples=results.resamples))
                )
                found.append(Worth(test, start, headline, metric, lengths, steps, low, high))
    return found


def steps_text(results: Results) -> str | None:
    """The answer to "how many training steps is steering worth"; None without two lengths to compare."""
    found = worths(results)
    if not found:
        return None
    lines = []
    for headline in HEADLINES:
        mine = [w for w in found if w.headline == headline]
        for title, group in (
            ("NLL", [w for w in mine if w.metric == "nll"]),
            ("answers", [w for w in mine if w.metric != "nll"]),
        ):
            if group:
                lines.append(f"- {sentence(results, headline.name, title, group)}")
    return "\n".join(lines) + f"\n\n{NOTE}\n\n" + _table(results, found)


NOTE = (
    "Worth: the number of steps after which training alone, without steering, first does as well; "
    "interpolated in the logarithm of the steps between the lengths that were measured. In brackets the "
    "95 % interval: the questions resampled for all lengths at once. △ more, ▽ fewer steps than it took, by "
    "that interval alone: not corrected for their number, and blind to the seed of the training."
)


def sentence(results: Results, name: str, title: str, group: Sequence[Worth]) -> str:
    """What the worths of one setting show in one metric."""
    more, fewer = [w for w in group if w.sign > 0], [w for w in group if w.sign < 0]
    count = f"{len(group)} warm starts" if len(group) != 1 else "1 warm start"
    if not more and not fewer:
        return f"{name}, by {title}: none of {count} is demonstrably worth more or fewer steps than it took."
    text = f"{name}, by {title}: of {count}, {len(more)} demonstrably worth more steps than they took"
    if more:
        most = max(more, key=lambda w: (w.low / w.start.steps, w.steps))
        text += f" (most: {results.label(most.test)}, {results.start_label(most.start)}, worth {most})"
    return text + f", {len(fewer)} fewer."


def _table(results: Results, found: Sequence[Worth]) -> str:
    marks = {1: " △", -1: " ▽", 0: ""}
    groups: dict[tuple, list[str]] = {}
    for worth in found:
        key = (worth.test, worth.start, worth.headline.key)
        peft = PEFTS.get(worth.start.peft, worth.start.peft)
        names = [results.label(worth.test), peft, worth.headline.name, str(worth.start.steps)]
        cells = groups.setdefault(key, [*names, "–", "–"])
        cells[4 if worth.metric == "nll" else 5] = f"{worth}{marks[worth.sign]}"
    head = ["task", "PEFT", "setting", "steps taken", "worth by NLL", "worth by answers"]
    return markdown(head, list(groups.values()))
