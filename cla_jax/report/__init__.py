"""Runs compared: accuracy against KV-cache memory, as a table, a picture and an HTML page.

    rows     what run directories say, whether they may be compared, the table
    tasks    scores of downstream tasks
    pareto   the frontier and its picture
    page     the HTML page: picture, table, learning curves, run details

Nothing is evaluated here; only what the run directories hold is read.
"""

import os
from collections.abc import Sequence

from etils import epath

from cla_jax import runs
from cla_jax.report import page, pareto, tasks
from cla_jax.report.page import notes
from cla_jax.report.pareto import Point
from cla_jax.report.rows import Row, common_directory, read, table

__all__ = ["Point", "Row", "common_directory", "notes", "read", "table", "tasks", "write"]


def write(
    rows: Sequence[Row],
    directory: str | os.PathLike[str],
    reference: Sequence[Point] = (),
    problems: Sequence[str] = (),
) -> list[epath.Path]:
    """Writes report.html, pareto.png and pareto.svg; returns their paths.

    `reference`: further points in perplexity, such as a paper's, drawn grey; left out where the runs
    themselves are not compared by perplexity. `problems`: what `read` could not read, for the page to say.
    """
    directory = epath.Path(directory)
    figure = page.plot(rows, reference)
    contents = {
        "report.html": page.html(
            rows, directory.name or "Comparison", reference, problems
        ).encode(),
        "pareto.png": pareto.saved(figure, "png"),
        "pareto.svg": pareto.saved(figure, "svg"),
    }
    runs.write_all_atomically({directory / name: data for name, data in contents.items()})
    return [directory / name for name in contents]
