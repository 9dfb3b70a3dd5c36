"""Runs in MLflow: one run a key, gone on with when the same key comes again, with a truthful end.

Without a server the store is an sqlite file in a local root; for a remote root it stays on this machine, in `.hvqd/`,
and its artifacts go under the root.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from botocore import exceptions as boto_errors

from infra.errors import EnvironmentFailure, InputError
from infra.lease import process_identity
from infra.quiet import switch_off_telemetry
from infra.secrets import mask
from infra.signals import held_back
from infra.storage import Store, place_new

Status = Literal["FINISHED", "FAILED", "KILLED"]

KEY_TAG = "hvqd.key"
PROCESS_TAG = "hvqd.process"
"""Who writes the run now: JSON of `infra.lease.process_identity`, and the machine's name."""
_SQLITE = "sqlite:///"
_BATCH = 100
_METRICS_A_BATCH = 1_000
_RUNS_A_PAGE = 500
_LONGEST_VALUE = 6_000
_ANSWER_SECONDS = 5
_DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


@cache
def client(uri: str, process: int) -> Any:
    """MLflow's client of a tracking store; one a process."""
    switch_off_telemetry()
    from mlflow import MlflowClient

    if uri.startswith(_SQLITE):
        _make_database(Path(uri.removeprefix(_SQLITE)))
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _make_database(path: Path) -> None:
    """An empty store at this path unless there is one: whole or absent.

    MLflow builds its tables in hundreds of steps and cannot go on with half of them, as a full disk or a kill leaves
    them.
    """
    if path.exists():
        return
    from mlflow import MlflowClient

    _make_folder(path.parent)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    try:
        with explained(f"{_SQLITE}{path}"):
            MlflowClient(tracking_uri=f"{_SQLITE}{partial}").search_experiments(max_results=1)
        place_new(partial, path)  # unless another process was first
    finally:
        partial.unlink(missing_ok=True)


def renew() -> None:
    """Forget the clients by which MLflow writes artifacts to S3: they keep the credentials they were made with."""
    if "boto3" in sys.modules:
        sys.modules["boto3"].setup_default_session()
    if "mlflow.store.artifact.s3_artifact_repo" in sys.modules:
        sys.modules["mlflow.store.artifact.s3_artifact_repo"]._cached_get_s3_client.cache_clear()


def _is_of_artifacts(error: Exception) -> bool:
    """Whether an object store's client, which MLflow lets speak for itself, has failed."""
    boto3 = sys.modules.get("boto3.exceptions")
    return isinstance(error, boto_errors.BotoCoreError | boto_errors.ClientError) or (
        boto3 is not None and isinstance(error, boto3.Boto3Error)
    )


