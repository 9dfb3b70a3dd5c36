"""What a command that looks at a tokenizer is given: tokenizers by folder, pictures by file, folder and split."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hvqd_model import save_model
from infra.errors import InputError
from tests.pictures import decoded, encoded, noise, write_files
from tests.unit.test_generate import models
from workflows.config import RunConfig
from workflows.data.pictures import prepare
from workflows.drawing.tokenizer_source import find_pictures, find_tokenizer, spread

SIZE = (16, 16)
CONFIG = RunConfig.model_validate({"data": {"image_size": [32, 32], "resize": "pad", "background": [10, 20, 30]}})


def test_a_tokenizer_is_found_in_a_root_in_a_bundle_and_in_its_own_folder(tmp_path: Path) -> None:
    vq, prior = models()
    for place in ("root/vq/model", "bundle/vq", "alone"):
        (tmp_path / place).mkdir(parents=True)
        save_model(vq, tmp_path / place)
    for name in ("root", "bundle", "alone"):
        found = find_tokenizer(str(tmp_path / name), CONFIG)
        assert found.name == str(tmp_path / name)
        assert all(torch.equal(a, b) for a, b in zip(found.model.codebooks, vq.codebooks, strict=True))
    (tmp_path / "prior").mkdir()
    save_model(prior, tmp_path / "prior")
    with pytest.raises(InputError, match=r"/prior is no tokenizer but a HierarchicalPrior\nhint: name the folder of a"):
        find_tokenizer(str(tmp_path / "prior"), CONFIG)
    with pytest.raises(
        InputError, match=r"no tokenizer at .*/nowhere: neither vq/model/ nor vq/ nor config.json\nhint"
    ):
        find_tokenizer(str(tmp_path / "nowhere"), CONFIG)


def test_without_champion_and_tokenizer_it_says_so_and_makes_nothing(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"root": str(tmp_path / "new")})
    with pytest.raises(InputError, match=r"no tokenizer: hvqd has no champion, .* at .*/new/vq\nhint: `hvqd train vq`"):
        find_tokenizer(None, config)
    assert list(tmp_path.iterdir()) == []


def test_pictures_are_prepared_as_those_of_a_dataset_are(tmp_path: Path) -> None:
    """Any size and mode; the tokenizer's size, the data's other settings."""
    clear = Image.new("RGBA", (40, 20), (200, 0, 0, 128))
    files = {
        "a.png": encoded(clear),
        "b/c.jpg": encoded(noise(1, 50, 31), "JPEG"),
        "d.webp": encoded(noise(2, 9, 8), "WEBP"),
    }
    write_files(tmp_path / "folder", {**files, "readme.txt": b"no picture"})
    found = find_pictures(str(tmp_path / "folder"), CONFIG, SIZE, 10)
    assert found.names == tuple(files)
    assert found.rejected == ()
    settings = CONFIG.data.model_copy(update={"image_size": SIZE})
    for content, pixels in zip(files.values(), found.pictures, strict=True):
        np.testing.assert_array_equal(pixels, decoded(prepare(content, None, settings).png))
    one = find_pictures(str(tmp_path / "folder" / "b" / "c.jpg"), CONFIG, SIZE, 10)
    assert one.names == ("c.jpg",)
    np.testing.assert_array_equal(one.pictures[0], found.pictures[1])


def test_of_many_pictures_some_evenly_spread_ones_are_taken(tmp_path: Path) -> None:
    write_files(tmp_path, {f"{place:02d}.png": encoded(noise(place)) for place in range(11)})
    assert find_pictures(str(tmp_path), CONFIG, SIZE, 3).names == ("00.png", "05.png", "10.png")
    assert len(find_pictures(str(tmp_path), CONFIG, SIZE, 99).names) == 11
    assert [spread(count, 4) for count in (1, 3, 4, 100)] == [[0], [0, 1, 2], [0, 1, 2, 3], [0, 33, 66, 99]]


def test_what_cannot_be_read_is_left_out_and_named(tmp_path: Path) -> None:
    good = encoded(noise(0))
    write_files(tmp_path, {"a.png": good, "b.png": good[:60], "c.png": b"", "d.png": encoded(noise(1, 4, 4))})
    found = find_pictures(str(tmp_path), CONFIG, SIZE, 10)
    assert found.names == ("a.png",)
    assert [line.split(":")[0] for line in found.rejected] == ["b.png", "c.png", "d.png"]
    assert found.rejected[1:] == (
        "c.png: empty: the file has no bytes",
        "d.png: too small: 4 x 4 is shorter than 8 pixels",
    )


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "nowhere",
            r"no such picture, folder or split: nowhere \(splits are train, val, test\)\nhint: name a file, .*",
        ),
        ("empty", r"no pictures in the folder empty\nhint: name a folder with files such as \.png"),
        ("bad", r"no picture that can be read at bad: x\.png: unreadable: not a picture in a known format\nhint: pict"),
        ("bad/x.png", r"no picture that can be read at bad/x\.png: x\.png: unreadable: .*\nhint: pictures are PNG"),
        ("test", r"there is no finished artifact at .*/dataset\nhint: make it with `hvqd data build`"),
    ],
)
def test_where_there_are_no_pictures_it_says_so(
    path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, {"empty/notes.txt": b"none", "bad/x.png": b"no picture", "test/a.png": encoded(noise(0))})
    with pytest.raises(InputError, match=message):
        find_pictures(path, CONFIG, SIZE, 10)
    assert find_pictures("./test", CONFIG, SIZE, 10).names == ("a.png",), "a folder that is called like a split"


@pytest.mark.parametrize("most", [0, -3])
def test_fewer_than_one_picture_is_refused(most: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(f"-n must be at least 1: {most}\nhint: for example -n 16")):
        find_pictures(str(tmp_path), CONFIG, SIZE, most)
