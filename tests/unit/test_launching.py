"""From a command here to a submission for a target, and what is refused before anything is submitted."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.errors import EnvironmentFailure, InputError
from infra.jobs import (
    JobState,
    Submission,
    check_free,
    check_resources,
    check_root,
    find_job,
    job_name,
    launcher_for,
)
from infra.jobs_local import LocalLauncher
from infra.jobs_ray import CODE, _stage
from infra.targets import KubeRayTarget, LocalTarget, RayTarget, SlurmTarget, Target, read_target, target_names
from infra.versions import code_digest, differences, source_commit, versions
from tests.command_line import environment, run_hvqd
from workflows.commands.job import Job
from workflows.launching.command import settings_options, submission_for, tracking_note

ROOT = "s3://bucket/run"
RAY = RayTarget(kind="ray", address="http://127.0.0.1:8265")
SLURM = SlurmTarget(kind="slurm", nodes=2, cpus_per_node=4)


def job(**changes: Any) -> Job:
    """A command with the options that `launch` takes."""
    values: dict[str, Any] = {
        "config_file": None,
        "preset": "integration",
        "overrides": [],
        "root": ROOT,
        "dry_run": False,
        "as_json": False,
        "seed": None,
        "debug": False,
    }
    return Job(**{**values, **changes})


def submitted(words: str, target: Target = RAY, on: str = "ray", name: str | None = None, **changes: Any) -> Submission:
    return submission_for(job(**changes), words.split(), target, on, name, preflight=False)


def small(**changes: Any) -> Submission:
    """A job that any target holds."""
    return replace(Submission("hvqd-test", ("run",), ROOT, 1, 1, 0), **changes)


# ---- the submission ----


@pytest.mark.parametrize("preset", [None, "integration"])
def test_a_configuration_file_travels_as_settings_that_resolve_to_the_same(tmp_path: Path, preset: str | None) -> None:
    file = tmp_path / "mine.yaml"
    values = {
        "seed": 3,
        "data": {"image_size": [16, 16]},
        "vq": {"model": {"codebook_sizes": [16, 16], "width": 16, "code_dim": 8}},
        "tracking": {"experiment": 'it\'s "ours", ünïcode', "uri": None},
        "compute": {"workers": {"min": 1, "max": 3}},
    }
    file.write_text(yaml.safe_dump(values))
    here = job(config_file=file, preset=preset, overrides=["vq.model.width=32"], seed=9)
    options = settings_options(here)
    assert str(file) not in " ".join(options)
    assert options[:1] + options[-2:] == ["--preset", "--seed", "9"]
    sent = [value for flag, value in pairwise(options) if flag == "--set"]
    there = job(preset=options[1], overrides=sent, seed=9).config  # as the command on the target reads them
    assert there == here.config
    assert there.vq.model.width == 32 and there.compute.most_workers == 3


def test_the_command_goes_with_its_settings_root_and_address_last() -> None:
    found = submitted("train vq --json", overrides=["compute.workers=2"], seed=5)
    assert found.command == (
        *("train", "vq", "--json", "--preset", "integration", "--set", "compute.workers=2", "--seed", "5"),
        *("--root", ROOT, "--set", "compute.address=auto"),
    )
    assert (found.workers, found.root) == (2, ROOT)
    local = submitted("run", LocalTarget(kind="local"), "local")
    assert "compute.address=auto" not in local.command, "on one machine the job starts its own cluster"


def test_preflight_goes_with_the_versions_of_this_machine() -> None:
    found = submission_for(job(), ["run"], RAY, "ray", None, preflight=True)
    expected = dict(word.removeprefix("--expect=").split("=", 1) for word in found.preflight_options if "--exp" in word)
    assert expected == versions()
    assert differences({**expected, "ray": "2.0"}, versions()) == [f"ray {versions()['ray']} instead of 2.0"]


def test_the_usual_name_follows_from_command_and_root_alone() -> None:
    first = submitted("train prior")
    assert first.name == submitted("train prior", seed=4).name == job_name(("train", "prior"), ROOT)
    assert first.name.startswith("hvqd-train-prior-")
    assert len({first.name, submitted("train vq").name, submitted("train prior", root="s3://bucket/other").name}) == 3


def test_a_name_of_ones_own_is_one_that_jobs_finds_again() -> None:
    assert submitted("run", name="mine-2").name == submitted("run", name="hvqd-mine-2").name == "hvqd-mine-2"


@pytest.mark.parametrize("name", ["", "../other", "Mine", "a b", "mine-", "x" * 43])
def test_a_name_that_some_target_would_not_take_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"at most 47 with hvqd- before it: .*\nhint: --name tokenizer-2"):
        submitted("run", name=name)


def test_a_relative_root_in_a_shared_folder_travels_as_an_absolute_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shared = RayTarget(kind="ray", address="http://127.0.0.1:8265", shared_folders=(str(tmp_path),))
    found = submitted("run", shared, root="runs/mine")
    assert found.root == str(tmp_path / "runs" / "mine")
    assert found.command[found.command.index("--root") + 1] == found.root


def test_forwarded_values_are_taken_here_and_not_shown_by_the_submission(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    target = RAY.model_copy(update={"forward": ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")})
    found = submitted("run", target)
    assert found.secrets == {"AWS_SECRET_ACCESS_KEY": "hunter2"}
    assert "hunter2" not in repr(found)


def test_an_elastic_job_asks_for_the_workers_that_it_starts_with_at_least() -> None:
    elastic = submitted("run", overrides=["compute.workers={min: 1, max: 8}"])
    assert elastic.workers == 1
    check_resources(elastic, 1, 0, "a small cluster")
    batches = [f"{stage}.train.{size}" for stage in ("vq", "prior") for size in ("global_batch=64", "micro_batch=32")]
    assert submitted("run", overrides=["compute.workers={min: 2, max: 8}", *batches]).workers == 2


def test_what_travels_is_the_same_code_with_its_lock_and_its_commit(tmp_path: Path) -> None:
    staged = Path(_stage(tmp_path))
    assert {path.name for path in staged.iterdir()} == {*CODE, "COMMIT"}
    program = "from infra.versions import code_digest, source_commit; print(code_digest(), source_commit())"
    words = [sys.executable, "-S", "-c", program]
    there = subprocess.run(words, cwd=staged, capture_output=True, text=True, check=True).stdout.split()
    assert there == [code_digest(), source_commit()]
    assert len(there[1]) == 40, "a commit, in a checkout"


@pytest.mark.parametrize(
    ("words", "travel"), [("train vq", False), ("encode", False), ("run", True), ("tune vq", True)]
)
def test_the_bundled_pictures_travel_with_what_may_read_them(words: str, travel: bool, tmp_path: Path) -> None:
    staged = Path(_stage(tmp_path, submitted(words).without))
    assert bool(list(staged.rglob("*.parquet"))) is travel


def test_a_file_in_a_shared_folder_travels_as_an_absolute_path_and_one_of_this_machine_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("space.yaml", "gates.yaml"):
        (tmp_path / name).write_text("")
    shared = RAY.model_copy(update={"shared_folders": (str(tmp_path),)})
    found = submitted("tune space.yaml", shared, overrides=["gates.file=gates.yaml"])
    assert found.command[1] == str(tmp_path / "space.yaml")
    assert f"gates.file={json.dumps(str(tmp_path / 'gates.yaml'))}" in found.command
    unseen = [("tune space.yaml", []), ("run", ["gates.file=gates.yaml"]), (f"data build {tmp_path}", [])]
    for words, overrides in unseen:
        with pytest.raises(InputError, match=r"lies on this machine, and the nodes of ray do not see it\nhint: a URL"):
            submitted(words, overrides=overrides)
    assert submitted("tune space.yaml", LocalTarget(kind="local"), "local").command[1] == "space.yaml"
    assert submitted("tune vq").command[1] == "vq", "a ready space is no file"
    assert submitted("data build /only/there").command[2] == "/only/there", "what lies on the nodes is theirs to find"


# ---- bad input ----


def test_a_command_that_is_not_of_the_path_is_refused() -> None:
    with pytest.raises(InputError, match=r"cannot be launched: serve \(run, data build, .*\)\nhint: hvqd launch run"):
        submitted("serve")


def test_an_unknown_target_is_refused_with_the_nearest() -> None:
    assert target_names() == ["kuberay", "local", "ray", "slurm", "vms"]
    with pytest.raises(InputError, match=r"no such target: slrum \(kuberay, .*\)\nhint: did you mean --on slurm\?"):
        read_target("slrum")
    with pytest.raises(InputError, match=r"no such target: nowhere/x\.yaml .*\nhint: "):
        read_target("nowhere/x.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: slurm\nnode: 3\n", "node: extra inputs are not permitted"),
        ("kind: moon\n", "kind: input tag 'moon'"),
        ("- kind\n", "kind: "),
        ("kind: ray\naddress: 10.0.0.1:8265\n", "address: string should match pattern"),
        ("kind: ray\naddress: http://x\ntoken_variable: my token\n", "token_variable: string should match pattern"),
        (
            "kind: kuberay\nimage: x\ngroups: [{name: gpu, replicas: 4}]\n",
            r"groups\.0: replicas must lie between min_replicas and max_replicas \(0 to 1\): 4",
        ),
    ],
)
def test_a_target_with_a_mistake_is_refused_with_its_key(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=rf"the target \S*mine\.yaml: {message}.*\nhint: "):
        read_target(str(file))


def test_a_target_that_is_no_yaml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("kind: [")
    with pytest.raises(InputError, match=r"cannot read the target .*mine\.yaml.*\nhint: it must be a YAML file"):
        read_target(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize("root", ["runs/tiny", "file:///tmp/x", "/scratch2/x"])
def test_a_root_that_only_this_machine_sees_is_refused_on_several(root: str) -> None:
    target = SLURM.model_copy(update={"shared_folders": ("/scratch",)})
    message = rf"the root {root} is a folder of this machine, and the nodes of slurm .*\nhint: --root s3://"
    with pytest.raises(InputError, match=message):
        check_root(root, target, "slurm")


@pytest.mark.parametrize("root", ["s3://bucket/x", "/scratch/x", "file:///scratch/x"])
def test_a_root_that_all_machines_see_is_taken(root: str) -> None:
    check_root(root, SLURM.model_copy(update={"shared_folders": ("/scratch",)}), "slurm")
    check_root("runs/tiny", LocalTarget(kind="local"), "local")


def test_more_gpus_than_there_are_is_refused() -> None:
    wanted = small(workers=3, gpus_per_worker=1)
    check_resources(wanted, 3, 3, "the cluster")
    with pytest.raises(
        InputError, match=r"the cluster has 2 GPUs, .* ask for 3\nhint: compute\.workers must be at most 2"
    ):
        check_resources(wanted, 8, 2, "the cluster")
    with pytest.raises(InputError, match=r"has 4 CPUs, .* ask for 6\nhint: compute\.workers x compute\.threads"):
        check_resources(small(workers=3, cpus_per_worker=2), 4, 0, "the cluster")


@pytest.mark.parametrize(
    ("target", "program"),
    [(SLURM, "sbatch"), (KubeRayTarget(kind="kuberay", image="x", groups=[{"name": "g"}]), "kubectl")],
)
def test_a_missing_program_is_named(
    target: Target, program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentFailure, match=f"{program} is not installed on this machine\nhint: "):
        launcher_for(target).check(small())


def test_a_server_of_slurm_that_fails_is_an_error_with_what_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sbatch", "sinfo"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(EnvironmentFailure, match=r"sinfo .* failed: Unable to contact slurm controller\nhint: "):
        launcher_for(SLURM).check(small())


def test_variables_to_forward_are_refused_where_the_cluster_keeps_secrets() -> None:
    target = KubeRayTarget(kind="kuberay", image="x", groups=[{"name": "g"}], forward=("AWS_SECRET_ACCESS_KEY",))
    with pytest.raises(
        InputError, match="forwards no variables: forward: AWS_SECRET_ACCESS_KEY\nhint: keep the values"
    ):
        launcher_for(target).check(small())


def test_secrets_are_not_forwarded_by_a_command_line_that_others_can_read() -> None:
    target = read_target("vms").model_copy(update={"forward": ("AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")})
    with pytest.raises(InputError, match=r"list of processes: forward: AWS_SECRET_ACCESS_KEY\nhint: give the machines"):
        launcher_for(target).check(small())
    launcher_for(read_target("vms")).check(small())


# ---- a Ray cluster that does not answer as it should ----


@contextmanager
def answering(reply: Callable[[str], bytes]) -> Iterator[str]:
    """Address of a server that reads a request and sends what `reply` makes of it, whatever that is."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                asked = connection.recv(65536).decode()
                if asked:
                    connection.sendall(reply(asked))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(timeout=10)


