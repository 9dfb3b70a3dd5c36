"""Jobs on Kubernetes through KubeRay's RayJob: a Ray cluster that lives as long as the job, written as one manifest.

Node loss. A lost worker pod comes back and the training goes on from the newest checkpoint (compute.max_failures); a
lost head or driver begins the job anew on a fresh cluster (`restarts`, the RayJob's backoffLimit), from the same root.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from infra.errors import EnvironmentFailure, InputError
from infra.jobs import (
    ENDED,
    Document,
    JobState,
    State,
    Submission,
    check_resources,
    find_job,
    require_program,
    run_program,
)
from infra.targets import KubeRayTarget, WorkerGroup

LABEL = "app.kubernetes.io/part-of"
_HINT = "install kubectl, and a kubeconfig that reaches the cluster"
_STATES: dict[str, State] = {
    "": "waiting",
    "Initializing": "waiting",
    "Suspending": "waiting",
    "Suspended": "waiting",
    "Retrying": "waiting",
    "Waiting": "waiting",
    "Running": "running",
    "Complete": "succeeded",
    "Failed": "failed",
    "ValidationFailed": "failed",
}


@dataclass(frozen=True)
class KubeRayLauncher:
    """Jobs through kubectl."""

    target: KubeRayTarget

    def render(self, submission: Submission) -> list[Document]:
        """The RayJob."""
        text = yaml.safe_dump(self.manifest(submission), sort_keys=False, width=1_000)
        return [Document(f"{submission.name}.yaml", text)]

    def check(self, submission: Submission) -> None:
        """Whether the API server answers and knows RayJobs, and the groups can hold the workers."""
        if self.target.forward:
            raise InputError(
                f"a kuberay target forwards no variables: forward: {', '.join(self.target.forward)}\n"
                "hint: keep the values in a Kubernetes secret and name it under the target's secrets"
            )
        groups = self.target.groups
        most = {group.name: group.max_replicas if self.target.autoscaling else group.replicas for group in groups}
        cpus = sum(most[group.name] * group.cpus for group in groups)
        gpus = sum(most[group.name] * group.gpus for group in groups)
        check_resources(submission, cpus, gpus, f"the target's groups ({', '.join(most)})")
        self._kubectl("get", "crd", "rayjobs.ray.io", "--request-timeout=5s", "-o", "name", seconds=10)

    def submit(self, submission: Submission) -> JobState:
        """Create the RayJob; one that has ended under this name is deleted first."""
        if any(job.name == submission.name for job in self.jobs()):
            self._kubectl("delete", "rayjob", submission.name, "--wait=true")
        self._kubectl("create", "-f", "-", stdin=self.render(submission)[0].text)
        return find_job(self, submission.name)

    def jobs(self) -> list[JobState]:
        """RayJobs with our label."""
        said = self._kubectl("get", "rayjobs", "-l", f"{LABEL}=hvqd", "-o", "json", "--request-timeout=10s")
        found = []
        for item in json.loads(said)["items"]:
            status = item.get("status") or {}
            state = _STATES.get(status.get("jobDeploymentStatus", ""), "failed")
            if state == "succeeded" and status.get("jobStatus") == "STOPPED":
                state = "stopped"
            name = item["metadata"]["name"]
            started = status.get("startTime") or item["metadata"].get("creationTimestamp", "")
            where = f"rayjob {self.target.namespace}/{name}"
            if cluster := status.get("rayClusterName"):
                where += f", cluster {cluster}"
            found.append(JobState(name, state, where, started, " ".join((status.get("message") or "").split())[:300]))
        return sorted(found, key=lambda job: job.started, reverse=True)

    def logs(self, name: str, *, follow: bool) -> Iterator[str]:
        """The output of the pod that submitted the driver and follows it."""
        find_job(self, name)
        words = ["logs", "-l", f"job-name={name}", "--tail=-1", *(["--follow", "--pod-running-timeout=10m"] * follow)]
        process = subprocess.Popen(
            self._words(*words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stderr is not None
        try:
            yield from process.stdout
            if process.wait():
                said = " ".join(process.stderr.read().split())[:300]
                raise EnvironmentFailure(f"kubectl logs failed: {said}\nhint: the pods may not have started yet")
        finally:
            process.kill()
            process.wait()

    def stop(self, name: str) -> JobState:
        """Delete the RayJob with its cluster."""
        job = find_job(self, name)
        if job.state in ENDED:
            return job
        self._kubectl("delete", "rayjob", name, "--wait=true", seconds=120)
        return JobState(name, "stopped", job.where, job.started)

    def _words(self, *words: str) -> list[str]:
        context = ["--context", self.target.context] if self.target.context else []
        return [require_program("kubectl", _HINT), *context, "--namespace", self.target.namespace, *words]

    def _kubectl(self, *words: str, stdin: str | None = None, seconds: float = 60.0) -> str:
        return run_program(*self._words(*words), stdin=stdin, seconds=seconds)

    # ---- the manifest ----

    def manifest(self, submission: Submission) -> dict[str, Any]:
        """The RayJob as a mapping; forwarded variables are no part of it, secrets stand there by reference."""
        target = self.target
        labels = {LABEL: "hvqd", "app.kubernetes.io/name": submission.name}
        if target.queue is not None:
            labels["kueue.x-k8s.io/queue-name"] = target.queue
        spec: dict[str, Any] = {
            "entrypoint": f"bash -c {_quoted(submission.shell(['python', '-m', 'workflows.cli']))}",
            "submissionMode": "K8sJobMode",
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": target.keep_seconds,
            "backoffLimit": target.restarts,
            "suspend": target.queue is not None,
            "rayClusterSpec": self._cluster(),
        }
        if target.deadline_seconds is not None:
            spec["activeDeadlineSeconds"] = target.deadline_seconds
        return {
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "metadata": {
                "name": submission.name,
                "namespace": target.namespace,
                "labels": labels,
                "annotations": {"hvqd/root": submission.root},
            },
            "spec": spec,
        }

    def _cluster(self) -> dict[str, Any]:
        import ray

        target = self.target
        cluster: dict[str, Any] = {"rayVersion": ray.__version__, "enableInTreeAutoscaling": target.autoscaling}
        if target.autoscaling:
            cluster["autoscalerOptions"] = {"upscalingMode": "Default", "idleTimeoutSeconds": 300}
        head = WorkerGroup(name="head", cpus=target.head_cpus, memory_gib=target.head_memory_gib, shared_memory_gib=2)
        cluster["headGroupSpec"] = {
            # No CPUs of its own for Ray: training belongs on the workers, and the head must not be short of memory.
            "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
            "template": self._template("ray-head", head),
        }
        cluster["workerGroupSpecs"] = [
            {
                "groupName": group.name,
                "replicas": group.replicas,
                "minReplicas": group.min_replicas,
                "maxReplicas": group.max_replicas,
                "rayStartParams": {"num-gpus": str(group.gpus)} if group.gpus else {},
                "template": self._template("ray-worker", group),
            }
            for group in target.groups
        ]
        return cluster

    def _template(self, container: str, group: WorkerGroup) -> dict[str, Any]:
        target = self.target
        resources: dict[str, str] = {"cpu": str(group.cpus), "memory": f"{group.memory_gib}Gi"}
        if group.gpus:
            resources["nvidia.com/gpu"] = str(group.gpus)
        pod: dict[str, Any] = {
            "containers": [
                {
                    "name": container,
                    "image": target.image,
                    "env": self._environment(),
                    "resources": {"requests": resources, "limits": dict(resources)},
                    "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],
                    "securityContext": {"allowPrivilegeEscalation": False},
                }
            ],
            "volumes": [
                {
                    "name": "shared-memory",
                    "emptyDir": {"medium": "Memory", "sizeLimit": f"{group.shared_memory_gib}Gi"},
                }
            ],
            "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000},
            "terminationGracePeriodSeconds": 60,
        }
        if target.priority_class is not None:
            pod["priorityClassName"] = target.priority_class
        if target.service_account is not None:
            pod["serviceAccountName"] = target.service_account
        if group.node_labels:
            pod["nodeSelector"] = dict(group.node_labels)
        if group.gpus:
            pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
        return {"metadata": {"labels": {LABEL: "hvqd"}}, "spec": pod}

    def _environment(self) -> list[dict[str, Any]]:
        plain = [{"name": name, "value": value} for name, value in self.target.environment.items()]
        kept = [
            {"name": name, "valueFrom": {"secretKeyRef": {"name": at.secret, "key": at.key}}}
            for name, at in self.target.secrets.items()
        ]
        return [*plain, {"name": "HVQD_LOGS", "value": "/tmp/hvqd-logs"}, *kept]


def _quoted(line: str) -> str:
    import shlex

    return shlex.quote(line)
