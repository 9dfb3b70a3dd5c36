"""The root on a real S3 server: every operation of the store, every fault named, and the whole path."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest

from infra.storage import Store, open_store
from tests.command_line import Finished, environment, run_hvqd
from tests.conftest import FinishedRun
from tests.services import S3Server, free_ports
from tests.store_facts import FACTS

NAMED_WITHIN_SECONDS = 30.0


@pytest.fixture
def s3_environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, with this process able to speak to it."""
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.__name__)
def test_on_a_real_s3_server(fact: Callable[[Store], None], s3_environment: S3Server) -> None:
    fact(open_store(f"s3://{s3_environment.bucket}/facts/{fact.__name__}"))


def test_a_whole_bucket_is_a_root_too(s3_environment: S3Server) -> None:
    bucket = open_store(f"s3://{s3_environment.bucket}")
    bucket.check_writable()
    bucket.write_bytes("whole/a", b"1")
    assert ("whole/a", 1) in bucket.walk() and bucket.files()["whole/a"] == 1 and "whole" in bucket.children()


def test_folders_that_a_console_made_are_no_files(s3_environment: S3Server) -> None:
    client = boto3.client("s3", endpoint_url=s3_environment.endpoint)
    for key in ("consoles/", "consoles/run/", "consoles/run/empty/"):
        client.put_object(Bucket=s3_environment.bucket, Key=key, Body=b"")
    store = open_store(f"s3://{s3_environment.bucket}/consoles/run")
    store.write_bytes("a", b"1")
    assert store.files() == {"a": 1} and list(store.walk()) == [("a", 1)]
    assert store.children() == ["a", "empty"]


# ---- faults ----


def build(root: str, folder: Path, env: dict[str, str]) -> Finished:
    """`hvqd data build` on an S3 root, in a folder of its own."""
    arguments = ("data", "build", "emoji", "--preset", "integration", "--root", root, "--json")
    return run_hvqd(*arguments, cwd=folder, env=environment(folder, env), timeout_seconds=120)


def assert_named(done: Finished, expected: str, hint: str, folder: Path) -> None:
    """Status 1, two lines and the same in JSON, within the time that is allowed; nothing is written but a log."""
    lines = done.err.splitlines()
    assert (done.status, len(lines)) == (1, 2), done.err
    assert re.match(f"error: cannot (read|write) {expected}", lines[0]), lines[0]
    assert lines[1].startswith("hint: ") and hint in lines[1]
    answer = done.answer
    assert answer == {"status": 1, "error": lines[0].removeprefix("error: "), "hint": lines[1].removeprefix("hint: ")}
    assert done.seconds < NAMED_WITHIN_SECONDS
    assert {path.name for path in folder.iterdir()} <= {".hvqd"}


def test_an_endpoint_where_nobody_listens_is_named(s3_server: S3Server, tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{free_ports(1)[0]}"
    done = build(f"s3://{s3_server.bucket}/x", tmp_path, {**s3_server.env, "AWS_ENDPOINT_URL": endpoint})
    assert_named(done, f"s3://{s3_server.bucket}/x.* at {endpoint}: ", "check AWS_ENDPOINT_URL", tmp_path)


def test_an_endpoint_whose_host_does_not_exist_is_named(s3_server: S3Server, tmp_path: Path) -> None:
    endpoint = "http://no-such-host.invalid:8333"
    done = build(f"s3://{s3_server.bucket}/x", tmp_path, {**s3_server.env, "AWS_ENDPOINT_URL": endpoint})
    assert_named(done, f"s3://{s3_server.bucket}/x.* at {endpoint}: ", "check AWS_ENDPOINT_URL", tmp_path)


def test_an_endpoint_that_never_answers_is_named(s3_server: S3Server, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel takes the connection, nobody reads it
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = build(f"s3://{s3_server.bucket}/x", tmp_path, {**s3_server.env, "AWS_ENDPOINT_URL": endpoint})
    assert_named(done, f"s3://{s3_server.bucket}/x.* at {endpoint}: ", "check AWS_ENDPOINT_URL", tmp_path)


def test_a_bucket_that_does_not_exist_is_named(s3_server: S3Server, tmp_path: Path) -> None:
    done = build("s3://no-such-bucket/x", tmp_path, s3_server.env)
    assert_named(done, "s3://no-such-bucket/x.*: the bucket does not exist", "create it", tmp_path)


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_a_wrong_key_is_named_without_showing_it(name: str, s3_server: S3Server, tmp_path: Path) -> None:
    done = build(f"s3://{s3_server.bucket}/x", tmp_path, {**s3_server.env, name: "wrong-0123456789"})
    assert_named(done, f"s3://{s3_server.bucket}/x.*: permission denied", "AWS_SECRET_ACCESS_KEY", tmp_path)
    assert s3_server.secret_key not in done.out + done.err and "wrong-0123456789" not in done.out + done.err


def test_missing_keys_are_named(s3_server: S3Server, tmp_path: Path) -> None:
    keyless = {name: value for name, value in s3_server.env.items() if "KEY" not in name}
    keyless["AWS_SHARED_CREDENTIALS_FILE"] = str(tmp_path / "absent")
    done = build(f"s3://{s3_server.bucket}/x", tmp_path, keyless)
    assert_named(done, f"s3://{s3_server.bucket}/x.*: Unable to locate credentials", "set AWS_ACCESS_KEY_ID", tmp_path)


# ---- the whole path ----


def test_the_root_alone_moves_the_whole_path_to_s3(
    s3_environment: S3Server, finished_run: FinishedRun, tmp_path: Path
) -> None:
    root = f"s3://{s3_environment.bucket}/pipelines/x"
    env = environment(tmp_path, s3_environment.env)
    done = run_hvqd("run", "--preset", "integration", "--root", root, "--json", cwd=tmp_path, env=env)
    result = done.succeeded().answer
    assert result["digests"] == finished_run.result["digests"] and len(result["digests"]) == 5
    assert (result["root"], result["champion"]) == (root, result["version"])
    assert result["report"] == f"{root}/report.html"

    grids = []
    for place, cwd, surroundings in ((root, tmp_path, env), (finished_run.root, finished_run.cwd, finished_run.env)):
        out = tmp_path / f"grid-{len(grids)}.png"
        asked = ("sample", "--root", str(place), "-n", "3", "--seed", "7", "--out", str(out), "--json")
        run_hvqd(*asked, cwd=cwd, env=surroundings).succeeded()
        grids.append(out.read_bytes())
    assert grids[0] == grids[1], "the champion on S3 is the champion of the local root"

    store = open_store(root)
    assert_no_secret(s3_environment.secret_key.encode(), store, tmp_path)
    before = store.files()
    again = run_hvqd("run", "--root", root, "--json", cwd=tmp_path, env=env).succeeded()
    assert again.answer["digests"] == result["digests"] and again.answer["version"] == result["version"]
    assert set(store.files()) == set(before), "what is current is not made again"


def assert_no_secret(secret: bytes, store: Store, folder: Path) -> None:
    """The secret stands in no object of the store and in no file that the command left on this machine."""
    objects = list(store.files())
    assert {"config.yaml", "report.html", "prior/manifest.json"} <= set(objects)
    local = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".log" for path in local) and any(path.suffix == ".db" for path in local)
    assert [name for name in objects if secret in store.read_bytes(name)] == []
    assert [path for path in local if secret in path.read_bytes()] == []
