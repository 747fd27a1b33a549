"""Engine `queued-resources`: Cloud TPU slices through gcloud, one queued resource a trial."""

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from typing import ClassVar

from launch.sweeps import tpus
from launch.sweeps.engines import Job, call, check_shared, one_by_one
from launch.sweeps.records import Submission
from launch.sweeps.trials import LaunchPlan

# What counts as waiting or running; the others, SUSPENDED after a preemption among them, never run again.
_ALIVE = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
_METADATA = (
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number"
)

# Runs on every worker, at every boot. The host that keeps the record gives the slice back at the end,
# whatever the end was. So a trial that has failed for good costs nothing more.
SCRIPT = """\
#!/bin/bash
export HOME=/root
mkdir -p /opt/cla_jax && cd /opt/cla_jax
host=$(curl -s -H 'Metadata-Flavor: Google' {metadata})
if [ ! -e /opt/cla_jax.ready ]; then
    ( set -e
    {setup}
    )
    [ $? = 0 ] && touch /opt/cla_jax.ready  # if not, the trial ends at once, and the slice is given back
fi
while true; do
    {command} --host "$host"
    code=$?
    echo "{name}: exit code $code"
    case $code in
        42|134|137|139|143) sleep 10 ;;
        *) break ;;
    esac
done
if [ "$host" = 0 ]; then
    gcloud compute tpus queued-resources delete {job} --zone={zone}{project} --force --async --quiet
fi
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueuedResources:
    """Slices of Cloud TPU, waited for in Google's queue."""

    # Zone of the TPUs, such as us-central1-a.
    zone: str = ""
    # Project; empty for gcloud's default project.
    project: str = ""
    # Use spot capacity. After a preemption, --wait or the next launch requests it again.
    spot: bool = False
    # Use reserved capacity.
    reserved: bool = False
    # Runtime version of the VM; empty for the default of the TPU type.
    runtime_version: str = ""
    # Shell command that installs this package in /opt/cla_jax of a new worker.
    setup: str = ""
    # Python interpreter on the workers.
    python: str = "python3"
    # Service account of the workers; it must be allowed to delete queued resources.
    service_account: str = ""
    # Give up waiting for capacity after this time, such as 6h.
    valid_until_duration: str = ""

    tools: ClassVar[Mapping[str, str]] = {
        "gcloud": "install the Google Cloud CLI (https://cloud.google.com/sdk/docs/install)"
    }
    here: ClassVar[bool] = False
    topology: ClassVar[str] = "needed"
    vms: ClassVar[bool] = True

    def __post_init__(self):
        if self.spot and self.reserved:
            raise ValueError(
                "--queued-resources.spot and --queued-resources.reserved: give only one"
            )

    def jobs(self, plan: LaunchPlan, numbers: Mapping[str, int]) -> list[Job]:
        check_shared(plan)
        resources = plan.trials[0].resources
        tpu = tpus.find(resources.topology)
        if not self.zone:
            raise ValueError(
                "--queued-resources.zone is missing: give the zone of the TPUs, such as us-central1-a"
            )
        if not self.setup:
            raise ValueError(
                "--queued-resources.setup is missing: give a shell command that installs the package on a "
                "worker, such as 'git clone URL . && pip install -e .[gcs] jax[tpu]'"
            )
        if resources.slices > 1:
            raise ValueError(
                f"--slices {resources.slices}: queued-resources supports one slice; for more, use jobset"
            )
        runtime = self.runtime_version or tpu.kind.runtime
        if not runtime:
            raise ValueError(
                f"--topology {resources.topology}: there are no TPU VMs of that type; use --engine jobset"
            )
        jobs = []
        for trial, job in one_by_one(plan.trials, numbers):
            script = SCRIPT.format(
                metadata=_METADATA,
                setup=self.setup,
                command=shlex.join([*trial.settings, *trial.command]),
                name=trial.name,
                job=job,
                zone=self.zone,
                project=f" --project={self.project}" if self.project else "",
            )
            flags = {
                "node-id": job,
                **self._where(),
                "accelerator-type": tpu.accelerator_type,
                "runtime-version": runtime,
                "labels": f"cla-jax-job={job}",
                "metadata-from-file": f"startup-script={{files}}/{job}.sh",
                "service-account": self.service_account,
                "scopes": "cloud-platform",
                "valid-until-duration": self.valid_until_duration,
            }
            command = [*_GCLOUD, "create", job]
            command += [f"--{flag}={value}" for flag, value in flags.items() if value]
            command += [f"--{flag}" for flag in ("spot", "reserved") if getattr(self, flag)]
            jobs.append(
                Job(
                    files={f"{job}.sh": script},
                    command=(*command, "--async", "--quiet"),
                    jobs={trial.name: job},
                    group=" ".join(f"--{flag}={value}" for flag, value in self._where().items()),
                )
            )
        return jobs

    def _where(self) -> dict[str, str]:
        return {"zone": self.zone} | ({"project": self.project} if self.project else {})

    def alive(self, submitted: Sequence[Submission]) -> set[str]:
        names = set()
        for group in {job.group for job in submitted}:
            for resource in json.loads(call(listing(group))):
                if resource.get("state", {}).get("state") in _ALIVE:
                    names.add(resource["name"].rpartition("/")[2])
        return names & {job.job for job in submitted}

    def cancel(self, submitted: Sequence[Submission]) -> list[tuple[str, ...]]:
        return [
            (*_GCLOUD, "delete", job.job, *job.group.split(), "--force", "--async", "--quiet")
            for job in submitted
        ]


_GCLOUD = ("gcloud", "compute", "tpus", "queued-resources")


def listing(group: str) -> list[str]:
    """The line that shows the queued resources of a zone, and project, as JSON."""
    return [*_GCLOUD, "list", *group.split(), "--format=json"]
