"""Engine `sky`: SkyPilot managed jobs, one a trial; SkyPilot recovers what is preempted."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from launch.sweeps import tpus
from launch.sweeps.engines import Job, call, check_shared, one_by_one, yaml
from launch.sweeps.engines.jobset import RESTARTED
from launch.sweeps.records import Submission
from launch.sweeps.trials import LaunchPlan, Trial

_ALIVE = ("PENDING", "SUBMITTED", "STARTING", "RUNNING", "RECOVERING", "WINDING_DOWN")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sky:
    """Managed jobs of SkyPilot, on whatever cloud has what is asked for."""

    # Accelerators in SkyPilot's notation, such as H100:8. Default: those of --topology.
    accelerators: str = ""
    # Use spot capacity.
    spot: bool = False
    # Cloud, region and zone, such as gcp/us-central1.
    infra: str = ""
    # Directory that is copied to the machines; the trial runs in it.
    workdir: str = "."
    # Shell commands that install the trial's dependencies.
    setup: str = "pip install -e '.[gcs]'"
    # Python interpreter on the machines.
    python: str = "python3"

    tools: ClassVar[Mapping[str, str]] = {"sky": "pip install 'skypilot[gcp]'"}
    here: ClassVar[bool] = False
    topology: ClassVar[str] = "allowed"
    vms: ClassVar[bool] = True

    def jobs(self, plan: LaunchPlan, numbers: Mapping[str, int]) -> list[Job]:
        check_shared(plan)
        if not self.accelerators and not plan.trials[0].resources.topology:
            raise ValueError(
                "engine sky needs --topology, such as v5e:16x16, or --sky.accelerators, such as H100:8"
            )
        if plan.trials[0].resources.slices > 1:
            raise ValueError("--slices: sky supports one slice; for more, use --engine jobset")
        return [
            Job(
                files={f"{job}.yaml": yaml.dump(self.task(trial, job))},
                command=(
                    *("sky", "jobs", "launch", "--yes", "--detach-run", "--name", job),
                    f"{{files}}/{job}.yaml",
                ),
                jobs={trial.name: job},
            )
            for trial, job in one_by_one(plan.trials, numbers)
        ]

    def task(self, trial: Trial, job: str) -> dict[str, Any]:
        """The managed job of a trial."""
        setup = self.setup
        resources: dict[str, Any] = {"accelerators": self.accelerators}
        if trial.resources.topology and not self.accelerators:
            tpu = tpus.find(trial.resources.topology)
            if not tpu.kind.runtime:
                raise ValueError(
                    f"--topology {trial.resources.topology} is unknown to SkyPilot; use --engine jobset"
                )
            resources["accelerators"] = f"tpu-{tpu.accelerator_type}"
            resources["accelerator_args"] = {"runtime_version": tpu.kind.runtime}
            setup += "\npip install 'jax[tpu]'"
        # The trial's record has the limits: exit code 1 ends the job, the others start it again.
        resources["job_recovery"] = {
            "max_restarts_on_errors": 0,
            "recover_on_exit_codes": list(RESTARTED),
        }
        if self.spot:
            resources["use_spot"] = True
        if self.infra:
            resources["infra"] = self.infra
        return {
            "name": job,
            "resources": resources,
            "workdir": self.workdir,
            **({"envs": dict(trial.environment)} if trial.environment else {}),
            "setup": f"{setup}\n",
            "run": f"{trial.shell()}\n",
        }

    def alive(self, submitted: Sequence[Submission]) -> set[str]:
        shown = json.loads(call(["sky", "jobs", "queue", "--skip-finished", "--output", "json"]))
        running = {
            job.get("job_name")
            for job in shown
            if str(job.get("status")).rpartition(".")[2] in _ALIVE
        }
        return {job.job for job in submitted} & running

    def cancel(self, submitted: Sequence[Submission]) -> list[tuple[str, ...]]:
        return [("sky", "jobs", "cancel", "--yes", "--name", job.job) for job in submitted]
