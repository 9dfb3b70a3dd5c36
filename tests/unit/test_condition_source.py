"""Conditions of a root: styles, captions and label maps of the dataset, row for row beside its codes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from hvqd_model.config import ConditionName, VQConfig
from hvqd_model.prior.conditions import Conditions
from infra.errors import InputError
from infra.storage import Store
from tests.pictures import encoded, noise
from workflows.artifacts import Manifest, write_manifest
from workflows.data.batches import CodeTable, ImageTable
from workflows.data.conditions import ConditionSource
from workflows.data.shards import to_parquet
from workflows.data.text_encoder import TextEncoder, encoder_folder
from workflows.training.stage import place_on

VQ = VQConfig(image_size=(16, 12), padding="edge", codebook_sizes=(8, 16))
STYLES = ("ink", "oil", "", "oil")
CAPTIONS = ("a cat", "a dog", "", "a cat")


def label_map(row: int) -> Image.Image:
    pixels = np.arange(16 * 12, dtype=np.uint8).reshape(16, 12) % (row + 2)
    pixels[0, 0] = 255
    return Image.fromarray(pixels)


def rows(ids: Sequence[str], with_more: bool = True) -> dict[str, Any]:
    count = len(ids)
    return {
        "id": list(ids),
        "label": [0, 1, 0, 1][:count],
        "style": list(STYLES[:count]) if with_more else [""] * count,
        "caption": list(CAPTIONS[:count]) if with_more else [""] * count,
        "group": list(ids),
        "image": [encoded(noise(row, 12, 16)) for row in range(count)],
        "seg": [encoded(label_map(row)) if row != 2 and with_more else None for row in range(count)],
    }


def dataset(root: Path, with_more: bool = True) -> tuple[Store, Manifest]:
    store, ids = Store(str(root / "dataset")), ["a", "b", "c", "d"]
    kinds = {"label": pa.int64(), "image": pa.binary(), "seg": pa.binary()}
    found = rows(ids, with_more)
    table = pa.table(found).cast(pa.schema([(name, kinds.get(name, pa.string())) for name in found]))
    store.write_bytes("train-00000.parquet", to_parquet(table))
    facts = {
        "rows": {"train": 4},
        "image_size": [16, 12],
        "classes": ["cats", "dogs"],
        "styles": ["ink", "oil"] if with_more else [],
    }
    return store, write_manifest(store, "dataset", "r", {}, facts, {})


def codes(ids: Sequence[str] = ("a", "b", "c", "d"), with_more: bool = True) -> CodeTable:
    styles = np.array(STYLES if with_more else [""] * 4)
    grids = [np.zeros((4, *grid), dtype=np.int32) for grid in VQ.grids]
    return CodeTable(np.array(ids), np.array([0, 1, 0, 1]), styles, np.array(ids), tuple(grids))


@pytest.fixture
def source_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes the source of some conditions."""
    monkeypatch.setenv("HVQD_CACHE", str(tmp_path / "cache"))

    def make(*names: ConditionName, with_more: bool = True) -> ConditionSource:
        store, manifest = dataset(tmp_path / f"{with_more}", with_more)
        return ConditionSource(store, manifest, VQ, names, None)

    return make


def test_every_row_comes_with_what_the_dataset_says_of_it(source_for: Any) -> None:
    source = source_for("class", "style", "text", "map")
    columns = source.columns("train", codes())
    labels, indices = torch.tensor([1, 0, 0]), np.array([3, 0, 2])
    given = columns.batch(labels, indices)
    assert isinstance(given, Conditions) and torch.equal(given.labels, labels)
    assert given.styles is not None and given.styles.tolist() == [1, 0, -1]
    vectors = TextEncoder(encoder_folder(None))(["a cat"])
    assert given.texts is not None and np.array_equal(
        given.texts.numpy(), np.stack([*vectors, *vectors, 0 * vectors[0]])
    )
    assert given.maps is not None and given.maps.shape == (3, 16, 16), "padded as the tokenizer pads pictures"
    for found, row in zip(given.maps.numpy(), (3, 0, None), strict=True):
        expected = np.full((16, 16), -1)
        if row is not None:
            expected[:, :12] = np.asarray(label_map(row))
            expected[0, 0] = -1
        assert np.array_equal(found, expected)
    assert len(columns.embeddings) == 3, "each distinct caption once"


def test_the_configuration_says_what_the_prior_is_told(source_for: Any) -> None:
    source = source_for("style", "text", "map")
    fields = source.described(source.columns("train", codes()))
    digest = TextEncoder(encoder_folder(None)).digest
    assert fields == {
        "styles": ("ink", "oil"), "text_dim": 384, "text_encoder": digest, "map_labels": 5, "map_size": (16, 16)
    }  # fmt: skip
    alone = source_for("class")
    assert alone.columns("train", codes()) is None
    assert alone.described(None) == {"classes": ("cats", "dogs")}


def test_pictures_and_conditions_of_the_same_shards_do_not_mix_in_the_cache(source_for: Any) -> None:
    source = source_for("map", "text")
    first = source.columns("train", codes())
    table = ImageTable.open(source.dataset_store, source.dataset, "train")
    again = source.columns("train", codes())
    assert table.images.shape == (4, 16, 12, 3)
    assert np.array_equal(first.maps, again.maps) and np.array_equal(first.embeddings, again.embeddings)


def test_conditions_move_to_a_device_whole() -> None:
    given = Conditions(torch.tensor([1]), torch.tensor([0]))
    codes_there, moved, keys = place_on(torch.device("meta"), (torch.zeros(2),), given, torch.tensor([3]))
    assert isinstance(moved, Conditions) and moved.labels.is_meta and moved.texts is None
    assert moved.styles is not None and moved.styles.is_meta
    assert codes_there[0].is_meta and keys.is_meta


@pytest.mark.parametrize(("name", "what"), [("style", "a style"), ("text", "a caption"), ("map", "a label map")])
def test_a_condition_that_the_data_lacks_is_refused(source_for: Any, name: Any, what: str) -> None:
    source = source_for(name, with_more=False)
    message = rf"prior\.model\.conditions names {name}, but no training picture has {what}: .*\nhint: leave it out"
    with pytest.raises(InputError, match=message):
        source.described(source.columns("train", codes(with_more=False)))


def test_codes_of_other_rows_are_refused(source_for: Any) -> None:
    with pytest.raises(InputError, match=r"the rows of codes/train are not those of dataset/train\nhint: delete"):
        source_for("map").columns("train", codes(ids=("a", "b", "c", "x")))
