"""The HTML page: Pareto picture, table, learning curves, run details; no external resource."""

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, Literal

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from cla_jax import costs
from cla_jax.config.record import run_identity
from cla_jax.fields import flatten
from cla_jax.messages import printable
from cla_jax.report import arrangement, pareto, seeds, studies, tasks
from cla_jax.report.arrangement import View
from cla_jax.report.pareto import COLOURS, SURFACE, Point
from cla_jax.report.rows import (
    Arrangement,
    Row,
    caption,
    columns,
    comparison,
    human,
    lines,
    missing,
    points,
    setting,
    warnings,
)

# A title, headings, lines of cells, and a sentence below.
Table = tuple[str, Sequence[str], Sequence[Sequence[str]], str]

DEFAULT = View()

HEADINGS = {"perplexity": "held-out perplexity", "bits_per_byte": "held-out bits per byte"}


def notes(rows: Sequence[Row], problems: Sequence[str] = ()) -> list[str]:
    """What to know about a comparison, and what is missing from it; `problems` are those of `read`."""
    return [
        printable(note, 4000)
        for note in (*warnings(rows, problems), *tasks.notes(rows), missing(rows))
        if note
    ]


def plot(
    rows: Sequence[Row],
    reference: Sequence[Point] = (),
    width: float = 8.4,
    kind: Literal["resident", "read"] = "resident",
) -> Figure:
    """The Pareto picture of the rows; `reference` only where perplexities may be compared.

    The second view has the bytes that a decode step reads. Quantised caches are left out of it.
    """
    if kind == "read":
        rows, reference = [row for row in rows if not row.cache], ()
    compared = comparison(rows)
    drawn = points(rows)
    if kind == "read":
        read = [costs.kv_bytes(row.config.model, row.context).read for row in rows]
        drawn = [dataclasses.replace(one, kv_bytes=b) for one, b in zip(drawn, read, strict=True)]
    order = sorted(range(len(rows)), key=lambda i: (rows[i].sharing, rows[i].cache))
    subtitle = "Caches are 16-bit unless named."
    if compared.ranked:
        subtitle += " Line: Pareto frontier."
    if any(point.unfinished for point in drawn):
        subtitle += " Hollow: unfinished, not ranked."
    if any(len(point.seeds) > 1 for point in drawn):
        subtitle += " Bars: one standard deviation over seeds; dots: single seeds."
    if pareto.overlapping(drawn):
        subtitle += " Rows with the same bytes stand side by side."
    return pareto.plot(
        [drawn[i] for i in order],
        quality=HEADINGS[compared.measure],
        subtitle=f"{compared.warning or subtitle}\n{setting(rows)}",
        reference=reference if compared.measure == "perplexity" else (),
        ranked=compared.ranked,
        width=width,
        kind=kind,
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
            steps, values, low, high = band(row, key)
            late += [*low[len(low) // 5 :], *high[len(high) // 5 :]]
            colour, line = _look(i)
            if len(row.seeds) > 1:
                tokens = [step * row.config.tokens_per_step for step in steps]
                axes.fill_between(tokens, low, high, color=colour, alpha=0.18, linewidth=0)
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


def band(row: Row, key: str) -> tuple[list[int], list[float], list[float], list[float]]:
    """(steps, means, least, greatest) of a metric over the seeds of a row, where all of them have it."""
    by_seed = [dict(zip(*curve(seed, key), strict=True)) for seed in row.seeds or (row,)]
    steps = sorted(set.intersection(*map(set, by_seed)))
    values = [[of_seed[step] for of_seed in by_seed] for step in steps]
    means = [math.fsum(here) / len(here) for here in values]
    return steps, means, [min(here) for here in values], [max(here) for here in values]


def learning_rates(curves: Sequence[seeds.Curve]) -> Figure:
    """Bits per byte over the learning rate; a star at the optimum of each curve."""
    with pareto.styled():
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        axes = figure.subplots()
        for i, curve in enumerate(curves):
            colour, line = _look(i)
            known = [
                (r, y) for r, y in zip(curve.rates, curve.losses, strict=True) if math.isfinite(y)
            ]
            axes.plot(
                [rate for rate, _ in known],
                [loss for _, loss in known],
                color=colour,
                linestyle=line,
                marker="o",
                markersize=4,
                linewidth=1.4,
                label=pareto.shortened(curve.name),
            )
            if curve.best:
                axes.plot(
                    [curve.best.rate],
                    [curve.best.loss],
                    linestyle="",
                    marker="*",
                    markersize=11,
                    color=colour,
                    markeredgecolor=SURFACE,
                    # Hollow at an edge: that is no optimum yet.
                    fillstyle="none" if curve.best.edge else "full",
                )
        axes.set_xscale("log")
        rates = sorted({rate for curve in curves for rate in curve.rates})
        axes.set_xticks(rates, [f"{rate:.3g}" for rate in rates])
        axes.set_xticks([], minor=True)
        axes.set(xlabel="peak learning rate", ylabel="held-out bits per byte")
        if curves:
            axes.legend(ncols=1 + len(curves) // 8, fontsize=8)
    return figure


def curve(row: Row, key: str, most: int = 500) -> tuple[list[int], list[float]]:
    """(steps, values) of a metric; of a long one every n-th record, the last one included."""
    records = [record for record in row.metrics if math.isfinite(record.get(key, math.nan))]
    records = records[:: -math.ceil(len(records) / most) or -1][::-1]
    return [record["step"] for record in records], [record[key] for record in records]


# --------------------------------------------------------------------------------------- page

_CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --muted: #66707b; --grid: #dfe3e8;
  --surface: #ffffff; --best: #dbe8ff80; --shadow: #1b1f2460; --warn: #9a5b00; --warn-back: #fff6e5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --muted: #98a2ad; --grid: #2f363e;
  --surface: #15181c; --best: #24406b70; --shadow: #e6e9ed70; --warn: #f0b860; --warn-back: #2c2415; } }
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
.remarks { padding-left: 1.2rem; font-size: .85rem; max-width: 60rem; overflow-wrap: anywhere; }
/* What lies beyond an edge casts a shadow on it: the two covers scroll with the table, the shadows do not. */
.scroll { overflow-x: auto; background:
  linear-gradient(to right, var(--surface) 40%, transparent) local left / 2.5rem 100% no-repeat,
  linear-gradient(to left, var(--surface) 40%, transparent) local right / 2.5rem 100% no-repeat,
  linear-gradient(to right, var(--shadow), transparent) scroll left / 1.2rem 100% no-repeat,
  linear-gradient(to left, var(--shadow), transparent) scroll right / 1.2rem 100% no-repeat; }
table { border-collapse: collapse; font-size: .87rem; min-width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .42rem; border-bottom: 1px solid var(--grid); white-space: pre; }
th { vertical-align: bottom; color: var(--muted); font-weight: 600; }
tr.best { background: var(--best); } tr.best td:nth-child(2) { font-weight: 600; }
.left { text-align: left; } .right { text-align: right; } .center { text-align: center; }
td.center { color: #2f6fde; } .step { color: var(--warn); font-weight: 400; margin-left: .5rem; }
.note { background: var(--warn-back); color: var(--warn); padding: .55rem .9rem; margin: .5rem 0;
  border-radius: 6px; overflow-wrap: anywhere; }
table.folded td { white-space: normal; } table.folded td.left { min-width: 14rem; overflow-wrap: anywhere; }
/* A seed's dot over a point does not keep the pointer from it. */
.pareto { pointer-events: none; } .point { cursor: pointer; pointer-events: auto; }
.point:focus { outline: 2px solid var(--muted); }
select { font: inherit; max-width: 100%; color: inherit; background: var(--surface);
  border: 1px solid var(--grid); border-radius: 6px; padding: .25rem .5rem; }
#shown table, #pair table { margin: .5rem 0; min-width: 0; } #shown td, #pair td { white-space: normal;
  overflow-wrap: anywhere; } #pair svg { max-width: 40rem; }
td.run { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 14rem; }
summary { cursor: pointer; margin: .4rem 0; } pre { font-size: .8rem; overflow-x: auto;
  border: 1px solid var(--grid); border-radius: 6px; padding: .8rem 1rem; }
@media screen and (max-width: 40rem) { body { margin: 1.2rem auto; padding: 0 .8rem; }
  svg.wide { display: none; } svg.narrow { display: block; } table { font-size: .8rem; }
  th, td { padding: .38rem .28rem; } td.run { min-width: 6rem; }
  table.folded th { white-space: normal; } table.folded td.left { min-width: 6.5rem; } }
@media print { :root { color-scheme: light; --ink: #1b1f24; --muted: #66707b; --grid: #dfe3e8;
  --surface: #ffffff; --best: #eef4ff; --warn: #9a5b00; --warn-back: #fff6e5; }
  body { margin: 0; max-width: none; padding: 0; font-size: 10pt; }
  .scroll { overflow: visible; background: none; }
  table { font-size: 7pt; } th, td { padding: .25rem .2rem; } td { white-space: pre-wrap; }
  td.left { min-width: 0; overflow-wrap: anywhere; } td.run { min-width: 9em; }
  svg, tr { break-inside: avoid; } h2 { break-after: avoid; } .curves svg { flex-basis: 45%; }
  .screen { display: none; } }
"""


_SCRIPT = (Path(__file__).parent / "page.js").read_text()


def html(
    rows: Sequence[Row],
    title: str,
    reference: Sequence[Point] = (),
    problems: Sequence[str] = (),
    *,
    outcome: studies.Outcome | None = None,
    beside: Sequence[Table] = (),
    notes: Sequence[str] = (),
    remarks: Sequence[str] = (),
    diverged: frozenset[str] = frozenset(),
    view: View = DEFAULT,
) -> str:
    """Claims, pictures, tables, learning curves and run details; every text of a run is escaped.

    What would mislead a reader comes first, then results, then further notes.

    Args:
      rows: one a run and a cache; runs that differ in their seed alone become one row.
      reference: further points in perplexity, drawn grey.
      problems: what could not be read.
      outcome: of a declared study; then only the runs that count in it are drawn.
      beside: tables of our results beside others, such as a paper's.
      notes: further things to know before reading the results.
      remarks: things to know after them.
      diverged: paths of runs whose loss was not finite.
    """
    runs = [row for row in rows if not row.cache]
    together = arrangement.merged(rows, view)
    arranged = arrangement.arrange(together, view, studies.counting(outcome))
    drawn = shown_rows(together, outcome, diverged)
    compared = [row for row in drawn if not row.cache]
    known = [
        *warnings(rows, problems),
        *tasks.notes(rows),
        *seeds.left_out(rows, view.group_by, view.over),
    ]
    known += notes
    noted = "".join(f'<p class="note">{escape(printable(note, 4000))}</p>\n' for note in known)
    if hint := missing(rows):
        noted += f'<p class="muted">{escape(hint)}</p>\n'
    pictures = {kind: _both_widths(drawn, reference, kind) for kind in ("resident", "read")}
    learning = "".join(
        _inline(figure, "", "Over training tokens: " + name)
        for name, figure in zip(
            ("training loss", "held-out evaluations"), curves(compared), strict=True
        )
    )
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{_CSS}</style></head>
<body>
<h1>{escape(title)}</h1>
<p class="muted">{len(runs)} run{"s" if len(runs) != 1 else ""}, compared by cla_jax</p>
{noted}{_claims(outcome)}{pictures["resident"]}
<p class="muted screen">Click a point, or reach it with the tab key, to see its config.</p>
<div id="shown" class="muted" aria-live="polite"></div>
{_remarks(remarks)}<h2>Results</h2>
{_results(together, arranged)}
<p class="muted">{escape(caption(together, arranged))}</p>
{"".join(map(_table, beside))}{_scores(rows)}<h2>Bytes that a decode step reads</h2>
{pictures["read"]}
<p class="muted">Sharing layers makes the cache smaller, but a decode step reads the same number of bytes.
Quantised caches are left out here.</p>
{_rates(together, diverged)}<h2>Learning curves</h2>
<div class="curves">{learning}</div>
{_legend(compared)}
<p class="muted">{escape(setting(rows))}
The vertical axes are chosen for the curves without their first fifth.
A run has the same colour in every plot. Bands show the lowest and the highest value of the seeds.</p>
{_side_by_side(runs)}<h2>Runs</h2>
{_details(runs)}
<script type="application/json" id="data">{_data(drawn, runs)}</script>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def shown_rows(
    together: Sequence[Row], outcome: studies.Outcome | None, diverged: frozenset[str] = frozenset()
) -> list[Row]:
    """The rows that pictures show: of a study those that count, of a search the best learning rates."""
    if outcome is not None:
        # Called as the study calls them: all are of one sweep, whose directory would say nothing.
        named = [
            dataclasses.replace(row, name=f"{declared}.seed-{seed}")
            for (declared, seed), row in outcome.runs.items()
        ]
        return seeds.merged(named)
    return seeds.best_of_rates(together, diverged)


def _both_widths(
    rows: Sequence[Row], reference: Sequence[Point], kind: Literal["resident", "read"]
) -> str:
    label = f"Quality over KV-cache bytes per token, {kind}"
    return "".join(
        _inline(plot(rows, reference, width, kind), f"pareto {name}", label)
        for name, width in (("wide", 8.4), ("narrow", 4.6))
    )


def _table(table: Table) -> str:
    title, headings, lines, below = table
    sides = ["left"] + ["right"] * (len(headings) - 1)

    def line(tag: str, cells: Sequence[str]) -> str:
        shown = [_wrapped(cells[0]), *map(escape, cells[1:])]
        pairs = zip(sides, shown, strict=True)
        inside = "".join(f'<{tag} class="{side}">{cell}</{tag}>' for side, cell in pairs)
        return f"<tr>{inside}</tr>\n"

    body = "".join(line("td", cells) for cells in lines)
    return (
        f'<h2>{escape(title)}</h2>\n<div class="scroll"><table class="folded">\n'
        f"<thead>{line('th', headings)}</thead>\n{body}</table></div>\n"
        f'<p class="muted">{escape(below)}</p>\n'
    )


def _remarks(remarks: Sequence[str]) -> str:
    """The section of notes that are read after the results; empty where there are none."""
    listed = "".join(f"<li>{escape(printable(one, 4000))}</li>\n" for one in remarks)
    return f'<h2>Notes</h2>\n<ul class="remarks">\n{listed}</ul>\n' if remarks else ""


def _wrapped(name: str) -> str:
    """A name that a narrow column or sheet breaks after a separator, not within a word."""
    return re.sub(r"(?<=[/_.])(?=[A-Za-z])", "<wbr>", escape(name))


def _claims(outcome: studies.Outcome | None) -> str:
    return "" if outcome is None else "".join(map(_table, studies.tables(outcome)))


def _rates(rows: Sequence[Row], diverged: frozenset[str]) -> str:
    curves = seeds.curves(rows, diverged)
    if not curves:
        return ""
    picture = _inline(
        learning_rates(curves), "pareto", "Held-out bits per byte over the learning rate"
    )
    return f"<h2>Learning rates</h2>\n{picture}\n{_table(seeds.rate_table(curves))}"


def _side_by_side(rows: Sequence[Row]) -> str:
    if len(rows) < 2:
        return ""

    def options(chosen: int) -> str:
        return "".join(
            f'<option value="{i}"{" selected" * (i == chosen)}>{escape(row.name)}</option>'
            for i, row in enumerate(rows)
        )

    return (
        f'<div class="screen">\n<h2>Two runs side by side</h2>\n'
        f'<p><select id="a" aria-label="first run">{options(0)}</select> '
        f'<select id="b" aria-label="second run">{options(1)}</select></p>\n<div id="pair"></div>\n</div>\n'
    )


def _data(drawn: Sequence[Row], runs: Sequence[Row]) -> str:
    """What the script reads: the config of each point, and of each run its config and loss curve."""

    def flat(row: Row) -> dict[str, Any]:
        settings = flatten(run_identity(row.config))
        return {key: value if value is None else str(value) for key, value in settings.items()}

    def entry(row: Row, *, curves: bool) -> dict[str, Any]:
        own: dict[str, Any] = {"name": row.name, "config": flat(row)}
        if curves:
            steps, losses = curve(row, "loss", 120)
            own["tokens"] = [step * row.config.tokens_per_step for step in steps]
            own["loss"] = [round(loss, 4) for loss in losses]
        own["scores"] = {
            HEADINGS[key]: round(getattr(row.scores, key), 4) for key in HEADINGS if row.scores
        }
        return own

    data = {
        "points": [entry(row, curves=False) for row in drawn],
        "runs": [entry(row, curves=True) for row in runs],
    }
    # No text of a run may end the element that it stands in.
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _legend(rows: Sequence[Row]) -> str:
    """Which line of the learning curves is whose."""
    entries = ""
    for i, row in enumerate(rows):
        colour, line = _look(i)
        entries += f'<li><i style="border-top: 3px {_LINES[line]} {colour}"></i>{_wrapped(row.name)}</li>\n'
    return f'<ul class="legend">\n{entries}</ul>'


def _inline(figure: Figure, name: str, label: str) -> str:
    """An SVG element whose neutral colours follow the page's scheme."""
    text = pareto.saved(figure, "svg").decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(
        r'<g id="point-(\d+)"', r'<g class="point" tabindex="0" role="button" data-point="\1"', text
    )
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # ids of groups would repeat between plots
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    for variable in ("ink", "muted", "grid", "surface"):
        text = text.replace(getattr(pareto, variable.upper()), f"var(--{variable})")
    return text.replace("<svg", f'<svg class="{name}" role="img" aria-label="{escape(label)}"', 1)


def _results(rows: Sequence[Row], arranged: Arrangement) -> str:
    headings = columns(rows, arranged)
    sides = [f' class="{side}"' for side in headings.values()]
    head = "".join(
        f"<th{side}>{escape(name)}</th>" for name, side in zip(headings, sides, strict=True)
    )
    body = ""
    sides[1] = ' class="left run"'
    for row, texts in lines(rows, arranged):
        cells = [escape(text) for text in texts]
        cells[1] = _wrapped(texts[1]) + f'<span class="step">{row.progress}</span>'
        tds = "".join(f"<td{side}>{cell}</td>" for cell, side in zip(cells, sides, strict=True))
        body += f'<tr class="{"best" if texts[0] else ""}">{tds}</tr>\n'
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n{body}</table></div>'


def _scores(rows: Sequence[Row]) -> str:
    """The section of task scores; empty where there are none."""
    headings, lines = tasks.lines(rows)
    return _table(("Downstream tasks", headings, lines, tasks.CAPTION)) if lines else ""


def _details(rows: Sequence[Row]) -> str:
    """A line a run with the settings in which the runs differ; it opens to all but the metrics."""
    flat = [flatten(run_identity(row.config)) for row in rows]
    fields = dict.fromkeys(key for settings in flat for key in settings)
    differing = [key for key in fields if len({settings.get(key) for settings in flat}) > 1]
    made = ""
    for row, settings in zip(rows, flat, strict=True):
        own = ", ".join(f"{key} = {settings[key]}" for key in differing if key in settings)
        content = json.dumps({"path": row.path, **row.record, "evaluations": row.evals}, indent=2)
        made += (
            f'<details><summary>{_wrapped(row.name)} <span class="muted">{escape(own)}</span>'
            f"</summary><pre>{escape(content)}</pre></details>\n"
        )
    return made
