"""Engines: what starts the trials of a launch plan. One file each, one frozen dataclass of options each.

An engine renders its jobs as data, files and commands, and what `--dry-run` shows is what is submitted. It
keeps no state: asked which of its jobs are queued or running, it asks the machinery itself.
"""

import dataclasses
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from launch.sweeps.records import Submission
from launch.sweeps.trials import LaunchPlan, Trial

# Variables by which SLURM, and MPI under it, tell a process which job it is a part of.
_OF_A_JOB = ("SLURM_", "SBATCH_", "PMI", "OMPI_")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is handed over in one go: files to be written first, and the command that takes them.

    Files lie in the directory `.sweep/jobs` of the sweep; in the command `{files}` stands for it.
    """

    files: Mapping[str, str]
    command: tuple[str, ...]
    # The trials, each with the engine's name for it; `{}` stands for what the command prints.
    jobs: Mapping[str, str]
    group: str = ""


class Engine(Protocol):
    """Where trials run."""

    # Command-line tools that it needs, with how to get each.
    tools: Mapping[str, str]
    # Whether trials run where the launcher runs, on its file system.
    here: bool
    # Whether a topology is needed, is allowed, or means nothing.
    topology: str
    # Whether its TPUs are Cloud TPU VMs.
    vms: bool

    def jobs(self, plan: LaunchPlan, numbers: Mapping[str, int]) -> list[Job]:
        """The jobs of all trials of a plan. `numbers`: which submission of each trial this is, from 1."""
        ...

    def alive(self, submitted: Sequence[Submission]) -> set[str]:
        """The jobs, by the engine's names, that wait or run."""
        ...

    def cancel(self, submitted: Sequence[Submission]) -> list[tuple[str, ...]]:
        """The commands that end jobs for good."""
        ...


def check_tools(engine: Engine) -> None:
    """Raises ValueError for a command-line tool that is missing, with how to get it."""
    for tool, how in engine.tools.items():
        if shutil.which(tool) is None:
            raise ValueError(
                f"this engine needs the command {tool}, which is not on the PATH: {how}"
            )


def outside(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without what says that its process is a part of a job.

    Inside an allocation SLURM describes the launcher's own step: its cores, its memory, its number of
    processes. A trial that inherits that is bound to the same core, or waits for processes that never come.
    """
    kept = ("SLURM_CONF", "SLURM_CLUSTERS")
    return {
        name: value
        for name, value in environment.items()
        if name in kept or not name.startswith(_OF_A_JOB)
    }


def call(command: Sequence[str]) -> str:
    """Runs a command; what it prints. Raises ValueError with its words if it fails."""
    done = subprocess.run(
        command,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
        env=outside(os.environ),
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-2000:]
        raise ValueError(f"{' '.join(command[:4])} ... failed with code {done.returncode}: {said}")
    return done.stdout


def one_by_one(trials: Iterable[Trial], numbers: Mapping[str, int]) -> list[tuple[Trial, str]]:
    """Trials, each with the name of its job."""
    return [(trial, trial.job(numbers.get(trial.name, 1))) for trial in trials]


def check_shared(plan: LaunchPlan) -> None:
    """Raises ValueError if the runs lie in a place that only this machine can name."""
    runs = plan.trials[0].config.placement.runs
    if "://" not in runs and not runs.startswith("/"):
        raise ValueError(
            f"placement.runs = {runs!r} means another place on another machine: give gs://... (with the "
            "extra `gcs`) or the absolute path of a mount, -- --placement.runs gs://BUCKET/runs"
        )
