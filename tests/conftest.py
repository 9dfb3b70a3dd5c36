"""What several tests share: one finished run of the whole path, and real servers on free loopback ports."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import environment, run_hvqd
from tests.services import MLflowServer, S3Server, free_ports, mlflow_on, mlflow_server, postgresql, seaweedfs


@dataclass(frozen=True)
class FinishedRun:
    """A whole path that ended well; read it, never change it."""

    root: Path
    result: dict[str, Any]
    """The JSON object of `hvqd run --json`: status, root, version, champion, report, digests."""
    cwd: Path
    """The folder the command ran in; its `.hvqd/logs` has the logs."""
    env: dict[str, str]
    """The environment it ran in."""


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_counts() -> None:
    """Where the suite runs in the background, Ctrl-C is ignored, and commands would inherit that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """The preset `integration`, run once a session on a local root."""
    folder = tmp_path_factory.mktemp("finished")
    env = environment(folder)
    root = folder / "run"
    done = run_hvqd("run", "--preset", "integration", "--root", str(root), "--json", cwd=folder, env=env)
    return FinishedRun(root, done.succeeded().answer, folder, env)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server with one empty bucket."""
    with seaweedfs(tmp_path_factory.mktemp("s3")) as server:
        yield server


@dataclass(frozen=True)
class RegistryServer:
    """An MLflow server on PostgreSQL, with its artifacts on S3."""

    address: str
    env: dict[str, str]
    """What a client needs in its environment."""


@pytest.fixture(scope="session")
def registry_server(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    """The registry as a team has it."""
    folder, (port,) = tmp_path_factory.mktemp("registry"), free_ports(1)
    artifacts = f"s3://{s3_server.bucket}/mlflow"
    with postgresql() as database, mlflow_on(database, artifacts, folder, s3_server.env, port) as server:
        yield RegistryServer(server.address, s3_server.env)


@pytest.fixture(scope="session")
def tracking_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MLflowServer]:
    """A real MLflow server on sqlite."""
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as server:
        yield server
