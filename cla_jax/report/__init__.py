"""Runs compared: accuracy against KV-cache memory, as a table, a picture and an HTML page.

    rows     what run directories say, whether they may be compared, the table
    seeds    runs that differ in their seed alone as one row; learning-rate curves
    arrangement  which runs are one row, further columns, differences to a baseline, the order
    studies  a declared study: which runs count, the verdicts on its claims
    tasks    scores of downstream tasks
    paper    ours beside a paper's printed results
    pareto   the frontier and its picture
    page     the HTML page: picture, tables, learning curves, run details; page.js shows configs
    tables   CSV, LaTeX and Markdown
    record   what a study's report was made of, so that a later one sees what changed

Nothing is evaluated here; only what the run directories hold is read.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from matplotlib.figure import Figure

from cla_jax import directories
from cla_jax.report import arrangement, page, pareto, record, seeds, studies, tables, tasks
from cla_jax.report.arrangement import View
from cla_jax.report.page import notes
from cla_jax.report.pareto import Point
from cla_jax.report.rows import Row, common_directory, read, table
from cla_jax.report.seeds import merged
from cla_jax.report.studies import Outcome, examine

__all__ = [
    "Outcome",
    "Point",
    "Row",
    "View",
    "arrangement",
    "common_directory",
    "examine",
    "merged",
    "notes",
    "read",
    "record",
    "table",
    "tasks",
    "write",
]


def write(
    rows: Sequence[Row],
    directory: str | os.PathLike[str],
    reference: Sequence[Point] = (),
    problems: Sequence[str] = (),
    *,
    outcome: Outcome | None = None,
    made: Mapping[str, Any] | None = None,
    beside: Sequence[page.Table] = (),
    further: Sequence[str] = (),
    remarks: Sequence[str] = (),
    diverged: frozenset[str] = frozenset(),
    view: View = page.DEFAULT,
) -> list[epath.Path]:
    """Writes report.html, figures (PNG, SVG, PDF) and tables (CSV, LaTeX); returns their paths.

    Args:
      reference: further points in perplexity, such as a paper's, drawn grey; left out where the runs
        themselves are not compared by perplexity.
      problems: what `read` could not read, for the page to say.
      outcome: of a declared study; then report.md, report.json and tables of its claims are written too.
      made: of a study: what its report was made of (see `record`).
      beside: tables of our results beside others.
      further: notes that stand before the results.
      remarks: notes that stand after them.
      diverged: paths of runs whose loss was not finite.
      view: which runs are one row, the baseline and the order.
    """
    directory = epath.Path(directory)
    title = outcome.declared.name if outcome else directory.name or "Comparison"
    together = arrangement.merged(rows, view)
    drawn = page.shown_rows(together, outcome, diverged)
    noted: list[str] = [*(outcome.notes if outcome else ()), *further]
    remarks = [*(record.words(made) if made else ()), *remarks]
    more = {"outcome": outcome, "beside": beside, "notes": noted, "diverged": diverged}
    more |= {"view": view, "remarks": remarks}
    text = page.html(rows, title, reference, problems, **more)
    assert record.MARK in text
    contents = {record.PAGE: text.encode()}
    figures = {"pareto": page.plot(drawn, reference), "read_bytes": page.plot(drawn, kind="read")}
    figures["training_loss"], figures["held_out"] = page.curves(
        [row for row in drawn if not row.cache]
    )
    if curves := seeds.curves(together, diverged):
        figures["learning_rates"] = page.learning_rates(curves)
        beside = [seeds.rate_table(curves), *beside]
    contents |= _figures(figures)
    known = tables.values(together, arrangement.arrange(together, view))
    lines = [list(line.values()) for line in known]
    contents |= _tables("results", list(known[0]) if known else [], lines)
    if outcome is not None:
        for name, (_, headings, cells, _) in zip(
            studies.TABLES, studies.tables(outcome), strict=False
        ):
            contents |= _tables(name, headings, cells)
        assert made is not None
        contents["report.md"] = _markdown(outcome, title, [*noted, *remarks], beside)
        contents[record.FILE] = record.dump(made)
    assert contents.keys() <= record.NAMES  # `replaced` looks for these
    directories.write_all_atomically({directory / name: data for name, data in contents.items()})
    return [directory / name for name in contents]


def _figures(figures: Mapping[str, Figure]) -> dict[str, bytes]:
    return {
        f"{name}.{format}": pareto.saved(figure, format)
        for name, figure in figures.items()
        for format in record.PICTURES
    }


def _tables(name: str, headings: Sequence[str], lines: Sequence[Sequence[Any]]) -> dict[str, bytes]:
    return {
        f"{name}.csv": tables.as_csv(headings, lines),
        f"{name}.tex": tables.as_latex(headings, lines),
    }


def _markdown(
    outcome: Outcome, title: str, told: Sequence[str], beside: Sequence[page.Table]
) -> bytes:
    parts = [f"# {title}\n"]
    numbers = range(len(outcome.verdicts))
    parts += [f"- {studies.sentence(outcome, i)}" for i in numbers]
    parts.append("\n![Accuracy against KV-cache memory](pareto.svg)\n")
    for heading, headings, lines, below in (*studies.tables(outcome), *beside):
        parts += [f"## {heading}\n", tables.as_markdown(headings, lines), f"{below}\n"]
    parts += ["## Notes\n", *(f"- {note}" for note in told)]
    return ("\n".join(parts) + "\n").encode()
