"""Real servers for tests, on free loopback ports, each in a process group of its own that is killed in the end."""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import botocore.config
import botocore.exceptions

_BIN = Path(sys.executable).parent
_START_SECONDS = 90.0
_POLL_SECONDS = 0.1
_LOG_TAIL = 3_000


@dataclass(frozen=True)
class S3Server:
    """A running S3 server."""

    endpoint: str
    bucket: str
    access_key: str
    secret_key: str
    shell: tuple[str, ...] = ()
    """The command that administers it, with its addresses."""

    def add_keys(self, user: str) -> dict[str, str]:
        """Another user's keys, as a credentials file names them."""
        keys = {"aws_access_key_id": f"{user}-access-key", "aws_secret_access_key": f"{user}-secret-key-0123456789"}
        named = f"-access_key {keys['aws_access_key_id']} -secret_key {keys['aws_secret_access_key']}"
        self._administer(f"s3.configure -user {user} {named} -actions Read,Write,List,Tagging,Admin -apply")
        self._await_answer(keys, allowed=True)
        return keys

    def remove_keys(self, user: str, keys: Mapping[str, str]) -> None:
        """The user's keys are refused from now on, as expired ones are."""
        self._administer(f"s3.configure -user {user} -delete -apply")
        self._await_answer(keys, allowed=False)

    def _administer(self, line: str) -> None:
        done = subprocess.run(
            self.shell, input=f"{line}\nexit\n", capture_output=True, text=True, timeout=_START_SECONDS
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def _await_answer(self, keys: Mapping[str, str], *, allowed: bool) -> None:
        client = _client(self.endpoint, keys["aws_access_key_id"], keys["aws_secret_access_key"])
        deadline, said = time.monotonic() + _START_SECONDS, "nothing"
        while time.monotonic() < deadline:
            try:
                client.put_object(Bucket=self.bucket, Key="ready", Body=b"")
                said = "it is allowed"
            except botocore.exceptions.ClientError as error:
                said = str(error)
            if (said == "it is allowed") == allowed:
                return
            time.sleep(_POLL_SECONDS)
        raise AssertionError(f"keys that should be {'allowed' if allowed else 'refused'}: {said}")

    @property
    def env(self) -> dict[str, str]:
        """What a client of it needs in its environment."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@dataclass(frozen=True)
class MLflowServer:
    """A running MLflow server."""

    address: str
    folder: Path
    """Everything it keeps: database, artifacts and log."""


def free_ports(count: int) -> list[int]:
    """Loopback ports nobody listens on, below the range the kernel hands out to clients."""
    with ExitStack() as held:
        ports: list[int] = []
        while len(ports) < count:
            port = random.randrange(20_000, 32_000)
            candidate = held.enter_context(socket.socket())
            try:
                candidate.bind(("127.0.0.1", port))
            except OSError:
                continue
            ports.append(port)
        return ports


@contextmanager
def seaweedfs(folder: Path) -> Iterator[S3Server]:
    """SeaweedFS's S3 gateway with one bucket; SIGKILL ends it, because it takes its time over SIGTERM."""
    names = ("master", "filer", "volume", "s3", "admin")
    ports = free_ports(2 * len(names))
    endpoint = f"http://127.0.0.1:{ports[names.index('s3')]}"
    master, filer = (f"127.0.0.1:{ports[names.index(n)]}.{ports[len(names) + names.index(n)]}" for n in names[:2])
    shell = (str(_BIN / "weed"), "shell", f"-master={master}", f"-filer={filer}")
    server = S3Server(endpoint, "hvqd", "test-access-key", "test-secret-key-0123456789", shell)
    flags = [f"-{name}.port={ports[index]}" for index, name in enumerate(names)]
    flags += [f"-{name}.port.grpc={ports[len(names) + index]}" for index, name in enumerate(names)]
    command = [
        *(str(_BIN / "weed"), "-logtostderr", "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *(*flags, "-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
        f"-bucket={server.bucket}",
    ]

    def probe() -> None:
        client = _client(endpoint, server.access_key, server.secret_key)
        client.put_object(Bucket=server.bucket, Key="ready", Body=b"")
        client.delete_object(Bucket=server.bucket, Key="ready")

    with _running(f"SeaweedFS at {endpoint}", command, server.env, folder, probe):
        yield server


def _client(endpoint: str, access_key: str, secret_key: str) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
        config=botocore.config.Config(connect_timeout=5, read_timeout=5, retries={"total_max_attempts": 1}),
    )


@contextmanager
def mlflow_server(folder: Path) -> Iterator[MLflowServer]:
    """MLflow's server on sqlite with its artifacts in `folder`, which clients on this machine write directly."""
    port = free_ports(1)[0]
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db"),
        *("--default-artifact-root", f"{folder}/artifacts", "--no-serve-artifacts"),
    ]
    settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "DO_NOT_TRACK": "true", "OMP_NUM_THREADS": "1"}
    address = f"http://127.0.0.1:{port}"

    def probe() -> None:
        urllib.request.urlopen(f"{address}/health", timeout=5).close()

    with _running(f"MLflow at {address}", command, settings, folder, probe):
        yield MLflowServer(address, folder)


