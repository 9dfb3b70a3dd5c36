"""What `hvqd checkpoints` does: look at checkpoints, check, export, rewrite them, and clear them away."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from hvqd_model.export import save_model
from infra.errors import EnvironmentFailure, InputError
from infra.storage import Store
from workflows.artifacts import MANIFEST, file_entry, find_manifest
from workflows.config import RunConfig
from workflows.requests import PARENTS, request_of
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
from workflows.training.retention import Candidate, Retention, kept
from workflows.training.state import KINDS, Range, write_tensors
from workflows.training.worker import StageName, TrainingJob, build_stage

STAGES: tuple[StageName, ...] = ("vq", "prior")


@dataclass(frozen=True)
class Found:
    """One folder among a stage's checkpoints."""

    stage: StageName
    name: str
    place: Name | None
    """None when it is not named like a checkpoint."""
    saved: Saved | None
    problem: str
    """Why it cannot be gone on from; empty when nothing is known against it."""

    @property
    def state(self) -> str:
        """In a word or a few."""
        return self.problem or "good"

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        known = {} if self.saved is None else {"bytes": self.saved.bytes, "score": self.saved.score}
        place = {} if self.place is None else {k: v for k, v in asdict(self.place).items() if k != "attempt"}
        written = {} if self.saved is None else {"written_at": self.saved.written_at}
        return {"stage": self.stage, "name": self.name, **place, **known, **written, "state": self.state}


def folder_of(root: Store, stage: StageName) -> Store:
    """The stage's checkpoints."""
    return root.child(stage, "checkpoints")


def find_checkpoints(root: Store, stage: StageName, *, thorough: bool = False) -> list[Found]:
    """All folders among a stage's checkpoints, the newest first.

    Args:
        thorough: read every file and compare its digest; otherwise manifests and sizes only.
    """
    store = folder_of(root, stage)
    places = names(store)
    found = [_look(store, stage, place, thorough) for place in places]
    known = {place.text for place in places}
    strangers = [name for name in store.children() if name not in known]
    return [*found, *(Found(stage, name, None, None, "no checkpoint of this program") for name in strangers)]


def _look(store: Store, stage: StageName, place: Name, thorough: bool) -> Found:
    try:
        saved = read_saved(store, place.text)
        if saved is None:
            return Found(stage, place.text, place, None, "unfinished: it has no manifest")
        check_saved(store, saved, share=(0, 1) if thorough else (len(saved.files), 1))
    except DamagedCheckpoint as error:
        return Found(stage, place.text, place, None, f"damaged: {error}")
    return Found(stage, place.text, place, saved, "")


def find_checkpoint(root: Store, stage: StageName, name: str | None) -> Saved:
    """A whole checkpoint: the named one, or the newest.

    Raises:
        InputError: there is none, or it is damaged.
    """
    found = find_checkpoints(root, stage, thorough=False)
    chosen = [each for each in found if (each.saved is not None if name is None else each.name == name)]
    url = folder_of(root, stage).url
    if not chosen:
        raise InputError(
            f"no {'checkpoint' if name is None else f'checkpoint {name}'} at {url}\n"
            f"hint: `hvqd checkpoints ls --root {root.url}` shows what is there"
        )
    saved = chosen[0].saved
    if saved is None:
        raise InputError(
            f"the checkpoint {url}/{chosen[0].name} is {chosen[0].problem}\n"
            "hint: name another one, or none for the newest"
        )
    try:
        check_saved(folder_of(root, stage), saved)
    except DamagedCheckpoint as error:
        raise InputError(f"the checkpoint {url}/{saved.name} is damaged: {error}\nhint: name another one") from error
    return saved


