"""Runs and versions in MLflow, on sqlite and on a real server: no double point, truthful ends, no secret."""

from __future__ import annotations

import http.server
import os
import pickle
import re
import shutil
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy.event

from infra.errors import EnvironmentFailure, GateRefusal, InputError
from infra.models import Registry
from infra.storage import open_store
from infra.tracking import TrackedRun, Tracker, open_tracker
from tests.command_line import Finished, environment, run_hvqd
from tests.conftest import FinishedRun
from tests.said import Said
from tests.services import MLflowServer, free_ports
from workflows.config import RunConfig
from workflows.context import Context
from workflows.pipeline import tracked
from workflows.training.alarms import Alarm
from workflows.training.launch import Desk

SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "fakeAWSsecret0123456789",
    "MLFLOW_TRACKING_PASSWORD": "fakeTRACKINGpassword01",
    "HF_TOKEN": "fakeHFtoken0123456789",
}
URL_SECRET = "fakeURLpassword0123456789"


@pytest.fixture(scope="module")
def sqlite_tracker(tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    """The store that a local root keeps."""
    return open_tracker(None, "hvqd", open_store(str(tmp_path_factory.mktemp("tracking"))))


@pytest.fixture(params=["sqlite", "server"])
def tracker(request: pytest.FixtureRequest) -> Tracker:
    """Both kinds of store; tests keep apart by their keys and names."""
    if request.param == "sqlite":
        found = request.getfixturevalue("sqlite_tracker")
        assert isinstance(found, Tracker)
        return found
    return Tracker(request.getfixturevalue("tracking_server").address, None, "hvqd")


def history(run: TrackedRun, name: str) -> list[tuple[int, float]]:
    """Every point that MLflow has, in order."""
    return sorted((point.step, point.value) for point in run.client.get_metric_history(run.run_id, name))


# ---- runs ----


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("statement", ["INSERT INTO metrics", "SELECT"])
def test_an_interrupted_write_is_whole_and_the_run_ends_as_killed(
    tmp_path: Path, number: signal.Signals, statement: str
) -> None:
    """Cut short there, the database stayed locked, and the run said RUNNING for good."""
    tracker = open_tracker(None, "hvqd", open_store(str(tmp_path)))
    sent: list[str] = []

    def interrupt(statement_now: str) -> None:
        if statement_now.lstrip().startswith(statement) and not sent:
            sent.append(statement_now)
            signal.raise_signal(number)

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), tracked(tracker.run("cut", "pipeline")) as run:
            engine = run.client._tracking_client.store.engine
            sqlalchemy.event.listen(engine, "after_cursor_execute", lambda _c, _cursor, text, *_: interrupt(text))
            run.log_metrics({"loss": 0.5}, step=1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(sent) == 1
    assert history(run, "loss") == [(1, 0.5)] and run.client.get_run(run.run_id).info.status == "KILLED"
    with closing(sqlite3.connect(tmp_path / "mlflow.db", timeout=0)) as connection:
        connection.execute("BEGIN EXCLUSIVE")  # nobody holds it


def test_a_resumed_run_is_the_same_run_without_a_double_point(tracker: Tracker) -> None:
    first = tracker.run("resume", "pipeline")
    for step in (10, 20, 30):
        first.log_metrics({"loss": 1 / step, "rate": float(step)}, step=step)
    first.log_metrics({"loss": 5.0}, step=30)
    again = tracker.run("resume", "another name")
    assert again.run_id == first.run_id and (first.resumed, again.resumed) == (False, True)
    for step in (20, 30, 40):  # what a run repeats that goes on from an older checkpoint
        again.log_metrics({"loss": 9.0, "new": 1.0}, step=step)
    assert history(again, "loss") == [(10, 1 / 10), (20, 1 / 20), (30, 1 / 30), (40, 9.0)]
    assert history(again, "new") == [(20, 1.0), (30, 1.0), (40, 1.0)]
    assert history(again, "rate") == [(10, 10.0), (20, 20.0), (30, 30.0)]


def test_another_key_is_another_run(tracker: Tracker) -> None:
    assert len({tracker.run(f"key {index}", "same name").run_id for index in range(3)}) == 3


def test_a_run_sent_to_another_process_writes_to_the_same_run(tracker: Tracker) -> None:
    run = tracker.run("sent", "step")
    copy = pickle.loads(pickle.dumps(run))
    copy.log_metrics({"loss": 1.0}, step=1)
    assert history(run, "loss") == [(1, 1.0)]


def test_pictures_and_alarms_of_a_training_are_kept_with_its_run(tracker: Tracker, tmp_path: Path) -> None:
    """Under names that sort by images seen; what a resumed run sends again takes the same place."""
    run, root = tracker.run("seen", "vq"), open_store(str(tmp_path))
    alarm = Alarm("codebook collapse", 1, 8_000, "0.2% of the codes used", "vq.model.restart_threshold=0.05")
    for _ in range(2):
        desk = Desk(Context(RunConfig(), root, run=run), root.child("vq"))
        desk.show([("picture", (16, b"one")), ("alarm", alarm), ("picture", (32_000, b"two"))])
    names = [item.path for item in run.client.list_artifacts(run.run_id, "pictures")]
    assert names == ["pictures/images-000000000016.png", "pictures/images-000000032000.png"]
    assert run.client.get_run(run.run_id).data.tags["hvqd.alarm.codebook_collapse_level_1"] == alarm.text


def test_what_a_killed_driver_did_not_pass_on_is_tracked_once_after_all(tracker: Tracker, tmp_path: Path) -> None:
    root = open_store(str(tmp_path))
    alarm = Alarm("codebook collapse", 1, 30, "0.2% of the codes used", "vq.model.restart_threshold=0.05")
    records = [{"images": float(images), "loss": 1 / images} for images in (10, 20, 30, 40)]
    first = Desk(Context(RunConfig(), root, run=tracker.run("killed", "vq")), root.child("vq"))
    first.show([("record", records[0]), ("record", records[1])])
    run, said = tracker.run("killed", "vq"), Said()
    Desk(Context(RunConfig(), root, said, run=run), root.child("vq")).show(
        [("past", (records[:3], [alarm])), ("record", records[3]), ("alarm", alarm)]
    )
    assert history(run, "loss") == [(record["images"], record["loss"]) for record in records]
    assert run.client.get_run(run.run_id).data.tags["hvqd.alarm.codebook_collapse_level_1"] == alarm.text
    assert said.lines == [], "it was told by the first one"


def test_a_run_ends_as_what_happened(tracker: Tracker) -> None:
    endings: list[tuple[BaseException | None, str]] = [
        (None, "FINISHED"),
        (GateRefusal("refused"), "FINISHED"),
        (KeyboardInterrupt(), "KILLED"),
        (RuntimeError("broken"), "FAILED"),
        (SystemExit(1), "FAILED"),
    ]
    for index, (error, status) in enumerate(endings):
        run = tracker.run(f"ends {index}", "step")
        assert run.client.get_run(run.run_id).info.status == "RUNNING"
        raised: BaseException | None = None
        try:
            with tracked(run):
                if error is not None:
                    raise error
        except BaseException as found:
            raised = found
        assert raised is error
        assert run.client.get_run(run.run_id).info.status == status
        tracker.run(f"ends {index}", "step")
        assert run.client.get_run(run.run_id).info.status == "RUNNING", "a run that goes on runs again"


def test_parameters_are_logged_once_and_never_again(tracker: Tracker) -> None:
    params: dict[str, object] = {f"p{index}": index for index in range(250)}  # more than a batch
    params |= {"long": "x" * 10_000, "none": None, "url": f"http://me:{URL_SECRET}@host"}
    tracker.run("params", "pipeline", params=params)
    run = tracker.run("params", "pipeline", params={"p0": "changed", "more": 1})
    found = run.client.get_run(run.run_id).data.params
    assert len(found) == len(params) and (found["p0"], found["p249"], found["none"]) == ("0", "249", "None")
    assert found["long"] == "x" * 6_000 and found["url"] == "http://me:***@host"


def test_a_run_knows_its_parent_and_tags_can_change(tracker: Tracker) -> None:
    parent = tracker.run("parent", "pipeline")
    child = tracker.run(
        "child", "vq", parent=parent.run_id, tags={"hvqd.step": "vq", "password": f"password={URL_SECRET}"}
    )
    child.set_tags({"hvqd.step": "prior"})
    tags = child.client.get_run(child.run_id).data.tags
    assert (tags["mlflow.parentRunId"], tags["hvqd.step"]) == (parent.run_id, "prior")
    assert tags["password"] == "password=***"
    assert tracker.run("child", "vq").client.get_run(child.run_id).data.tags["mlflow.parentRunId"] == parent.run_id


def test_files_folders_and_texts_are_artifacts(tracker: Tracker, tmp_path: Path) -> None:
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "deep" / "file").write_text("1")
    run = tracker.run("artifacts", "step")
    url = run.log_folder(tmp_path / "folder", "model")
    run.log_file(tmp_path / "folder" / "deep" / "file", "files")
    run.log_text(f"token={URL_SECRET}\n", "notes/text.txt")
    assert url.endswith("/model")
    for name, content in (("model/deep/file", "1"), ("files/file", "1"), ("notes/text.txt", "token=***\n")):
        found = run.client.download_artifacts(run.run_id, name, str(tmp_path))
        assert Path(found).read_text() == content