def http_reply(status: str, body: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()


def test_a_cluster_that_does_not_answer_is_an_error_within_seconds() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(EnvironmentFailure, match=f"the Ray dashboard does not answer at {address}: .*\nhint: "):
            launcher_for(RayTarget(kind="ray", address=address)).check(small())
        assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "reply",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"",
        http_reply("404 Not Found"),
        http_reply("200 OK", "<html>"),
        http_reply("200 OK", '{"data": {"result": {"result": [{"state": "ALIVE"}]}}}'),
        b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{",
    ],
    ids=["ssh", "silence", "404", "a web page", "an unknown form", "half an answer"],
)
def test_what_is_no_ray_dashboard_is_named_in_two_lines(reply: bytes) -> None:
    with (
        answering(lambda _: reply) as address,
        pytest.raises(EnvironmentFailure, match=rf"^what answers at {address} is no Ray dashboard .*\nhint: [^\n]*$"),
    ):
        launcher_for(RayTarget(kind="ray", address=address)).check(small())


def version_of(ray: str) -> str:
    return f'{{"version": "4", "ray_version": "{ray}"}}'


def test_another_version_of_ray_is_an_error_that_names_both_unless_the_clusters_own_hvqd_runs() -> None:
    with answering(lambda _: http_reply("200 OK", version_of("1.0.0"))) as address:
        target = RayTarget(kind="ray", address=address)
        here = versions()["ray"]
        with pytest.raises(InputError, match=rf"runs ray 1\.0\.0, this machine has ray {here}\nhint: install the same"):
            launcher_for(target).check(small())
        own = target.model_copy(update={"ship_code": False})
        with pytest.raises(EnvironmentFailure, match="is no Ray dashboard with the State API"):
            launcher_for(own).check(small())  # this server has no nodes to tell of


