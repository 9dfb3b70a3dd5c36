"""The path from pictures to a promoted model: which steps are current, and running those that are not.

Every step is a function of a Context that returns its artifact's manifest (see `workflows.requests` for what makes one
current). The pipeline adds what steps share: the tracked runs with truthful ends, and the order.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from infra.cluster import connect_ahead
from infra.errors import GateRefusal
from infra.storage import Store
from infra.tracking import Status, TrackedRun, Tracker, open_tracker
from workflows.artifacts import Manifest, check_files, digest_of, find_manifest
from workflows.config import RunConfig
from workflows.context import Context, Progress
from workflows.requests import PARENTS, request_of

State = Literal["current", "stale", "missing"]


@dataclass(frozen=True)
class Step:
    """One step of the path."""

    kind: str
    """The artifact it makes; also its folder under the root."""
    command: str
    """The command that runs it alone."""
    does: str
    """What the user is told while it runs."""
    function: str
    """module:name of its function; loaded when it is called, because most commands need few of them."""
    trains: bool = False
    """Whether workers do it, whose cluster can get ready while the function's libraries are loaded."""


STEPS: dict[str, Step] = {
    step.kind: step
    for step in (
        Step("dataset", "hvqd data build", "building the dataset", "workflows.data.ingest:build_dataset"),
        Step("vq", "hvqd train vq", "training the tokenizer", "workflows.training.launch:train_vq", True),
        Step("codes", "hvqd encode", "encoding the dataset", "workflows.encode:encode_dataset"),
        Step("prior", "hvqd train prior", "training the prior", "workflows.training.launch:train_prior", True),
        Step("evaluation", "hvqd evaluate", "evaluating on the test split", "workflows.evaluation.evaluate:evaluate"),
    )
}
FOLDERS = {**{kind: kind for kind in STEPS}, "registration": "registration"}


def artifact(root: Store, kind: str) -> Store:
    """The folder of an artifact under a root."""
    return root.child(FOLDERS[kind])


def state_of(kind: str, config: RunConfig, root: Store) -> tuple[State, Manifest | None]:
    """Whether an artifact answers today's request, and its manifest if it does.

    Raises:
        InputError: the manifest or a file of the artifact is damaged (named, with how to rebuild).
    """
    manifest = find_manifest(artifact(root, kind))
    if manifest is None:
        return "missing", None
    parents: dict[str, Manifest] = {}
    for parent in PARENTS[kind]:
        state, found = state_of(parent, config, root)
        if found is None or state != "current":
            return "stale", None
        parents[parent] = found
    if manifest.request != request_of(kind, config, parents):
        return "stale", None
    check_files(artifact(root, kind), manifest)
    return "current", manifest


def source_changed(config: RunConfig, root: Store) -> bool:
    """Whether the pictures that the dataset was made from are others by now; only building it asks."""
    from workflows.data.sources import has_changed

    manifest = find_manifest(artifact(root, "dataset"))
    return manifest is not None and has_changed(config.data, manifest.provenance.get("source"))


def plan(config: RunConfig, root: Store) -> dict[str, State]:
    """The state of every artifact, in the order of the path; reads manifests, writes nothing."""
    states = {kind: state_of(kind, config, root)[0] for kind in FOLDERS}
    if states["dataset"] == "current" and source_changed(config, root):
        return {kind: "stale" if state == "current" else state for kind, state in states.items()}
    return states


def tracker_for(config: RunConfig, root: Store) -> Tracker:
    """The tracker that the configuration names."""
    return open_tracker(config.tracking.uri, config.tracking.experiment, root)


def flat_parameters(config: RunConfig) -> dict[str, object]:
    """The configuration as dotted keys and plain values, as the tracker stores it."""

    def walk(prefix: str, value: object) -> Iterator[tuple[str, object]]:
        if isinstance(value, dict):
            for key, child in value.items():
                yield from walk(f"{prefix}.{key}" if prefix else key, child)
        else:
            yield prefix, value

    return dict(walk("", config.model_dump(mode="json", exclude={"tracking": {"uri"}})))


@contextmanager
def tracked(run: TrackedRun) -> Iterator[TrackedRun]:
    """End the run as what happened says."""
    try:
        yield run
    except BaseException as error:
        run.end(_end_of(error))
        raise
    run.end("FINISHED")


