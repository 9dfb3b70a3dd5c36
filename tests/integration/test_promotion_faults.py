"""What promotion does when its server restarts, its database is yesterday's, or its object store is away.

Servers of these tests' own: an MLflow server on PostgreSQL, artifacts and journal on S3.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import psycopg2
import pytest

from infra import storage
from infra.errors import EnvironmentFailure, InputError
from infra.tracking import client
from tests.registry_place import Place
from tests.services import MLflowServer, S3Server, free_ports, mlflow_on, postgresql, seaweedfs
from workflows.release.promotion import champions, promoter_for

_AWAIT_SECONDS = 180.0


class Team:
    """The servers of a team, each of which can be stopped and started again."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, stack: ExitStack) -> None:
        self.folder, self._monkeypatch, self._stack = folder, monkeypatch, stack
        self.database = stack.enter_context(postgresql())
        (self._port,) = free_ports(1)
        self._s3: AbstractContextManager[S3Server] | None = None
        self._mlflow: AbstractContextManager[MLflowServer] | None = None
        self.start_s3()
        self.start_mlflow(self.database)
        stack.callback(self.stop_mlflow)
        stack.callback(self.stop_s3)
        self.address = f"http://127.0.0.1:{self._port}"

    def start_s3(self) -> None:
        """The same objects at a new address."""
        (self.folder / "s3").mkdir(exist_ok=True)
        self._s3 = seaweedfs(self.folder / "s3")
        server = self._s3.__enter__()
        # MLflow keeps its client of an endpoint, and knows the endpoint by a name of its own.
        for name, value in {**server.env, "MLFLOW_S3_ENDPOINT_URL": server.endpoint}.items():
            self._monkeypatch.setenv(name, value)
        storage._filesystem.cache_clear()

    def stop_s3(self) -> None:
        if self._s3 is not None:
            self._s3.__exit__(None, None, None)
        self._s3 = None

    def start_mlflow(self, database: str) -> None:
        (self.folder / "mlflow").mkdir(exist_ok=True)
        self._mlflow = mlflow_on(database, "s3://hvqd/mlflow", self.folder / "mlflow", {}, self._port)
        self._mlflow.__enter__()

    def stop_mlflow(self) -> None:
        """As a crash does."""
        if self._mlflow is not None:
            self._mlflow.__exit__(None, None, None)
        self._mlflow = None

    def copy_database(self, name: str) -> str:
        """A backup of today's database; nobody may be connected."""
        connection = psycopg2.connect(self.database.replace("+psycopg2", "").replace("/postgres", "/template1"))
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(f"CREATE DATABASE {name} TEMPLATE postgres")
        connection.close()
        return self.database.replace("/postgres", f"/{name}")


@pytest.fixture
def team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Team]:
    with ExitStack() as stack:
        yield Team(tmp_path, monkeypatch, stack)
    storage._filesystem.cache_clear()
    client.cache_clear()


def registry_is_explained(place: Place) -> None:
    """The champion is that of the journal's last decision, or of the one before while it is not yet applied."""
    entries = promoter_for(place.context, place.tracker).journal.entries()
    assert place.champion in {(champions(part) or [None])[-1] for part in (entries, entries[:-1])}


def test_a_server_that_is_killed_in_the_middle_of_a_promotion(team: Team, tmp_path: Path) -> None:
    place = Place(tmp_path / "run", tracking={"uri": team.address})
    one, two = place.version(), place.version()
    place.promote(one)
    failures: list[Exception] = []

    def promote() -> None:
        try:
            place.promote(two)
        except (EnvironmentFailure, InputError) as error:
            failures.append(error)

    thread, deadline = threading.Thread(target=promote), time.monotonic() + _AWAIT_SECONDS
    thread.start()
    while "000002.json" not in place.journal_folder.children():  # the decision is written, the alias not yet moved
        assert time.monotonic() < deadline and thread.is_alive(), "no decision came"
    team.stop_mlflow()
    team.start_mlflow(team.database)
    thread.join(_AWAIT_SECONDS)
    assert not thread.is_alive()
    assert all("the tracking store" in str(error) and "\nhint: " in str(error) for error in failures)
    registry_is_explained(place)
    place.promote(two)
    assert (place.champion, place.previous) == (two, one)
    place.check_consistent()


def test_a_database_of_yesterday_is_refused_until_todays_is_back(team: Team, tmp_path: Path) -> None:
    place = Place(tmp_path / "run", tracking={"uri": team.address})
    one = place.version()
    place.promote(one)
    team.stop_mlflow()
    yesterday = team.copy_database("yesterday")
    team.start_mlflow(team.database)
    two = place.version(kid_samples=0.9)
    place.promote(two)
    team.stop_mlflow()
    team.start_mlflow(yesterday)
    with pytest.raises(InputError, match=r"has no version 2 of the model hvqd\nhint: "):
        place.promote(one)
    assert (place.champion, place.previous) == (one, None), "nothing was moved"
    assert place.actions() == [("promote", one), ("promote", two)], "nothing was recorded"
    team.stop_mlflow()
    team.start_mlflow(team.database)
    place.check_consistent()
    assert (place.champion, place.previous) == (two, one)


def test_a_store_that_is_away_is_named_and_nothing_is_moved(team: Team, tmp_path: Path) -> None:
    place = Place(tmp_path / "run", tracking={"uri": team.address})
    one, two = place.version(), place.version()
    place.promote(one)
    team.stop_s3()
    with pytest.raises(
        EnvironmentFailure, match=r"cannot (list|read|write) s3://hvqd/mlflow/.* at http.*\nhint: check"
    ):
        place.promote(two)
    assert (place.champion, place.previous) == (one, None)
    team.start_s3()
    registry_is_explained(place)
    place.promote(two)
    assert (place.champion, place.previous) == (two, one)
    place.check_consistent()
