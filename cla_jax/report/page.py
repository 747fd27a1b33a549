"""The HTML page: Pareto picture, table, learning curves, run details; no external resource."""

import json
import math
import re
from collections.abc import Sequence
from html import escape

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from cla_jax import config as configs
from cla_jax.messages import printable
from cla_jax.report import pareto, tasks
from cla_jax.report.pareto import COLOURS, Point
from cla_jax.report.rows import (
    COLUMNS,
    Row,
    caption,
    comparison,
    human,
    lines,
    missing,
    points,
    setting,
    warnings,
)

HEADINGS = {"perplexity": "held-out perplexity", "bits_per_byte": "held-out bits per byte"}


def notes(rows: Sequence[Row], problems: Sequence[str] = ()) -> list[str]:
    """What to know about a comparison, and what is missing from it; `problems` are those of `read`."""
    return [
        printable(note, 4000)
        for note in (*warnings(rows, problems), *tasks.notes(rows), missing(rows))
        if note
    ]


def plot(rows: Sequence[Row], reference: Sequence[Point] = (), width: float = 8.4) -> Figure:
    """The Pareto picture of the rows; `reference` only where perplexities may be compared."""
    compared = comparison(rows)
    drawn = points(rows)
    order = sorted(range(len(rows)), key=lambda i: (rows[i].sharing, rows[i].cache))
    subtitle = "Caches are 16-bit unless named."
    if compared.ranked:
        subtitle += " Line: Pareto frontier."
    if any(point.unfinished for point in drawn):
        subtitle += " Hollow: unfinished."
    return pareto.plot(
        [drawn[i] for i in order],
        quality=HEADINGS[compared.measure],
        subtitle=f"{compared.warning or subtitle}\n{setting(rows)}",
        reference=reference if compared.measure == "perplexity" else (),
        ranked=compared.ranked,
        width=width,
    )


_LINES = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "double"}  # matplotlib's, and CSS's


def _look(i: int) -> tuple[str, str]:
    """Colour and line of the i-th run."""
    return COLOURS[i % len(COLOURS)], list(_LINES)[i // len(COLOURS) % len(_LINES)]


def curves(rows: Sequence[Row]) -> list[Figure]:
    """Training loss, and the held-out evaluations made during training, over training tokens."""
    measure = comparison(rows).measure
    keys = {"loss": "training loss, nats per token", measure: HEADINGS[measure]}
    return [_curves(rows, key, heading) for key, heading in keys.items()]


def _curves(rows: Sequence[Row], key: str, heading: str) -> Figure:
    with pareto.styled():
        figure = Figure(figsize=(5.4, 3.6), layout="constrained")
        axes = figure.subplots()
        late: list[float] = []  # the fall from the first values would fill the plot
        for i, row in enumerate(rows):
            steps, values = curve(row, key)
            late += values[len(values) // 5 :]
            colour, line = _look(i)
            axes.plot(
                [step * row.config.tokens_per_step for step in steps],
                values,
                marker="" if key == "loss" else "o",
                color=colour,
                linestyle=line,
                linewidth=1.4,
                markersize=3.5,
            )
        axes.set(xlabel="training tokens", ylabel=heading)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: human(x)))
        if late:
            room = 0.05 * (max(late) - min(late)) or 0.1
            axes.set_ylim(min(late) - room, max(late) + room)
    return figure


def curve(row: Row, key: str, most: int = 500) -> tuple[list[int], list[float]]:
    """(steps, values) of a metric; of a long one every n-th record, the last one included."""
    found = [record for record in row.metrics if math.isfinite(record.get(key, math.nan))]
    found = found[:: -math.ceil(len(found) / most) or -1][::-1]
    return [record["step"] for record in found], [record[key] for record in found]


# --------------------------------------------------------------------------------------- page

_CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --muted: #66707b; --grid: #dfe3e8;
  --surface: #ffffff; --best: #eef4ff; --warn: #9a5b00; --warn-back: #fff6e5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --muted: #98a2ad; --grid: #2f363e;
  --surface: #15181c; --best: #1b2638; --warn: #f0b860; --warn-back: #2c2415; } }
