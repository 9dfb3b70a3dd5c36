"""Looking at checkpoints and clearing them away: what is named, what goes, and what always stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from infra.errors import InputError
from infra.storage import Store, open_store
from tests.tiny_training import prior_settings
from workflows.artifacts import MANIFEST
from workflows.config import RunConfig
from workflows.training.catalog import check_saved, names, read_saved
from workflows.training.checkpoint import StoreCheckpoints
from workflows.training.inspection import (
    delete_checkpoint,
    find_checkpoints,
    folder_of,
    garbage,
    reshape_checkpoint,
)
from workflows.training.loop import TrainState
from workflows.training.plain import PlainEngine

FILE = "rank-00000.safetensors"


def save(root: Store, step: int, request: str = "r", value: float = 1.0) -> None:
    """A checkpoint of a few weights at so many images."""
    module = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7))
    nn.init.constant_(module[0].weight, value)
    engine = PlainEngine(module, prior_settings(1), torch.device("cpu"))
    StoreCheckpoints(folder_of(root, "vq"), request, keep=99).save(engine, TrainState(8 * step))


@pytest.fixture
def root(tmp_path: Path) -> Store:
    """Checkpoints of steps 1, 2 and 3, and three folders that are none."""
    found = open_store(str(tmp_path))
    for step in (1, 2, 3):
        save(found, step)
    folder = folder_of(found, "vq")
    folder.child("000000000032-b0-w2-0123abcd").write_bytes(FILE, b"half")
    folder.child("old").write_bytes("x.pt", b"of another time")
    return found


def newest(root: Store, place: int = 0) -> str:
    """The name of the newest checkpoint that has a manifest, or of an older one."""
    store = folder_of(root, "vq")
    return [each.text for each in names(store) if read_saved(store, each.text) is not None][place]


def test_what_is_there_is_told_newest_first_with_what_is_wrong(root: Store) -> None:
    store = folder_of(root, "vq")
    content = bytearray(store.child(newest(root, 1)).read_bytes(FILE))
    content[-1] ^= 1
    store.child(newest(root, 1)).write_bytes(FILE, bytes(content))
    store.child(newest(root, 2)).delete(FILE)
    quick = [each.state for each in find_checkpoints(root, "vq")]
    unfinished, stranger = "unfinished: it has no manifest", "no checkpoint of this program"
    assert quick == [unfinished, "good", "good", f"damaged: {FILE} is missing", stranger]
    thorough = find_checkpoints(root, "vq", thorough=True)
    assert [each.state for each in thorough] == [
        *(unfinished, "good", f"damaged: {FILE} is damaged: its digest has changed"),
        *(f"damaged: {FILE} is missing", stranger),
    ]
    assert [each.place.images_seen for each in thorough if each.place is not None] == [32, 24, 16, 8]
    assert find_checkpoints(root, "prior") == []


@pytest.mark.parametrize("parts", [1, 3])
def test_a_rewritten_checkpoint_holds_the_same_in_other_files(root: Store, parts: int) -> None:
    store = folder_of(root, "vq")
    name = newest(root)
    before = read_saved(store, name)
    written = read_saved(store, reshape_checkpoint(root, "vq", name, parts))
    assert before is not None and written is not None
    check_saved(store, written)
    assert sorted(written.files) == [f"rank-{part:05d}.safetensors" for part in range(parts)] + ["shared.safetensors"]
    states = [each.state(lambda file, each=each: store.child(each.name).path / file) for each in (before, written)]
    with states[0].opened() as one, states[1].opened() as other:
        for parameter in before.shapes:
            for kind in ("weight", "exp_avg", "exp_avg_sq"):
                assert torch.equal(one.whole(kind, parameter), other.whole(kind, parameter))
        assert one.shared()[0].keys() == other.shared()[0].keys() != set()


def test_a_checkpoint_that_is_not_there_or_not_whole_is_refused(root: Store) -> None:
    with pytest.raises(InputError, match=r"no checkpoint 123 at .*\nhint: `hvqd checkpoints ls --root"):
        reshape_checkpoint(root, "vq", "123", 1)
    with pytest.raises(InputError, match=r"no checkpoint at .*/prior/checkpoints\nhint: "):
        reshape_checkpoint(root, "prior", None, 1)
    with pytest.raises(InputError, match=r"0123abcd is unfinished: it has no manifest\nhint: name another one"):
        reshape_checkpoint(root, "vq", "000000000032-b0-w2-0123abcd", 1)
    name = newest(root)
    size = len(folder_of(root, "vq").child(name).read_bytes(FILE))
    folder_of(root, "vq").child(name).write_bytes(FILE, bytes(size))
    with pytest.raises(InputError, match=rf"{name} is damaged: {FILE} is damaged: its digest .*\nhint: name another"):
        reshape_checkpoint(root, "vq", name, 1)


def test_leftovers_damaged_ones_and_all_but_the_newest_of_other_settings_go(root: Store) -> None:
    other = open_store(f"{root.url}/elsewhere")  # where a training of other settings deletes nothing of these
    save(other, 9, request="other")
    (folder,) = (folder_of(other, "vq").path).iterdir()
    folder.rename(folder_of(root, "vq").path / folder.name)
    folder_of(root, "vq").child(newest(root, 2)).delete(FILE)
    doomed = {each.name: each.why for each in garbage(RunConfig(), root, "vq")}
    assert doomed == {
        "000000000032-b0-w2-0123abcd": "unfinished: it has no manifest",
        "old": "no checkpoint of this program",
        newest(root, 2): f"damaged: {FILE} is missing",
        newest(root, 3): "of other settings, and not their newest",
    }
    for each in garbage(RunConfig(), root, "vq"):
        delete_checkpoint(root, each)
    assert [each.state for each in find_checkpoints(root, "vq", thorough=True)] == ["good", "good"]
    assert garbage(RunConfig(), root, "vq") == []


damages = st.lists(st.sampled_from(["none", "file", "manifest", "flip"]), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(damages)
def test_the_newest_good_one_never_goes(tmp_path_factory: pytest.TempPathFactory, found: list[str]) -> None:
    root = open_store(str(tmp_path_factory.mktemp("root")))
    store = folder_of(root, "vq")
    for step, damage in enumerate(found, 1):
        save(root, step)
        folder = store.child(names(store)[0].text)
        match damage:
            case "file":
                folder.delete(FILE)
            case "manifest":
                folder.delete(MANIFEST)
            case "flip":
                folder.write_bytes(FILE, bytes(len(folder.read_bytes(FILE))))
    good = [each.name for each in find_checkpoints(root, "vq", thorough=True) if each.saved is not None]
    for each in garbage(RunConfig(), root, "vq"):
        delete_checkpoint(root, each)
    assert store.children() == good[:1]
