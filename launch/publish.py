"""Copy finished runs without their checkpoints: small enough for a repository.

    python -m launch.publish runs/small/main docs/results/small/main
    python -m launch.publish runs/small/main docs/results/small/main --every 64

A copy has the files that reports read: the config, the tokenizer, and all evaluations with the scores of each
document. It also has every 32nd step of the metrics, with new line numbers and checksums. It has no
checkpoints, so it can be reported but not continued. Unfinished runs are skipped. If a run's records were
altered, it is not copied and the command fails.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import tyro
from etils import epath

from cla_jax import directories, names, runs, seals
from cla_jax.messages import printable
from cla_jax.runs import SAVED, Run
from launch.cli import read, user_errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    # A run, or a directory of runs.
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUNS")]
    # The directory of the copies.
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    # Copy the metrics of every N-th step, of the first step, and of all steps with an evaluation.
    every: int = 32

    def __post_init__(self):
        names.check_path("TARGET", self.target)
        if self.every < 1:
            raise ValueError(f"every = {self.every} must be positive")


def publish(arguments: Arguments) -> None:
    if (epath.Path(arguments.target) / "config.json").exists():
        raise ValueError(
            f"{arguments.target} is a run itself: name the directory in which the copies should lie"
        )
    refused = []
    for run in runs.find_runs([arguments.source]):
        try:
            _publish(run, epath.Path(arguments.target) / run.path.name, arguments.every)
        except ValueError as error:  # the other runs are copied all the same
            refused.append(str(error))
    if refused:
        raise ValueError("; ".join(refused))


def _publish(run: Run, target: epath.Path, every: int) -> None:
    """Raises ValueError if the run was altered, or another run is in the place of the copy."""
    problems: list[str] = []
    records = list(run.read_records(problems))
    problems += run.missing_records().problems
    if problems:
        raise ValueError(problems[0])
    if not _is_finished(run.config().steps, records):
        print(f"{printable(run.path)}: skipped, because it is not finished")
        return
    _copy(run, target, _kept(records, every))
    print(f"{printable(run.path)} -> {printable(target)}")


def _is_finished(steps: int, records: Sequence[dict[str, Any]]) -> bool:
    return any(record["step"] >= steps and "held_out_loss" in record for record in records)


def _kept(records: Sequence[dict[str, Any]], every: int) -> Iterator[dict[str, Any]]:
    """What of the metrics is copied. Notes of checkpoints are not: there will be none."""
    for record in records:
        if SAVED not in record and (
            record["step"] <= 1 or record["step"] % every == 0 or "held_out_loss" in record
        ):
            yield record


def _copy(run: Run, target: epath.Path, records: Iterator[dict[str, Any]]) -> None:
    """Raises ValueError if another run is in the place of the copy, or links that lead elsewhere."""
    for directory in (target, target / "eval"):
        directories.check_links(directory)
    if (target / "config.json").exists() and Run(target).id != run.id:
        raise ValueError(
            f"{target} contains another run and is not overwritten: choose another directory"
        )
    (target / "eval").mkdir(parents=True, exist_ok=True)
    evals = [f"eval/{name}.json" for name in run.evals()]
    for name in ("config.json", "tokenizer.json", *evals):
        directories.write_atomically(target / name, (run.path / name).read_text())
    lines = (
        seals.seal_line(record, number, run.id) if run.is_sealed else json.dumps(record) + "\n"
        for number, record in enumerate(records, 1)
    )
    directories.write_atomically(target / "metrics.jsonl", "".join(lines))


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    publish(read(Arguments, args=argv, prog="python -m launch.publish", description=__doc__))


if __name__ == "__main__":
    main(sys.argv[1:])
