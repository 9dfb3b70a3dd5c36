"""Checkpoints on the run's root: every rank uploads its own part, and a manifest written last makes them count.

Only copying the state stops training; files are written, digested and uploaded by a thread, one checkpoint at a time,
so that at most one copy is in memory and on the scratch disk. A rank says in a small receipt beside its file what it
has written; rank 0 waits for all receipts, writes the manifest and drops what the retention policy does not keep.

The newest whole one of the same request counts. A damaged one is named and passed over. See `catalog` for the layout
and `state` for why the number of ranks that reads is free.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from infra.errors import EnvironmentFailure
from infra.storage import Store
from workflows.artifacts import MANIFEST, FileEntry, file_entry
from workflows.training import collectives
from workflows.training.catalog import (
    COMPANION,
    SHARED,
    DamagedCheckpoint,
    Name,
    Saved,
    check_saved,
    names,
    read_saved,
)
from workflows.training.engine import Engine
from workflows.training.loop import TrainState
from workflows.training.patience import persist
from workflows.training.retention import Candidate, Retention, kept
from workflows.training.saving import Background
from workflows.training.stage import Companion
from workflows.training.state import EngineState, Range, join_tensors, split_tensors, write_tensors

log = logging.getLogger(__name__)

RECEIPT_SECONDS = 900.0
"""How long rank 0 waits for what the others have written."""
_POLL_SECONDS = (0.01, 1.0)
_MOVES = {"val_psnr": 1.0, "val_bits_total": -1.0}
"""Figures that say which checkpoint is best, and the direction in which they improve."""


@dataclass(frozen=True)
class _Share:
    """One rank's part of a checkpoint, copied: training goes on while it is written."""

    place: Name
    rank: int
    state: EngineState
    companion: Any
    companion_tensors: dict[str, torch.Tensor]
    train: TrainState


