"""Checkpoints on a store: the newest whole one of the same request counts, whatever else lies beside it."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from torch import nn

from infra.errors import EnvironmentFailure
from infra.storage import Store, open_store
from tests.tiny_training import GLOBAL_BATCH, prior_settings
from workflows.artifacts import MANIFEST, digest_of
from workflows.training import patience
from workflows.training.catalog import COMPANION, SHARED
from workflows.training.checkpoint import StoreCheckpoints
from workflows.training.loop import TrainState
from workflows.training.plain import PlainEngine
from workflows.training.retention import Retention
from workflows.training.state import EngineState

FILE = "rank-00000.safetensors"


class Partner:
    """Something trained beside the engine: one number."""

    def __init__(self, value: float) -> None:
        self.value = torch.tensor(value)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "steps": 3}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def engine(value: float) -> PlainEngine:
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2))
    nn.init.constant_(module[0].weight, value)
    module[1].running_mean.fill_(value)
    return PlainEngine(module, prior_settings(1), torch.device("cpu"))


def value_of(found: PlainEngine) -> float:
    return float(found.parameters[0].detach().mean())


def prefix_of(step: int) -> str:
    return f"{step * GLOBAL_BATCH:012d}-b0-w1-"


def folder_of(checkpoints: StoreCheckpoints, step: int) -> Store:
    (name,) = [name for name in checkpoints.store.children() if name.startswith(prefix_of(step))]
    return checkpoints.store.child(name)


def steps_of(checkpoints: StoreCheckpoints) -> list[int]:
    return [int(name[:12]) // GLOBAL_BATCH for name in checkpoints.store.children()]


def saved(folder: Path, steps: tuple[int, ...] = (1, 2, 3)) -> StoreCheckpoints:
    found = StoreCheckpoints(open_store(str(folder)), "request", keep=3)
    for step in steps:
        found.companion = Partner(step / 2)
        history = [{"images": index * GLOBAL_BATCH, "loss": 0.5} for index in range(step)]
        found.save(engine(step), TrainState(step * GLOBAL_BATCH, history))
    return found


@pytest.fixture
def checkpoints(tmp_path: Path) -> StoreCheckpoints:
    """Those of steps 1, 2 and 3; the weights are the number of the step, the partner half of it."""
    return saved(tmp_path / "checkpoints")


def restored(checkpoints: StoreCheckpoints) -> tuple[float, TrainState]:
    found, partner = engine(-1), Partner(-1)
    checkpoints.companion = partner
    state = checkpoints.restore(found)
    assert float(partner.value) == (value_of(found) / 2 if state.images_seen else -1)
    return value_of(found), state


def test_the_newest_is_restored_with_its_history(checkpoints: StoreCheckpoints) -> None:
    value, state = restored(checkpoints)
    assert (value, state.images_seen) == (3, 3 * GLOBAL_BATCH)
    assert state.history == [{"images": index * GLOBAL_BATCH, "loss": 0.5} for index in range(3)]


def test_an_empty_or_absent_folder_begins_anew(tmp_path: Path) -> None:
    value, state = restored(StoreCheckpoints(open_store(str(tmp_path / "absent")), "request", keep=1))
    assert (value, state) == (-1, TrainState())
    assert not (tmp_path / "absent").exists()


# ---- damage ----

Damage = Callable[[Store, Store], None]


def every_damage() -> Iterator[tuple[str, str, Damage]]:
    """What is done to a checkpoint's folder (the older one is at hand), what it is called, and the file named."""

    def truncated(file: str, share: float) -> Damage:
        def apply(folder: Store, older: Store) -> None:
            content = folder.read_bytes(file)
            folder.write_bytes(file, content[: min(int(len(content) * share), len(content) - 2)])

        return apply

    def flipped(file: str, share: float) -> Damage:
        def apply(folder: Store, older: Store) -> None:
            content = bytearray(folder.read_bytes(file))
            content[min(int(len(content) * share), len(content) - 1)] ^= 1
            folder.write_bytes(file, bytes(content))

        return apply

    def swapped(file: str) -> Damage:
        return lambda folder, older: folder.write_bytes(file, older.read_bytes(file))

    def exchanged(folder: Store, older: Store) -> None:
        contents = [folder.read_bytes(name) for name in (FILE, SHARED)]
        folder.write_bytes(SHARED, contents[0])
        folder.write_bytes(FILE, contents[1])

    for file in (FILE, SHARED, COMPANION, MANIFEST):
        for share in (0.0, 0.1, 0.25, 0.5, 1.0):
            yield f"{file} truncated to {share:g}", file, truncated(file, share)
        for share in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
            yield f"{file} flipped at {share:g}", file, flipped(file, share)
        if file != MANIFEST:
            yield f"{file} missing", file, lambda folder, older, file=file: folder.delete(file)
        yield f"{file} of another checkpoint", file, swapped(file)
    yield "two files exchanged", FILE, exchanged