def test_a_cluster_that_takes_the_connection_and_says_nothing_is_an_error_within_seconds() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        launcher = launcher_for(RayTarget(kind="ray", address=f"http://127.0.0.1:{silent.getsockname()[1]}"))
        for ask in (lambda: launcher.check(small()), launcher.jobs, lambda: launcher.stop("hvqd-x")):
            started = time.monotonic()
            with pytest.raises(EnvironmentFailure, match=r"what answers at http.* timed out\nhint: "):
                ask()
            assert time.monotonic() - started < 10


def test_nodes_that_are_alive_count_and_the_token_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "right")
    rows = (
        '{"data": {"result": {"result": [{"state": "ALIVE", "resources_total": {"CPU": 2, "GPU": 1}},'
        ' {"state": "DEAD", "resources_total": {"CPU": 64, "GPU": 8}}]}}}'
    )

    def reply(asked: str) -> bytes:
        if "Authorization: Bearer right\r\n" not in asked:
            return http_reply("403 Forbidden")
        return http_reply("200 OK", version_of(versions()["ray"]) if "GET /api/version " in asked else rows)

    with answering(reply) as address:
        target = RayTarget(kind="ray", address=address, token_variable="MY_TOKEN")
        launcher_for(target).check(small(gpus_per_worker=1))
        with pytest.raises(InputError, match=r"\(1 nodes\) has 1 GPUs, the job's workers ask for 2\nhint: "):
            launcher_for(target).check(small(workers=2, gpus_per_worker=1))
        monkeypatch.setenv("MY_TOKEN", "wrong")
        with pytest.raises(InputError, match=r"refused the token in MY_TOKEN \(HTTP 403\)\nhint: it must be"):
            launcher_for(target).check(small())
        with pytest.raises(InputError, match=r"wants a token \(HTTP 403\), and the target names none\nhint: put"):
            launcher_for(RayTarget(kind="ray", address=address)).check(small())
        monkeypatch.delenv("MY_TOKEN")
        with pytest.raises(InputError, match="takes its token from MY_TOKEN, which is not set here\nhint: export"):
            launcher_for(target).check(small())


