"""What `hvqd launch` writes for Kubernetes, Slurm and virtual machines, held against those systems' own rules.

The RayJob schema is KubeRay's custom resource definition (tests/schemas/kuberay, with its licence).
"""

from __future__ import annotations

import gzip
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from infra.errors import InputError
from infra.jobs import Submission, launcher_for
from infra.jobs_kuberay import KubeRayLauncher
from infra.jobs_slurm import SlurmLauncher
from infra.jobs_vms import VmsLauncher, check_schema
from infra.targets import KubeRayTarget, SecretKey, SlurmTarget, VmsTarget, WorkerGroup, read_target, target_names

CRD = Path(__file__).parents[1] / "schemas" / "kuberay" / "ray.io_rayjobs.yaml.gz"
ROOT = "s3://bucket/a root"
SECRET = "hunter2-hunter2"


def submission(**changes: Any) -> Submission:
    """Four workers with a GPU each, and a value that must not be shown."""
    values: dict[str, Any] = {
        "name": "hvqd-train-vq-0123abcd",
        "command": ("train", "vq", "--root", ROOT, "--set", 'data.conditions=["it\'s"]'),
        "root": ROOT,
        "workers": 4,
        "cpus_per_worker": 2,
        "gpus_per_worker": 1,
        "preflight_options": ("--root", ROOT, "--expect=ray=2.9"),
        "secrets": {"AWS_SECRET_ACCESS_KEY": SECRET},
    }
    return Submission(**{**values, **changes})


def strict(schema: Any) -> Any:
    """The schema with every field that is not named refused, as `kubectl create --validate=strict` does."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        closed.setdefault("additionalProperties", bool(schema.get("x-kubernetes-preserve-unknown-fields")))
    return closed


@pytest.fixture(scope="module")
def rayjob() -> jsonschema.Draft7Validator:
    """Of the RayJob's version v1."""
    definition = yaml.load(gzip.decompress(CRD.read_bytes()), yaml.CSafeLoader)
    schema = next(version for version in definition["spec"]["versions"] if version["name"] == "v1")
    return jsonschema.Draft7Validator(strict(schema["schema"]["openAPIV3Schema"]))


def everything() -> KubeRayTarget:
    """A target with every field set."""
    return KubeRayTarget(
        kind="kuberay",
        image="registry.example.com/hvqd@sha256:0",
        namespace="training",
        groups=(
            WorkerGroup(
                name="gpu", replicas=2, min_replicas=1, max_replicas=4, cpus=8, gpus=2, node_labels={"pool": "a100"}
            ),
            WorkerGroup(name="cpu"),
        ),
        autoscaling=True,
        queue="research",
        priority_class="low",
        secrets={"AWS_SECRET_ACCESS_KEY": SecretKey(secret="hvqd-s3", key="secret-key")},
        environment={"NCCL_DEBUG": "WARN"},
        service_account="trainer",
        restarts=7,
        deadline_seconds=3600,
    )


def bundled(kind: str) -> Any:
    target = read_target(kind)
    assert target.kind == kind
    return target


@pytest.mark.parametrize("target", [bundled("kuberay"), everything()], ids=["bundled", "every field"])
def test_the_rayjob_is_one_that_kuberay_takes_with_unknown_fields_refused(
    rayjob: jsonschema.Draft7Validator, target: KubeRayTarget
) -> None:
    (document,) = KubeRayLauncher(target).render(submission())
    assert [error.message for error in rayjob.iter_errors(yaml.safe_load(document.text))] == []


@pytest.mark.parametrize(
    ("path", "old", "new", "message"),
    [
        ("spec", "backoffLimit", "backofLimit", "'backofLimit' was unexpected"),
        ("spec.rayClusterSpec.workerGroupSpecs.0", "minReplicas", "minReplica", "'minReplica' was unexpected"),
        (
            "spec.rayClusterSpec.headGroupSpec.template.spec.containers.0",
            "volumeMounts",
            "volumeMount",
            "'volumeMount' was unexpected",
        ),
        ("spec.rayClusterSpec.workerGroupSpecs.0", "groupName", None, "'groupName' is a required property"),
    ],
)
def test_a_misspelt_field_of_the_rayjob_is_refused(
    rayjob: jsonschema.Draft7Validator, path: str, old: str, new: str | None, message: str
) -> None:
    manifest = yaml.safe_load(KubeRayLauncher(everything()).render(submission())[0].text)
    place = manifest
    for part in path.split("."):
        place = place[int(part)] if part.isdigit() else place[part]
    value = place.pop(old)
    if new is not None:
        place[new] = value
    assert any(message in error.message for error in rayjob.iter_errors(manifest))


