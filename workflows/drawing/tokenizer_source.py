"""What a command that looks at a tokenizer is given: the tokenizer, and pictures of its size."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from hvqd_model import HierarchicalVQ, load_model
from infra.errors import InputError
from infra.storage import Store, open_store
from workflows.artifacts import find_manifest, read_manifest
from workflows.config import DataSettings, RunConfig
from workflows.data.batches import ImageTable
from workflows.data.pictures import EXTENSIONS, Rejected, prepare
from workflows.data.splits import SPLITS
from workflows.drawing.generate import Pictures
from workflows.drawing.sheets import to_png
from workflows.encode import load_tokenizer


@dataclass(frozen=True)
class NamedTokenizer:
    """A tokenizer and where it is from."""

    model: HierarchicalVQ
    name: str


@dataclass(frozen=True)
class NamedPictures:
    """Pictures of a tokenizer's size."""

    names: tuple[str, ...]
    pictures: Pictures
    rejected: tuple[str, ...]
    """A line for each file that could not be read: its name and why."""


# ---- the tokenizer ----


def find_tokenizer(model: str | None, config: RunConfig) -> NamedTokenizer:
    """The tokenizer that `--model` names: a folder (a run's root, a bundle, the tokenizer's own) or a version.

    Without a name it is the champion's, and where there is no champion yet the one that the root has trained.

    Raises:
        InputError: there is none.
    """
    if model is not None and "models:/" not in model:
        return NamedTokenizer(_of_folder(open_store(model).path), model)
    from workflows.pipeline import tracker_for
    from workflows.release.registry import load_version

    root = open_store(config.root)
    tracker, name = tracker_for(config, root), config.tracking.model_name
    if model is None and not (tracker.is_there and tracker.champion(name)):
        manifest = find_manifest(root.child("vq"))
        if manifest is None:
            raise InputError(
                f"no tokenizer: {name} has no champion, and there is no finished one at {root.url}/vq\n"
                "hint: `hvqd train vq` makes one; or name a run's root with --root, a folder with --model"
            )
        return NamedTokenizer(load_tokenizer(root, manifest), f"{root.url}/vq")
    uri = model or f"models:/{name}@champion"
    return NamedTokenizer(load_version(tracker, name, uri).vq, uri)


def _of_folder(folder: Path) -> HierarchicalVQ:
    places = [folder / "vq" / "model", folder / "vq", folder]
    place = next((place for place in places if (place / "config.json").is_file()), None)
    if place is None:
        raise InputError(
            f"no tokenizer at {folder}: neither vq/model/ nor vq/ nor config.json\n"
            "hint: name a run's root or a registered version's folder, or leave --model out for the champion"
        )
    model = load_model(place)
    if not isinstance(model, HierarchicalVQ):
        raise InputError(f"{place} is no tokenizer but a {type(model).__name__}\nhint: name the folder of a tokenizer")
    return model


# ---- the pictures ----


def find_pictures(path: str, config: RunConfig, image_size: tuple[int, int], most: int) -> NamedPictures:
    """Pictures of a split of the root's dataset, of a folder (with what lies below it) or of one file.

    They are prepared as a dataset's are (`data.resize`, `data.background`, …). Of more than `most`, some evenly spread
    ones are taken.

    Args:
        path: train, val, test, or a path or URL; `./test` is a folder of that name.

    Raises:
        InputError: there is no such thing, or no picture in it that can be read.
    """
    if most < 1:
        raise InputError(f"-n must be at least 1: {most}\nhint: for example -n 16")
    settings = config.data.model_copy(update={"image_size": image_size})
    if path in SPLITS:
        return _of_split(path, config, settings, most)
    store, names = _listed(path)
    chosen = [names[place] for place in spread(len(names), most)]
    found: list[tuple[str, Pictures]] = []
    rejected = []
    for name in chosen:
        try:
            found.append((name, _pixels(store.read_bytes(name), settings)))
        except (Rejected, OSError) as reason:
            rejected.append(f"{name}: {reason}")
    if not found:
        raise InputError(
            f"no picture that can be read at {path}: {rejected[0]}\n"
            "hint: pictures are PNG, JPEG, WebP, GIF, BMP, TIFF and the like"
        )
    return NamedPictures(tuple(name for name, _ in found), np.stack([pixels for _, pixels in found]), tuple(rejected))


def _pixels(content: bytes, settings: DataSettings) -> Pictures:
    return np.asarray(Image.open(io.BytesIO(prepare(content, None, settings).png)))


def spread(count: int, most: int) -> list[int]:
    """At most so many of the places 0 to count - 1, evenly spread, in order."""
    found: list[int] = np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(np.int64)).tolist()
    return found


def _of_split(split: str, config: RunConfig, settings: DataSettings, most: int) -> NamedPictures:
    store = open_store(config.root).child("dataset")
    table = ImageTable.open(store, read_manifest(store, "hvqd data build"), split)
    if len(table) == 0:
        raise InputError(f"the split {split} of {store.url} is empty\nhint: name another one: {', '.join(SPLITS)}")
    rows = spread(len(table), most)
    pictures = np.asarray(table.images[rows])
    if pictures.shape[1:3] != settings.image_size:
        pictures = np.stack([_pixels(to_png(Image.fromarray(picture)), settings) for picture in pictures])
    return NamedPictures(tuple(str(table.ids[row]) for row in rows), pictures, ())


def _listed(path: str) -> tuple[Store, list[str]]:
    """The store and the names in it that could be pictures."""
    if "://" in path:
        folder, _, last = path.rstrip("/").rpartition("/")
        parent = open_store(folder)
        single, store = parent.exists(last), open_store(path)
    else:
        local = Path(path)
        single, parent, last = local.is_file(), Store(str(local.resolve().parent)), local.name
        if not single and not local.is_dir():
            raise _nothing(path)
        store = Store(str(local.resolve()))
    if single:
        return parent, [last]
    names = [name for name, _ in store.walk() if Path(name).suffix.lower() in EXTENSIONS]
    if not names:
        raise (
            _nothing(path)
            if "://" in path
            else InputError(
                f"no pictures in the folder {path}\nhint: name a folder with files such as .png, .jpg or .webp"
            )
        )
    return store, names


def _nothing(path: str) -> InputError:
    return InputError(
        f"no such picture, folder or split: {path} (splits are {', '.join(SPLITS)})\n"
        "hint: name a file, a folder of pictures, or a split of the root's dataset"
    )