@contextmanager
def explained(uri: str, *, whole: bool = True) -> Iterator[None]:
    """Turn what MLflow raises when its store is away into two lines a user can act on.

    Args:
        uri: of the store.
        whole: a Ctrl-C waits until the block has ended where this process writes the database itself: cut short, the
            database would stay locked, and the run's end could not be written. False where it may take long.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError  # what MLflow lets through while it opens a database

    is_database = not uri.startswith(("http://", "https://"))
    try:
        with held_back() if whole and is_database else nullcontext():
            yield
    except (MlflowException, SQLAlchemyError) as error:
        text = " ".join(str(error).split())
        if re.search("disk is full|No space left", text):
            raise EnvironmentFailure(
                f"cannot write the tracking store {mask(uri)}: the disk is full\n"
                "hint: free some space; earlier artifacts are intact, the same command goes on"
            ) from error
        if refused := re.search(r"error code (40[13])\b|PERMISSION_DENIED|UNAUTHENTICATED|CUSTOMER_UNAUTHORIZED", text):
            how = f" (HTTP {refused[1]})" if refused[1] else ""
            raise EnvironmentFailure(
                f"the tracking server {mask(uri)} refuses this user{how}: {mask(text)[:300]}\n"
                "hint: set MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, to what it "
                "accepts; nothing was changed"
            ) from error
        if isinstance(error, SQLAlchemyError) or re.search(
            r"Max retries|Connection|timed out|HTTP.* 5\d\d|OperationalError|disk", text
        ):
            raise EnvironmentFailure(
                f"the tracking store {mask(uri)} failed: {mask(text)[:300]}\n"
                "hint: check that it runs and can be written; the same command goes on"
            ) from error
        raise
    except Exception as error:
        if not _is_of_artifacts(error):
            raise
        raise EnvironmentFailure(
            f"the artifact store of {mask(uri)} failed: {mask(' '.join(str(error).split()))[:300]}\n"
            "hint: check AWS_ENDPOINT_URL and the keys; the same command goes on"
        ) from error


@contextmanager
def _little_patience() -> Iterator[None]:
    """Let MLflow give up within seconds: right for a question before work starts, its minutes are right for work."""
    wanted = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": str(_ANSWER_SECONDS)}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@dataclass(frozen=True)
class Tracker:
    """A tracking store and an experiment in it; sent to any process."""

    uri: str
    artifact_root: str | None
    """Where a new experiment keeps its artifacts; None leaves it to the server."""
    experiment: str

    @property
    def client(self) -> Any:
        """MLflow's client."""
        return client(self.uri, os.getpid())

    @property
    def is_there(self) -> bool:
        """Whether the store exists: only to ask an sqlite store would make one."""
        return not self.uri.startswith(_SQLITE) or Path(self.uri.removeprefix(_SQLITE)).exists()

    def shared_artifacts(self, experiment: str) -> str:
        """URL of the folder that this store gives to an experiment's artifacts: the same one for everybody."""
        with explained(self.uri):
            found = self.client.get_experiment(replace(self, experiment=experiment)._experiment_id())
        return str(found.artifact_location).removeprefix("file://")

    def check_answers(self) -> None:
        """Ask the store a small question.

        Raises:
            EnvironmentFailure: no answer within seconds.
            InputError: the address is none that MLflow knows.
        """
        scheme = self.uri.partition(":")[0]
        if scheme in ("http", "https"):
            self._check_server()
        elif (kind := scheme.split("+")[0]) in _DATABASE_PORTS:
            self._check_database(_DATABASE_PORTS[kind])
        elif kind != "sqlite":
            raise InputError(
                f"tracking.uri must be http(s)://…, sqlite:///… or postgresql+psycopg2://…: {mask(self.uri)}\n"
                "hint: leave it out for an sqlite store beside the artifacts"
            )
        from mlflow.exceptions import MlflowException

        try:
            with explained(self.uri), _little_patience():
                self._experiment_id()
        except (MlflowException, ImportError) as error:  # ImportError: a database whose driver is not installed
            raise EnvironmentFailure(
                f"the tracking store {mask(self.uri)} does not work: {mask(' '.join(str(error).split()))[:300]}\n"
                "hint: check tracking.uri, and MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD if it wants them"
            ) from error

    def check_writable(self) -> None:
        """Make a run, log a value, and delete the run again.

        Raises:
            EnvironmentFailure: the store does not take it.
        """
        from mlflow.exceptions import MlflowException

        try:
            with explained(self.uri), _little_patience():
                run = self.client.create_run(self._experiment_id(), tags={"hvqd.step": "preflight"})
                self.client.log_metric(run.info.run_id, "preflight", 1.0)
                self.client.delete_run(run.info.run_id)
        except MlflowException as error:
            raise EnvironmentFailure(
                f"the tracking store {mask(self.uri)} takes no runs: {mask(' '.join(str(error).split()))[:300]}\n"
                "hint: check the account's rights on it (MLFLOW_TRACKING_USERNAME)"
            ) from error

    def _check_server(self) -> None:
        import urllib.error
        import urllib.request

        try:
            address = urlsplit(self.uri)
            bare = address._replace(netloc=address.netloc.rpartition("@")[2]).geturl()  # urllib takes no password
            urllib.request.urlopen(f"{bare.rstrip('/')}/health", timeout=_ANSWER_SECONDS).close()
        except (OSError, ValueError) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                return  # somebody answers; whether it is MLflow shows in the next call
            raise EnvironmentFailure(
                f"no MLflow server answers at {mask(self.uri)}: {error}\n"
                "hint: check tracking.uri, or leave it out for an sqlite store beside the artifacts"
            ) from error

    def _check_database(self, port: int) -> None:
        try:
            address = urlsplit(self.uri)
            if address.hostname:  # without one it is a local socket
                socket.create_connection((address.hostname, address.port or port), timeout=_ANSWER_SECONDS).close()
        except (OSError, ValueError) as error:
            raise EnvironmentFailure(
                f"no database answers at {mask(self.uri)}: {error}\n"
                "hint: check tracking.uri, or leave it out for an sqlite store beside the artifacts"
            ) from error

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(self.experiment)
        if found is None:
            try:
                return str(self.client.create_experiment(self.experiment, artifact_location=self.artifact_root))
            except MlflowException:  # another process was first
                found = self.client.get_experiment_by_name(self.experiment)
                if found is None:
                    raise
        return str(found.experiment_id)

    def run(
        self,
        key: str,
        name: str,
        *,
        parent: str | None = None,
        params: Mapping[str, object] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> TrackedRun:
        """The run of a key: the one there is, set running again, or a new one.

        Args:
            key: what the run is about; equal keys are one run.
            name: shown in MLflow.
            parent: run id of the run this one belongs to.
            params: logged once, when the run is made.
            tags: set now.
        """
        with explained(self.uri):
            experiment = self._experiment_id()
            found = self.client.search_runs([experiment], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
            all_tags = {
                KEY_TAG: key,
                PROCESS_TAG: json.dumps([process_identity(os.getpid()), socket.gethostname()]),
                **(tags or {}),
                **({"mlflow.parentRunId": parent} if parent else {}),
            }
            if found:
                run = TrackedRun(self.uri, found[0].info.run_id, resumed=True)
                self.client.update_run(run.run_id, status="RUNNING")
                run.set_tags(all_tags)
                return run
            made = self.client.create_run(experiment, tags={k: mask(v) for k, v in all_tags.items()}, run_name=name)
            run = TrackedRun(self.uri, made.info.run_id)
            run.log_params(params or {})
            return run

    def runs(self, condition: str) -> Iterator[KnownRun]:
        """The runs of the experiment that a condition in MLflow's language holds for, page by page."""
        if not self.is_there:
            return
        with explained(self.uri):
            experiment, token = self.client.get_experiment_by_name(self.experiment), None
            while experiment is not None:
                page = self.client.search_runs([experiment.experiment_id], condition, 1, _RUNS_A_PAGE, page_token=token)
                for run in page:
                    yield KnownRun(run.info.run_id, run.info.run_name, run.info.status, dict(run.data.tags))
                if not (token := page.token):
                    return

    def champion(self, model_name: str) -> str | None:
        """The version that the alias `champion` points to, or None."""
        from infra.models import Registry

        return Registry(self.uri).alias(model_name, "champion")


@dataclass(frozen=True)
class KnownRun:
    """What the store says of a run."""

    run_id: str
    name: str
    status: str
    """RUNNING, FINISHED, FAILED, KILLED or SCHEDULED."""
    tags: Mapping[str, str]

    @property
    def process(self) -> tuple[Any, str]:
        """The identity of the process that wrote it last, and its machine; (None, "") where unknown."""
        try:
            identity, machine = json.loads(self.tags[PROCESS_TAG])
        except (KeyError, ValueError, TypeError):
            return None, ""
        return identity, str(machine)


@dataclass(frozen=True)
class TrackedRun:
    """One run; sent to any process."""

    uri: str
    run_id: str
    resumed: bool = False
    """Whether the run was there before: then points it already has are not sent again."""
    _logged: dict[str, set[int]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def client(self) -> Any:
        """MLflow's client."""
        return client(self.uri, os.getpid())

    def log_params(self, params: Mapping[str, object]) -> None:
        """Parameters, which never change once logged."""
        from mlflow.entities import Param

        entries = [Param(name, mask(str(value))[:_LONGEST_VALUE]) for name, value in params.items()]
        with explained(self.uri):
            for batch in _batches(entries, _BATCH):
                self.client.log_batch(self.run_id, params=batch)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """One point of each metric; a point that the run has already is left out."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entries = [
            Metric(name, float(value), now, step) for name, value in metrics.items() if step not in self._steps(name)
        ]
        with explained(self.uri):
            for batch in _batches(entries, _METRICS_A_BATCH):
                self.client.log_batch(self.run_id, metrics=batch)
        for entry in entries:
            self._logged[entry.key].add(step)

    def _steps(self, name: str) -> set[int]:
        if name not in self._logged:
            with explained(self.uri):
                history = self.client.get_metric_history(self.run_id, name) if self.resumed else []
            self._logged[name] = {point.step for point in history}
        return self._logged[name]

    def log_file(self, path: Path, folder: str = "") -> None:
        """A file as an artifact of the run."""
        with explained(self.uri):
            self.client.log_artifact(self.run_id, str(path), folder or None)

    def log_folder(self, path: Path, folder: str) -> str:
        """A folder as artifacts of the run; returns its URL."""
        with explained(self.uri, whole=False):
            self.client.log_artifacts(self.run_id, str(path), folder)
            return f"{self.client.get_run(self.run_id).info.artifact_uri}/{folder}"

    def log_text(self, text: str, name: str) -> None:
        """A text as an artifact of the run."""
        with explained(self.uri):
            self.client.log_text(self.run_id, mask(text), name)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Tags, overwritten when they are there."""
        from mlflow.entities import RunTag

        entries = [RunTag(name, mask(str(value))) for name, value in tags.items()]
        with explained(self.uri):
            for batch in _batches(entries, _BATCH):
                self.client.log_batch(self.run_id, tags=batch)

    def end(self, status: Status) -> None:
        """How the run ended."""
        with explained(self.uri):
            self.client.set_terminated(self.run_id, status)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFailure(
            f"cannot make the tracking store's folder {folder}: {error}\nhint: choose a place that can be written"
        ) from error


def _batches(entries: list[Any], size: int) -> Iterable[list[Any]]:
    return (entries[start : start + size] for start in range(0, len(entries), size))


def open_tracker(uri: str | None, experiment: str, root: Store, scratch: Path = Path(".hvqd")) -> Tracker:
    """The tracker at a URI; None keeps an sqlite store beside the artifacts (see the module's docstring).

    Raises:
        InputError: the URI's password is stars, because it comes from what a root remembers.
    """
    if uri is not None and ":***@" in uri:
        raise InputError(
            f"the password of tracking.uri is not known: {uri}\nhint: a root does not remember it; pass --set "
            "tracking.uri=… again, or keep it in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD from the start"
        )
    if uri is not None:
        return Tracker(uri, None, experiment)
    if root.is_local:
        folder, artifacts = root.path, str(root.path / "mlartifacts")
    else:
        folder = scratch / hashlib.sha256(root.url.encode()).hexdigest()[:12]
        artifacts = f"{root.url}/mlartifacts"
    return Tracker(f"sqlite:///{folder.resolve()}/mlflow.db", artifacts, experiment)
