"""Results as text tables for the screen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

POINT = ("setting", "batch", "vocab", "dtype", "logits", "cache", "busy")


def milliseconds(seconds: float) -> str:
    """Three significant digits."""
    return f"{seconds * 1e3:.3g}" if seconds < 0.9995 else f"{seconds * 1e3:.0f}"


def times(ratio: float) -> str:
    """A ratio with as many digits as it deserves."""
    return f"{ratio:.2f}" if ratio < 9.995 else f"{ratio:.0f}"


def points(rows: Iterable[dict[str, Any]]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Rows grouped by what was measured: (the point, its contestants), in the order of measurement."""

    def key(row: dict[str, Any]) -> tuple:
        return tuple(row.get(name, 0) for name in POINT)

    return [(dict(zip(POINT, values, strict=True)), list(found)) for values, found in groupby(rows, key)]


def quiet(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those measured without busy loops beside them."""
    return [row for row in rows if not row.get("busy")]


def speedup(row: dict[str, Any], ours: dict[str, Any]) -> tuple[float, float, float]:
    """How many times faster ``ours`` is than ``row``: by medians, and the range that the quartiles allow."""
    return (
        row["median_s"] / ours["median_s"],
        row["q1_s"] / ours["q3_s"],
        row["q3_s"] / ours["q1_s"],
    )


def same(row: dict[str, Any], ours: dict[str, Any]) -> bool:
    """Whether two medians differ by no more than the noise of both."""
    return abs(row["median_s"] - ours["median_s"]) <= row["noise_s"] + ours["noise_s"]


def best_of_ours(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """svdk's fastest backend among the contestants of a point."""
    ours = [row for row in rows if row["contestant"].startswith("svdk")]
    return min(ours, key=lambda row: row["median_s"]) if ours else None


def versus(row: dict[str, Any], ours: dict[str, Any] | None) -> str:
    """The last column: ``x12 (11-13)``, or ``same`` when the difference is within the noise."""
    if ours is None or row is ours or row["contestant"].startswith("svdk/"):
        return ""
    if same(row, ours):
        return "same"
    ratio, low, high = speedup(row, ours)
    return f"x{times(ratio)} ({times(low)}-{times(high)})"


def micro(results: dict[str, Any]) -> str:
    """One block a point: contestant, times, bandwidth, and how many times faster svdk is."""
    kind = "copy" if results["machine"]["device"] == "cuda" else "read"
    bandwidth = results["bandwidth"][kind]
    lines = [
        f"memory: {results['bandwidth']['read'] / 1e9:.1f} GB/s read, "
        f"{results['bandwidth']['copy'] / 1e9:.1f} GB/s copy (read + written), all threads, this run.",
        "GB/s counts each logit once. Hot operands may sit in a cache: more than 100 % is possible there.",
    ]
    head = ["", "median ms", "±noise", "min ms", "n", "GB/s", f"% {kind}", "launches", "svdk is"]
    for point, rows in points(results["micro"]):
        title = "{setting}  B={batch} V={vocab} {dtype} {logits}, {cache}".format(**point)
        title += f", beside {point['busy']} busy loops" if point["busy"] else ""
        ours, table = best_of_ours(rows), [head]
        for row in rows:
            rate = row["bytes"] / row["median_s"]
            share = 100 * rate / bandwidth
            table.append(
                [
                    row["contestant"],
                    milliseconds(row["median_s"]),
                    milliseconds(row["noise_s"]),
                    milliseconds(row["min_s"]),
                    str(row["n"]),
                    f"{rate / 1e9:.3g}",
                    f"{share:.2g}" if share < 10 else f"{share:.0f}",
                    "-" if row["launches"] is None else str(row["launches"]),
                    versus(row, ours),
                ]
            )
        lines += ["", title, aligned(table)]
    return "\n".join(lines)


def end_to_end(results: dict[str, Any]) -> str:
    """One block a model and batch."""
    lines: list[str] = []
    for (model, batch), found in groupby(results["end_to_end"], lambda row: (row["model"], row["batch"])):
        rows = list(found)
        ours = next((row for row in rows if row["contestant"] == "svdk"), None)
        table = [["", "ms a step", "±noise", "min", "n", "peak MB", "svdk is"]]
        for row in rows:
            peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
            table.append(
                [
                    row["contestant"],
                    milliseconds(row["median_s"]),
                    milliseconds(row["noise_s"]),
                    milliseconds(row["min_s"]),
                    str(row["n"]),
                    peak,
                    versus(row, ours),
                ]
            )
        title = f"end to end  {model} B={batch} {rows[0]['dtype']}, {rows[0]['new_tokens']} new tokens"
        lines += ["", title, aligned(table)]
    return "\n".join(lines)


def aligned(table: Sequence[Sequence[str]]) -> str:
    """Columns of equal width: the first to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    )


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, cells padded so that the source reads well too."""
    widths = [max(len(row[i]) for row in (head, *lines)) for i in range(len(head))]
    table = [head, ["-" * max(3, width) for width in widths], *lines]
    return "\n".join(
        "| " + " | ".join(cell.ljust(max(3, width)) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in table
    )