def _end_of(error: BaseException) -> Status:
    match error:
        case KeyboardInterrupt():
            return "KILLED"
        case GateRefusal():
            return "FINISHED"  # a refusal is an answer, not a failure
    return "FAILED"


@dataclass
class Pipeline:
    """One root's pipeline, with its parent run opened when the first step has something to record."""

    config: RunConfig
    root: Store
    tracker: Tracker
    progress: Progress
    parent: TrackedRun | None = None

    def open_parent(self) -> TrackedRun:
        """The pipeline's own run; the same one when the same configuration goes on in the same root."""
        if self.parent is None:
            settings = self.config.model_dump(mode="json", exclude={"compute", "root", "tracking"})
            key = digest_of({"root": self.root.url, "settings": settings})
            self.parent = self.tracker.run(key, "pipeline", params=flat_parameters(self.config))
        return self.parent

    def step(self, kind: str) -> Manifest:
        """The step's artifact, made now unless it is current."""
        step = STEPS[kind]
        state, manifest = state_of(kind, self.config, self.root)
        changed = kind == "dataset" and manifest is not None and source_changed(self.config, self.root)
        if changed:
            state, manifest = "stale", None
        if manifest is not None:
            self.progress.say(f"{step.kind:<11} current   {manifest.digest[:12]}")
            return manifest
        why = "its source has changed" if changed else "settings or parents have changed"
        self.progress.say(f"{step.kind:<11} {step.does}" + (f" ({why})" if state == "stale" else ""))
        started = time.monotonic()
        if step.trains:
            connect_ahead(self.config.compute.address)
        parents = {parent: read for parent in PARENTS[kind] if (read := find_manifest(artifact(self.root, parent)))}
        key = digest_of(
            {
                "root": self.root.url,
                "kind": kind,
                "parents": {name: m.digest for name, m in parents.items()},
                "config": self.config.model_dump(mode="json", exclude={"compute", "root", "tracking"}),
            }
        )
        run = self.tracker.run(key, kind, parent=self.open_parent().run_id, tags={"hvqd.step": kind})
        with tracked(run):
            manifest = _load(step.function)(Context(self.config, self.root, self.progress, run))
            run.set_tags({"hvqd.digest": manifest.digest})
        self.progress.say(f"{step.kind:<11} done      {manifest.digest[:12]}  in {time.monotonic() - started:.0f} s")
        return manifest

    def finish(self) -> dict[str, Any]:
        """Register what was evaluated, ask the gates, and write the report.

        Returns:
            JSON values: version, champion, report, promoted.

        Raises:
            GateRefusal: a gate refused; the report is written all the same.
        """
        from workflows.release.promotion import promote
        from workflows.release.registry import register

        context = Context(self.config, self.root, self.progress, self.open_parent())
        registration = register(context, self.tracker)
        version = str(registration.facts["version"])
        refusal: GateRefusal | None = None
        champion: str | None = version
        try:
            promote(context, self.tracker, version)
        except GateRefusal as error:
            refusal, champion = error, self.tracker.champion(self.config.tracking.model_name)
        from workflows.reporting.report import write_report

        report = write_report(context)
        if refusal is not None:
            message = f"{refusal}; the report at {report} shows the figures"
            raise GateRefusal(message, refusal.facts, refusal.shown) from refusal
        return {"version": version, "champion": champion, "report": report}

    def run(self) -> dict[str, Any]:
        """The whole path. See `finish` for what comes back."""
        with self._ending():
            digests = {kind: self.step(kind).digest for kind in STEPS}
            result = self.finish()
        return {"root": self.root.url, **result, "digests": digests}

    def run_alone(self, kind: str) -> Manifest:
        """One step, and the end of the pipeline's run with it."""
        with self._ending():
            return self.step(kind)

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """End the pipeline's own run, if one was opened, as what happened says."""
        try:
            yield
        except BaseException as error:
            if self.parent is not None:
                self.parent.end(_end_of(error))
            raise
        if self.parent is not None:
            self.parent.end("FINISHED")


def _load(function: str) -> Callable[[Context], Manifest]:
    module, _, name = function.partition(":")
    loaded: Callable[[Context], Manifest] = getattr(importlib.import_module(module), name)
    return loaded