def test_each_of_fifty_and_more_damaged_checkpoints_is_named_and_the_newest_good_one_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path / "whole", (1, 2))
    seen = 0
    for what, file, damage in every_damage():
        shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
        found = StoreCheckpoints(open_store(str(tmp_path / "damaged")), "request", keep=3)
        folder = folder_of(found, 2)
        damage(folder, folder_of(found, 1))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert restored(found)[0] == 1, what
        (said,) = [record.getMessage() for record in caplog.records]
        named = "its manifest" if file == MANIFEST else f": {file} " if what != "two files exchanged" else "safetensors"
        assert f"{folder.url} is passed over: " in said and named in said, what
        shutil.rmtree(tmp_path / "damaged")
        seen += 1
    assert seen == 56


@pytest.mark.parametrize(
    "change",
    [
        {"images_seen": "many"},
        {"parts": {FILE: {"0.weight": [0]}}},
        {"files": {FILE: {"bytes": 1}}},
        {"shapes": None},
    ],
)
def test_a_manifest_with_a_valid_digest_and_senseless_content_is_passed_over(
    checkpoints: StoreCheckpoints, change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(checkpoints, 3)
    value = folder.read_json(MANIFEST) | change
    del value["digest"]
    folder.write_json(MANIFEST, {**value, "digest": digest_of(value)})
    with caplog.at_level(logging.WARNING):
        assert restored(checkpoints)[0] == 2
    assert "passed over: " in caplog.text


def test_a_manifest_of_another_format_is_passed_over_and_named(
    checkpoints: StoreCheckpoints, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(checkpoints, 3)
    folder.write_bytes(MANIFEST, json.dumps(folder.read_json(MANIFEST) | {"format": 99}).encode())
    with caplog.at_level(logging.WARNING):
        assert restored(checkpoints)[0] == 2
    assert "its manifest has format 99, this program reads 2" in caplog.text


def test_one_without_a_manifest_does_not_count_and_is_deleted_by_the_next_save(checkpoints: StoreCheckpoints) -> None:
    folder_of(checkpoints, 3).delete(MANIFEST)
    checkpoints.store.child(f"{prefix_of(9)}0123abcd").write_bytes(FILE, b"half")
    assert restored(checkpoints)[0] == 2
    checkpoints.save(engine(4), TrainState(4 * GLOBAL_BATCH))
    assert steps_of(checkpoints) == [1, 2, 4]


def test_what_another_rank_has_written_of_the_next_one_outlives_the_tidying_up_after_this_one(
    checkpoints: StoreCheckpoints,
) -> None:
    """Rank 1 does not wait for rank 0 to tidy up, which a slow store delays."""
    checkpoints._attempt = "0123abcd"
    early = checkpoints.store.child(f"{prefix_of(5)}0123abcd")
    leftover = checkpoints.store.child(f"{prefix_of(6)}deadbeef")
    for folder in (early, leftover):
        folder.write_bytes("rank-00001.safetensors", b"of rank 1")
    checkpoints.save(engine(4), TrainState(4 * GLOBAL_BATCH))
    assert early.files() and not leftover.files()
    assert steps_of(checkpoints) == [2, 3, 4, 5]


def test_those_of_another_request_do_not_count_and_are_deleted_by_the_next_save(checkpoints: StoreCheckpoints) -> None:
    other = StoreCheckpoints(checkpoints.store, "another request", keep=3, companion=Partner(3.5))
    assert restored(other) == (-1, TrainState())
    other.companion = Partner(3.5)
    other.save(engine(7), TrainState(GLOBAL_BATCH))
    assert steps_of(other) == [1]
    assert restored(other)[0] == 7
    assert restored(checkpoints)[0] == -1


def test_all_damaged_begins_anew(checkpoints: StoreCheckpoints) -> None:
    for step in (1, 2, 3):
        folder_of(checkpoints, step).delete(FILE)
    assert restored(checkpoints) == (-1, TrainState())


@pytest.mark.parametrize("keep", [1, 2])
def test_only_the_newest_are_kept(checkpoints: StoreCheckpoints, keep: int) -> None:
    checkpoints.keep = keep
    checkpoints.save(engine(4), TrainState(4 * GLOBAL_BATCH))
    assert steps_of(checkpoints) == [3, 4][-keep:]


def test_the_best_stay_beside_the_newest(tmp_path: Path) -> None:
    found = StoreCheckpoints(open_store(str(tmp_path)), "request", Retention(last=1, best=1))
    for step, psnr in ((1, 20.0), (2, 23.0), (3, 21.0), (4, 22.0)):
        found.save(engine(step), TrainState(step * GLOBAL_BATCH, [{"images": step, "val_psnr": psnr}, {"loss": 1.0}]))
    assert steps_of(found) == [2, 4]


def test_after_going_back_the_newer_damaged_one_is_replaced(checkpoints: StoreCheckpoints) -> None:
    folder_of(checkpoints, 3).delete(FILE)
    assert restored(checkpoints)[0] == 2
    checkpoints.companion = Partner(16.5)
    checkpoints.save(engine(33), TrainState(3 * GLOBAL_BATCH))
    assert restored(checkpoints)[0] == 33
    assert steps_of(checkpoints) == [1, 2, 3]


def test_a_setback_counts_more_than_images(checkpoints: StoreCheckpoints) -> None:
    checkpoints.companion = Partner(10)
    checkpoints.save(engine(20), TrainState(2 * GLOBAL_BATCH, [], [{"images": 30, "to": 16}]))
    value, state = restored(checkpoints)
    assert (value, state.images_seen, state.setbacks) == (20, 2 * GLOBAL_BATCH, [{"images": 30, "to": 16}])


def test_stepping_back_takes_the_newest_or_the_one_before_and_deletes_what_is_newer(
    checkpoints: StoreCheckpoints,
) -> None:
    found = engine(-1)
    state = checkpoints.step_back(found, None)
    assert (value_of(found), state.images_seen, steps_of(checkpoints)) == (3, 3 * GLOBAL_BATCH, [1, 2, 3])
    state = checkpoints.step_back(found, state.images_seen)
    assert (value_of(found), state.images_seen, steps_of(checkpoints)) == (2, 2 * GLOBAL_BATCH, [1, 2])
    assert checkpoints.step_back(found, GLOBAL_BATCH).images_seen == 0
    assert (value_of(found), steps_of(checkpoints)) == (2, [1, 2]), "nothing is loaded, and nothing is deleted"


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


# ---- in the background ----


def test_what_is_saved_in_the_background_is_what_the_state_was_when_it_was_asked_for(tmp_path: Path) -> None:
    found = StoreCheckpoints(open_store(str(tmp_path)), "request", keep=3, background=True)
    changing = engine(1)
    state = TrainState(GLOBAL_BATCH, [{"images": 8, "loss": 0.5}])
    found.save(changing, state)
    with torch.no_grad():
        changing.parameters[0].fill_(99)
    state.history.append({"images": 16, "loss": 0.1})
    found.finish()
    target = engine(-1)
    restored_state = found.restore(target)
    assert (value_of(target), restored_state.history) == (1, [{"images": 8, "loss": 0.5}])


def test_what_went_wrong_in_the_background_is_raised_by_the_next_save(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    found = StoreCheckpoints(open_store(str(tmp_path / "checkpoints")), "request", keep=3, background=True)
    found.save(engine(1), TrainState(GLOBAL_BATCH))
    with pytest.raises(EnvironmentFailure, match=r"cannot write .*checkpoints.*\nhint: choose a root"):
        found.save(engine(2), TrainState(2 * GLOBAL_BATCH))
    found.finish()


# ---- a store that fails, and one that is slow ----


class Faulty(LocalFileSystem):
    """A remote store on a local disk that fails so many times, and notes what is uploaded."""

    protocol = "faulty"
    failures = 0
    events: ClassVar[list[str]] = []
    scratch = Path()

    def _meet(self) -> None:
        if Faulty.failures > 0:
            Faulty.failures -= 1
            raise ConnectionError("the store is away")

    def ls(self, *arguments: Any, **options: Any) -> Any:
        """May fail."""
        self._meet()
        return super().ls(*arguments, **options)

    def cat_file(self, *arguments: Any, **options: Any) -> Any:
        """May fail."""
        self._meet()
        return super().cat_file(*arguments, **options)

    def get_file(self, *arguments: Any, **options: Any) -> Any:
        """May fail."""
        self._meet()
        return super().get_file(*arguments, **options)

    def pipe_file(self, path: str, value: bytes, **options: Any) -> Any:
        """May fail."""
        self._meet()
        self.makedirs(self._parent(path), exist_ok=True)
        return super().pipe_file(path, value, **options)

    def put_file(self, source: str, target: str, **options: Any) -> None:
        """May fail; takes a moment."""
        self._meet()
        files = [path for path in self.scratch.rglob("*") if path.is_file()]
        Faulty.events.append(f"upload with {len(files)} files in the scratch folder")
        time.sleep(0.02)
        self.makedirs(self._parent(target), exist_ok=True)
        super().put_file(source, target, **options)
        Faulty.events.append("uploaded")


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The folder of `checkpoints`, as a store that can be made to fail."""
    fsspec.register_implementation("faulty", Faulty, clobber=True)
    monkeypatch.setattr(patience, "_FIRST_PAUSE", 0.001)
    monkeypatch.setattr(patience, "_warnings", patience.Warnings())
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    Faulty.failures, Faulty.events, Faulty.scratch = 0, [], scratch
    return Store(f"faulty://{tmp_path}/checkpoints")


def test_a_store_that_is_away_is_waited_for_when_going_on_and_when_saving(
    checkpoints: StoreCheckpoints, faulty: Store, caplog: pytest.LogCaptureFixture
) -> None:
    for failures in range(1, 12):  # so that each call is the one that fails last
        remote = StoreCheckpoints(faulty, "request", keep=3)
        Faulty.failures = failures
        assert restored(remote)[0] == 3
        assert Faulty.failures == 0
    assert caplog.text.count("trying again") == 1, "one line a minute"
    for failures in range(1, 12):
        remote.companion = Partner((3 + failures) / 2)
        Faulty.failures = failures
        remote.save(engine(3 + failures), TrainState((3 + failures) * GLOBAL_BATCH))
        assert Faulty.failures == 0
    assert restored(remote)[0] == 14
    assert steps_of(remote) == [12, 13, 14]


def test_one_copy_of_the_state_and_one_file_at_most_wait_for_a_slow_store(faulty: Store) -> None:
    class Watched(PlainEngine):
        def state(self) -> EngineState:
            Faulty.events.append("copied")
            return super().state()

    found = StoreCheckpoints(faulty, "request", keep=9, background=True, companion=Partner(1))
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2))
    watched = Watched(module, prior_settings(1), torch.device("cpu"))
    for step in range(1, 4):
        found.save(watched, TrainState(step * GLOBAL_BATCH))
    found.finish()
    one = ["upload with 1 files in the scratch folder", "uploaded"]
    assert Faulty.events == ["copied", *one, *one, *one] * 3, "weights, what is shared, what is trained beside them"


def test_a_full_scratch_disk_is_named_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/dev/null/nowhere")
    found = StoreCheckpoints(open_store(str(tmp_path)), "request", keep=3)
    with pytest.raises(EnvironmentFailure, match=r"scratch folder .*\nhint: free some space there, or name .* TMPDIR"):
        found.save(engine(1), TrainState(GLOBAL_BATCH))
