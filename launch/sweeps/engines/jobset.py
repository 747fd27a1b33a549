"""Engines `jobset` and `xpk`: pods of TPUs on GKE, one JobSet a trial, queued by Kueue.

The exit code of the trial's runner decides. Code 1 fails the JobSet at once. Three kinds of codes start all
pods again: 42 (asked to stop, or to be started again), 134 (jax ends a process whose peer is dead or silent),
and the codes of killed processes. They are not counted here, because the trial's own record has the limits.
xpk's manifest restarts on the same codes, but counts them.
"""

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from launch.sweeps import tpus
from launch.sweeps.engines import Job, call, check_shared, one_by_one, yaml
from launch.sweeps.records import Submission
from launch.sweeps.trials import LaunchPlan, Trial

RESTARTED = (42, 134, 137, 139, 143)

_KUBECTL = {
    "kubectl": "install it (https://kubernetes.io/docs/tasks/tools) and choose the cluster's context"
}


class _OnKubernetes:
    """What the two engines share: their trials are JobSets of a cluster."""

    here: ClassVar[bool] = False
    topology: ClassVar[str] = "needed"
    vms: ClassVar[bool] = False

    def alive(self, submitted: Sequence[Submission]) -> set[str]:
        alive = set()
        for namespace in {job.group for job in submitted}:
            shown = json.loads(
                call(["kubectl", "get", "jobsets", "--namespace", namespace, "-o", "json"])
            )
            for item in shown["items"]:
                ended = {
                    c["type"]
                    for c in item.get("status", {}).get("conditions", [])
                    if c["status"] == "True"
                }
                if not ended & {"Completed", "Failed"}:
                    alive.add(item["metadata"]["name"])
        return alive & {job.job for job in submitted}

    def cancel(self, submitted: Sequence[Submission]) -> list[tuple[str, ...]]:
        return [
            ("kubectl", "delete", "jobset", job.job, "--namespace", job.group, "--ignore-not-found")
            for job in submitted
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobSet(_OnKubernetes):
    """JobSets on a GKE cluster with Kueue."""

    # Container image with this package, the extra `gcs` and jax[tpu] installed.
    image: str = ""
    # Kubernetes namespace.
    namespace: str = "default"
    # Kueue's local queue; empty if the cluster has no Kueue.
    queue: str = "multislice-queue"
    # Use the nodes of this reservation.
    reservation: str = ""
    # Use spot nodes.
    spot: bool = False
    # Kubernetes service account with access to gs://.
    service_account: str = ""
    # Seconds from SIGTERM until the pod is killed; training must save within them.
    grace: int = 120
    # Python interpreter in the image.
    python: str = "python"

    tools: ClassVar[Mapping[str, str]] = _KUBECTL

    def jobs(self, plan: LaunchPlan, numbers: Mapping[str, int]) -> list[Job]:
        check_shared(plan)
        if not self.image:
            raise ValueError("--jobset.image is missing: give a container image with this package")
        return [
            Job(
                files={f"{job}.yaml": yaml.dump(self.manifest(trial, job))},
                command=(
                    "kubectl",
                    "apply",
                    "--namespace",
                    self.namespace,
                    "-f",
                    f"{{files}}/{job}.yaml",
                ),
                jobs={trial.name: job},
                group=self.namespace,
            )
            for trial, job in one_by_one(plan.trials, numbers)
        ]

    def manifest(self, trial: Trial, job: str) -> dict[str, Any]:
        """The JobSet of a trial."""
        labels = {"cla-jax-job": job}
        metadata: dict[str, Any] = {
            "name": job,
            "namespace": self.namespace,
            "labels": ({"kueue.x-k8s.io/queue-name": self.queue} if self.queue else {}) | labels,
            # A slice is a node pool: no two slices in one.
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool",
                "cla-jax-trial": trial.directory,
            },
        }
        return {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": metadata,
            "spec": {
                "failurePolicy": {
                    "maxRestarts": trial.retry.preemptions,
                    "rules": [
                        {
                            "name": "failed",
                            "action": "FailJobSet",
                            "onJobFailureReasons": ["PodFailurePolicy"],
                        },
                        {
                            "name": "again",
                            "action": "RestartJobSetAndIgnoreMaxRestarts",
                            "onJobFailureReasons": ["BackoffLimitExceeded"],
                        },
                    ],
                },
                "replicatedJobs": [
                    {
                        "name": "slice",
                        "replicas": trial.resources.slices,
                        "template": {"spec": self._slice(trial, labels)},
                    }
                ],
            },
        }

    def _slice(self, trial: Trial, labels: Mapping[str, str]) -> dict[str, Any]:
        """The Job of a slice: a pod for each host."""
        hosts = tpus.find(trial.resources.topology).hosts
        return {
            "parallelism": hosts,
            "completions": hosts,
            "completionMode": "Indexed",
            "backoffLimit": 0,
            "podFailurePolicy": {
                "rules": [
                    {
                        "action": "FailJob",
                        "onExitCodes": {
                            "containerName": "trial",
                            "operator": "NotIn",
                            "values": list(RESTARTED),
                        },
                    }
                ]
            },
            "template": {
                "metadata": {
                    "labels": labels,
                    # An autoscaler must not clear nodes away under a run.
                    "annotations": {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"},
                },
                "spec": self._pod(trial),
            },
        }

    def _pod(self, trial: Trial) -> dict[str, Any]:
        slice_ = tpus.find(trial.resources.topology)
        selector = {
            "cloud.google.com/gke-tpu-accelerator": slice_.kind.gke,
            "cloud.google.com/gke-tpu-topology": slice_.shape,
        }
        if self.spot:
            selector["cloud.google.com/gke-spot"] = "true"
        if self.reservation:
            selector["cloud.google.com/reservation-name"] = self.reservation
        return {
            "restartPolicy": "Never",
            "hostNetwork": True,
            "dnsPolicy": "ClusterFirstWithHostNet",
            "terminationGracePeriodSeconds": self.grace,
            "nodeSelector": selector,
            "tolerations": [{"key": "google.com/tpu", "operator": "Exists"}],
            **({"priorityClassName": trial.priority} if trial.priority else {}),
            **({"serviceAccountName": self.service_account} if self.service_account else {}),
            "containers": [
                {
                    "name": "trial",
                    "image": self.image,
                    "command": [_unexpanded(word) for word in trial.command],
                    **(
                        {
                            "env": [
                                {"name": name, "value": _unexpanded(value)}
                                for name, value in trial.environment.items()
                            ]
                        }
                        if trial.environment
                        else {}
                    ),
                    "securityContext": {"privileged": True},
                    "resources": {"limits": {"google.com/tpu": tpus.CHIPS_PER_HOST}},
                    "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
                }
            ],
            "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}],
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Xpk(_OnKubernetes):
    """The same pods through Google's xpk, which writes the manifest itself."""

    # Cluster that xpk created.
    cluster: str = ""
    # Zone of the cluster.
    zone: str = ""
    # Project.
    project: str = ""
    # Container image with this package, the extra `gcs` and jax[tpu] installed.
    image: str = ""
    # Kubernetes namespace.
    namespace: str = "default"
    # Type of capacity: on-demand, spot, or reservation=NAME; empty: xpk detects it.
    capacity: str = ""
    # Python interpreter in the image.
    python: str = "python"

    tools: ClassVar[Mapping[str, str]] = _KUBECTL | {"xpk": "pip install xpk"}

    def jobs(self, plan: LaunchPlan, numbers: Mapping[str, int]) -> list[Job]:
        check_shared(plan)
        for field in ("cluster", "zone", "project", "image"):
            if not getattr(self, field):
                raise ValueError(f"--xpk.{field} is missing")
        jobs = []
        for trial, job in one_by_one(plan.trials, numbers):
            resources = trial.resources
            environment = [f"--env={name}={value}" for name, value in trial.environment.items()]
            command = (
                *("xpk", "workload", "create", "--workload", job, "--cluster", self.cluster),
                *("--project", self.project, "--zone", self.zone, "--namespace", self.namespace),
                *("--tpu-type", tpus.find(resources.topology).xpk_type),
                *("--num-slices", str(resources.slices), "--docker-image", self.image),
                *("--max-restarts", str(trial.retry.preemptions)),
                *("--restart-on-exit-codes", ",".join(map(str, RESTARTED))),
                *(("--priority", trial.priority) if trial.priority else ()),
                *((f"--{self.capacity}",) if self.capacity else ()),
                *environment,
                *("--command", shlex.join(trial.command)),
            )
            jobs.append(
                Job(files={}, command=command, jobs={trial.name: job}, group=self.namespace)
            )
        return jobs


def _unexpanded(text: str) -> str:
    """Kubernetes replaces $(NAME) in commands and values, and takes $$ for one $."""
    return text.replace("$", "$$")