@contextmanager
def postgresql() -> Iterator[str]:
    """The address of an empty PostgreSQL database, from the binaries of the wheel `pgserver`.

    PostgreSQL refuses to run as root, and an unprivileged user can't enter pytest's folders: it gets one of its own.
    """
    package = Path(str(importlib.util.find_spec("pgserver").submodule_search_locations[0]))  # type: ignore[union-attr,index]
    folder = Path(tempfile.mkdtemp(prefix="hvqd-postgresql-"))
    port = free_ports(1)[0]
    data, log = folder / "data", folder / "server.log"
    is_root = os.geteuid() == 0
    owner = {"user": "nobody", "group": "nogroup", "extra_groups": []} if is_root else {}
    try:
        for name in ("pgserver", "pgserver.libs"):  # found relative to the binaries
            shutil.copytree(package.with_name(name), folder / name)
        binaries = folder / "pgserver" / "pginstall" / "bin"
        data.mkdir(mode=0o700)
        folder.chmod(0o755)
        if is_root:
            shutil.chown(data, "nobody", "nogroup")
        made = subprocess.run(
            [binaries / "initdb", "-A", "trust", "-U", "hvqd", "-E", "UTF8", "--no-locale", "--no-sync", "-D", data],
            cwd=folder, capture_output=True, text=True, **owner,  # type: ignore[call-overload]
        )  # fmt: skip
        assert made.returncode == 0, made.stdout + made.stderr
        settings = ("fsync=off", "synchronous_commit=off", "full_page_writes=off", f"unix_socket_directories={data}")
        command = [binaries / "postgres", "-h", "127.0.0.1", "-p", str(port), "-k", data, "-D", data]
        command += [part for setting in settings for part in ("-c", setting)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, **owner
            )
        try:
            _await(f"PostgreSQL on port {port}", process, lambda: _ask_postgresql(port), log)
            yield f"postgresql+psycopg2://hvqd@127.0.0.1:{port}/postgres"
        finally:
            process.send_signal(signal.SIGQUIT)
            process.wait()
    finally:
        shutil.rmtree(folder)


def _ask_postgresql(port: int) -> None:
    import psycopg2

    try:
        psycopg2.connect(f"host=127.0.0.1 port={port} user=hvqd dbname=postgres connect_timeout=5").close()
    except psycopg2.OperationalError as error:
        raise OSError(str(error)) from error


@contextmanager
def mlflow_on(database: str, artifacts: str, folder: Path, env: Mapping[str, str], port: int) -> Iterator[MLflowServer]:
    """MLflow's server on a database and an object store, which its clients write directly."""
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", database, "--default-artifact-root", artifacts, "--no-serve-artifacts"),
    ]
    settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "DO_NOT_TRACK": "true", "OMP_NUM_THREADS": "1", **env}
    address = f"http://127.0.0.1:{port}"

    def probe() -> None:
        urllib.request.urlopen(f"{address}/health", timeout=5).close()

    with _running(f"MLflow at {address}", command, settings, folder, probe):
        yield MLflowServer(address, folder)


@contextmanager
def _running(
    name: str, command: Sequence[str], settings: Mapping[str, str], folder: Path, probe: Callable[[], None]
) -> Iterator[None]:
    """The server from the first time that `probe` does not raise; its log lies in `folder`."""
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **settings},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _await(name, process, probe, log)
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _await(name: str, process: subprocess.Popen[bytes], probe: Callable[[], None], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    problem: Exception | None = None
    while time.monotonic() < deadline and process.poll() is None:
        try:
            return probe()
        except (OSError, botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
            problem = error
        time.sleep(_POLL_SECONDS)
    ended = "it still runs" if process.returncode is None else f"it ended with status {process.returncode}"
    tail = log.read_text(errors="replace")[-_LOG_TAIL:]
    raise AssertionError(f"{name} was not ready within {_START_SECONDS:.0f} s ({ended}): {problem}\n{tail}")