# ---- jobs on this machine ----


def ended(launcher: LocalLauncher, name: str) -> JobState:
    deadline = time.monotonic() + 60
    while (state := find_job(launcher, name)).state == "running":
        assert time.monotonic() < deadline, f"waited 60 s for the end of {state}"
        time.sleep(0.05)
    return state


def test_a_name_that_runs_already_is_refused_with_where_and_how_to_follow(tmp_path: Path) -> None:
    launcher = LocalLauncher(LocalTarget(kind="local", folder=str(tmp_path / "jobs")))
    work = small(command=("no-such-command",), preflight=False)
    check_free(launcher, work.name, "local")
    state = launcher.submit(work)
    assert state.state == "running", "starting Python takes longer than asking"
    message = r"the job hvqd-test is running already: process \d+, .*\nhint: follow it with `hvqd jobs logs -f hvqd-t"
    with pytest.raises(InputError, match=message):
        check_free(launcher, work.name, "local")
    failed = ended(launcher, work.name)
    assert (failed.state, failed.message) == ("failed", "status 2")
    check_free(launcher, work.name, "local")
    assert "no-such-command" in "".join(launcher.logs(work.name, follow=True))


def test_a_job_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    launcher = LocalLauncher(LocalTarget(kind="local", folder=str(tmp_path / "jobs")))
    with pytest.raises(InputError, match=r"no such job: hvqd-x \(there are none\)\nhint: `hvqd jobs ls"):
        launcher.stop("hvqd-x")


