"""The files of a sweep: what was asked for, what was submitted, and how each trial fares.

    runs/SWEEP/                 a study directory: the run directories of the trials
    runs/SWEEP/.sweep/
        lock                    held by the launcher
        sweep.json              the engine that the sweep was last handed to
        TRIAL/trial.json        the config, as in a run's config.json; launch.train takes it    (launcher)
        TRIAL/submission.json   the engine's name for the job, and how many there were          (launcher)
        TRIAL/state.json        attempts, preemptions, failures, last error, heartbeat          (runner)
        TRIAL/lock              held by the runner, and by the training process that it started
        TRIAL/log.txt           what training printed
        TRIAL/cancelled         there if the trial is not to be started              (launch.cancel)

Every file has one writer, and is written whole. Locks are flock's: a crash frees them; a shared file system
must support them. A remote directory (gs://) has none: there the engine sees to it that a trial runs once.
"""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

from etils import epath

from cla_jax import directories, files, goodput, runs, seals
from cla_jax.config import Config
from cla_jax.config.record import to_record
from cla_jax.directories import is_local, write_atomically
from cla_jax.fields import from_dict
from cla_jax.runs import Run

T = TypeVar("T")
R = TypeVar("R")

HEARTBEAT_S = 15  # between two signs of life of a runner
SILENT_S = 90  # without one, a runner counts as dead
_TAIL = 1 << 16  # bytes of the metrics that hold the last step, evaluation and time summary

Status = Literal["waiting", "running", "stopped", "failed", "done"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """How a trial fares, as its runner last wrote it. Times are seconds since 1970."""

    status: Status = "waiting"
    attempts: int = 0
    preemptions: int = 0  # stopped, or died without a word
    failures: int = 0
    # Of these, how many in a row without a new checkpoint: what is held against the limits.
    preempted_in_a_row: int = 0
    failed_in_a_row: int = 0
    progress: int = 0  # the newest checkpoint
    error: str = ""  # of the last failure
    diverged: bool = False
    host: str = ""
    pid: int = 0
    updated: float = 0.0

    @property
    def silent(self) -> bool:
        return time.time() - self.updated > SILENT_S


@dataclasses.dataclass(frozen=True, kw_only=True)
class Submission:
    """A trial handed to an engine."""

    engine: str
    job: str  # the engine's own name for it
    number: int = 1  # how often the trial was handed over
    group: str = ""  # what the engine needs beside the name to find it: a namespace, a zone
    attempts: int = 0  # that the trial had made by then


@dataclasses.dataclass(frozen=True)
class Record:
    """The files of one trial."""

    sweep: epath.Path  # runs/SWEEP
    name: str

    @property
    def path(self) -> epath.Path:
        return self.sweep / ".sweep" / self.name

    @property
    def trial(self) -> epath.Path:
        return self.path / "trial.json"

    @property
    def log(self) -> epath.Path:
        return self.path / "log.txt"

    @property
    def run(self) -> Run:
        return Run(self.sweep / self.name)

    @property
    def is_local(self) -> bool:
        return is_local(self.sweep)

    def config(self) -> Config:
        """Raises ValueError naming a missing or broken file."""
        return runs.read_config(self.trial)

    def state(self) -> State:
        return _read(self.path / "state.json", State) or State()

    def submission(self) -> Submission | None:
        return _read(self.path / "submission.json", Submission)

    def write_trial(self, config: Config, further: dict[str, Any]) -> None:
        write(self.trial, to_record(config) | further)

    def write_state(self, state: State) -> None:
        write(self.path / "state.json", dataclasses.asdict(state))

    def write_submission(self, submission: Submission) -> None:
        write(self.path / "submission.json", dataclasses.asdict(submission))

    @property
    def is_cancelled(self) -> bool:
        return (self.path / "cancelled").exists()

    def cancel(self) -> None:
        write_atomically(self.path / "cancelled", "")

    def clear_failure(self) -> None:
        """Forgets a cancellation and what is held against the trial; its checkpoints stay."""
        (self.path / "cancelled").unlink(missing_ok=True)
        state = self.state()
        if state.status == "failed":
            fresh = {"failed_in_a_row": 0, "preempted_in_a_row": 0, "diverged": False}
            self.write_state(dataclasses.replace(state, status="waiting", **fresh))

    @contextlib.contextmanager
    def locked(self) -> Iterator[tuple[int, ...] | None]:
        """The descriptors of the lock, for children to inherit; None if another process has it."""
        with _locked(self.path / "lock") as held:
            yield held

    @property
    def is_locked(self) -> bool:
        """Whether a runner of this file system is at it; False for a remote directory."""
        return self.is_local and directories.is_locked(self.path / "lock")


@contextlib.contextmanager
def launching(sweep: epath.Path) -> Iterator[None]:
    """Keeps a second launcher from the same sweep. Raises ValueError if there is one."""
    with _locked(sweep / ".sweep" / "lock") as held:
        if held is None:
            raise ValueError(f"{sweep} is being launched by another process")
        yield


@contextlib.contextmanager
def _locked(file: epath.Path) -> Iterator[tuple[int, ...] | None]:
    """Yields None if another process has the lock, after waiting for one that only looks."""
    if not is_local(file):
        yield ()
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with directories.lock(file, patience=1.0) as held:
        yield held or None


# -------------------------------------------------------------------------------- a whole sweep


def names(sweep: epath.Path) -> list[str]:
    """The trials that were ever launched. Raises ValueError if the directory is no sweep."""
    directory = sweep / ".sweep"
    if not directory.exists():
        raise ValueError(f"{sweep} holds no sweep (no .sweep): launch one with launch.sweep")
    return sorted(path.name for path in directory.iterdir() if (path / "trial.json").exists())


def in_parallel(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Many small files, which on a remote file system take a while each."""
    with ThreadPoolExecutor(16) as threads:
        return list(threads.map(function, items))


# ------------------------------------------------------------------------------ run directories


def last_records(run: Run) -> list[dict[str, Any]]:
    """The last lines of a run's metrics, however long they are; see Run.read_records."""
    if not run.is_local or not run.metrics.exists():
        return list(run.read_records())
    with files.opened(run.metrics, links=False) as file:
        start = max(0, file.seek(0, os.SEEK_END) - _TAIL)
        file.seek(start)
        lines = file.read(2 * _TAIL).split(b"\n")[1 if start else 0 :]
    lines = seals.read_lines(lines, run.id, last=None, required=run.is_sealed)
    records = map(runs.metrics_record, lines)
    return [record for record in records if record is not None]


def result(run: Run, steps: int) -> dict[str, float] | None:
    """The held-out metrics of a run after its last step; None while there are none."""
    metrics = None
    for record in last_records(run):
        if record["step"] == steps and record.get("perplexity") is not None:
            metrics = record
    return metrics


def last_step(run: Run) -> dict[str, Any]:
    """What the metrics last said of a step: step, loss, tokens_per_s, eta_s as far as they go."""
    merged: dict[str, Any] = {}
    for record in last_records(run):
        if not goodput.is_time_summary(record) and "loss" in record:
            merged = record
    return merged


# -------------------------------------------------------------------------------------- files


def write(file: epath.Path, fields: dict[str, Any]) -> None:
    write_atomically(file, json.dumps(fields, indent=2) + "\n")


def _read(file: epath.Path, cls: type[T]) -> T | None:
    if not files.exists(file):
        return None
    try:
        fields = files.read_object(file, links=False)
        with files.about(file):
            return from_dict(cls, fields)
    except ValueError as error:
        raise ValueError(f"{error}; remove the file to count from zero") from None
