"""Clearing away versions that nothing needs, and carrying a version to another registry with all its bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from infra.errors import GateRefusal, InputError
from infra.models import Registry
from infra.storage import open_store
from tests.conftest import RegistryServer
from tests.registry_place import Place
from tests.services import S3Server, free_ports, mlflow_on, postgresql
from workflows.release.promotion import rollback
from workflows.release.registry import parts_tag, version_problems
from workflows.release.version_copy import ORIGIN_TAG, copy_version
from workflows.release.version_gc import GONE_TAG, collect
from workflows.release.versions import compare_versions, history, list_versions


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "run")


def numbers(place: Place) -> list[str]:
    return [version["version"] for version in list_versions(place.context, place.tracker).value["versions"]]


def files(place: Place, version: str) -> Path:
    return Path(place.registry.source("hvqd", version))


def test_what_an_alias_a_rollback_the_journal_or_another_version_needs_is_never_removed(place: Place) -> None:
    champions = [place.version() for _ in range(3)]
    candidate, spare, shared, refused = place.version(), place.version(), place.version(), place.version(psnr=1.0)
    place.registry.set_alias("hvqd", "candidate", candidate)
    run = place.tracker.run("pointer", "copy")
    pointer = place.registry.create("another", place.registry.source("hvqd", shared), run.run_id, {}, "a pointer")
    for version in champions:
        place.promote(version)
    place.promote(refused, override="to see")
    rollback(place.context, place.tracker, None, "seen")
    before = {version: files(place, version) for version in numbers(place)}

    dry = collect(place.context, place.tracker, keep=0, delete=False)
    assert dry.value["would_remove"] == [spare, refused] and dry.value["bytes"] > 0
    assert numbers(place) == list(before) and all(path.is_dir() for path in before.values())
    kept = dry.value["kept"]
    assert kept[champions[0]] == "a rollback can go back to it" and kept[champions[2]] == "alias champion"
    assert kept[shared] == f"its files are also those of another version {pointer}"
    assert "nothing was removed: `--delete` removes them" in dry.text

    done = collect(place.context, place.tracker, keep=0, delete=True)
    assert done.value["removed"] == [spare, refused]
    assert numbers(place) == [version for version in before if version not in (spare, refused)]
    assert {version for version, path in before.items() if not path.exists()} == {spare, refused}
    assert (place.champion, place.previous) == (champions[2], champions[1])
    assert rollback(place.context, place.tracker, champions[0], "further back").champion == champions[0]
    place.check_consistent()
    assert history(place.context, place.tracker, verify=True).value["verified"] is True


def test_the_newest_versions_stay_and_an_interrupted_removal_is_finished(place: Place) -> None:
    one, two, three = (place.version() for _ in range(3))
    assert collect(place.context, place.tracker, keep=2, delete=True).value["removed"] == [one]
    assert set(collect(place.context, place.tracker, keep=5, delete=True).value["kept"]) == {two, three}
    place.registry.set_tag("hvqd", three, GONE_TAG, "a crash came in between")
    open_store(str(files(place, three))).delete()
    assert collect(place.context, place.tracker, keep=5, delete=True).value["removed"] == [three]
    with pytest.raises(InputError, match=r"--keep must be at least 0: -1\nhint: --keep 5 keeps the five newest"):
        collect(place.context, place.tracker, keep=-1, delete=False)


# ---- to another registry ----


def test_a_version_goes_to_another_registry_with_its_bytes_and_is_judged_there(place: Place, tmp_path: Path) -> None:
    """Staging's files may go afterwards: production has its own."""
    production = Place(tmp_path / "production")
    first, better = place.version(), place.version(kid_samples=0.5)
    place.promote(better)
    to = str(production.context.root.path)
    dry = copy_version(place.context, place.tracker, "champion", to=to, dry_run=True)
    assert dry.value["copied"] is False and not production.context.root.path.exists()
    done = copy_version(place.context, place.tracker, "champion", to=to, dry_run=False)
    assert (done.value["copied"], done.value["from"], done.value["version"]) == (True, better, "1")
    again = copy_version(place.context, place.tracker, better, to=to, dry_run=False)
    assert (again.value["copied"], again.value["version"]) == (False, "1")

    copied, original = files(production, "1"), files(place, better)
    assert copied.is_relative_to(production.context.root.path) and not original.is_relative_to(
        production.context.root.path
    )
    contents = [
        {p.relative_to(top): p.read_bytes() for p in top.rglob("*") if p.is_file()} for top in (copied, original)
    ]
    assert contents[0] == contents[1] and len(contents[0]) == 7
    tags, there = place.registry.tags("hvqd", better), production.registry.tags("hvqd", "1")
    assert there == {**{tag: text for tag, text in tags.items() if tag != "hvqd.audit"}, ORIGIN_TAG: there[ORIGIN_TAG]}
    assert production.registry.alias("hvqd", "candidate") == "1" and production.champion is None
    production.promote("1")
    production.check_consistent()
    open_store(str(original)).delete()
    assert copy_version(place.context, place.tracker, first, to=to, dry_run=False).value["version"] == "2"
    with pytest.raises(GateRefusal, match="max_kid_regression fails"):
        production.promote("2")