def test_processes_that_start_at_once_make_one_experiment(tracker: Tracker) -> None:
    racing = replace(tracker, experiment="raced")
    failures: list[Exception] = []

    def ask() -> None:
        try:
            racing.check_answers()
        except Exception as error:  # shown below
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(tracker.client.search_experiments(filter_string="name = 'raced'")) == 1


# ---- versions ----


def new_version(tracker: Tracker, model: str, folder: Path, **tags: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights").write_text(f"weights of {model}")
    run = tracker.run(f"register {model}", "register")
    source = run.log_folder(folder, "model")
    return Registry(tracker.uri).create(model, source, run.run_id, tags, "a description")


def test_an_alias_is_read_back_where_it_was_set(tracker: Tracker, tmp_path: Path) -> None:
    registry = Registry(tracker.uri)
    assert registry.alias("nosuch", "champion") is None
    first = new_version(tracker, "aliased", tmp_path / "a", key="one")
    second = new_version(tracker, "aliased", tmp_path / "b", key="two")
    assert registry.alias("aliased", "champion") is None
    for version in (first, second, first):
        registry.set_alias("aliased", "champion", version)
        assert registry.alias("aliased", "champion") == version
        assert tracker.champion("aliased") == version
        aliases = tracker.client.get_model_version("aliased", version).aliases
        assert aliases == ["champion"], "MLflow agrees"
    registry.set_alias("aliased", "previous", second)
    assert registry.alias("aliased", "champion") == first, "aliases do not disturb each other"


def test_an_alias_that_somebody_else_moves_at_once_is_noticed(tmp_path: Path) -> None:
    tracker = open_tracker(None, "hvqd", open_store(str(tmp_path / "root")))
    registry = Registry(tracker.uri)
    versions = [new_version(tracker, "contested", tmp_path / name) for name in "ab"]
    database = tmp_path / "root" / "mlflow.db"
    with closing(sqlite3.connect(database)) as connection, connection:  # the other promoter, always a moment later
        connection.execute(
            "CREATE TRIGGER other AFTER INSERT ON registered_model_aliases "
            f"BEGIN UPDATE registered_model_aliases SET version = {versions[0]} WHERE name = NEW.name; END"
        )
    message = r"the alias champion of contested points to version 1, not 2: somebody else moved it\nhint: look at who"
    with pytest.raises(InputError, match=message):
        registry.set_alias("contested", "champion", versions[1])


def test_a_version_is_found_by_its_tag_and_downloaded_as_it_was(tracker: Tracker, tmp_path: Path) -> None:
    registry = Registry(tracker.uri)
    assert registry.version_tagged("tagged", "key", "one") is None
    first = new_version(tracker, "tagged", tmp_path / "a", key="one", secret=f"password={URL_SECRET}")
    second = new_version(tracker, "tagged", tmp_path / "b", key="one")
    registry.set_tag("tagged", second, "note", f"token={URL_SECRET}")
    assert registry.version_tagged("tagged", "key", "one") == second, "the newest"
    assert registry.version_tagged("tagged", "key", "two") is None
    assert registry.tags("tagged", first) == {"key": "one", "secret": "password=***"}
    assert registry.tags("tagged", second) == {"key": "one", "note": "token=***"}
    (tmp_path / "target").mkdir()
    found = registry.download("tagged", first, tmp_path / "target")
    assert (found / "weights").read_text() == "weights of tagged"


def test_a_version_that_does_not_exist_is_named(tracker: Tracker, tmp_path: Path) -> None:
    registry = Registry(tracker.uri)
    new_version(tracker, "numbered", tmp_path / "a")
    for model, version in (("numbered", "99"), ("numbered", "abc"), ("nosuch", "1")):
        message = rf"the registry at .* has no version {version} of the model {model}\nhint: `hvqd register` makes one"
        for ask in (registry.tags, registry.source):
            with pytest.raises(InputError, match=message):
                ask(model, version)


# ---- stores that do not work ----


def build(address: str, folder: Path) -> Finished:
    """`hvqd data build` that tracks at an address."""
    arguments = ("data", "build", "emoji", "--preset", "integration", "--root", str(folder / "run"), "--json")
    setting = ("--set", f"tracking.uri={address}")
    return run_hvqd(*arguments, *setting, cwd=folder, env=environment(folder), timeout_seconds=120)


def assert_named(done: Finished, expected: str, folder: Path) -> None:
    """Status 1 and two lines within seconds, and no artifact begun."""
    lines = done.err.splitlines()
    assert (done.status, len(lines)) == (1, 2), done.err
    assert re.match(f"error: {expected}", lines[0]) and lines[1].startswith("hint: check tracking.uri"), done.err
    assert done.answer["status"] == 1 and done.seconds < 30
    assert not (folder / "run").exists() or list((folder / "run").iterdir()) == []


@contextmanager
def answering(status: int, health: int | None = None) -> Iterator[str]:
    """The address of a web server that is no MLflow and answers everything with one status, or all but /health."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(health if health and self.path == "/health" else status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_POST = do_GET  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing is logged."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def test_an_address_without_a_server_is_named_within_seconds(tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{free_ports(1)[0]}"
    done = build(address.replace("://", f"://me:{URL_SECRET}@"), tmp_path)
    assert_named(done, f"no MLflow server answers at {address.replace('://', r'://me:[*]{3}@')}: .*refused", tmp_path)
    assert URL_SECRET not in done.out + done.err


@pytest.mark.parametrize("status", [500, 503])
def test_a_server_that_is_down_behind_a_proxy_is_named(status: int) -> None:
    with (
        answering(status) as address,
        pytest.raises(
            EnvironmentFailure,
            match=rf"no MLflow server answers at {address}: HTTP Error {status}.*\nhint: check tracking",
        ),
    ):
        Tracker(address, None, "hvqd").check_answers()


def test_a_server_whose_database_is_down_is_named_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    started = time.monotonic()
    with (
        answering(500, health=200) as address,
        pytest.raises(EnvironmentFailure, match=rf"the tracking store {address} failed: .*500.*\nhint: check that"),
    ):
        Tracker(address, None, "hvqd").check_answers()
    assert time.monotonic() - started < 30
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ and os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"


def test_an_address_without_a_database_is_named_within_seconds() -> None:
    port = free_ports(1)[0]
    started = time.monotonic()
    message = rf"no database answers at postgresql\+psycopg2://me:\*\*\*@127\.0\.0\.1:{port}/x: .*refused\nhint: check"
    with pytest.raises(EnvironmentFailure, match=message):
        Tracker(f"postgresql+psycopg2://me:{URL_SECRET}@127.0.0.1:{port}/x", None, "hvqd").check_answers()
    assert time.monotonic() - started < 10


def test_a_database_whose_driver_is_missing_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"mssql+pymssql://me@127.0.0.1:{silent.getsockname()[1]}/x"
        with pytest.raises(EnvironmentFailure, match=r"the tracking store mssql.* does not work: .*pymssql.*\nhint: "):
            Tracker(uri, None, "hvqd").check_answers()


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, r"the tracking server ADDRESS refuses this user \(HTTP 401\): .*\nhint: set MLFLOW_TRACKING_TOKEN"),
        (403, r"the tracking server ADDRESS refuses this user \(HTTP 403\): .*\nhint: set MLFLOW_TRACKING_TOKEN"),
        (404, r"the tracking store ADDRESS does not work: .*404.*\nhint: check tracking\.uri"),
    ],
)
def test_a_server_that_is_no_mlflow_or_refuses_is_named(status: int, message: str) -> None:
    with answering(status) as address:
        said = message.replace("ADDRESS", address)
        with pytest.raises(EnvironmentFailure, match=said):
            Tracker(address, None, "hvqd").check_answers()
        if status != 404:
            registry = Registry(address)
            for ask in (
                lambda: registry.alias("hvqd", "champion"),
                lambda: registry.tags("hvqd", "1"),
                lambda: registry.set_alias("hvqd", "champion", "1"),
            ):
                with pytest.raises(EnvironmentFailure, match=said):
                    ask()


def test_a_server_that_never_answers_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(EnvironmentFailure, match=rf"no MLflow server answers at {address}: timed out\nhint: "):
            Tracker(address, None, "hvqd").check_answers()


def test_a_server_that_goes_away_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    address = f"http://127.0.0.1:{free_ports(1)[0]}"
    run, registry = TrackedRun(address, "0" * 32, resumed=True), Registry(address)
    for ask in (
        lambda: run.end("FINISHED"),
        lambda: run.log_metrics({"loss": 1.0}, step=1),
        lambda: Tracker(address, None, "hvqd").run("key", "name"),
        lambda: registry.alias("hvqd", "champion"),
        lambda: registry.tags("hvqd", "1"),
        lambda: registry.version_tagged("hvqd", "a", "b"),
    ):
        with pytest.raises(EnvironmentFailure, match=rf"the tracking store {address} failed: .*\nhint: check that it"):
            ask()


@pytest.mark.parametrize("uri", ["ftp://host/x", "file:///tmp/x", "mlruns", "databricks"])
def test_an_address_that_is_no_store_is_refused(uri: str) -> None:
    with pytest.raises(InputError, match=rf"tracking\.uri must be http\(s\)://.*: {uri}\nhint: leave it out"):
        Tracker(uri, None, "hvqd").check_answers()


def test_a_database_that_cannot_be_made_or_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(EnvironmentFailure, match=r"cannot make the tracking store's folder .*file/x: .*\nhint: choose"):
        Tracker(f"sqlite:///{tmp_path}/file/x/mlflow.db", None, "hvqd").check_answers()
    (tmp_path / "mlflow.db").write_bytes(b"this is no database, whatever its name says" * 100)
    with pytest.raises(
        EnvironmentFailure, match=r"the tracking store sqlite:.*mlflow\.db .*not a database.*\nhint: check"
    ):
        Tracker(f"sqlite:///{tmp_path}/mlflow.db", None, "hvqd").check_answers()


# ---- the whole path ----


def assert_recorded(tracker: Tracker, digests: dict[str, str], made: set[str]) -> None:
    """One pipeline with a finished child for each step that was made, whose curves have no double point."""
    experiment = tracker.client.get_experiment_by_name(tracker.experiment)
    runs = tracker.client.search_runs([experiment.experiment_id], "tags.`hvqd.key` != ''")
    runs = [run for run in runs if run.info.run_name in {"pipeline", *made}]
    by_name = {run.info.run_name: run for run in runs}
    assert len(runs) == len(by_name) == 1 + len(made) and set(by_name) == {"pipeline", *made}
    assert {run.info.status for run in runs} == {"FINISHED"}
    for kind in made:
        tags = by_name[kind].data.tags
        assert tags["mlflow.parentRunId"] == by_name["pipeline"].info.run_id
        assert tags["hvqd.digest"] == digests[kind]
    params = by_name["pipeline"].data.params
    assert params["prior.train.images"] == "640" and "tracking.uri" not in params
    prior = by_name["prior"]
    assert "loss" in prior.data.metrics, sorted(prior.data.metrics)
    for name in prior.data.metrics:
        steps = [point.step for point in tracker.client.get_metric_history(prior.info.run_id, name)]
        assert len(steps) == len(set(steps)), name


def test_a_finished_run_is_recorded_under_its_local_root(finished_run: FinishedRun) -> None:
    tracker = open_tracker(None, "hvqd", open_store(str(finished_run.root)))
    digests = finished_run.result["digests"]
    assert_recorded(tracker, digests, set(digests))
    assert tracker.champion("hvqd") == finished_run.result["version"] == "1"


def test_a_run_tracked_on_a_server_leaves_no_secret_anywhere(
    finished_run: FinishedRun, tracking_server: MLflowServer, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(finished_run.root, tmp_path / "run"))
    for folder in ("prior", "evaluation", "registration"):  # what follows is made anew, and recorded on the server
        shutil.rmtree(root / folder)
    uri = tracking_server.address.replace("://", f"://me:{URL_SECRET}@")
    tracking = ("--set", f"tracking.uri={uri}", "--set", "tracking.experiment=secrets")
    model = ("--set", "tracking.model_name=secretive")
    env = environment(tmp_path, SECRETS)
    common = ("--preset", "integration", "--root", str(root), *tracking, *model, "--json")
    done = run_hvqd("run", *common, cwd=tmp_path, env=env).succeeded()
    result = done.answer
    assert result["digests"] == finished_run.result["digests"], "where it is recorded changes no result"
    tracker = Tracker(tracking_server.address, None, "secrets")
    assert_recorded(tracker, result["digests"], {"prior", "evaluation"})
    assert tracker.champion("secretive") == result["version"] == "1"

    sample = ("sample", "--root", str(root), "-n", "1", "--out", str(tmp_path / "x.png"), "--json")
    drawn = run_hvqd(*sample, "--set", f"tracking.uri={uri}", cwd=tmp_path, env=env).succeeded()
    forgotten = run_hvqd(*sample, cwd=tmp_path, env=env)
    assert forgotten.status == 2 and "the password of tracking.uri is not known" in forgotten.err

    secrets = [URL_SECRET.encode(), *(value.encode() for value in SECRETS.values())]
    shown = "".join(one.out + one.err for one in (done, drawn, forgotten)).encode()
    assert [secret for secret in secrets if secret in shown] == []
    written = [path for folder in (tmp_path, tracking_server.folder) for path in folder.rglob("*") if path.is_file()]
    kinds = {path.suffix for path in written}
    assert {".log", ".db", ".json", ".yaml", ".html", ".parquet", ".safetensors"} <= kinds, kinds
    assert [path for path in written if any(secret in path.read_bytes() for secret in secrets)] == []
