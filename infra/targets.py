"""Where jobs run: targets, typed, one small YAML each (`infra/deploy/targets/*.yaml`, or a file of one's own).

A target holds no secret: it names environment variables whose values are taken where the job is launched (`forward`),
or secrets that the cluster keeps.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from infra.errors import InputError

BUNDLED = Path(__file__).parent / "deploy" / "targets"

_NAME = r"^[a-z]([-a-z0-9]{0,40}[a-z0-9])?$"
_VARIABLE = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class _Typed(BaseModel):
    """Frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class _Target(_Typed):
    """What every target has."""

    environment: Mapping[_VARIABLE, str] = {}
    """Variables that the job gets; no secrets, they are shown."""
    forward: tuple[_VARIABLE, ...] = ()
    """Names of variables that the job gets with the values they have where it is launched; never shown."""
    shared_folders: tuple[str, ...] = ()
    """Folders that all machines of the target see under the same path, and that a root may therefore lie in."""


class LocalTarget(_Target):
    """This machine: a process of its own that outlives the terminal."""

    kind: Literal["local"]
    folder: str = ".hvqd/jobs"
    """Where logs and records of jobs lie."""


class RayTarget(_Target):
    """An existing Ray cluster, through its Jobs API."""

    kind: Literal["ray"]
    address: str = Field(pattern=r"^https?://[^/\s]+$")
    """Of the dashboard, for example http://10.0.0.1:8265."""
    token_variable: _VARIABLE | None = None
    """Environment variable with the cluster's token; null for a cluster without."""
    ship_code: bool = True
    """Whether this machine's code and lock travel with the job; otherwise the cluster's own hvqd runs."""
    install: bool = False
    """Whether the cluster installs the locked versions for the job first, where its own differ (minutes)."""


class SlurmTarget(_Target):
    """Slurm: a batch script that starts Ray on its nodes and runs the job on the first."""

    kind: Literal["slurm"]
    nodes: int = Field(1, ge=1)
    """Machines."""
    cpus_per_node: int = Field(1, ge=1)
    """CPUs of each."""
    gpus_per_node: int = Field(0, ge=0)
    """GPUs of each."""
    memory_per_node: str | None = Field(None, pattern=r"^\d+[KMGT]?$")
    """Memory of each, as Slurm writes it (64G)."""
    partition: str | None = None
    """Partition; null for the default."""
    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """Quality of service."""
    time_limit: str | None = Field(None, pattern=r"^(\d+-)?\d+(:\d+){0,2}$")
    """As Slurm writes it (1-12:00:00); null for the partition's own."""
    notice_seconds: int = Field(120, ge=1, le=65535)
    """How long before the time limit or a preemption the job is told, writes nothing more, and is queued again."""
    start_seconds: int = Field(180, ge=1)
    """How long the nodes may take to find each other."""
    python: str | None = None
    """Python of an environment with hvqd that all nodes see; null for the one that launches."""
    folder: str = ".hvqd/slurm"
    """Where scripts and logs lie; all nodes must see it."""
    setup: tuple[str, ...] = ()
    """Shell lines before anything else (module load …)."""
    addresses: Mapping[str, str] = {}
    """IP address by Slurm node name, where Ray shall not use the one that the node's own name has."""


class SecretKey(_Typed):
    """A value in a Kubernetes secret."""

    secret: str
    """Its name."""
    key: str
    """The key in it."""


class WorkerGroup(_Typed):
    """Alike machines of a Ray cluster on Kubernetes."""

    name: str = Field(pattern=_NAME)
    """Of the group."""
    replicas: int = Field(1, ge=0)
    """Pods at the start."""
    min_replicas: int = Field(0, ge=0)
    """Fewest pods that the autoscaler leaves."""
    max_replicas: int = Field(1, ge=1)
    """Most pods that it starts."""
    cpus: int = Field(1, ge=1)
    """CPUs a pod."""
    gpus: int = Field(0, ge=0)
    """GPUs a pod."""
    memory_gib: int = Field(4, ge=1)
    """Memory a pod."""
    shared_memory_gib: int = Field(1, ge=1)
    """Of /dev/shm, which NCCL and Ray's object store use."""
    node_labels: Mapping[str, str] = {}
    """Labels of nodes that it may run on."""

    @model_validator(mode="after")
    def _bounds_in_order(self) -> WorkerGroup:
        if not self.min_replicas <= self.replicas <= self.max_replicas:
            raise ValueError(
                f"replicas must lie between min_replicas and max_replicas "
                f"({self.min_replicas} to {self.max_replicas}): {self.replicas}"
            )
        return self