@contextmanager
def _local(folder: Store) -> Iterator[Any]:
    """Files of a checkpoint, available locally."""
    if folder.is_local:
        yield lambda name: folder.path / name
        return
    scratch = Path(tempfile.mkdtemp(prefix="hvqd-checkpoint-"))
    try:
        yield lambda name: scratch / name if (scratch / name).exists() else folder.download(name, scratch / name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def export_checkpoint(config: RunConfig, root: Store, stage: StageName, name: str | None, target: Path) -> Saved:
    """Write the model of a checkpoint to a local folder: the weights' moving average where there is one.

    Raises:
        InputError: there is no such checkpoint, or it is of a model with other settings than the root's.
    """
    saved = find_checkpoint(root, stage, name)
    built = build_stage(TrainingJob(stage, config, root, saved.request), torch.device("cpu"))
    with _local(folder_of(root, stage).child(saved.name)) as fetch, saved.state(fetch).opened() as state:
        buffers, frozen = state.shared()
        kind = "average" if state.has("average") else "weight"
        weights = {parameter: state.whole(kind, parameter) for parameter in state.shapes}
    tensors = {parameter.removeprefix("model."): value for parameter, value in (weights | frozen | buffers).items()}
    expected = {key: tuple(value.shape) for key, value in built.model.state_dict().items()}
    if {key: tuple(value.shape) for key, value in tensors.items()} != expected:
        raise InputError(
            f"the checkpoint {saved.name} is of a model with other settings than {root.url} has now\n"
            "hint: give the --config that it was trained with"
        )
    save_model(built.model, target, tensors)
    return saved


def reshape_checkpoint(root: Store, stage: StageName, name: str | None, parts: int) -> str:
    """Write a checkpoint again in so many files of equal size, and check the copy; returns its name.

    A training reads any number of files: this serves to hand on one file instead of hundreds.
    """
    saved = find_checkpoint(root, stage, name)
    store = folder_of(root, stage)
    target = replace(saved.place, workers=parts, attempt=uuid.uuid4().hex[:8])
    files, spans = {}, {}
    with (
        tempfile.TemporaryDirectory(prefix="hvqd-checkpoint-") as scratch,
        _local(store.child(saved.name)) as fetch,
        saved.state(fetch).opened() as state,
    ):
        kinds = [kind for kind in KINDS if state.has(kind)]
        for part in range(parts):
            ranges = {}
            for parameter, shape in saved.shapes.items():
                size = torch.Size(shape).numel()
                start, end = part * size // parts, (part + 1) * size // parts
                if start < end:
                    ranges[parameter] = Range(start, end - start)
            path = Path(scratch) / f"rank-{part:05d}.safetensors"
            wanted = ((kind, parameter, span) for kind in kinds for parameter, span in ranges.items())
            write_tensors(path, {f"{kind}/{p}": state.read(kind, p, span) for kind, p, span in wanted})
            files[path.name], spans[path.name] = file_entry(path), ranges
            store.child(target.text).upload(path, path.name)
            path.unlink()
        for file in (SHARED, COMPANION):
            if file in saved.files:
                store.child(target.text).upload(fetch(file), file)
                files[file] = saved.files[file]
    written = replace(
        saved, name=target.text, files=files, parts=spans, written_at=datetime.now(UTC).isoformat(timespec="seconds")
    )
    store.child(target.text).write_json(MANIFEST, written.as_json())
    try:
        check_saved(store, written)
    except DamagedCheckpoint as error:
        raise EnvironmentFailure(
            f"what was written is damaged: {error}\nhint: check the store, and try again"
        ) from error
    return target.text


@dataclass(frozen=True)
class Doomed:
    """A folder that goes, and why."""

    stage: StageName
    name: str
    why: str


def garbage(config: RunConfig, root: Store, stage: StageName) -> list[Doomed]:
    """What nothing needs: leftovers of crashes, damaged ones, those of other settings, and what the policy drops.

    The newest good checkpoint of each set of settings always stays: of those that trained something else, too, for
    settings may be changed back.
    """
    found = find_checkpoints(root, stage, thorough=True)
    doomed = [Doomed(stage, each.name, each.problem) for each in found if each.saved is None]
    keep = config.compute.keep
    train = config.vq.train if stage == "vq" else config.prior.train
    current = _request(config, root, stage)
    by_request: dict[str, list[Saved]] = {}
    for each in found:
        if each.saved is not None:
            by_request.setdefault(each.saved.request, []).append(each.saved)
    for request, group in by_request.items():
        policy = Retention(train.keep_checkpoints, keep.best, keep.every_images) if request == current else Retention(1)
        stay = kept([Candidate(saved.place, saved.score) for saved in group], policy)
        why = "the settings keep others" if request == current else "of other settings, and not their newest"
        doomed += [Doomed(stage, saved.name, why) for saved in group if saved.name not in stay]
    return doomed


def _request(config: RunConfig, root: Store, stage: StageName) -> str:
    """What today's settings ask for; empty when a parent is missing."""
    parents = {kind: find_manifest(root.child(kind)) for kind in PARENTS[stage]}
    present = {kind: manifest for kind, manifest in parents.items() if manifest is not None}
    return request_of(stage, config, present) if len(present) == len(parents) else ""


def delete_checkpoint(root: Store, doomed: Doomed) -> None:
    """Delete one, its manifest first."""
    folder = folder_of(root, doomed.stage).child(doomed.name)
    folder.delete(MANIFEST)
    folder.delete()
