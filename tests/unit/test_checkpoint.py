"""Checkpoints on a store: the newest whole one of the same request counts, whatever else lies beside it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from infra.errors import InputError
from infra.storage import Store, open_store
from tests.tiny_training import GLOBAL_BATCH, prior_settings
from workflows.artifacts import MANIFEST
from workflows.training.checkpoint import StoreCheckpoints
from workflows.training.loop import TrainState
from workflows.training.plain import PlainEngine

FILE = "plain.pt"


class OfManyWorkers(PlainEngine):
    """An engine that says it is one of three."""

    world = 3


def engine(value: float, kind: type[PlainEngine] = PlainEngine) -> PlainEngine:
    module = nn.Linear(2, 2, bias=False)
    nn.init.constant_(module.weight, value)
    return kind(module, prior_settings(1), torch.device("cpu"))


def value_of(found: PlainEngine) -> float:
    return float(found.parameters[0].detach().mean())


def name_of(step: int) -> str:
    return f"{step * GLOBAL_BATCH:012d}-w1"


@pytest.fixture
def checkpoints(tmp_path: Path) -> StoreCheckpoints:
    """Those of steps 1, 2 and 3; the weights are the number of the step."""
    found = StoreCheckpoints(open_store(str(tmp_path / "checkpoints")), "request", keep=3)
    for step in (1, 2, 3):
        history = [{"images": index * GLOBAL_BATCH, "loss": 0.5} for index in range(step)]
        found.save(engine(step), TrainState(step * GLOBAL_BATCH, history))
    return found


def restored(checkpoints: StoreCheckpoints) -> tuple[float, TrainState]:
    found = engine(-1)
    state = checkpoints.restore(found)
    return value_of(found), state


def test_the_newest_is_restored_with_its_history(checkpoints: StoreCheckpoints) -> None:
    value, state = restored(checkpoints)
    assert (value, state.images_seen) == (3, 3 * GLOBAL_BATCH)
    assert state.history == [{"images": index * GLOBAL_BATCH, "loss": 0.5} for index in range(3)]


def test_an_empty_or_absent_folder_begins_anew(tmp_path: Path) -> None:
    value, state = restored(StoreCheckpoints(open_store(str(tmp_path / "absent")), "request", keep=1))
    assert (value, state) == (-1, TrainState())
    assert not (tmp_path / "absent").exists()


def truncate(folder: Store) -> None:
    folder.write_bytes(FILE, folder.read_bytes(FILE)[:-1])


def flip(folder: Store) -> None:
    content = bytearray(folder.read_bytes(FILE))
    content[len(content) // 2] ^= 1
    folder.write_bytes(FILE, bytes(content))


def remove(folder: Store) -> None:
    folder.delete(FILE)


@pytest.mark.parametrize("damage", [truncate, flip, remove])
def test_one_with_a_damaged_file_is_passed_over_and_named(
    checkpoints: StoreCheckpoints, damage: Callable[[Store], None], caplog: pytest.LogCaptureFixture
) -> None:
    damage(checkpoints.store.child(name_of(3)))
    with caplog.at_level(logging.WARNING):
        value, state = restored(checkpoints)
    assert (value, state.images_seen) == (2, 2 * GLOBAL_BATCH)
    assert f"{name_of(3)} is passed over: {FILE} is missing or damaged" in caplog.text


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"ranks"', '"banks"'),
        lambda text: text.replace('"sha256"', '"sha"'),
        lambda text: json.dumps(json.loads(text) | {"images_seen": "many"}),
        lambda text: json.dumps(json.loads(text) | {"ranks": [None]}),
    ],
    ids=["truncated", "a list", "no ranks", "unknown entry", "no number", "no files"],
)
def test_one_with_a_damaged_manifest_is_passed_over_and_named(
    checkpoints: StoreCheckpoints, damage: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = checkpoints.store.child(name_of(3))
    folder.write_bytes(MANIFEST, damage(folder.read_bytes(MANIFEST).decode()).encode())
    with caplog.at_level(logging.WARNING):
        value, _ = restored(checkpoints)
    assert value == 2
    assert f"{name_of(3)} has a damaged manifest and is passed over" in caplog.text


def test_one_without_a_manifest_does_not_count_and_is_deleted_by_the_next_save(checkpoints: StoreCheckpoints) -> None:
    checkpoints.store.child(name_of(3)).delete(MANIFEST)
    checkpoints.store.child(name_of(9)).write_bytes(FILE, b"half")
    assert restored(checkpoints)[0] == 2
    checkpoints.save(engine(4), TrainState(4 * GLOBAL_BATCH))
    assert checkpoints.store.children() == [name_of(1), name_of(2), name_of(4)]


def test_those_of_another_request_do_not_count_and_are_deleted_by_the_next_save(checkpoints: StoreCheckpoints) -> None:
    other = StoreCheckpoints(checkpoints.store, "another request", keep=3)
    assert restored(other) == (-1, TrainState())
    other.save(engine(7), TrainState(GLOBAL_BATCH))
    assert other.store.children() == [name_of(1)]
    assert restored(other)[0] == 7
    assert restored(checkpoints)[0] == -1


def test_all_damaged_begins_anew(checkpoints: StoreCheckpoints) -> None:
    for step in (1, 2, 3):
        truncate(checkpoints.store.child(name_of(step)))
    assert restored(checkpoints) == (-1, TrainState())


@pytest.mark.parametrize("keep", [1, 2])
def test_only_the_newest_are_kept(checkpoints: StoreCheckpoints, keep: int) -> None:
    checkpoints.keep = keep
    checkpoints.save(engine(4), TrainState(4 * GLOBAL_BATCH))
    assert checkpoints.store.children() == [name_of(step) for step in (3, 4)][-keep:]


def test_after_going_back_the_newer_damaged_one_is_replaced(checkpoints: StoreCheckpoints) -> None:
    flip(checkpoints.store.child(name_of(3)))
    assert restored(checkpoints)[0] == 2
    checkpoints.save(engine(33), TrainState(3 * GLOBAL_BATCH))
    assert restored(checkpoints)[0] == 33


def test_another_number_of_workers_is_refused_with_what_to_do(checkpoints: StoreCheckpoints) -> None:
    with pytest.raises(
        InputError,
        match=rf"checkpoints/{name_of(3)} was written by 1 workers, and this run has 3\n"
        r"hint: go on with compute\.workers=1, or delete .*/checkpoints to begin anew",
    ):
        checkpoints.restore(engine(0, OfManyWorkers))


def test_a_remote_store_is_fetched_to_a_folder_that_does_not_stay(
    checkpoints: StoreCheckpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    remote = StoreCheckpoints(Store(f"local://{checkpoints.store.url}"), "request", keep=3)
    assert not remote.store.is_local
    assert restored(remote)[0] == 3
    checkpoints.save(engine(4), TrainState(4 * GLOBAL_BATCH))
    assert list(scratch.iterdir()) == []