def test_a_version_goes_from_a_staging_server_to_a_production_server_with_artifacts_of_its_own(
    registry_server: RegistryServer, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in registry_server.env.items():
        monkeypatch.setenv(name, value)
    artifacts, (port,) = f"s3://{s3_server.bucket}/production", free_ports(1)
    with (
        postgresql() as database,
        mlflow_on(database, artifacts, tmp_path, registry_server.env, port) as server,
    ):
        staging = Place(tmp_path / "staging", tracking={"uri": registry_server.address})
        staging.clear()
        production = Place(tmp_path / "production", tracking={"uri": server.address})
        staging.promote(staging.version())
        done = copy_version(staging.context, staging.tracker, "champion", to=server.address, dry_run=False)
        assert (done.value["copied"], done.value["version"]) == (True, "1")
        left, arrived = (open_store(place.registry.source("hvqd", "1")) for place in (staging, production))
        assert arrived.url.startswith(artifacts) and not left.url.startswith(artifacts)
        assert arrived.files() == left.files() and len(arrived.files()) == 7
        left.delete()
        production.promote("1")
        production.check_consistent()
        folder = production.registry.download("hvqd", "1", tmp_path / "arrived")
        assert version_problems(folder, production.registry.tags("hvqd", "1")) == []


def test_a_damaged_version_is_not_copied(place: Place, tmp_path: Path) -> None:
    version, to = place.version(), str(tmp_path / "production")
    (files(place, version) / "artifacts" / "bundle" / "weights").write_bytes(b"x")
    message = r"version 1 of hvqd is not what was registered: weights has been changed\nhint: nothing was registered"
    with pytest.raises(InputError, match=message):
        copy_version(place.context, place.tracker, version, to=to, dry_run=False)
    assert Registry(f"sqlite:///{to}/mlflow.db").versions("hvqd") == []
    with pytest.raises(InputError, match=r"--to names the registry that the version is in: .*\nhint: name another one"):
        copy_version(place.context, place.tracker, version, to=str(place.context.root.path), dry_run=False)


# ---- figures by protocol ----


def test_versions_are_compared_by_a_later_protocol_that_both_were_judged_by(place: Place) -> None:
    one, two = place.version(), place.version(kid_samples=0.5)
    place.registry.set_tag("hvqd", two, "hvqd.protocol", "q")
    assert compare_versions(place.context, place.tracker, one, two).value["comparable"] is False
    place.promote(one)
    with pytest.raises(GateRefusal, match="judged by another protocol: `hvqd evaluate --model champion`"):
        place.promote(two)
    figures = json.loads(place.registry.tags("hvqd", one)["hvqd.figures"]) | {"kid_samples": 3.0}
    place.registry.set_tag("hvqd", one, "hvqd.judged.q", json.dumps(figures))
    for version in (one, two):
        place.registry.set_tag("hvqd", version, parts_tag("q"), place.registry.tags("hvqd", one)[parts_tag("p")])
    compared = compare_versions(place.context, place.tracker, one, two).value
    assert (compared["protocol"], compared["figures"]["kid_samples"]) == ("q", [3.0, 0.5])
    place.promote(two)
    place.check_consistent()


def test_figures_without_a_protocol_are_refused(place: Place) -> None:
    version = place.version()
    place.registry.client.delete_model_version_tag("hvqd", version, "hvqd.protocol")
    message = r"the figures of version 1 of hvqd come without a protocol: .*\nhint: `hvqd evaluate --model 1` judges"
    with pytest.raises(InputError, match=message):
        place.promote(version)
    assert place.champion is None and place.actions() == []
