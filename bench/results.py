"""The results file: writing, reading, and comparing two of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdk.errors import InputError
from svdk.utils.files import read_object, write_json

FORMAT = 1
MICRO_KEY = ("setting", "contestant", "batch", "vocab", "dtype", "logits", "cache")
END_TO_END_KEY = ("model", "contestant", "batch", "dtype")
SMALLEST = 0.05
"""A change below 5 % is never called one, however quiet the machine was."""

Results = dict[str, Any]


def save(results: Results, path: str | Path) -> Path:
    """Write ``results`` as JSON, atomically; the folder is made if needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, results, indent=1, allow_nan=True)
    return path


def check_target(path: str | Path, info: dict[str, Any]) -> None:
    """Refuse to replace what another machine measured; ``info`` as :func:`svdk.bench.machine.describe`.

    Raises:
        InputError: ``path`` is a results file of another machine.
    """
    try:
        there = load(path)["machine"]
    except (InputError, KeyError):
        return
    names = ("device", "gpu", "cpu", "cores", "kernel")
    if differing := [f"{name} {there.get(name)!r}" for name in names if there.get(name) != info.get(name)]:
        raise InputError(
            f"--output was {path}, which holds results of another machine ({', '.join(differing)}); "
            "allowed: a new file, or one that this machine wrote"
        )


def load(path: str | Path) -> Results:
    """Read a results file.

    Raises:
        InputError: no such file, or not a results file of this format.
    """
    try:
        results = read_object(Path(path))
    except FileNotFoundError:
        raise InputError(f"results file was {path}, which does not exist; make one with svdk bench") from None
    if (found := results.get("format")) != FORMAT:
        raise InputError(f"results file {path} had format {found!r}; allowed: {FORMAT}")
    for part, fields in (("micro", (*MICRO_KEY, "median_s", "noise_s")), ("end_to_end", END_TO_END_KEY)):
        for row in results.get(part, ()):
            if missing := [name for name in fields if name not in row]:
                raise InputError(f"results file {path} had a row of {part} without {', '.join(missing)}")
    return results


@dataclass(frozen=True)
class Change:
    """One row that both files have."""

    what: str
    old: float
    new: float
    noise: float
    """Of the difference, seconds."""
    ours: bool
    """Whether svdk was measured, or a baseline."""

    @property
    def ratio(self) -> float:
        """New time over old time."""
        return self.new / self.old

    @property
    def verdict(self) -> str:
        """``"slower"``, ``"faster"`` or ``"same"`` (within the noise of both runs)."""
        difference = self.new - self.old
        if abs(difference) <= max(self.noise, SMALLEST * self.old):
            return "same"
        return "slower" if difference > 0 else "faster"


@dataclass(frozen=True)
class Comparison:
    """What changed between two results files."""

    changes: list[Change]
    warnings: list[str]

    @property
    def regressions(self) -> list[Change]:
        """svdk's rows that became slower beyond the noise."""
        return [c for c in self.changes if c.ours and c.verdict == "slower"]

    @property
    def drift(self) -> float | None:
        """Median ratio of the baselines: what the machine or PyTorch did, rather than svdk."""
        ratios = [c.ratio for c in self.changes if not c.ours]
        return statistics.median(ratios) if ratios else None


def compare(old: Results, new: Results) -> Comparison:
    """Match rows by what was measured; see :class:`Change` for what counts as a change.

    Raises:
        InputError: the files have no row in common.
    """
    changes = []
    for part, key in (("micro", MICRO_KEY), ("end_to_end", END_TO_END_KEY)):
        before = {_key(row, key): row for row in old.get(part, ())}
        for row in new.get(part, ()):
            if (match := before.get(_key(row, key))) is None:
                continue
            changes.append(
                Change(
                    " ".join(map(str, _key(row, key))),
                    match["median_s"],
                    row["median_s"],
                    match["noise_s"] + row["noise_s"],
                    row["contestant"].startswith("svdk"),
                )
            )
    if not changes:
        raise InputError("the two results files had no measurement in common; allowed: at least one")
    return Comparison(changes, list(_differences(old["machine"], new["machine"])))


def _key(row: dict[str, Any], names: tuple[str, ...]) -> tuple[Any, ...]:
    busy = (row["busy"],) if row.get("busy") else ()  # busy loops beside it; older files do not say
    return (*(row[name] for name in names), *busy)


def _differences(old: dict[str, Any], new: dict[str, Any]) -> Iterable[str]:
    for name in ("device", "gpu", "cpu", "cores", "threads", "kernel", "torch"):
        if old.get(name) != new.get(name):
            yield f"{name} differs: {old.get(name)} and {new.get(name)}"


def report(comparison: Comparison, every: bool = False) -> str:
    """The comparison as text: warnings, changed rows (or every row), and a summary line."""
    lines = [f"warning: {text}" for text in comparison.warnings]
    shown = [c for c in comparison.changes if every or c.verdict != "same"]
    for c in sorted(shown, key=lambda c: -c.ratio):
        mark = "REGRESSION" if c in comparison.regressions else c.verdict
        lines.append(
            f"{mark:>10}  x{c.ratio:5.2f}  {c.old * 1e3:.4g} -> {c.new * 1e3:.4g} ms "
            f"(noise {c.noise * 1e3:.2g})  {c.what}"
        )
    ours = [c for c in comparison.changes if c.ours]
    faster = sum(c.verdict == "faster" for c in ours)
    lines.append(
        f"svdk: {len(comparison.regressions)} slower, {faster} faster, "
        f"{len(ours) - faster - len(comparison.regressions)} same within the noise"
    )
    if comparison.drift is not None:
        lines.append(f"baselines (same code in both runs): median x{comparison.drift:.2f}")
    return "\n".join(lines)