# ---- the command ----


def test_a_dry_run_prints_the_manifest_and_touches_nothing(tmp_path: Path) -> None:
    words = ["launch", "run", "--preset", "integration", "--root", ROOT, "--on", "kuberay", "--dry-run", "--json"]
    done = run_hvqd(*words, cwd=tmp_path, env=environment(tmp_path)).succeeded()
    (text,) = done.answer["documents"].values()
    manifest = yaml.safe_load(text)
    assert manifest["metadata"]["name"] == done.answer["name"] == job_name(("run",), ROOT)
    assert manifest["metadata"]["annotations"] == {"hvqd/root": ROOT}
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_is_two_lines_and_status_two_and_a_missing_program_status_one(tmp_path: Path) -> None:
    env = {**environment(tmp_path), "PATH": str(tmp_path)}
    common = ["launch", "run", "--preset", "integration"]
    wrong = run_hvqd(*common, "--root", str(tmp_path / "run"), "--on", "slurm", cwd=tmp_path, env=env)
    assert (wrong.status, len(wrong.err.splitlines())) == (2, 2), wrong.err
    missing = run_hvqd(
        *common, "--root", ROOT, "--on", "slurm", "--set", "data.image_size=[32,32]", cwd=tmp_path, env=env
    )
    assert missing.status == 1 and missing.err.splitlines() == [
        "error: sbatch is not installed on this machine",
        "hint: run this where Slurm's commands are, usually a login node",
    ]


def test_a_tracking_store_that_would_go_with_the_jobs_machine_is_said() -> None:
    note = tracking_note(job(root="s3://bucket/run").config, RAY)
    assert note is not None and "--set tracking.uri=http" in note
    assert tracking_note(job(root="s3://bucket/run", overrides=["tracking.uri=http://mlflow:5000"]).config, RAY) is None
    assert tracking_note(job(root="/mnt/shared/run").config, RAY) is None, "it lies beside the artifacts"
    assert tracking_note(job(root="s3://bucket/run").config, LocalTarget(kind="local")) is None