class KubeRayTarget(_Target):
    """Kubernetes with the KubeRay operator: a RayJob."""

    kind: Literal["kuberay"]
    image: str
    """Container image with hvqd (see infra/deploy/docker), best with a digest."""
    namespace: str = "default"
    """Kubernetes namespace."""
    context: str | None = None
    """kubectl's context; null for the present one."""
    head_cpus: int = Field(2, ge=1)
    """CPUs of the head, which runs the driver and no training."""
    head_memory_gib: int = Field(8, ge=1)
    """Its memory."""
    groups: tuple[WorkerGroup, ...] = Field(min_length=1)
    """Worker pods."""
    autoscaling: bool = False
    """Whether pods come and go between each group's bounds."""
    queue: str | None = None
    """Kueue queue (label kueue.x-k8s.io/queue-name); its jobs start suspended."""
    priority_class: str | None = None
    """Kubernetes priority class of all pods."""
    secrets: Mapping[_VARIABLE, SecretKey] = {}
    """Environment variables whose values the cluster keeps in secrets."""
    service_account: str | None = None
    """Of all pods."""
    restarts: int = Field(3, ge=0)
    """How often the job begins again on a fresh cluster after its head or driver was lost; it goes on from the root."""
    deadline_seconds: int | None = Field(None, ge=1)
    """Time after which it is stopped."""
    keep_seconds: int = Field(600, ge=0)
    """How long a finished job's cluster and record stay."""


class VmsTarget(_Target):
    """Virtual machines of a cloud, through Ray's cluster launcher."""

    kind: Literal["vms"]
    provider: Mapping[str, Any]
    """Ray's `provider` section: type (aws, gcp, azure, local, …), region, …"""
    auth: Mapping[str, Any]
    """Ray's `auth` section: ssh_user, ssh_private_key."""
    head: Mapping[str, Any] = {}
    """`node_config` of the head, in the provider's words."""
    worker: Mapping[str, Any] = {}
    """`node_config` of the workers."""
    workers: int = Field(1, ge=0)
    """Machines beside the head."""
    max_workers: int | None = Field(None, ge=0)
    """Most that the autoscaler starts; null for `workers`."""
    cpus: int | None = Field(None, ge=1)
    """CPUs of a worker; null where Ray finds out by itself."""
    gpus: int | None = Field(None, ge=0)
    """GPUs of a worker."""
    setup: tuple[str, ...] = ("python3 -m venv ~/hvqd/.venv", "cd ~/hvqd && scripts/install.sh")
    """Commands that install hvqd on a machine, after its source was copied to ~/hvqd."""
    idle_minutes: int = Field(15, ge=1)
    """After so long an idle machine is given back."""


Target = LocalTarget | RayTarget | SlurmTarget | KubeRayTarget | VmsTarget
_ADAPTER: TypeAdapter[Target] = TypeAdapter(Annotated[Target, Field(discriminator="kind")])


def target_names() -> list[str]:
    """Targets that come with hvqd."""
    return sorted(path.stem for path in BUNDLED.glob("*.yaml"))


def read_target(name: str) -> Target:
    """The target of a name (infra/deploy/targets/NAME.yaml) or of a YAML file.

    Raises:
        InputError: there is none, or it is not valid.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else BUNDLED / f"{name}.yaml"
    if not path.is_file():
        names = target_names()
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"did you mean --on {close[0]}?" if close else "a file of your own: --on my-target.yaml"
        raise InputError(f"no such target: {name} ({', '.join(names)})\nhint: {hint}")
    try:
        return _ADAPTER.validate_python(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"cannot read the target {path}: {reason}\nhint: it must be a YAML file") from error
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        kinds = {"local", "ray", "slurm", "kuberay", "vms"}
        key = ".".join(str(part) for part in problem["loc"] if part not in kinds) or "kind"
        problem["msg"] = problem["msg"].removeprefix("Value error, ")
        message = problem["msg"][:1].lower() + problem["msg"][1:]
        raise InputError(f"the target {path}: {key}: {message}\nhint: {BUNDLED} has an example of each kind") from error
