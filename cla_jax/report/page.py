"""The HTML page: Pareto picture, table, learning curves, run details; no external resource."""

import json
import math
import re
from collections.abc import Sequence
from html import escape

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from cla_jax import config as configs
from cla_jax.report import pareto, tasks
from cla_jax.report.pareto import COLOURS, Point, shortened
from cla_jax.report.rows import CAPTION, COLUMNS, Row, comparison, human, lines, points
from cla_jax.report.rows import notes as notes_on_rows

HEADINGS = {"perplexity": "held-out perplexity", "bits_per_byte": "held-out bits per byte"}


def notes(rows: Sequence[Row]) -> list[str]:
    """What to know about a comparison, and what is missing from it."""
    return [*notes_on_rows(rows), *tasks.notes(rows)]


def plot(rows: Sequence[Row], reference: Sequence[Point] = ()) -> Figure:
    """The Pareto picture of the rows; `reference` only where perplexities may be compared."""
    measure, warning = comparison(rows)
    drawn = points(sorted(rows, key=lambda row: (row.sharing, row.cache)))
    subtitle = (
        "Each point is a trained model; caches are 16-bit unless named. Line: Pareto frontier"
    )
    if any(point.unfinished for point in drawn):
        subtitle += "; hollow: unfinished"
    return pareto.plot(
        drawn,
        quality=HEADINGS[measure],
        subtitle=warning or f"{subtitle}.",
        reference=reference if measure == "perplexity" else (),
    )


def curves(rows: Sequence[Row]) -> Figure:
    """Training loss and the held-out evaluations made during training, over training tokens."""
    measure, _ = comparison(rows)
    with pareto.styled():
        figure = Figure(figsize=(10, 3.6 + 0.06 * len(rows)), layout="constrained")
        panels = figure.subplots(1, 2)
        keys = {"loss": "training loss, nats per token", measure: HEADINGS[measure]}
        for axes, (key, heading) in zip(panels, keys.items(), strict=True):
            late: list[float] = []  # the fall from the first values would fill the plot
            for i, row in enumerate(rows):
                steps, values = curve(row, key)
                late += values[len(values) // 5 :]
                axes.plot(
                    [step * row.config.tokens_per_step for step in steps],
                    values,
                    marker="" if key == "loss" else "o",
                    label=shortened(row.name),
                    color=COLOURS[i % len(COLOURS)],
                    linestyle=("-", "--", ":", "-.")[i // len(COLOURS) % 4],
                    linewidth=1.4,
                    markersize=3.5,
                )
            axes.set(xlabel="training tokens", ylabel=heading)
            axes.set_xlim(left=0)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: human(x)))
            if late:
                room = 0.05 * (max(late) - min(late)) or 0.1
                axes.set_ylim(min(late) - room, max(late) + room)
        figure.legend(handles=panels[0].get_lines(), loc="outside lower center", ncols=4)
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
body { margin: 2.5rem auto; max-width: 72rem; padding: 0 1.25rem; background: var(--surface);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
.muted { color: var(--muted); font-size: .85rem; max-width: 52rem; }
svg { width: 100%; height: auto; display: block; } svg.pareto { max-width: 54rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .87rem; min-width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .6rem; border-bottom: 1px solid var(--grid); white-space: pre; }
th { vertical-align: bottom; color: var(--muted); font-weight: 600; }
tr.best { background: var(--best); } tr.best td:nth-child(2) { font-weight: 600; }
.left { text-align: left; } .right { text-align: right; } .center { text-align: center; }
td.center { color: #2f6fde; } .step { color: var(--warn); font-weight: 400; margin-left: .5rem; }
.note { background: var(--warn-back); color: var(--warn); padding: .55rem .9rem; margin: .5rem 0;
  border-radius: 6px; overflow-wrap: anywhere; }
summary { cursor: pointer; margin: .4rem 0; } pre { font-size: .8rem; overflow-x: auto;
  border: 1px solid var(--grid); border-radius: 6px; padding: .8rem 1rem; }
"""


def html(rows: Sequence[Row], title: str, reference: Sequence[Point] = ()) -> str:
    """Picture, table, learning curves and run details; every text of a run is escaped."""
    runs = [row for row in rows if not row.cache]
    warnings = "".join(f'<p class="note">{escape(note)}</p>\n' for note in notes(rows))
    picture = _inline(plot(rows, reference), "pareto", "Quality over KV-cache bytes per token")
    learning = _inline(curves(runs), "curves", "Loss and evaluations over training tokens")
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{_CSS}</style></head>
<body>
<h1>{escape(title)}</h1>
<p class="muted">{len(runs)} run{"s" if len(runs) != 1 else ""}, compared by cla_jax</p>
{warnings}{picture}
<h2>Results</h2>
{_results(rows)}
<p class="muted">{escape(CAPTION)}</p>
{_scores(rows)}<h2>Learning curves</h2>
{learning}
<p class="muted">The vertical axes are cut to what follows the first fifth of each curve.</p>
<h2>Runs</h2>
{_details(runs)}
</body>
</html>
"""


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
    differing = [key for key in flat[0] if len({settings[key] for settings in flat}) > 1]
    made = ""
    for row, settings in zip(rows, flat, strict=True):
        own = ", ".join(f"{key} = {settings[key]}" for key in differing)
        content = json.dumps({"path": row.path, **row.record, "evaluations": row.evals}, indent=2)
        made += (
            f'<details><summary>{escape(row.name)} <span class="muted">{escape(own)}</span>'
            f"</summary><pre>{escape(content)}</pre></details>\n"
        )
    return made
