"""Compares runs, or tests the claims of a study: `python -m launch.compare PATH [PATH ...]`."""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from etils import epath
from rich.console import Console

import experiments
from cla_jax import report, runs
from cla_jax.report import paper, studies
from cla_jax.report.rows import Arrangement
from cla_jax.runs import Run
from cla_jax.study import Declared
from experiments import paper as printed
from launch.cli import read, user_errors
from launch.sweeps.records import Record


def compare(
    paths: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="PATH ...", help_behavior_hint=""),
    ] = (),
    *,
    study: Annotated[str, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = "",
    context: Annotated[int | None, tyro.conf.arg(metavar="TOKENS", help_behavior_hint="")] = None,
    out: Annotated[str, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = "",
    group_by: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]],
        tyro.conf.arg(metavar="FIELD", help_behavior_hint=""),
    ] = (),
    over: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]],
        tyro.conf.arg(metavar="FIELD", help_behavior_hint=""),
    ] = (),
    baseline: Annotated[str, tyro.conf.arg(metavar="RUN", help_behavior_hint="")] = "",
    sort: Annotated[str, tyro.conf.arg(metavar="FIELD", help_behavior_hint="")] = "",
) -> None:
    """Compare runs: accuracy against KV-cache memory, in tables and plots.

    Prints the table, and the scores of downstream tasks if there are any. Writes report.html, one file with
    tables, plots, learning curves, two runs side by side, and details. Also writes plots as PNG, SVG and PDF,
    and tables as CSV and LaTeX. Runs that differ only in their seed form one row. The command reads the run
    directories only; it evaluates nothing. An earlier report in the output
    directory is replaced only if both are of the same study, or both of none.

    The runs of a sweep, or two runs of different studies:
        python -m launch.compare runs/tiny
        python -m launch.compare runs/tiny/mqa runs/mine/cla2 --out comparison

    Cache sizes at a context longer than the training window:
        python -m launch.compare runs/tiny --context 32768

    One row for each value of a field, with differences to a baseline:
        python -m launch.compare runs/tiny --group-by model.kv_map --over seed --baseline "kv_map identity"

    The claims of a declared study, tested with the runs in a directory:
        python -m launch.compare --study small.main runs/small

    Args:
      paths: run directories, or directories of runs; local or gs://
      study: test the claims of this declared study; also writes report.md and report.json
      context: count KV bytes for this many tokens of context (default: the training window)
      out: output directory (default: the given directory, or the common parent of several)
      group_by: one row for each value of this config field; repeat the flag for several fields
      over: one row for runs that differ only in this field (default: seed); repeat the flag for several
      baseline: a row or a run; a column shows the difference of the others to it, seed by seed
      sort: a config field, run, kv_bytes, parameters, perplexity, bits_per_byte or difference
    """
    if study and (group_by or over):
        raise ValueError("--study defines which runs belong together: remove --group-by and --over")
    fields = lambda names: tuple(name.replace("-", "_") for name in names)  # as flags spell them
    view = report.View(
        group_by=fields(group_by),
        over=fields(over) or ("seed",),
        baseline=baseline,
        sort=sort.replace("-", "_"),
    )
    declared = experiments.find_study(study) if study else None
    paths, directory = _places(paths, declared, out)
    earlier = report.record.replaced(epath.Path(directory), declared.name if declared else "")
    problems: list[str] = []
    compared = runs.find_runs(paths, problems)
    rows = report.read(compared, context, problems)
    if not rows:
        raise ValueError("; ".join(problems))
    together = report.arrangement.merged(rows, view)
    diverged, failed = _bad_ends(compared)
    outcome = made = None
    noise: list[str] = []
    if declared:
        outcome = report.examine(declared, rows, diverged=diverged, failed=failed)
        noise = studies.noise(rows, declared.study)
        made = report.record.make(
            outcome,
            rows,
            earlier=earlier,
            commit=_commit(),
            command=_command(study, paths, context, out, baseline, sort),
        )
    ends = [f"{row.name} failed: {failed[row.path]}" for row in rows if row.path in failed]
    ends += [f"{row.name} diverged" for row in rows if row.path in diverged]
    further = () if declared else ends
    arranged = report.arrangement.arrange(together, view, studies.counting(outcome))
    # First: whatever becomes of the table, the report is there.
    written = report.write(
        rows,
        directory,
        problems=problems,
        outcome=outcome,
        made=made,
        beside=paper.tables(rows, *_printed()),
        further=further,
        remarks=noise,
        diverged=diverged,
        view=view,
    )
    _print_tables(rows, together, arranged)
    # Not through a console, which would break a command into lines.
    left_out = report.seeds.left_out(rows, view.group_by, view.over)
    for note in (*report.notes(rows, problems), *left_out, *further):
        print(note)
    if outcome:
        _print_verdicts(outcome)
    for note in noise:
        print(note)
    for file in written:
        print(f"wrote {os.fspath(file)}")


