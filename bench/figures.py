"""Three figures of a results file as PNG: speed-up bars, the memory roofline, time against batch size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from svdk.bench import tables
from svdk.bench.results import Results
from svdk.utils import figures
from svdk.utils.files import write_file

COLOURS = {
    "svdk": figures.BLACK,
    "eager": figures.BLUE,
    "softmax+multinomial": figures.BLUE,
    "one uniform": figures.SKY,
    "compile": figures.ORANGE,
    "race": figures.GREEN,
    "warpers": figures.PURPLE,
    "flashinfer": figures.VERMILION,
    "filtered": figures.GREEN,
    "argmax": figures.BLUE,
}
NAMES = {
    "eager": "eager PyTorch",
    "softmax+multinomial": "softmax + multinomial",
    "one uniform": "softmax + cumsum + one uniform",
    "compile": "torch.compile",
    "race": "vLLM-style race",
    "warpers": "transformers warpers",
    "flashinfer": "FlashInfer",
    "filtered": "topk, sort or mask",
    "argmax": "argmax",
}


def family(contestant: str) -> str:
    """The contestant without backend or compile mode."""
    return "svdk" if contestant.startswith("svdk") else contestant.split(":")[0]


def draw(results: Results, folder: str | Path, prefix: str = "") -> list[Path]:
    """Write ``speedup.png``, ``roofline.png`` and ``batch.png`` (where there are rows for them)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    results = results | {"micro": tables.quiet(results["micro"])}
    for name, figure in (("speedup", speedup), ("roofline", roofline), ("batch", batch)):
        drawn = figure(results)
        if drawn is not None:
            written.append(folder / f"{prefix}{name}.png")
            write_file(written[-1], figures.png(drawn))
    return written


def _figure(width: float, height: float, title: str, results: Results) -> Any:
    info = results["machine"]
    place = info.get("gpu") or f"{info['cpu']}, {info['threads']} threads"
    return figures.new_figure(width, height, f"{title}\n{place}, torch {info['torch']}", dpi=130)


def main_shape(results: Results) -> tuple[int, int] | None:
    """(B, V) that most settings were measured at, float32."""
    settings: dict[tuple[int, int], set[str]] = {}
    for row in results["micro"]:
        if row["dtype"] == "float32":
            settings.setdefault((row["batch"], row["vocab"]), set()).add(row["setting"])
    return max(settings, key=lambda shape: (len(settings[shape]), shape), default=None)