* { box-sizing: border-box; }
body { margin: 2.5rem auto; max-width: 72rem; padding: 0 1.25rem; background: var(--surface);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
.muted { color: var(--muted); font-size: .85rem; max-width: 52rem; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; display: block; } svg.pareto { max-width: 54rem; }
svg.narrow { display: none; }
.curves { display: flex; flex-wrap: wrap; gap: 1rem; } .curves svg { flex: 1 1 20rem; max-width: 36rem; }
.legend { display: flex; flex-wrap: wrap; gap: .15rem 1.2rem; font-size: .85rem; padding: 0;
  list-style: none; overflow-wrap: anywhere; }
.legend i { display: inline-block; width: 1.6rem; margin-right: .4rem; vertical-align: middle; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .87rem; min-width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .6rem; border-bottom: 1px solid var(--grid); white-space: pre; }
th { vertical-align: bottom; color: var(--muted); font-weight: 600; }
tr.best { background: var(--best); } tr.best td:nth-child(2) { font-weight: 600; }
.left { text-align: left; } .right { text-align: right; } .center { text-align: center; }
td.center { color: #2f6fde; } .step { color: var(--warn); font-weight: 400; margin-left: .5rem; }
.note { background: var(--warn-back); color: var(--warn); padding: .55rem .9rem; margin: .5rem 0;
  border-radius: 6px; overflow-wrap: anywhere; }
td.run { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 7rem; }
summary { cursor: pointer; margin: .4rem 0; } pre { font-size: .8rem; overflow-x: auto;
  border: 1px solid var(--grid); border-radius: 6px; padding: .8rem 1rem; }
@media screen and (max-width: 40rem) { body { margin: 1.2rem auto; padding: 0 .8rem; }
  svg.wide { display: none; } svg.narrow { display: block; } table { font-size: .8rem; }
  th, td { padding: .38rem .28rem; } td.run { min-width: 6rem; } }
@media print { :root { color-scheme: light; --ink: #1b1f24; --muted: #66707b; --grid: #dfe3e8;
  --surface: #ffffff; --best: #eef4ff; --warn: #9a5b00; --warn-back: #fff6e5; }
  body { margin: 0; max-width: none; padding: 0; font-size: 10pt; } .scroll { overflow: visible; }
  table { font-size: 7.5pt; } th, td { padding: .25rem .3rem; } td { white-space: pre-wrap; }
  td.run, td.left { min-width: 0; overflow-wrap: anywhere; } svg, tr { break-inside: avoid; }
  h2 { break-after: avoid; } .curves svg { flex-basis: 45%; } }
"""


def html(
    rows: Sequence[Row],
    title: str,
    reference: Sequence[Point] = (),
    problems: Sequence[str] = (),
) -> str:
    """Picture, table, learning curves and run details; every text of a run is escaped."""
    runs = [row for row in rows if not row.cache]
    told = "".join(
        f'<p class="note">{escape(printable(note, 4000))}</p>\n'
        for note in (*warnings(rows, problems), *tasks.notes(rows))
    )
    if hint := missing(rows):
        told += f'<p class="muted">{escape(hint)}</p>\n'
    label = "Quality over KV-cache bytes per token"
    picture = "".join(
        _inline(plot(rows, reference, width), f"pareto {name}", label)
        for name, width in (("wide", 8.4), ("narrow", 4.6))
    )
    learning = "".join(
        _inline(figure, "", "Over training tokens: " + name)
        for name, figure in zip(
            ("training loss", "held-out evaluations"), curves(runs), strict=True
        )
    )
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{_CSS}</style></head>
<body>
<h1>{escape(title)}</h1>
<p class="muted">{len(runs)} run{"s" if len(runs) != 1 else ""}, compared by cla_jax</p>
{told}{picture}
<h2>Results</h2>
{_results(rows)}
<p class="muted">{escape(caption(rows))}</p>
{_scores(rows)}<h2>Learning curves</h2>
<div class="curves">{learning}</div>
{_legend(runs)}
<p class="muted">{escape(setting(runs))} The vertical axes are cut to what follows the first fifth of each
curve. A run has the same colour in every picture.</p>
<h2>Runs</h2>
{_details(runs)}
</body>
</html>
"""


def _legend(rows: Sequence[Row]) -> str:
    """Which line of the learning curves is whose."""
    entries = ""
    for i, row in enumerate(rows):
        colour, line = _look(i)
        entries += (
            f'<li><i style="border-top: 3px {_LINES[line]} {colour}"></i>{escape(row.name)}</li>\n'
        )
    return f'<ul class="legend">\n{entries}</ul>'


def _inline(figure: Figure, name: str, label: str) -> str:
    """An SVG element whose neutral colours follow the page's scheme."""
    text = pareto.saved(figure, "svg").decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # ids of groups would repeat between plots
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    for variable in ("ink", "muted", "grid", "surface"):
        text = text.replace(getattr(pareto, variable.upper()), f"var(--{variable})")
    return text.replace("<svg", f'<svg class="{name}" role="img" aria-label="{escape(label)}"', 1)


def _results(rows: Sequence[Row]) -> str:
    sides = [f' class="{side}"' for side in COLUMNS.values()]
    head = "".join(f"<th{side}>{name}</th>" for name, side in zip(COLUMNS, sides, strict=True))
    body = ""
    sides[1] = ' class="left run"'
    for row, texts in lines(rows):
        cells = [escape(text) for text in texts]
        cells[1] += f'<span class="step">{row.progress}</span>'
        tds = "".join(f"<td{side}>{cell}</td>" for cell, side in zip(cells, sides, strict=True))
        body += f'<tr class="{"best" if texts[0] else ""}">{tds}</tr>\n'
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n{body}</table></div>'


def _scores(rows: Sequence[Row]) -> str:
    """The section of task scores; empty where there are none."""
    headings, found = tasks.lines(rows)
    if not found:
        return ""
    sides = ["left"] + ["right"] * (len(headings) - 1)

    def line(tag: str, cells: Sequence[str]) -> str:
        pairs = zip(sides, cells, strict=True)
        inside = "".join(f'<{tag} class="{side}">{escape(cell)}</{tag}>' for side, cell in pairs)
        return f"<tr>{inside}</tr>\n"

    body = "".join(line("td", cells) for cells in found)
    return (
        f'<h2>Downstream tasks</h2>\n<div class="scroll"><table>\n<thead>{line("th", headings)}</thead>\n'
        f'{body}</table></div>\n<p class="muted">{escape(tasks.CAPTION)}</p>\n'
    )


def _details(rows: Sequence[Row]) -> str:
    """A line a run with the settings in which the runs differ; it opens to all but the metrics."""
    flat = [configs.flatten(configs.identity(row.config)) for row in rows]
    fields = dict.fromkeys(key for settings in flat for key in settings)
    differing = [key for key in fields if len({settings.get(key) for settings in flat}) > 1]
    made = ""
    for row, settings in zip(rows, flat, strict=True):
        own = ", ".join(f"{key} = {settings[key]}" for key in differing if key in settings)
        content = json.dumps({"path": row.path, **row.record, "evaluations": row.evals}, indent=2)
        made += (
            f'<details><summary>{escape(row.name)} <span class="muted">{escape(own)}</span>'
            f"</summary><pre>{escape(content)}</pre></details>\n"
        )
    return made