def _places(
    paths: tuple[str, ...], declared: Declared | None, out: str
) -> tuple[tuple[str, ...], str | epath.Path]:
    """Where the runs are, and where the report goes. Raises ValueError if that is not known."""
    if declared and not paths:
        paths = (str(runs.run_path(next(iter(declared.trials.values()))).parent),)
    if not paths:
        raise ValueError("give at least one run or study directory: python -m launch.compare PATH")
    directory = out or report.common_directory(paths)
    if not directory:
        raise ValueError(
            "the paths have no common parent directory: give the output directory with --out DIR"
        )
    return paths, directory


def _print_tables(
    rows: Sequence[report.Row], together: Sequence[report.Row], arranged: Arrangement
) -> None:
    """Prints the rows, and the scores of downstream tasks if there are any."""
    console, width = Console(), None
    if console.is_terminal:
        width = console.width
    else:
        # A file or a pipe has no width that a table should fit: no column may be squeezed.
        console = Console(width=10_000)
    console.print(report.table(together, width, arranged))
    if (scores := report.tasks.table(rows)) is not None:
        console.print(scores)


def _print_verdicts(outcome: report.Outcome) -> None:
    """Prints the claims with their verdicts, the gains, and what is missing."""
    for note in outcome.notes:
        print(note)
    for number in range(len(outcome.verdicts)):
        print(studies.sentence(outcome, number))
    for gain, result in outcome.gains:
        print(f"{gain}: {result}")
    _print_missing(outcome.declared, outcome)


def _print_missing(declared: Declared, outcome: report.Outcome) -> None:
    """Says how many runs of a study are missing, and the command that makes them."""
    missing = len(declared.trials) - len(outcome.runs) - len(outcome.diverged)
    if missing:
        command = shlex.join(("python", "-m", "launch.sweep", declared.name))
        print(f"{missing} of {len(declared.trials)} runs of the study are missing: {command}")


def _bad_ends(runs: Sequence[Run]) -> tuple[frozenset[str], dict[str, str]]:
    """The runs of a sweep that diverged, and those that failed with their last error, by their paths."""
    diverged, failed = set(), {}
    for run in runs:
        if not (run.path.parent / ".sweep" / run.path.name).exists():
            continue
        state = Record(run.path.parent, run.path.name).state()
        if state.diverged:
            diverged.add(str(run.path))
        elif state.status == "failed":
            failed[str(run.path)] = state.error or "failed"
    return frozenset(diverged), failed


def _printed() -> tuple[dict[str, paper.Line], list[paper.Stated]]:
    """What the paper prints, for the rows that are the paper's."""
    wikitext = ("wikitext", "word_perplexity")
    lines = {}
    for name, line in printed.PRINTED.items():
        pairs = zip(printed.TASKS, line.tasks, strict=False)  # rows of table 1 have none
        scores = {(task, "acc"): percent / 100 for task, percent in pairs}
        if line.wikitext is not None:
            scores = {wikitext: line.wikitext} | scores
        lines[name] = paper.Line(kv_bytes=line.kv_bytes, perplexity=line.perplexity, scores=scores)
    stated = [
        paper.Stated(
            row=one.row,
            other=one.other,
            value=one.value,
            score=wikitext if one.measure == "wikitext" else None,
        )
        for one in printed.DIFFERENCES
    ]
    return lines, stated


def _commit() -> str:
    """The commit of the code, with a plus sign if files were changed since; empty where there is no git."""
    here = Path(__file__).parents[1]

    def git(*words: str) -> str:
        made: Any = subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, check=True
        )
        return made.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _command(
    study: str, paths: Sequence[str], context: int | None, out: str, baseline: str, sort: str
) -> str:
    words = ["python", "-m", "launch.compare", "--study", study, *map(os.fspath, paths)]
    words += ["--context", str(context)] if context else []
    for flag, value in (("--out", out), ("--baseline", baseline), ("--sort", sort)):
        words += [flag, value] if value else []
    return shlex.join(words)


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    read(compare, prog="python -m launch.compare", args=argv)


if __name__ == "__main__":
    main(sys.argv[1:])
