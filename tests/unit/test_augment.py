"""Variants of pictures: what stays, what they depend on, what is written, and what is refused."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from hvqd_model.randomness import derive_key
from infra.errors import InputError
from infra.storage import Store
from tests.pictures import encoded, noise
from tests.unit.test_drawing import map_png, save
from workflows.artifacts import MANIFEST, find_manifest, write_manifest
from workflows.config import DataSettings, RunConfig
from workflows.context import Silent
from workflows.data.pictures import prepare
from workflows.data.reading import read_unit
from workflows.data.sources import Raw, list_units
from workflows.drawing import augment as module
from workflows.drawing.augment import PART_PICTURES, AugmentRequest, augment, told
from workflows.drawing.bundle import load_bundle
from workflows.encode import encode_batches
from workflows.loading import load_config

SETTINGS = DataSettings(image_size=(16, 16))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a model that is told all four conditions."""
    return save(tmp_path_factory.mktemp("told"))


@pytest.fixture
def config() -> RunConfig:
    return load_config("integration", overrides=["sampling.steps=3", "sampling.batch=4", "sampling.guidance=2"])


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Five pictures of three classes, one of which the model does not know, and a broken one."""
    folder = tmp_path / "pictures"
    for number, label in enumerate(["cats", "cats", "dogs", "dogs", "fish"]):
        (folder / label).mkdir(parents=True, exist_ok=True)
        noise(number + 1).save(folder / label / f"{number}.png")
    (folder / "cats" / "broken.png").write_bytes(b"no picture")
    return folder


def request(model: Path, source: object, **changes: Any) -> AugmentRequest:
    """Two variants of each picture."""
    base = AugmentRequest(str(source), "out", 2, 0.6, 1, True, str(model), 3)
    return replace(base, **changes)


def rows_of(folder: str = "out") -> list[dict[str, Any]]:
    parts = [pq.read_table(path) for path in sorted(Path(folder).glob("part-*.parquet"))]
    return pa.concat_tables(parts).to_pylist()  # type: ignore[no-any-return]


def pixels(content: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(content)))


def test_a_folder_becomes_rows_that_data_build_reads_with_variants_beside_their_pictures(
    model: Path, pictures: Path, config: RunConfig
) -> None:
    found = augment(request(model, pictures), config, Silent())
    facts = found["facts"]
    assert (facts["originals"], facts["rejected"], facts["unknown_classes"]) == (5, 1, 1)
    assert facts["variants"] + facts["unchanged"] == 10 and facts["variants"] >= 8
    asked = facts["asked"]
    assert (asked["variants"], asked["strength"], asked["keep"], asked["originals"], asked["seed"]) == (
        2,
        0.6,
        1,
        True,
        3,
    )
    assert asked["model"] == load_bundle(model).digest and asked["sampling"]["steps"] == 3
    settings = SETTINGS.model_copy(update={"source": "out", "class_column": "class", "group_column": "group"})
    read = [raw for unit in list_units(settings) for raw in read_unit(unit)]
    assert len(read) == facts["originals"] + facts["variants"]
    assert {raw.label for raw in read} == {"cats", "dogs", "fish"}
    for raw in read:
        original = raw.id.partition("#")[0]
        assert (raw.group, raw.label) == (original, original.partition("/")[0])
        assert prepare(raw.content, raw.seg, settings)
    files = sorted(path.name for path in Path("out").iterdir())
    assert files == [MANIFEST, "part-00000.parquet"], "nothing else lies in the way of data build"


def test_a_variant_keeps_the_coarse_codes_and_changes_finer_ones(
    model: Path, config: RunConfig, tmp_path: Path
) -> None:
    """A flat picture decoded and encoded again says little about codes, so what is drawn is looked at itself."""
    editor = module.Editor.open(request(model, "x"), config)
    original = module._Original(Raw("a", encoded(noise(1)), "cats"), np.asarray(noise(1)), b"", None)
    seen: list[Any] = []
    drawer = module.Editor.drawer

    def listening(self: Any, given: Any, seeds: Any) -> Any:
        draw = drawer(self, given, seeds)

        def drawn(codes: Any, unknown: Any) -> Any:
            seen.append((codes, unknown, draw(codes, unknown), given, seeds))
            return seen[-1][2]

        return drawn

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.Editor, "drawer", listening)
        found = module._varied([original], request(model, "x", count=6, strength=0.5), editor)
    codes, unknown, drawn, given, seeds = seen[0]
    assert len(found[0]) == 6 and seeds == [derive_key("augment", 3, "a", number) for number in range(6)]
    assert torch.equal(drawn[0], codes[0]) and not bool(unknown[0].any())
    assert torch.equal(drawn[1][~unknown[1]], codes[1][~unknown[1]])
    assert 0.2 < float(unknown[1].float().mean()) < 0.8
    assert given.labels.tolist() == [0] * 6


def test_a_picture_has_the_same_variants_alone_and_among_others(model: Path, pictures: Path, config: RunConfig) -> None:
    augment(request(model, pictures), config, Silent())
    (pictures / "only" / "cats").mkdir(parents=True)
    (pictures / "cats" / "1.png").rename(pictures / "only" / "cats" / "1.png")
    augment(request(model, pictures / "only", out="alone"), config, Silent())
    together = {row["id"]: row["image"] for row in rows_of() if row["id"].startswith("cats/1.png")}
    alone = {row["id"]: row["image"] for row in rows_of("alone")}
    assert alone == together and len(alone) >= 2
    augment(request(model, pictures / "only", out="other", seed=4), config, Silent())
    other = {row["id"]: row["image"] for row in rows_of("other")}
    assert other["cats/1.png"] == alone["cats/1.png"] and other != alone


def test_an_interrupted_command_goes_on_and_a_finished_one_does_nothing(
    model: Path, pictures: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PART_PICTURES", 2)
    whole = augment(request(model, pictures, out="whole"), config, Silent())
    calls: list[int] = []
    real = module._part_rows

    def counted(originals: Any, asked: Any, editor: Any) -> Any:
        calls.append(len(originals))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(originals, asked, editor)

    monkeypatch.setattr(module, "_part_rows", counted)
    with pytest.raises(KeyboardInterrupt):
        augment(request(model, pictures), config, Silent())
    assert find_manifest(Store("out")) is None
    found = augment(request(model, pictures), config, Silent())
    assert len(calls) == 4, "the first part is not drawn again"
    assert found["digest"] == whole["digest"] and rows_of() == rows_of("whole")
    assert augment(request(model, pictures), config, Silent())["digest"] == found["digest"] and len(calls) == 4
    changed = augment(request(model, pictures, strength=0.3), config, Silent())
    assert changed["digest"] != found["digest"], "another request takes the place of the old one"
    assert PART_PICTURES > 2


def test_what_is_held_out_has_no_variants_and_splits_stay(model: Path, config: RunConfig) -> None:
    """As in a root's dataset, or a source with a column of splits."""
    rows = [
        {"id": f"p{number}", "image": encoded(noise(number)), "split": split, "caption": "a cat", "seg": map_png(1)}
        for number, split in enumerate(["train", "validation", "test", "train"])
    ]
    pq.write_table(pa.Table.from_pylist(rows), "source.parquet")
    augment(request(model, "source.parquet", strength=1.0), config, Silent())
    written = rows_of()
    varied = {row["id"].partition("#")[0] for row in written if "#" in row["id"]}
    assert varied == {"p0", "p3"}
    assert {row["id"].partition("#")[0]: row["split"] for row in written} == {
        "p0": "train",
        "p1": "validation",
        "p2": "test",
        "p3": "train",
    }
    assert all(row["caption"] == "a cat" and row["seg"] is not None for row in written)


