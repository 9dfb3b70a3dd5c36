"""The checkpoints in a stage's folder: what each one's manifest says, and whether its files are still what it says.

`checkpoints/<images>-b<setbacks>-w<workers>-<attempt>/` holds a file for each rank that wrote it, one for what is whole
everywhere, and `manifest.json`, written last, with the digest of every file, of itself, and where in which file every
parameter's elements lie. A folder without a manifest is unfinished or a crash's leftover. The attempt is drawn anew by
every process group that trains, so that files of two attempts never mix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from infra.storage import Store
from workflows.artifacts import MANIFEST, FileEntry, digest_of
from workflows.training.state import Part, Range, SavedState

FORMAT = 2
SHARED = "shared.safetensors"
COMPANION = "companion.safetensors"
_NAME = re.compile(r"(\d{12})-b(\d+)-w(\d+)-([0-9a-f]{8})")


class DamagedCheckpoint(ValueError):  # noqa: N818 - it names what was found
    """A checkpoint that cannot be gone on from; says what is wrong with it."""


@dataclass(frozen=True, order=True)
class Name:
    """A checkpoint's place in the order: later setbacks count more than images."""

    setbacks: int
    images_seen: int
    workers: int
    attempt: str

    @property
    def text(self) -> str:
        """The folder's name."""
        return f"{self.images_seen:012d}-b{self.setbacks}-w{self.workers}-{self.attempt}"

    @classmethod
    def parse(cls, text: str) -> Name | None:
        """The place that a folder's name tells; None when it is no checkpoint's."""
        found = _NAME.fullmatch(text)
        return cls(int(found[2]), int(found[1]), int(found[3]), found[4]) if found else None


@dataclass(frozen=True)
class Saved:
    """What a checkpoint's manifest says."""

    name: str
    request: str
    images_seen: int
    history: list[dict[str, Any]]
    setbacks: list[dict[str, Any]]
    interval: dict[str, Any]
    files: Mapping[str, FileEntry]
    parts: Mapping[str, Mapping[str, Range]]
    """Ranges of each parameter, by file."""
    steps: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]
    companion: Any = None
    """Plain values of what is trained beside the engine; its tensors lie in COMPANION."""
    score: float | None = None
    """What keep-best compares: the larger, the better; None before the first evaluation."""
    written_at: str = field(default="", compare=False)
    """UTC."""

    @property
    def place(self) -> Name:
        """Where it stands in the order."""
        found = Name.parse(self.name)
        assert found is not None
        return found

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(entry.bytes for entry in self.files.values())

    def as_json(self) -> dict[str, Any]:
        """The manifest's value, its own digest included."""
        value = {
            "format": FORMAT,
            "name": self.name,
            "request": self.request,
            "images_seen": self.images_seen,
            "history": self.history,
            "setbacks": self.setbacks,
            "interval": self.interval,
            "files": {file: asdict(entry) for file, entry in self.files.items()},
            "parts": {
                file: {name: [found.start, found.length] for name, found in ranges.items()}
                for file, ranges in self.parts.items()
            },
            "steps": dict(self.steps),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "companion": self.companion,
            "score": self.score,
            "written_at": self.written_at,
        }
        return {**value, "digest": digest_of(value)}

    def state(self, fetch: Callable[[str], Path]) -> SavedState:
        """Its parameters, read range by range; `fetch` makes a file available locally."""
        parts = [Part(file, ranges) for file, ranges in self.parts.items()]
        return SavedState(parts, SHARED, self.steps, self.shapes, fetch)


def names(store: Store) -> list[Name]:
    """The folders that are named like checkpoints, the newest first."""
    return sorted((found for text in store.children() if (found := Name.parse(text))), reverse=True)


def read_saved(store: Store, name: str) -> Saved | None:
    """The manifest of a checkpoint; None when there is none yet.

    Raises:
        DamagedCheckpoint: it is not what was written.
    """
    try:
        value = store.child(name).read_json(MANIFEST)
        if value["format"] != FORMAT:
            raise DamagedCheckpoint(f"its manifest has format {value['format']}, this program reads {FORMAT}")
        digest, place = value.pop("digest"), Name.parse(name)
        if place is None or digest != digest_of(value) or value["name"] != name:
            raise DamagedCheckpoint("its manifest is not the one that was written")
        if value["images_seen"] != place.images_seen or len(value["setbacks"]) != place.setbacks:
            raise DamagedCheckpoint("its manifest is not the one that was written")
        return Saved(
            name=name,
            request=value["request"],
            images_seen=value["images_seen"],
            history=value["history"],
            setbacks=value["setbacks"],
            interval=value["interval"],
            files={file: FileEntry(**entry) for file, entry in value["files"].items()},
            parts={
                file: {parameter: Range(*found) for parameter, found in ranges.items()}
                for file, ranges in value["parts"].items()
            },
            steps=value["steps"],
            shapes={parameter: tuple(shape) for parameter, shape in value["shapes"].items()},
            companion=value["companion"],
            score=value["score"],
            written_at=value["written_at"],
        )
    except FileNotFoundError:
        return None
    except DamagedCheckpoint:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DamagedCheckpoint(f"its manifest cannot be read: {' '.join(str(error).split())}") from error


def check_saved(store: Store, saved: Saved, *, share: tuple[int, int] = (0, 1)) -> None:
    """Compare files with the manifest.

    Args:
        share: (which, of how many) parts of the files to read; sizes are compared for all.

    Raises:
        DamagedCheckpoint: a file is missing, or is another one (named).
    """
    folder = store.child(saved.name)
    sizes = folder.files()
    for file, entry in sorted(saved.files.items()):
        if file not in sizes:
            raise DamagedCheckpoint(f"{file} is missing")
        if sizes[file] != entry.bytes:
            raise DamagedCheckpoint(f"{file} has {sizes[file]} bytes instead of {entry.bytes}")
    which, parts = share
    for file in sorted(saved.files)[which::parts]:
        try:
            digest = folder.sha256(file)
        except FileNotFoundError as error:
            raise DamagedCheckpoint(f"{file} is missing") from error
        if digest != saved.files[file].sha256:
            raise DamagedCheckpoint(f"{file} is damaged: its digest has changed")
