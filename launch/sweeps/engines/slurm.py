"""Engine `slurm`: a job array, requeued when it is preempted; several nodes of a trial join by themselves."""

import dataclasses
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import ClassVar

from cla_jax import chips
from launch.sweeps.engines import Job, call
from launch.sweeps.records import Submission
from launch.sweeps.trials import LaunchPlan, Resources, Trial

_USUAL_ARRAY = 1001  # SLURM's own default
_GET = "part of SLURM's client package (Debian: slurm-client); or launch from a login node"

# Each host of a trial runs the trial runner under srun. To preempt, SLURM sends SIGTERM to the steps and to
# this shell, waits KillWait, and requeues by itself; scancel does the same without requeueing. Before a time
# limit only the steps are told: then the shell queues again. What was killed alone, or lost another host,
# goes on at once. Variables of the user's belong to the trial alone: here they could be taken for ours.
SCRIPT = """\
#!/bin/bash
{setup}trials=({names})
trial=${{trials[$SLURM_ARRAY_TASK_ID]}}
stopped=
trap 'stopped=1' TERM
while true; do
    srun --kill-on-bad-exit=0 {command} &
    step=$!
    while true; do  # the trap ends wait before the step has ended
        wait "$step"
        code=$?
        kill -0 "$step" 2>/dev/null || break
    done
    echo "$trial: exit code $code"
    [ -z "$stopped" ] || exit "$code"
    case $code in
        42) scontrol requeue "$SLURM_JOB_ID"; exit 42 ;;
        134|137|139|143) sleep 5 ;;
        *) exit "$code" ;;
    esac
done
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slurm:
    """A job array, one task a trial."""

    # Partition; empty for the cluster's default.
    partition: str = ""
    # Time limit of a job in sbatch's notation, such as 12:00:00. Two minutes before the limit, training saves
    # and the job is requeued.
    time: str = ""
    # Nodes for each trial, with one process on each. Default with --topology: the topology's.
    nodes: int = 1
    # CPU cores for each process; 0 for the cluster's default.
    cpus: int = 0
    # GPUs on each node. Default with --topology: the topology's.
    gpus: int = 0
    # Maximum number of trials at a time; 0 for no limit.
    at_once: int = 0
    # Further sbatch flags, such as --account=lab --constraint=h100.
    sbatch: str = ""
    # Shell commands to run before the trial, such as `module load cuda`.
    setup: str = ""

    tools: ClassVar[Mapping[str, str]] = dict.fromkeys(("sbatch", "squeue", "scancel"), _GET)
    here: ClassVar[bool] = True
    topology: ClassVar[str] = "allowed"
    vms: ClassVar[bool] = False

    def __post_init__(self):
        for field in ("nodes", "cpus", "gpus", "at_once"):
            if getattr(self, field) < (1 if field == "nodes" else 0):
                raise ValueError(
                    f"--slurm.{field.replace('_', '-')} {getattr(self, field)} must be at least "
                    f"{1 if field == 'nodes' else 0}"
                )
        self.further  # noqa: B018  raises for what is no list of words

    def jobs(self, plan: LaunchPlan, numbers: Mapping[str, int]) -> list[Job]:
        most = _largest_array()
        cuts = range(0, len(plan.trials), most)
        return [self._array(plan, plan.trials[cut:][:most], numbers) for cut in cuts]

    def _array(self, plan: LaunchPlan, trials: Sequence[Trial], numbers: Mapping[str, int]) -> Job:
        first = trials[0]
        nodes, gpus = self.machines(first.resources)
        round_ = max(numbers.get(trial.name, 1) for trial in trials)
        array = f"0-{len(trials) - 1}" + (f"%{self.at_once}" if self.at_once else "")
        # In names of files sbatch replaces %A and the like.
        directory = str(plan.directory).replace("%", "%%")
        options: dict[str, object] = {
            "job-name": plan.sweep,
            "array": array,
            "nodes": nodes,
            "ntasks-per-node": 1,
            "output": f"{directory}/.sweep/jobs/%A_%a.out",
            "open-mode": "append",
            "chdir": os.getcwd(),
            "signal": "TERM@120" if self.time else "",
            "partition": self.partition,
            "time": self.time,
            "cpus-per-task": self.cpus or "",
            "gpus-per-node": gpus or "",
            "priority": first.priority,
        }
        # All trials have the same command but for the name.
        before, after = first.around_name()
        words = [
            *map(shlex.quote, (*first.settings, *before)),
            '"$trial"',
            *map(shlex.quote, after),
        ]
        hosts = ["--hosts", str(nodes)] if nodes > 1 else []
        script = SCRIPT.format(
            names=" ".join(shlex.quote(trial.name) for trial in trials),
            setup=self.setup and f"{self.setup}\n",
            command=" ".join([*words, *hosts]),
        )
        file = f"array-{first.job(round_)}.sh"
        return Job(
            files={file: script},
            # Not as lines of the script, which sbatch splits at blanks, quotes and #.
            command=(
                *("sbatch", "--parsable", "--requeue"),
                *(f"--{name}={value}" for name, value in options.items() if value != ""),
                *self.further,
                f"{{files}}/{file}",
            ),
            jobs={trial.name: f"{{}}_{i}" for i, trial in enumerate(trials)},
        )

    def machines(self, resources: Resources) -> tuple[int, int]:
        """Nodes of a trial, and GPUs of each. Raises ValueError where options and topology differ."""
        name = resources.topology
        if not name:
            return self.nodes, self.gpus
        if not chips.is_gpu(name):
            raise ValueError(
                f"--topology {name}: engine slurm supports GPU topologies only, such as h100:16x8"
            )
        _, gpus = chips.gpu_shape(name)
        for flag, given, usual, needed in (
            ("nodes", self.nodes, 1, resources.hosts),
            ("gpus", self.gpus, 0, gpus),
        ):
            if given not in (usual, needed):
                raise ValueError(f"--slurm.{flag} {given}, but --topology {name} has {needed}")
        return resources.hosts, gpus

    @property
    def further(self) -> list[str]:
        """`sbatch` as words. Raises ValueError for a quote without its end."""
        try:
            return shlex.split(self.sbatch)
        except ValueError as error:
            raise ValueError(f"--slurm.sbatch={self.sbatch!r}: {error}") from None

    def alive(self, submitted: Sequence[Submission]) -> set[str]:
        shown = call(["squeue", "--me", "--noheader", "--array", "--format=%F_%K"])
        return {job.job for job in submitted} & set(shown.split())

    def cancel(self, submitted: Sequence[Submission]) -> list[tuple[str, ...]]:
        return [("scancel", *(job.job for job in submitted))] if submitted else []


def _largest_array() -> int:
    """How many tasks the cluster takes in an array; their numbers must stay below it."""
    try:
        shown = call(["scontrol", "show", "config"])
    except (ValueError, FileNotFoundError):  # a dry run elsewhere; sbatch itself would say more
        return _USUAL_ARRAY
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", shown, re.MULTILINE)
    return max(1, int(match[1])) if match else _USUAL_ARRAY
