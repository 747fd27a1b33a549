"""Engine `local`: a pool of processes on this machine, each with its share of cores or devices."""

import dataclasses
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from etils import epath

from cla_jax.directories import open_plain
from launch.sweeps.engines import Job, outside
from launch.sweeps.records import Submission
from launch.sweeps.trials import LaunchPlan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Local:
    """Trials at the same time on this machine."""

    # Trials at a time; 0: one per GPU, or without GPUs one per four cores (at least one).
    workers: int = 0
    # CPU cores that each trial is pinned to; 0 for an equal share.
    cores: int = 0

    tools: ClassVar[Mapping[str, str]] = {}
    here: ClassVar[bool] = True
    topology: ClassVar[str] = "none"
    vms: ClassVar[bool] = False

    def __post_init__(self):
        if self.workers < 0 or self.cores < 0:
            raise ValueError("--local.workers and --local.cores must not be negative")
        if (self.workers or 1) * (self.cores or 1) > len(cores()):
            raise ValueError(
                f"--local.workers {self.workers} with {self.cores or 1} cores each: this machine has "
                f"{len(cores())} cores"
            )

    def slots(self) -> list[dict[str, str]]:
        """The environment of each place in the pool, and under `cores` what it keeps to."""
        devices = gpus()
        workers = self.workers or len(devices) or max(1, len(cores()) // 4)
        share = self.cores or max(1, len(cores()) // workers)
        places = []
        for i in range(workers):
            mine = cores()[i * share % len(cores()) :][:share]
            slot = {"cores": ",".join(map(str, mine)), "OMP_NUM_THREADS": str(len(mine))}
            if devices:
                per = max(1, len(devices) // workers)
                slot["CUDA_VISIBLE_DEVICES"] = ",".join(devices[i * per % len(devices) :][:per])
            places.append(slot)
        return places

    def jobs(self, plan: LaunchPlan, numbers: Mapping[str, int]) -> list[Job]:
        """A job a trial; the pool adds a place's cores and devices when it starts it."""
        return [
            Job(
                files={},
                command=trial.command,
                jobs={trial.name: trial.job(numbers.get(trial.name, 1))},
            )
            for trial in plan.trials
        ]

    def alive(self, submitted: Sequence[Submission]) -> set[str]:  # noqa: ARG002
        """None: locks say who runs."""
        return set()

    def cancel(self, submitted: Sequence[Submission]) -> list[tuple[str, ...]]:  # noqa: ARG002
        """Runners look for the mark of a cancellation themselves."""
        return []


class Pool:
    """Processes that this launcher has started, one a place."""

    def __init__(self, local: Local):
        self.slots = local.slots()
        self.running: dict[
            str, tuple[int, subprocess.Popen]
        ] = {}  # by trial: its place and process

    def free(self, elsewhere: int) -> int:
        """Places left; trials that outlived an earlier launcher take some too."""
        return max(0, len(self.slots) - len(self.running) - elsewhere)

    def start(self, name: str, job: Job, environment: Mapping[str, str], log: epath.Path) -> None:
        taken = {place for place, _ in self.running.values()}
        place = next(i for i in range(len(self.slots)) if i not in taken)
        slot = dict(self.slots[place])
        keep = ("--cores", slot.pop("cores")) if hasattr(os, "sched_setaffinity") else ()
        log.parent.mkdir(parents=True, exist_ok=True)
        with open_plain(log, "ab") as out:
            process = subprocess.Popen(
                [*job.command, *keep],
                env=outside(os.environ) | slot | dict(environment),
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is the launcher's to pass on
            )
        self.running[name] = (place, process)

    def ended(self) -> dict[str, int]:
        """The trials that have ended since, with their exit codes."""
        codes = {name: process.poll() for name, (_, process) in self.running.items()}
        ended = {name: code for name, code in codes.items() if code is not None}
        for name in ended:
            del self.running[name]
        return ended

    def has_ended(self) -> bool:
        """Whether `ended` has something to tell."""
        return any(process.poll() is not None for _, process in self.running.values())

    def end(self, ask: bool) -> None:
        """Waits for all to end, having asked them to save and to do so."""
        for _, process in self.running.values() if ask else ():
            process.terminate()
        for _, process in self.running.values():
            process.wait()


def cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def gpus() -> list[str]:
    """NVIDIA GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [device for device in visible.split(",") if device not in ("", "-1")]
    devices = Path("/dev").glob("nvidia[0-9]*")
    return [str(i) for i in sorted(int(device.name.removeprefix("nvidia")) for device in devices)]
