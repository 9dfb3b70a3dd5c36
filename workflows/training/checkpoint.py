"""Checkpoints on the run's root: every rank uploads its own files, and a manifest written last makes them count.

`checkpoints/<images>-w<world>/` holds the ranks' files and `manifest.json` with their digests, the request they
answer and the history so far. A folder without a manifest is a crash's leftover; one with a damaged file is passed over
for the one before it.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from infra.errors import InputError
from infra.storage import Store
from workflows.artifacts import MANIFEST, FileEntry, file_entry
from workflows.training import collectives
from workflows.training.engine import Engine
from workflows.training.loop import TrainState
from workflows.training.stage import Companion

log = logging.getLogger(__name__)

_COMPANION = "companion.pt"


@dataclass(frozen=True)
class _Found:
    """A checkpoint's manifest."""

    name: str
    images_seen: int
    history: list[dict[str, Any]]
    ranks: list[dict[str, FileEntry]]
    """Files of each rank."""


@dataclass
class StoreCheckpoints:
    """The checkpoints of one stage under its folder on the root."""

    store: Store
    """The stage's `checkpoints` folder."""
    request: str
    """What the training answers; checkpoints of another request are not gone on with."""
    keep: int
    companion: Companion | None = None
    """What the stage trains outside the engine; rank 0 writes it for all."""

    def restore(self, engine: Engine) -> TrainState:
        """The newest complete checkpoint of this request.

        Raises:
            InputError: it was written by another number of workers.
        """
        found = collectives.broadcast_object(self._newest() if engine.rank == 0 else None)
        if found is None:
            return TrainState()
        if len(found.ranks) != engine.world:
            raise InputError(
                f"the checkpoint {self.store.url}/{found.name} was written by {len(found.ranks)} workers, "
                f"and this run has {engine.world}\n"
                f"hint: go on with compute.workers={len(found.ranks)}, or delete {self.store.url} to begin anew"
            )
        folder = self.store.child(found.name)
        names = {**found.ranks[0], **found.ranks[engine.rank]}
        with self._fetched(folder, list(names)) as local:
            engine.load(local)
            if self.companion is not None:
                state = torch.load(local / _COMPANION, map_location="cpu", weights_only=True)
                self.companion.load_state_dict(state)
        collectives.barrier()
        if engine.rank == 0:
            log.info("going on from %s", folder.url)
        return TrainState(found.images_seen, found.history)

    def save(self, engine: Engine, state: TrainState) -> None:
        """Upload every rank's files, then the manifest, then drop what is old."""
        name = f"{state.images_seen:012d}-w{engine.world}"
        folder = self.store.child(name)
        if engine.rank == 0 and folder.exists(MANIFEST):
            folder.delete()  # written by a run of another request
        collectives.barrier()
        # DeepSpeed's ranks meet inside `save`, so that all must write where their own disk is.
        local = Path(tempfile.mkdtemp(prefix="hvqd-checkpoint-"))
        try:
            engine.save(local)
            if self.companion is not None and engine.rank == 0:
                torch.save(self.companion.state_dict(), local / _COMPANION)
            entries: dict[str, FileEntry] = {}
            for file in sorted(path for path in local.rglob("*") if path.is_file() and path.suffix == ".pt"):
                relative = file.relative_to(local).as_posix()
                entries[relative] = file_entry(file)
                folder.upload(file, relative)
            ranks = collectives.gather_objects(entries)
        finally:
            shutil.rmtree(local, ignore_errors=True)
        if engine.rank == 0:
            manifest = {
                "request": self.request,
                "images_seen": state.images_seen,
                "history": state.history,
                "ranks": [{name: asdict(entry) for name, entry in files.items()} for files in ranks],
            }
            folder.write_json(MANIFEST, manifest)
            self._drop_old(name)
        collectives.barrier()

    def _newest(self) -> _Found | None:
        """The newest checkpoint whose manifest and files are whole."""
        for name in sorted(self.store.children(), reverse=True):
            found = self._read(name)
            if found is not None and self._is_whole(found):
                return found
        return None

    def _read(self, name: str) -> _Found | None:
        try:
            value = self.store.child(name).read_json(MANIFEST)
            if value["request"] != self.request:
                return None
            ranks = [{file: FileEntry(**entry) for file, entry in files.items()} for files in value["ranks"]]
            return _Found(name, int(value["images_seen"]), value["history"], ranks)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError):
            log.warning("the checkpoint %s/%s has a damaged manifest and is passed over", self.store.url, name)
            return None

    def _is_whole(self, found: _Found) -> bool:
        folder = self.store.child(found.name)
        sizes = folder.files()
        for file, entry in {file: entry for files in found.ranks for file, entry in files.items()}.items():
            if sizes.get(file) != entry.bytes or folder.sha256(file) != entry.sha256:
                log.warning("the checkpoint %s is passed over: %s is missing or damaged", folder.url, file)
                return False
        return True

    def _drop_old(self, newest: str) -> None:
        """Keep the newest of this request; delete the others, leftovers of crashes included."""
        mine = [name for name in sorted(self.store.children(), reverse=True) if name <= newest and self._read(name)]
        for name in self.store.children():
            if name not in mine[: self.keep]:
                self.store.child(name).delete(MANIFEST)  # first, so that a half-deleted one does not count
                self.store.child(name).delete()

    @contextmanager
    def _fetched(self, folder: Store, names: list[str]) -> Iterator[Path]:
        """A local folder with the named files."""
        if folder.is_local:
            yield folder.path
            return
        local = Path(tempfile.mkdtemp(prefix="hvqd-checkpoint-"))
        try:
            for name in names:
                folder.download(name, local / name)
            yield local
        finally:
            shutil.rmtree(local, ignore_errors=True)