def test_without_originals_there_are_variants_alone(model: Path, pictures: Path, config: RunConfig) -> None:
    found = augment(request(model, pictures, originals=False), config, Silent())
    assert len(rows_of()) == found["facts"]["variants"] and all("#" in row["id"] for row in rows_of())


def test_a_model_is_told_what_it_knows_of_a_picture(model: Path) -> None:
    bundle = load_bundle(model)
    known = Raw("a", None, "dogs", style="oil", caption="red apple")
    given = told(bundle, [_bare(known, map_png(2)), _bare(Raw("b", None, "fish", style="chalk"), None)])
    assert given.labels.tolist() == [1, -1]
    assert given.styles is not None and given.styles.tolist() == [1, -1]
    assert given.texts is not None and bundle.text is not None
    assert torch.equal(given.texts[0], torch.from_numpy(bundle.text.encoder(["red apple"])[0]))
    assert not bool(given.texts[1].any())
    assert given.maps is not None and [part.unique().tolist() for part in given.maps] == [[2], [-1]]


def _bare(raw: Raw, seg: bytes | None) -> Any:
    return module._Original(raw, np.zeros((16, 16, 3), np.uint8), b"", seg)


def test_variants_of_a_drawn_picture_are_pictures_of_the_model(model: Path, pictures: Path, config: RunConfig) -> None:
    augment(request(model, pictures, sheet=Path("sheet.png")), config, Silent())
    assert Image.open("sheet.png").size[0] > 4 * 96, "picture, codes and two variants"
    shapes = {pixels(row["image"]).shape for row in rows_of()}
    assert shapes == {(16, 16, 3)}
    vq = load_bundle(model).vq
    images = np.stack([pixels(row["image"]) for row in rows_of()])
    assert len(encode_batches(vq, images)[0]) == len(images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "-n must be at least 1: 0\nhint: "),
        ({"strength": 0.0}, "--strength must be above 0 and at most 1: 0\nhint: "),
        ({"strength": 1.5}, r"--strength must be above 0 and at most 1: 1\.5\nhint: "),
        ({"keep": 0}, "--keep must be between 1 and 1, .*: 0\nhint: "),
        ({"keep": 2}, "--keep must be between 1 and 1, .*: 2\nhint: "),
        ({"source": "nowhere"}, "data.source does not exist: nowhere\nhint: "),
        ({"source": "train"}, "there is no finished artifact at .*dataset\nhint: make it with `hvqd data build`"),
        ({"source": "broken"}, r"no picture of broken can be read \(1 were rejected\)\nhint: `hvqd data build`"),
        ({"out": "mine"}, r"--out must be a new folder, .*: mine holds notes\.txt\nhint: "),
        ({"out": "artifact"}, "artifact holds an artifact of kind codes\nhint: "),
        ({"out": "pictures/out"}, "--out must not lie in the source, .*: pictures/out\nhint: "),
    ],
)
def test_a_wrong_request_is_refused(
    model: Path, pictures: Path, config: RunConfig, changes: dict[str, Any], message: str
) -> None:
    for name in ("mine", "broken"):
        Path(name).mkdir()
    Path("mine/notes.txt").write_text("mine\n")
    Path("broken/a.png").write_bytes(b"no picture")
    write_manifest(Store("artifact"), "codes", "request", {})
    with pytest.raises(InputError, match=message):
        augment(request(model, **({"source": "pictures"} | changes)), config, Silent())
    assert Path("mine/notes.txt").read_text() == "mine\n"


def test_a_map_with_labels_that_the_model_does_not_know_is_refused(model: Path, config: RunConfig) -> None:
    rows = [{"id": "p", "image": encoded(noise(1)), "seg": map_png(7)}]
    pq.write_table(pa.Table.from_pylist(rows), "source.parquet")
    with pytest.raises(InputError, match=r"the label map of p must have labels 0 to 2: 7\nhint: use the labels"):
        augment(request(model, "source.parquet"), config, Silent())