def test_the_rayjob_holds_what_was_asked() -> None:
    manifest = KubeRayLauncher(everything()).manifest(submission())
    assert manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    spec = manifest["spec"]
    assert (spec["suspend"], spec["backoffLimit"], spec["activeDeadlineSeconds"]) == (True, 7, 3600)
    cluster = spec["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is True
    gpu, cpu = cluster["workerGroupSpecs"]
    assert [gpu[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [2, 1, 4]
    pod = gpu["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"cpu": "8", "memory": "4Gi", "nvidia.com/gpu": "2"}
    assert (pod["priorityClassName"], pod["serviceAccountName"]) == ("low", "trainer")
    assert pod["nodeSelector"] == {"pool": "a100"}
    assert pod["volumes"][0]["emptyDir"]["medium"] == "Memory"
    reference = {"secretKeyRef": {"name": "hvqd-s3", "key": "secret-key"}}
    assert {"name": "AWS_SECRET_ACCESS_KEY", "valueFrom": reference} in container["env"]
    assert "nvidia.com/gpu" not in cpu["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def texts(value: Any) -> Iterator[str]:
    """All strings of a manifest, keys included."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield key
            yield from texts(child)
    elif isinstance(value, list):
        for child in value:
            yield from texts(child)
    elif isinstance(value, str):
        yield value


def test_no_placeholder_is_left_in_a_manifest() -> None:
    manifests = [KubeRayLauncher(bundled("kuberay")).manifest(submission()), VmsLauncher(bundled("vms")).cluster()]
    found = [text for manifest in manifests for text in texts(manifest)]
    assert len(found) > 100
    assert [text for text in found if "${" in text or "{{" in text or text in ("None", "null")] == []


def test_no_document_of_any_target_shows_a_forwarded_value() -> None:
    names = target_names()
    assert len(names) == 5
    for name in names:
        documents = launcher_for(read_target(name)).render(submission())
        assert documents
        assert SECRET not in "".join(document.text for document in documents), name


def test_the_job_runs_the_command_only_after_preflight_passes(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\necho "$1" "$@" >> said\n[ "$1" != preflight ]\n')
    program.chmod(0o755)
    line = submission().shell([str(program)])
    assert subprocess.run(["bash", "-c", line], cwd=tmp_path, check=False).returncode == 1
    assert [said.split()[0] for said in (tmp_path / "said").read_text().splitlines()] == ["preflight"]
    subprocess.run(["bash", "-c", submission(preflight=False).shell([str(program)])], cwd=tmp_path, check=True)
    assert (tmp_path / "said").read_text().splitlines()[1] == (
        f'train train vq --root {ROOT} --set data.conditions=["it\'s"]'
    )


# ---- Slurm ----


def script(folder: Path, **changes: Any) -> str:
    values: dict[str, Any] = {
        "kind": "slurm",
        "nodes": 3,
        "cpus_per_node": 8,
        "gpus_per_node": 4,
        "memory_per_node": "64G",
        "partition": "long",
        "account": "vision",
        "qos": "low",
        "time_limit": "1-00:00:00",
        "notice_seconds": 90,
        "python": "/opt/hvqd/bin/python",
        "setup": ("module load cuda",),
        "environment": {"NCCL_DEBUG": "it's"},
        "addresses": {"node1": "127.0.0.2"},
        "folder": str(folder),
    }
    (document,) = SlurmLauncher(SlurmTarget(**{**values, **changes})).render(submission())
    return document.text


@pytest.mark.parametrize("addresses", [{}, {"n1": "127.0.0.2", "n2": "127.0.0.3"}])
def test_the_batch_script_is_valid_bash(tmp_path: Path, addresses: dict[str, str]) -> None:
    text = script(tmp_path, addresses=addresses)
    checked = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_the_batch_script_asks_slurm_for_what_the_target_says(tmp_path: Path) -> None:
    asked = re.findall(r"^#SBATCH --(.+)$", script(tmp_path), re.MULTILINE)
    assert asked == [
        "job-name=hvqd-train-vq-0123abcd",
        "nodes=3",
        "ntasks-per-node=1",
        "cpus-per-task=8",
        "gpus-per-node=4",
        "mem=64G",
        "partition=long",
        "account=vision",
        "qos=low",
        "time=1-00:00:00",
        f"output={tmp_path}/hvqd-train-vq-0123abcd.log",
        "open-mode=append",
        "signal=B:USR1@90",
        "requeue",
    ]
    bare = script(tmp_path, gpus_per_node=0, partition=None, memory_per_node=None)
    assert not re.search(r"--(gpus-per-node|partition|mem)=", bare)


def test_every_job_has_a_ray_token_of_its_own_unless_the_target_sets_one(tmp_path: Path) -> None:
    (make,) = [line for line in script(tmp_path).splitlines() if "RAY_AUTH_TOKEN=" in line]
    shown = f"{make}; echo $RAY_AUTH_TOKEN"
    made = [subprocess.run(["bash", "-c", shown], capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert all(re.fullmatch(r"[0-9a-f]{64}\n", token) for token in made) and made[0] != made[1]
    text = script(tmp_path, environment={"RAY_AUTH_TOKEN": "the target's"})
    lines = [line for line in text.splitlines() if "RAY_AUTH_TOKEN=" in line]
    shown = "; ".join([*lines, "echo $RAY_AUTH_TOKEN"])
    assert subprocess.run(["bash", "-c", shown], capture_output=True, text=True, check=True).stdout == "the target's\n"


def test_the_batch_script_starts_head_and_workers_and_goes_on_from_the_same_root_when_queued_again(
    tmp_path: Path,
) -> None:
    text = script(tmp_path)
    lines = text.splitlines()
    assert "--head --port=" in text and '--address="$head_address:$port"' in text
    assert 'for node in "${nodes[@]:1}"; do' in lines
    assert "    node1) echo 127.0.0.2 ;;" in lines
    assert "module load cuda" in lines and "export NCCL_DEBUG='it'\"'\"'s'" in lines
    assert "infra.nodes_ready 3 180" in text, "no job before every node has come"
    assert 'scontrol requeue "$SLURM_JOB_ID"' in text and "trap on_notice USR1" in lines
    (driver,) = [line for line in lines if line.startswith("bash -c ")]
    assert "/opt/hvqd/bin/python -m workflows.cli preflight" in driver
    assert driver.count(ROOT) == 2, "preflight and job have the same root, whatever start it is"


# ---- virtual machines ----


def test_the_cluster_file_of_virtual_machines_is_one_that_ray_takes() -> None:
    cluster = VmsLauncher(bundled("vms")).cluster()
    check_schema(cluster)
    workers = cluster["available_node_types"]["worker"]
    assert (workers["min_workers"], workers["max_workers"], cluster["max_workers"]) == (2, 2, 2)
    assert cluster["available_node_types"]["head"]["resources"] == {"CPU": 0}, "training belongs on the workers"
    assert yaml.safe_load(VmsLauncher(bundled("vms")).render(submission())[0].text) == cluster


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"provider": {"region": "eu-central-1"}}, "would not take provider: 'type' is a required property"),
        ({"provider": {"type": 3}}, r"would not take provider\.type: 3 is not of type 'string'"),
        ({"auth": {"ssh_user": 3}}, r"would not take auth\.ssh_user: 3 is not of type 'string'"),
    ],
)
def test_a_broken_cluster_file_is_refused_before_a_machine_is_started(changes: dict[str, Any], message: str) -> None:
    target = VmsTarget(**{"kind": "vms", "provider": {"type": "aws"}, "auth": {"ssh_user": "ubuntu"}, **changes})
    with pytest.raises(InputError, match=message + r".*\nhint: `provider` and `auth`"):
        VmsLauncher(target).check(submission())


def test_machines_too_few_for_the_workers_are_refused() -> None:
    target = VmsTarget(kind="vms", provider={"type": "aws"}, auth={"ssh_user": "ubuntu"}, workers=2, gpus=1)
    message = r"a cluster of 2 machines has 2 GPUs, the job's workers ask for 4\nhint: .* at most 2, or add nodes"
    with pytest.raises(InputError, match=message):
        VmsLauncher(target).check(submission())
