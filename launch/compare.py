"""Compares runs: `python -m launch.compare PATH [PATH ...]`."""

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro
from rich.console import Console

from cla_jax import report, runs
from launch.cli import read, user_errors


def compare(
    paths: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="PATH ...", help_behavior_hint=""),
    ],
    *,
    context: Annotated[int | None, tyro.conf.arg(metavar="TOKENS", help_behavior_hint="")] = None,
    out: Annotated[str, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = "",
) -> None:
    """Compares runs: accuracy against KV-cache memory, as a table and as a picture.

    Prints the table, and the scores of downstream tasks if there are any, and writes report.html (one
    file: tables, picture, learning curves, details),
    pareto.png and pareto.svg. Only what the run directories hold is read; nothing is computed anew.

    A study, or two runs of different studies:
        python -m launch.compare runs/tiny
        python -m launch.compare runs/tiny/mqa runs/mine/cla2 --out comparison

    What caches hold at a context that is longer than the window of training:
        python -m launch.compare runs/tiny --context 32768

    Args:
      paths: run directories, or study directories that hold some; local or gs://
      context: count KV bytes for so many tokens of context (default: the window of training)
      out: where to write (default: the one directory given, or the common parent of several)
    """
    if not paths:
        raise ValueError("give at least one run or study directory: python -m launch.compare PATH")
    directory = out or report.common_directory(paths)
    if not directory:
        raise ValueError("the paths have no directory in common; say where to write with --out DIR")
    problems: list[str] = []
    rows = report.read(runs.find_runs(paths), context, problems)
    if not rows:
        raise ValueError("; ".join(problems))
    # First: whatever becomes of the table, the report is there.
    written = report.write(rows, directory, problems=problems)
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a file or a pipe has no width that a table should fit
    console.print(report.table(rows))
    if (scores := report.tasks.table(rows)) is not None:
        console.print(scores)
    for note in report.notes(rows, problems):
        print(note)  # not through the console, which would break a command into lines
    for file in written:
        print(f"wrote {os.fspath(file)}")


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    read(compare, prog="python -m launch.compare", args=argv)


if __name__ == "__main__":
    main(sys.argv[1:])