@dataclass
class StoreCheckpoints:
    """The checkpoints of one stage under its folder on the root."""

    store: Store
    """The stage's `checkpoints` folder."""
    request: str
    """What the training answers; checkpoints of another request are not gone on with."""
    keep: int | Retention
    """What stays; a number keeps so many of the newest."""
    companion: Companion | None = None
    """What the stage trains outside the engine; rank 0 writes it for all."""
    background: bool = False
    """Write and upload while training goes on; `finish` waits for what is under way."""
    patience_seconds: float = 600.0
    """How long a remote store may be away before a save gives up."""
    blocked_seconds: float = 0.0
    """How long training has stood still for checkpoints so far."""
    written_at: datetime | None = None
    """When the newest whole one was written; rank 0 knows."""
    _damaged: set[str] = field(default_factory=set)
    """Names of those that were passed over; the next save deletes them."""
    _attempt: str = ""
    _place: Name | None = None
    """Of the checkpoint that was restored last."""
    _writer: Background = field(default_factory=Background)

    @property
    def retention(self) -> Retention:
        """The policy."""
        return Retention(self.keep) if isinstance(self.keep, int) else self.keep

    # ---- going on ----

    def restore(self, engine: Engine) -> TrainState:
        """The newest complete checkpoint of this request, whoever wrote it."""
        return self._restore(engine, None)

    def step_back(self, engine: Engine, before_images: int | None) -> TrainState:
        """The newest complete checkpoint, or the newest before so many images; a state of 0 images when there is none.

        What is newer is deleted: it led to where the training could not go on.
        """
        self.finish()
        state = self._restore(engine, before_images)
        place = self._place
        if engine.rank == 0 and place is not None:
            for newer in self._persist("list", lambda: names(self.store)):
                if newer > place:
                    self._persist("delete", lambda newer=newer: self._delete(newer.text))
        collectives.barrier()
        return state

    def _restore(self, engine: Engine, before_images: int | None) -> TrainState:
        found: Saved | None = None
        self._place, self._attempt = None, ""  # what is saved from here on must not mix with what was saved before
        candidates: Iterator[Saved] = self._readable(before_images) if engine.rank == 0 else iter(())
        while True:
            found = collectives.broadcast_object(next(candidates, None))
            if found is None:
                return TrainState()
            if self._is_whole(found, engine):
                break
        with self._local_files(self.store.child(found.name)) as fetch, found.state(fetch).opened() as saved:
            engine.load_state(saved)
            if self.companion is not None and found.companion is not None:
                tensors = safetensors.torch.load_file(fetch(COMPANION))
                self.companion.load_state_dict(join_tensors(found.companion, tensors))
        collectives.barrier()
        self._place = found.place
        if engine.rank == 0:
            self.written_at = datetime.fromisoformat(found.written_at)
            how = "" if found.place.workers == engine.world else f", written by {found.place.workers} workers"
            log.info("going on from %s/%s%s", self.store.url, found.name, how)
        return TrainState(found.images_seen, found.history, found.setbacks, found.interval)

    def _readable(self, before_images: int | None) -> Iterator[Saved]:
        """Checkpoints of this request, the newest first; what is wrong with others is said."""
        for place in self._persist("look for", lambda: names(self.store)):
            if before_images is not None and place.images_seen >= before_images:
                continue
            try:
                found: Saved | None = self._persist("read", lambda place=place: read_saved(self.store, place.text))
            except DamagedCheckpoint as error:
                self._pass_over(place.text, str(error))
                continue
            if found is not None and found.request == self.request:
                yield found

    def _is_whole(self, found: Saved, engine: Engine) -> bool:
        """Whether every file is as it was written; ranks share the reading."""
        problem = ""
        try:
            self._persist("read", lambda: check_saved(self.store, found, share=(engine.rank, engine.world)))
        except DamagedCheckpoint as error:
            problem = str(error)
        problems = [text for text in collectives.gather_objects(problem) if text]
        if problems and engine.rank == 0:
            self._pass_over(found.name, problems[0])
        return not problems

    def _pass_over(self, name: str, why: str) -> None:
        self._damaged.add(name)
        log.warning("the checkpoint %s/%s is passed over: %s", self.store.url, name, why)

    @contextmanager
    def _local_files(self, folder: Store) -> Iterator[Any]:
        """A function that makes a file of the folder available locally."""
        if folder.is_local:
            yield lambda name: folder.path / name
            return
        with _scratch() as local:

            def fetch(name: str) -> Path:
                if not (local / name).exists():
                    self._persist("read", lambda: folder.download(name, local / name))
                return local / name

            yield fetch

    # ---- saving ----

    def age_seconds(self) -> float | None:
        """Since the newest whole one was written; None when there is none, and on other ranks than the first."""
        return (datetime.now(UTC) - self.written_at).total_seconds() if self.written_at is not None else None

    def save(self, engine: Engine, state: TrainState) -> None:
        """Copy the state and have it written; waits for the checkpoint before, if it is still under way."""
        started = time.monotonic()
        self._writer.wait()
        if not self._attempt:
            self._attempt = collectives.broadcast_object(uuid.uuid4().hex[:8])
        companion, tensors = split_tensors(self.companion.state_dict()) if self.companion is not None else (None, {})
        share = _Share(
            place=Name(len(state.setbacks), state.images_seen, engine.world, self._attempt),
            rank=engine.rank,
            state=engine.state(),
            companion=companion,
            companion_tensors=tensors if engine.rank == 0 else {},
            train=replace(state, history=list(state.history), setbacks=list(state.setbacks)),
        )
        self._writer.start(lambda: self._write(share))
        if not self.background:
            self._writer.wait()
            collectives.barrier()
        self.blocked_seconds += time.monotonic() - started

    def finish(self) -> None:
        """Wait for the checkpoint that is under way.

        Raises:
            EnvironmentFailure: it could not be written.
        """
        started = time.monotonic()
        self._writer.wait()
        collectives.barrier()
        self.blocked_seconds += time.monotonic() - started

    def _write(self, share: _Share) -> None:
        """This rank's files and receipt; on rank 0 also the manifest, and the end of old checkpoints."""
        folder = self.store.child(share.place.text)
        receipt = self._write_files(folder, share)
        if share.rank != 0:
            return
        receipts = [receipt, *(self._receipt(folder, rank) for rank in range(1, share.place.workers))]
        saved = Saved(
            name=share.place.text,
            request=self.request,
            images_seen=share.train.images_seen,
            history=share.train.history,
            setbacks=share.train.setbacks,
            interval=share.train.interval,
            files={file: FileEntry(**entry) for found in receipts for file, entry in found["files"].items()},
            parts={
                file: {name: Range(*span) for name, span in spans.items()}
                for found in receipts
                for file, spans in found["parts"].items()
            },
            steps={name: steps for found in receipts for name, steps in found["steps"].items()},
            shapes=share.state.shapes,
            companion=share.companion,
            score=_score(share.train.history),
            written_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        self._persist("write", lambda: folder.write_json(MANIFEST, saved.as_json()))
        self.written_at = datetime.fromisoformat(saved.written_at)
        self._persist("tidy up", lambda: self._drop_old(saved))

    def _write_files(self, folder: Store, share: _Share) -> dict[str, Any]:
        """Upload what this rank holds; returns the receipt, which lies beside it."""
        part = f"rank-{share.rank:05d}.safetensors"
        contents = {part: share.state.values}
        if share.rank == 0:
            contents[SHARED] = share.state.shared
            if share.companion is not None:
                contents[COMPANION] = share.companion_tensors
        files: dict[str, Any] = {}
        with _scratch() as local:
            for name, tensors in contents.items():
                path = local / name
                with _explained_scratch():
                    write_tensors(path, tensors)
                    files[name] = asdict(file_entry(path))
                self._persist("upload", lambda path=path, name=name: folder.upload(path, name))
                path.unlink()
        spans = {name: [found.start, found.length] for name, found in share.state.ranges.items()}
        receipt = {"files": files, "parts": {part: spans}, "steps": share.state.steps}
        if share.rank != 0:
            self._persist("write", lambda: folder.write_json(_receipt_name(share.rank), receipt))
        return receipt

    def _receipt(self, folder: Store, rank: int) -> dict[str, Any]:
        """What another rank has written, as soon as it has."""
        deadline, pause = time.monotonic() + RECEIPT_SECONDS, _POLL_SECONDS[0]
        name = _receipt_name(rank)
        while time.monotonic() < deadline:
            try:
                found: dict[str, Any] = self._persist("read", lambda: folder.read_json(name))
                return found
            except FileNotFoundError:
                time.sleep(pause)
                pause = min(2 * pause, _POLL_SECONDS[1])
        raise EnvironmentFailure(
            f"rank {rank} did not write its part of {folder.url} within {RECEIPT_SECONDS:.0f} s\n"
            "hint: see whether its machine is alive; the same command goes on from the checkpoint before"
        )

    def _persist(self, action: str, call: Any) -> Any:
        return persist(call, f"{action} the checkpoint", self.store, self.patience_seconds)

    def _drop_old(self, newest: Saved) -> None:
        """Delete what the policy does not keep, leftovers of crashes and of other requests included.

        What is not named like a checkpoint is somebody else's, and stays: `hvqd checkpoints gc` shows it.
        """
        present = self.store.children()
        candidates = []
        for place in names(self.store):
            if place > newest.place or place.text in self._damaged:
                continue
            try:
                found = newest if place == newest.place else read_saved(self.store, place.text)
            except DamagedCheckpoint:
                continue
            if found is not None and found.request == self.request:
                candidates.append(Candidate(place, found.score))
        stay = kept(candidates, self.retention)
        for name in present:
            # Other ranks do not wait for this tidying up: they may be writing the next one already.
            named = Name.parse(name)
            if named is None:
                continue
            is_next = named.attempt == newest.place.attempt and named > newest.place
            if name not in stay and not is_next:
                self._delete(name)

    def _delete(self, name: str) -> None:
        folder = self.store.child(name)
        folder.delete(MANIFEST)  # first, so that a half-deleted one does not count
        folder.delete()


@contextmanager
def _explained_scratch() -> Iterator[None]:
    """Say which disk is full: it is not the root's."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        raise EnvironmentFailure(
            f"cannot write a checkpoint to the scratch folder {tempfile.gettempdir()}: {error}\n"
            "hint: free some space there, or name another folder in TMPDIR; the same command goes on"
        ) from error


@contextmanager
def _scratch() -> Iterator[Path]:
    """A local folder that is gone in the end."""
    with _explained_scratch():
        local = Path(tempfile.mkdtemp(prefix="hvqd-checkpoint-"))
    try:
        yield local
    finally:
        shutil.rmtree(local, ignore_errors=True)


def _receipt_name(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _score(history: list[dict[str, Any]]) -> float | None:
    """The last value of the figure that says how good a model is."""
    for record in reversed(history):
        for name, direction in _MOVES.items():
            if name in record:
                return direction * float(record[name])
    return None
