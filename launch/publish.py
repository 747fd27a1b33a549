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
    target = epath.Path(arguments.target)
    if (target / "config.json").exists():
        raise ValueError(
            f"{target} is a run itself: name the directory in which the copies should lie"
        )
    source, found = epath.Path(arguments.source), runs.find_runs([arguments.source])
    if _is_in(target, source) and not _is_in(source, target):  # then earlier copies are no sources
        found = [run for run in found if not _is_in(run.path, target)]
    for run in found:
        if runs.real_path(target / run.path.name) == runs.real_path(run.path):
            raise ValueError(
                f"the copy of {run.path} would replace it: name another directory than {target}"
            )
    refused = []
    for run in found:
        try:
            _publish(run, target / run.path.name, arguments.every)
        except (ValueError, OSError) as error:  # the other runs are copied all the same
            refused.append(str(error))
    if refused:
        raise ValueError("; ".join(refused))


def _is_in(path: epath.Path, directory: epath.Path) -> bool:
    return epath.Path(runs.real_path(path)).is_relative_to(runs.real_path(directory))


def _publish(run: Run, target: epath.Path, every: int) -> None:
    """Raises ValueError if the run was altered, or another run is in the place of the copy."""
    problems: list[str] = []
    records = list(run.read_records(problems))
    problems += run.missing_records().problems
    if problems:
        raise ValueError(problems[0])
    if not run.is_finished():
        print(f"{printable(run.path)}: skipped, because it is not finished")
        return
    _copy(run, target, _kept(records, every))
    print(f"{printable(run.path)} -> {printable(target)}")


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
    lines = (
        seals.seal_line(record, number, run.id) if run.is_sealed else json.dumps(record) + "\n"
        for number, record in enumerate(records, 1)
    )
    # Without its config, what was copied in part is not taken for a run.
    copied = ["tokenizer.json", *(f"eval/{name}.json" for name in run.evals()), "config.json"]
    texts = {"metrics.jsonl": "".join(lines)}
    texts |= {name: (run.path / name).read_text() for name in copied}
    (target / "eval").mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        directories.write_atomically(target / name, text)


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    publish(read(Arguments, args=argv, prog="python -m launch.publish", description=__doc__))


if __name__ == "__main__":
    main(sys.argv[1:])
