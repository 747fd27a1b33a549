"""Show the state of the trials of a sweep, read from their files.

    python -m launch.status smoke.grid                 # a sweep that was launched from this directory
    python -m launch.status gs://BUCKET/runs/cla_1b    # a sweep's directory
    python -m launch.status smoke.grid --json
    python -m launch.status smoke.grid --once          # print once, as without a terminal

Shows state, step, loss, tokens/s, remaining time, preemptions, failures and the last error of every trial.
The engine is not queried: a trial is `waiting` from its submission to its start. If its runner has not
updated its record for 90 seconds, it is `dead`. Launch the sweep again to continue it from its checkpoint.
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from etils import epath

import experiments
from cla_jax.messages import near_choice, printable
from launch.cli import read, user_errors
from launch.sweeps import records, trials
from launch.sweeps.records import Record

if TYPE_CHECKING:
    from rich.table import Table

_STYLES = {
    "running": "green",
    "done": "bold",
    "failed": "red",
    "dead": "yellow",
    "stopped": "yellow",
    "cancelled": "dim",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    # The name of a sweep, or its directory.
    sweep: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SWEEP")]
    # Print JSON once, instead of a table.
    json: bool = False
    # Print the table once.
    once: bool = False
    # Seconds between updates of the table.
    every: float = 5.0
    # Directory of all run directories, for a sweep given by name.
    runs: str = "runs"


def find(sweep: str, runs: str) -> epath.Path:
    """The directory of a sweep. Raises ValueError, with the nearest names, if there is none."""
    for path in (epath.Path(sweep), epath.Path(runs) / trials.sweep_name(sweep)):
        if (path / ".sweep").exists():
            return path
    if "/" not in sweep and not experiments.names_a_file(sweep):
        near_choice("sweep", sweep, experiments.sweeps())
    raise ValueError(
        f"{sweep} was not launched from here: there is no .sweep in {sweep} or {path}; if the runs are "
        "elsewhere, give --runs"
    )


def line(record: Record) -> dict[str, Any]:
    """What is known of a trial, as JSON has it; a trial whose files are damaged says so."""
    try:
        config, state = record.config(), record.state()
        last = records.last_step(record.run)
        result = records.result(record.run, config.steps)
        submission = record.submission()
    except ValueError as error:
        return {"trial": record.name, "state": "unreadable", "error": str(error)}
    status: str = state.status
    if result is not None:
        status = "done"
    elif record.is_cancelled and status != "running":
        status = "cancelled"
    elif status == "running":
        unlocked = record.is_local and not record.is_locked
        status = "dead" if unlocked or state.silent else status
    return {
        "trial": record.name,
        "state": status,
        "step": last.get("step", 0),
        "steps": config.steps,
        "loss": last.get("loss"),
        "tokens_per_s": last.get("tokens_per_s") if status == "running" else None,
        "eta_s": last.get("eta_s") if status == "running" else None,
        "perplexity": result["perplexity"] if result else None,
        "attempts": state.attempts,
        "preemptions": state.preemptions,
        "failures": state.failures,
        "error": state.error,
        "engine": submission.engine if submission else "",
        "job": submission.job if submission else "",
        "host": state.host,
    }


def lines(sweep: epath.Path) -> list[dict[str, Any]]:
    """A line for each trial. Raises ValueError if the directory is no sweep."""
    return records.in_parallel(lambda name: line(Record(sweep, name)), records.names(sweep))


def table(sweep: epath.Path, lines: list[dict[str, Any]]) -> "Table":
    """The lines for a terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    summary = trials.count(line["state"] for line in lines)
    made = Table(
        box=box.SIMPLE_HEAD, title=Text(printable(f"{sweep}: {summary or 'no trial yet'}"))
    )
    for column in ("trial", "state", "step", "loss", "perplexity", "tokens/s", "ETA"):
        left = column in ("trial", "state")
        made.add_column(column, justify="left" if left else "right", no_wrap=True)
    made.add_column("pre-\nempted", justify="right")
    made.add_column("failed", justify="right")
    made.add_column("last error", overflow="fold")
    show = lambda form, value: "" if value is None or math.isnan(value) else form.format(value)
    # Names and errors come from files: they must not be read as markup, nor move the cursor.
    plain = lambda text, style="": Text(printable(text), style=style)
    for line in lines:
        if line["state"] == "unreadable":
            made.add_row(plain(line["trial"]), "unreadable", *[""] * 7, plain(line["error"]))
            continue
        made.add_row(
            plain(line["trial"]),
            plain(line["state"], _STYLES.get(line["state"], "")),
            f"{line['step']:,}/{line['steps']:,}",
            show("{:.4f}", line["loss"]),
            show("{:.4f}", line["perplexity"]),
            show("{:,.0f}", line["tokens_per_s"]),
            _duration(line["eta_s"]),
            str(line["preemptions"] or ""),
            str(line["failures"] or ""),
            plain(line["error"].partition("\n")[0]),
        )
    return made


def _duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    arguments = read(Arguments, args=argv, prog="python -m launch.status", description=__doc__)
    sweep = find(arguments.sweep, arguments.runs)
    if arguments.json:
        json.dump(lines(sweep), sys.stdout, indent=1)
        print()
        return
    from rich.console import Console
    from rich.live import Live

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a file or a pipe has no width that a table should fit
    shown = lines(sweep)
    if arguments.once or not console.is_terminal:
        console.print(table(sweep, shown))
        return
    unfinished = ("waiting", "running", "stopped", "dead")
    with Live(table(sweep, shown), console=console, auto_refresh=False) as live:
        while any(line["state"] in unfinished for line in shown):
            try:
                time.sleep(arguments.every)
            except KeyboardInterrupt:
                return
            shown = lines(sweep)
            live.update(table(sweep, shown), refresh=True)


if __name__ == "__main__":
    main()
