"""Cancel a sweep, or some of its trials. Running trials save and end; waiting trials never start.

    python -m launch.cancel smoke.grid
    python -m launch.cancel smoke.grid peak_lr=0.001,seed=0
    python -m launch.cancel gs://BUCKET/runs/cla_1b

Finished trials are not changed. `python -m launch.sweep SWEEP --again` continues the others from their
checkpoints.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from cla_jax.messages import near_choice
from launch.cli import collected, read, user_errors
from launch.status import find, line
from launch.sweeps import engines, records
from launch.sweeps.launcher import engine_of
from launch.sweeps.records import Record, Submission


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    # The name of a sweep, or its directory; then the trials to cancel (default: all).
    names: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SWEEP [TRIAL ...]")
    ] = ()
    # Directory of all run directories, for a sweep given by name.
    runs: str = "runs"


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    arguments = read(Arguments, args=argv, prog="python -m launch.cancel", description=__doc__)
    if not arguments.names:
        raise ValueError("give a sweep: python -m launch.cancel SWEEP")
    sweep = find(arguments.names[0], arguments.runs)
    known = records.names(sweep)
    for name in arguments.names[1:]:
        near_choice("trial", name, known)
    chosen = [Record(sweep, name) for name in arguments.names[1:] or known]
    unfinished = [record for record in chosen if line(record)["state"] != "done"]
    # First the mark: a runner that is told to stop must find it.
    failed: list[str] = []
    for record in unfinished:
        record.cancel()
    by_engine: dict[str, list[Submission]] = {}
    for record in unfinished:
        with collected(failed):
            if submission := record.submission():
                by_engine.setdefault(submission.engine, []).append(submission)
    for name, submissions in by_engine.items():
        engine = engine_of(name)
        engines.check_tools(engine)
        for command in engine.cancel(submissions):
            with collected(failed):  # the others are cancelled all the same
                engines.call(command)
    for record in chosen:
        state = "cancelled" if record in unfinished else "finished before: nothing changes"
        print(f"{record.name}  {state}")
    if not chosen:
        print(f"{sweep}: no trial was submitted, so there is nothing to cancel")
    if any(submission.engine == "local" for those in by_engine.values() for submission in those):
        print(f"running trials save and end; they check for this every {records.HEARTBEAT_S} s")
    if failed:
        raise ValueError("\n".join(failed))


if __name__ == "__main__":
    main(sys.argv[1:])