def at_main_shape(results: Results) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Points at :func:`main_shape` with the first kind of logits that was measured, cold before hot."""
    if (shape := main_shape(results)) is None:
        return []
    kind = results["micro"][0]["logits"]
    found: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {}
    for point, rows in tables.points(results["micro"]):
        here = (point["batch"], point["vocab"]) == shape and point["dtype"] == "float32"
        if here and point["logits"] == kind and (point["cache"] == "cold" or point["setting"] not in found):
            found[point["setting"]] = (point, rows)
    return list(found.values())


def speedup(results: Results) -> Any | None:
    """How many times faster svdk is than each baseline, by setting, at the main shape."""
    bars = [
        (point["setting"], row["contestant"], *tables.speedup(row, ours))
        for point, rows in at_main_shape(results)
        if (ours := tables.best_of_ours(rows)) is not None
        for row in rows
        if not row["contestant"].startswith("svdk")
    ]
    if not bars or (shape := main_shape(results)) is None:
        return None
    batch_size, vocab = shape
    figure = _figure(
        7.6, 1.2 + 0.26 * len(bars), f"svdk against baselines, B={batch_size}, V={vocab:,}, float32", results
    )
    axes = figure.subplots()
    ticks: dict[str, list[float]] = {}
    labelled: set[str] = set()
    y, last = 0.0, bars[0][0]
    for setting, contestant, ratio, low, high in bars:
        y += 1.6 if setting != last else 1.0
        last, name = setting, family(contestant)
        label = NAMES[name] if name not in labelled else None
        labelled.add(name)
        axes.barh(y, ratio, height=0.8, color=COLOURS[name], label=label)
        axes.errorbar(ratio, y, xerr=[[ratio - low], [high - ratio]], color="0.35", capsize=2, linewidth=1)
        axes.annotate(
            f"{tables.times(ratio)}×",
            (high, y),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
        ticks.setdefault(setting, []).append(y)
    axes.set_xscale("log")
    axes.axvline(1, color="0.3", linewidth=1)
    axes.set_yticks([sum(ys) / len(ys) for ys in ticks.values()], list(ticks))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("times faster (medians; whiskers: quartiles)")
    figures.plain(axes, "x")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def roofline(results: Results) -> Any | None:
    """Achieved GB/s against the bytes of a call, with the measured bandwidth as the roof."""
    rows = [row for row in results["micro"] if row["setting"] in ("sample", "plain")]
    if not rows:
        return None
    figure = _figure(7.6, 4.8, "logits read per second (each counted once), hot and cold operands", results)
    axes = figure.subplots()
    seen: set[str] = set()
    for row in rows:
        name = family(row["contestant"])
        label = "svdk" if name == "svdk" else NAMES[name]
        label, hot = f"{label}, {row['setting']}", row["cache"] == "hot"
        axes.plot(
            row["bytes"] / 1e6,
            row["bytes"] / row["median_s"] / 1e9,
            linestyle="none",
            markersize=6,
            marker="o" if row["setting"] == "sample" else "^",
            color=COLOURS[name],
            markeredgewidth=1.2,
            markerfacecolor="none" if hot else COLOURS[name],
            label=None if label in seen or hot else label,
        )
        if not hot:
            seen.add(label)
    kind = "copy" if results["machine"]["device"] == "cuda" else "read"
    roof = results["bandwidth"][kind] / 1e9
    axes.axhline(roof, color="0.3", linestyle="--", linewidth=1, label=f"memory, {kind}: {roof:.0f} GB/s")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("megabytes of logits a call (open markers: hot in the cache)")
    axes.set_ylabel("GB/s")
    figures.plain(axes, "both")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def batch(results: Results) -> Any | None:
    """Median time against the batch size, for the vocabulary measured at most batch sizes."""
    rows = [
        row
        for row in results["micro"]
        if row["setting"] in ("sample", "plain") and row["cache"] == "cold" and row["dtype"] == "float32"
    ]
    rows = [row for row in rows if row["logits"] == rows[0]["logits"]]
    sizes: dict[int, set[int]] = {}
    for row in rows:
        sizes.setdefault(row["vocab"], set()).add(row["batch"])
    vocab = max(sizes, key=lambda v: (len(sizes[v]), v), default=None)
    if vocab is None or len(sizes[vocab]) < 2:
        return None
    figure = _figure(7.6, 3.8, f"time of one call, V={vocab:,}, float32, cold operands", results)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, setting in zip(panels, ("sample", "plain"), strict=True):
        lines: dict[str, dict[int, dict[str, Any]]] = {}
        for row in rows:
            if row["vocab"] != vocab or row["setting"] != setting:
                continue
            best = lines.setdefault(family(row["contestant"]), {})
            if row["batch"] not in best or row["median_s"] < best[row["batch"]]["median_s"]:
                best[row["batch"]] = row
        for name, by_batch in lines.items():
            found = sorted(by_batch.values(), key=lambda row: row["batch"])
            axes.errorbar(
                [row["batch"] for row in found],
                [row["median_s"] * 1e3 for row in found],
                yerr=[
                    [(row["median_s"] - row["q1_s"]) * 1e3 for row in found],
                    [(row["q3_s"] - row["median_s"]) * 1e3 for row in found],
                ],
                color=COLOURS[name],
                marker="o",
                markersize=4,
                capsize=2,
                label=NAMES.get(name, name),
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title("steered sampling" if setting == "sample" else "plain sampling", fontsize=10)
        axes.set_xlabel("batch size")
        axes.xaxis.set_major_formatter("{x:g}")
        if lines:
            axes.legend(fontsize=8, frameon=False)
        figures.plain(axes, "both")
    panels[0].set_ylabel("ms")
    return figure
