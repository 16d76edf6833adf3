"""Write the tables and figures of results files into README.md or another page.

``python -m svdk.bench.readme_tables bench/results/NAME.json ... [--readme README.md]`` replaces what stands
between the lines ``<!-- bench:begin -->`` and ``<!-- bench:end -->``; figures go beside the results files.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from svdk.bench import figures, filter_tables, results, tables
from svdk.bench.cases import SETTINGS
from svdk.errors import InputError
from svdk.utils.files import write_file

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
TITLES = {
    "speedup": "Times faster than each baseline",
    "roofline": "Logits read per second and the memory bandwidth",
    "batch": "Time of one call against the batch size",
}
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 2 on an input error."""
    parser = argparse.ArgumentParser(prog="python -m svdk.bench.readme_tables", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="one after the other on the page")
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    args = parser.parse_args(arguments)
    try:
        update(args.readme, *args.results)
    except (InputError, OSError) as error:
        print(f"readme_tables: error: {error}", file=sys.stderr)
        return 2
    return 0


def update(readme: Path, *sources: Path) -> None:
    """Replace the part between the markers, atomically, and draw the figures of all ``sources``.

    Raises:
        InputError: no results file, or a README without the two markers in this order.
    """
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise InputError(f"{readme} had no {BEGIN} ... {END}; allowed: each of the two lines once, in order")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    parts = []
    for source in sources:
        found = results.load(source)
        pictures = figures.draw(found, source.parent, f"{source.stem}-") if _shown(found) else []
        links = [Path(os.path.relpath(path, readme.parent)).as_posix() for path in pictures]
        parts.append(section(found, Path(os.path.relpath(source, readme.parent)).as_posix(), links))
    body = "\n\n".join(parts)
    write_file(readme, f"{before}{BEGIN}\n{body}\n{END}{after}")


def _shown(found: results.Results) -> bool:
    """Whether figures say more of these results than their tables: not of filters, nor of a busy machine."""
    return any(row["setting"] == "sample" for row in found["micro"]) and not any(
        row.get("busy") for row in found["micro"]
    )


def section(found: results.Results, source: str, links: Iterable[str] = ()) -> str:
    """The Markdown between the markers."""
    parts = [_preamble(found, source)]
    everything = found["micro"]
    found = found | {"micro": tables.quiet(everything)}
    points = tables.points(found["micro"])
    for setting in ("sample", "plain"):
        if chosen := [(point, rows) for point, rows in points if point["setting"] == setting]:
            title = "Steered sampling" if setting == "sample" else "Plain sampling"
            parts.append(
                f"**{title}** ({SETTINGS[setting].what}): svdk's time, and how many times faster it is"
            )
            parts.append(_shapes(found, chosen))
    others = [
        (p, rows)
        for p, rows in figures.at_main_shape(found)
        if p["setting"] not in ("sample", "plain", *filter_tables.ALONE)
    ]
    if others and (shape := figures.main_shape(found)):
        batch, vocab = shape
        parts.append(f"**The other settings**, B={batch}, V={vocab:,}, float32, {others[0][0]['cache']}:")
        parts.append(_settings(others))
    parts += filter_tables.filters(found) + filter_tables.busy(everything)
    if found["end_to_end"]:
        parts.append(
            "**End to end**, milliseconds a step (one token for each row; a prompt of 16 tokens included):"
        )
        parts.append(_end_to_end(found["end_to_end"]))
    parts += [f"![{TITLES[_figure_name(link)]}]({link})" for link in links]
    return "\n\n".join(parts)


def _figure_name(link: str) -> str:
    return Path(link).stem.rsplit("-", 1)[-1]


def _preamble(found: results.Results, source: str) -> str:
    info, memory = found["machine"], found["bandwidth"]
    place = (
        info.get("gpu") or f"{info['cpu']}, {info['threads']} threads ({info.get('kernel') or 'reference'})"
    )
    natural = found["natural_logits"]
    kinds = f"natural logits are rows of {natural}" if natural else "zipf logits are synthetic"
    return (
        f"Generated from [{source}]({source}): {place}, torch {info['torch']}, svdk {info['svdk']} "
        f"(commit {info['commit'] or 'unknown'}), {found['created'][:10]}. "
        f"Main memory in the same run: {memory['read'] / 1e9:.0f} GB/s read, {memory['copy'] / 1e9:.0f} GB/s "
        "copy. Medians; the file has quartiles, minima and counts. Cold: operands rotate through buffers "
        f"larger than the last cache; {kinds}."
    )


def _shapes(found: results.Results, points: list[tuple[Row, list[Row]]]) -> str:
    kind = "copy" if found["machine"]["device"] == "cuda" else "read"
    names = list(dict.fromkeys(figures.family(r["contestant"]) for _, rows in points for r in rows))
    names = [name for name in names if name != "svdk"]
    head = ["B", "V", "dtype", "logits", "caches", "ms", f"of memory {kind}"]
    head += [figures.NAMES[name] for name in names]
    lines = []
    for point, rows in points:
        if (ours := tables.best_of_ours(rows)) is None:
            continue
        share = ours["bytes"] / ours["median_s"] / found["bandwidth"][kind]
        cells = [f"{point['batch']}", f"{point['vocab']:,}", point["dtype"], point["logits"], point["cache"]]
        cells += [tables.milliseconds(ours["median_s"]), f"{100 * share:.0f} %"]
        lines.append(cells + [_ratio(_best(rows, name), ours) for name in names])
    return tables.markdown(head, lines)


def _best(rows: list[Row], family: str) -> Row | None:
    own = [row for row in rows if figures.family(row["contestant"]) == family]
    return min(own, key=lambda row: row["median_s"], default=None)


def _ratio(row: Row | None, ours: Row) -> str:
    if row is None:
        return ""
    return "same" if tables.same(row, ours) else f"{tables.times(row['median_s'] / ours['median_s'])}×"


def _settings(points: list[tuple[Row, list[Row]]]) -> str:
    lines = []
    for point, rows in points:
        ours = tables.best_of_ours(rows)
        for row in rows:
            if ours is None or row["contestant"].startswith("svdk"):
                continue
            setting = point["setting"]
            lines.append(
                [
                    f"`{setting}`",
                    SETTINGS[setting].what,
                    tables.milliseconds(ours["median_s"]),
                    figures.NAMES[figures.family(row["contestant"])],
                    tables.milliseconds(row["median_s"]),
                    _ratio(row, ours),
                ]
            )
    return tables.markdown(["setting", "", "svdk ms", "baseline", "ms", "svdk is faster by"], lines)


def _end_to_end(rows: list[Row]) -> str:
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    lines = []
    for (model, batch), group in groupby(rows, lambda row: (row["model"], row["batch"])):
        by_name = {row["contestant"]: row for row in group}
        cells = [model, str(batch)]
        for name in names:
            row = by_name.get(name)
            cells.append("" if row is None else f"{row['median_s'] * 1e3:.1f} ± {row['noise_s'] * 1e3:.1f}")
        lines.append(cells)
    return tables.markdown(["model", "B", *names], lines)


if __name__ == "__main__":
    raise SystemExit(main())
