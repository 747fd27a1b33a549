"""Engine `slurm`: a job array, requeued when it is preempted; several nodes of a trial join by themselves."""

import dataclasses
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from typing import ClassVar

from launch.engines import Job, call
from launch.records import Submission
from launch.trials import LaunchPlan

_GET = "part of SLURM's client package (Debian: slurm-client); or launch from a login node"

# Each host of a trial runs the trial runner under srun. To preempt, SLURM sends SIGTERM to the steps and to
# this shell, waits KillWait, and requeues by itself; scancel does the same without requeueing. Before a time
# limit only the steps are told: then the shell queues again. What was killed alone, or lost another host,
# goes on at once.
SCRIPT = """\
#!/bin/bash
{directives}
trials=({names})
trial=${{trials[$SLURM_ARRAY_TASK_ID]}}
{setup}stopped=
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

    # Partition; empty for the cluster's usual one.
    partition: str = ""
    # Time limit of a job, as sbatch takes it: 12:00:00. Two minutes before it, training saves and the job
    # queues again.
    time: str = ""
    # Nodes for each trial; on each of them one process.
    nodes: int = 1
    # Cores for each process; 0 for the cluster's usual number.
    cpus: int = 0
    # GPUs on each node.
    gpus: int = 0
    # Trials at a time; 0 for as many as there is room for.
    at_once: int = 0
    # Further flags of sbatch, for example --account=lab --constraint=h100.
    sbatch: str = ""
    # Shell lines before the trial, to load modules or activate an environment.
    setup: str = ""

    tools: ClassVar[Mapping[str, str]] = dict.fromkeys(("sbatch", "squeue", "scancel"), _GET)
    here: ClassVar[bool] = True
    topology: ClassVar[str] = "none"
    vms: ClassVar[bool] = False

    def __post_init__(self):
        for field in ("nodes", "cpus", "gpus", "at_once"):
            if getattr(self, field) < (1 if field == "nodes" else 0):
                raise ValueError(
                    f"--slurm.{field.replace('_', '-')} {getattr(self, field)} is too few"
                )

    def jobs(self, plan: LaunchPlan, numbers: Mapping[str, int]) -> list[Job]:
        first = plan.trials[0]
        round_ = max(numbers.get(trial.name, 1) for trial in plan.trials)
        array = f"0-{len(plan.trials) - 1}" + (f"%{self.at_once}" if self.at_once else "")
        options: dict[str, object] = {
            "job-name": plan.sweep,
            "array": array,
            "nodes": self.nodes,
            "ntasks-per-node": 1,
            "output": f"{plan.directory}/.sweep/jobs/%A_%a.out",
            "open-mode": "append",
            "chdir": os.getcwd(),
            "signal": "TERM@120" if self.time else "",
            "partition": self.partition,
            "time": self.time,
            "cpus-per-task": self.cpus or "",
            "gpus-per-node": self.gpus or "",
            "priority": first.priority,
        }
        # sbatch splits its lines at blanks, and knows double quotes.
        quoted = lambda value: json.dumps(value) if " " in str(value) else value
        directives = [f"#SBATCH --{k}={quoted(v)}" for k, v in options.items() if v != ""]
        directives += [
            "#SBATCH --requeue",
            *([f"#SBATCH {self.sbatch}"] if self.sbatch else []),
        ]
        exports = [f"export {name}={shlex.quote(v)}\n" for name, v in first.environment.items()]
        # All trials have the same command but for the name.
        words = ['"$trial"' if w == first.name else shlex.quote(w) for w in first.command]
        hosts = ["--hosts", str(self.nodes)] if self.nodes > 1 else []
        script = SCRIPT.format(
            directives="\n".join(directives),
            names=" ".join(shlex.quote(trial.name) for trial in plan.trials),
            setup="".join([*exports, self.setup and f"{self.setup}\n"]),
            command=" ".join([*words, *hosts]),
        )
        file = f"array-{first.job(round_)}.sh"
        jobs = {trial.name: f"{{}}_{i}" for i, trial in enumerate(plan.trials)}
        return [
            Job(
                files={file: script},
                command=("sbatch", "--parsable", f"{{files}}/{file}"),
                jobs=jobs,
            )
        ]

    def alive(self, submitted: Sequence[Submission]) -> set[str]:
        shown = call(["squeue", "--me", "--noheader", "--array", "--format=%F_%K"])
        return {job.job for job in submitted} & set(shown.split())

    def cancel(self, submitted: Sequence[Submission]) -> list[tuple[str, ...]]:
        return [("scancel", *(job.job for job in submitted))] if submitted else []
