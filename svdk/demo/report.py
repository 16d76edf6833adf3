"""The demo's findings for reading: a table for the terminal and one self-contained HTML file."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

from svdk import __version__
from svdk.demo.evaluate import Interval
from svdk.demo.picture import draw
from svdk.demo.results import AUTO, SETTING, Results, Row
from svdk.utils.files import write_file
from svdk.warmstart.data import Example

STYLE = """
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #1f2430;
       background: #fff; max-width: 68rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h3 { font-size: .95rem; margin: 1.4rem 0 .3rem; }
h3 small { font-weight: 400; color: #5b6372; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.sub, figcaption, .note { color: #5b6372; font-size: .88rem; }
.verdict { border-left: 5px solid var(--mark); background: #f5f7fa; padding: .8rem 1.1rem; margin: 1.4rem 0; }
.verdict p { margin: .35rem 0; } .verdict p:first-child { font-size: 1.12rem; font-weight: 600; }
.helps { --mark: #2e8b57; } .hurts { --mark: #c0392b; } .unclear { --mark: #b8860b; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .45rem .6rem; border-bottom: 1px solid #e3e6eb; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #c9ced6; font-weight: 600; vertical-align: bottom; }
td small { display: block; color: #5b6372; white-space: nowrap; }
.sure { font-weight: 600; } .examples td:first-child { width: 17rem; }
.examples td, .examples th { text-align: left; }
code, pre { font: .86em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: #f5f7fa; padding: .7rem .9rem; overflow-x: auto; margin: .4rem 0; white-space: pre-wrap; }
pre.wide { white-space: pre; font-size: .76rem; } td:first-child { white-space: nowrap; }
td code { white-space: pre-wrap; overflow-wrap: anywhere; } .ok { color: #1e7145; } .bad { color: #a93226; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: .9rem; }
dt { color: #5b6372; } dd { margin: 0; }
"""


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>svdk demo: steering {verdict}</title><style>{style}</style></head><body>
<h1>svdk demo</h1>
<p class="sub">{origin}</p>
<div class="verdict {kind}"><p>{first}</p>{rest}</div>
<h2>Task</h2>
<p>Find the date in a sentence and write it as YYYY-MM-DD, and nothing else. The sentences are made up by a
seeded script; no date occurs twice. An answer is an exact match only when all that the model wrote is the
right date.</p>
{example}
<h2>Held-out results</h2>
<div class="scroll"><table><thead><tr><th>system</th><th>lever</th><th>exact match</th>
<th>against<br>warm start</th><th>starts with the<br>right date</th><th>a date and<br>nothing else</th>
<th>NLL (nats<br>a token)</th><th>against<br>warm start</th><th>ms a<br>token</th></tr></thead><tbody>
{rows}</tbody></table></div>
<p class="note">{count} examples, greedy decoding. Small print: 95% bootstrap interval over examples;
differences are paired, and bold where the interval excludes zero. NLL is teacher-forced with λ = 0. Time is
at batch size 1, reading the prompt included; a steered token needs both models, run in one forward pass.
<em>paper</em>: KL gradient, α = 0.1, λ = −∞, strength from the mean of the per-token optima.
<em>paper, tuned μ</em>: the same with the strength of least calibration NLL. <em>by position</em>: a strength
for each of the first output positions. <em>auto</em>: the cheapest lever that is not demonstrably worse than
the best, by cross-validation on the calibration data. <em>examples shown</em>: solved examples before the
question, no training; the answer ends with its line. The longer warm start took as long as warm start and
calibration together and saw the examples of both.</p>
<figure><img alt="Exact match by system, and calibration NLL along the strength"
src="data:image/png;base64,{picture}">
<figcaption>Left: held-out exact match with 95% intervals. Right: loss on the calibration examples along the
strength; dots are the strengths that were used.</figcaption></figure>
<h2>Examples</h2>
<p>{changes} Shown is the first example of each kind.</p>
{picks}
<h2>Calibration</h2>
<pre class="wide">{calibration}</pre>
<h2>How it was run</h2>
<dl>{settings}</dl>
</body></html>
"""


def table(results: Results) -> str:
    """The table of systems in plain text, about 110 columns."""
    head = (
        f"{'':<31} {'lever':>12}  {'exact match (%)':^20}  {'vs warm (points)':^22}  {'right date':>10}"
        f"  {'form':>6}  {'NLL':>6}  {'ms/token':>8}"
    )
    lines = [head, "-" * len(head)]
    for row in results.rows:
        means = row.means
        change = row.versus_warm.get("exact")
        versus = _span(change, 100, 1, "+") + (" *" if change.sign else "  ") if change else ""
        lines.append(
            f"{row.system.label:<31} {lever_text(row):>12}  {_span(means['exact'], 100, 1):>20}  {versus:>22}"
            f"  {100 * means['right'].mean:>9.1f}%  {100 * means['valid'].mean:>5.1f}%"
            f"  {means['nll'].mean:>6.3f}"
            f"  {1000 * row.seconds_per_token:>8.1f}"
        )
    lines.append(
        "in brackets: 95% bootstrap interval over examples; *: the paired difference excludes zero;\n"
        "right date: how the answer starts; form: a date and nothing else; NLL: nats a token, teacher-\n"
        "forced, with penalty 0; ms/token: at batch size 1"
    )
    return "\n".join(lines)


def lever_text(row: Row) -> str:
    """What steers, in a word or a number."""
    steering = row.system.steering
    if steering is None or steering.lever == "none":
        return ""
    if steering.lever == "scale":
        return f"scale {steering.scale:g}"
    if steering.positions:
        return f"{len(steering.positions)} positions"
    if steering.classes is not None:
        return "3 classes"
    return f"μ {steering.strength:.2f}"


def examples(results: Results) -> str:
    """The examples in plain text, every system's answer below each other."""
    blocks = []
    for pick in results.picks():
        example = results.held_out[pick.index]
        lines = [f"{pick.reason.capitalize()} (held-out example {pick.index + 1}):"]
        lines += [f"    {line}" for line in (example.prompt + example.completion).splitlines()]
        for outcome in results.outcomes:
            mark = "ok" if outcome.scores[pick.index].exact else "--"
            lines.append(f"  {mark}  {outcome.system.label:<31}  {one_line(outcome.answers[pick.index])}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _span(interval: Interval, scale: float, digits: int, sign: str = "") -> str:
    mean, low, high = (f"{scale * v:{sign}.{digits}f}" for v in (interval.mean, interval.low, interval.high))
    return f"{mean} ({low} to {high})"


def write_html(results: Results, path: Path) -> Path:
    """Write the report to ``path`` (atomically) and return it."""
    write_file(path, render(results))
    return path


def render(results: Results) -> str:
    """The report as one HTML document; the picture is inside."""
    count = len(results.held_out)
    first, *rest = results.conclusion()
    mended, broken = results.changes()
    return PAGE.format(
        style=STYLE,
        verdict=escape(results.verdict),
        kind=results.verdict if results.verdict in ("helps", "hurts") else "unclear",
        origin=escape(f"{results.model}, seed {results.seed}, svdk {__version__}"),
        first=escape(first),
        rest="".join(f"<p>{escape(sentence)}</p>" for sentence in rest),
        example=_html_example(results.held_out[0]),
        rows="".join(_html_row(row) for row in results.rows),
        count=count,
        picture=base64.b64encode(draw(results)).decode(),
        changes=f"Of {count} answers, steering (auto) mends {mended} that the warm start gets wrong "
        f"and breaks {broken} that it gets right.",
        picks=_html_picks(results),
        calibration=escape(results.calibrations[AUTO].table()),
        settings=_html_settings(results),
    )


def _html_example(example: Example) -> str:
    return f"<pre>{escape(example.prompt)}<b>{escape(example.completion)}</b></pre>"


def _html_row(row: Row) -> str:
    steering, means, versus = row.system.steering, row.means, row.versus_warm
    lever = lever_text(row)
    if steering and steering.steers:
        lever += f"<small>{SETTING[steering.direction]}, α = {steering.alpha:g}</small>"

    def change(measure: str, scale: float, digits: int) -> str:
        if measure not in versus:
            return ""
        found = versus[measure]
        mean, low, high = (f"{scale * v:+.{digits}f}" for v in (found.mean, found.low, found.high))
        weight = ' class="sure"' if found.sign else ""
        return f"<span{weight}>{mean}</span><small>{low} to {high}</small>"

    exact, right, valid, nll = (means[name] for name in ("exact", "right", "valid", "nll"))
    cells = [
        escape(row.system.label),
        lever,
        f"{100 * exact.mean:.1f}%<small>{100 * exact.low:.1f} to {100 * exact.high:.1f}</small>",
        change("exact", 100, 1),
        f"{100 * right.mean:.1f}%<small>{100 * right.low:.1f} to {100 * right.high:.1f}</small>",
        f"{100 * valid.mean:.1f}%<small>{100 * valid.low:.1f} to {100 * valid.high:.1f}</small>",
        f"{nll.mean:.3f}<small>{nll.low:.3f} to {nll.high:.3f}</small>",
        change("nll", 1, 3),
        f"{1000 * row.seconds_per_token:.1f}",
    ]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>\n"


def _html_picks(results: Results) -> str:
    parts = []
    for pick in results.picks():
        example = results.held_out[pick.index]
        lines = []
        for outcome in results.outcomes:
            exact = outcome.scores[pick.index].exact
            mark = '<span class="ok">✓</span>' if exact else '<span class="bad">✗</span>'
            shown = escape(one_line(outcome.answers[pick.index]))
            lines.append(
                f"<tr><td>{escape(outcome.system.label)}</td><td>{mark} <code>{shown}</code></td></tr>"
            )
        parts.append(
            f"<h3>{escape(pick.reason.capitalize())} <small>held-out example {pick.index + 1}</small></h3>"
            f"{_html_example(example)}"
            f'<table class="examples"><tbody>{"".join(lines)}</tbody></table>'
        )
    return "\n".join(parts)


def _html_settings(results: Results) -> str:
    settings = results.settings
    items = {
        "warm start": f"LoRA, {settings['steps']} steps of {settings['train_batch']} examples, "
        f"learning rate {settings['learning_rate']:g}",
        "calibration": f"{settings['calibration']} examples",
        "evaluation": f"{settings['held_out']} held-out examples, at most {settings['max_new_tokens']} "
        "new tokens",
        "wall time": ", ".join(f"{name} {seconds:.0f} s" for name, seconds in results.seconds.items()),
    }
    return "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in items.items())


def one_line(answer: str) -> str:
    """An answer with its line ends made visible."""
    return answer.strip().replace("\n", "⏎")
