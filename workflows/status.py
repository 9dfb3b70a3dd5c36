"""The state of a pipeline from its root alone: no cluster, no tracking server, nothing but files is asked.

Every step's manifest tells whether it is finished and current; the newest checkpoint tells how far a training is and
how old that knowledge is; the journal of promotions, where it lies under the root, tells the champion.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from infra.errors import InputError
from infra.secrets import mask
from infra.storage import Store, open_store
from workflows.artifacts import MANIFEST, find_manifest
from workflows.config import RunConfig
from workflows.pipeline import FOLDERS, STEPS, artifact, state_of
from workflows.release.journal import Journal
from workflows.release.promotion import champions
from workflows.tables import aligned

State = Literal["current", "stale", "under way", "missing", "damaged"]

_SHOWN = {
    "vq": ("val_psnr",),
    "prior": ("val_bits_total",),
    "evaluation": ("psnr", "kid_samples", "recall_samples", "class_accuracy_samples"),
}
"""The figures that a line has room for."""


@dataclass(frozen=True)
class CheckpointState:
    """The newest complete checkpoint of a training."""

    name: str
    images_seen: int
    written_at: str | None
    """UTC; None where its manifest does not tell."""
    age_seconds: float | None
    last: Mapping[str, float]
    """The newest value of every figure in its history."""
    unfinished: int
    """Folders beside it without a manifest: being written, or a crash's leftovers."""


@dataclass(frozen=True)
class StepState:
    """One step."""

    kind: str
    state: State
    command: str
    """What makes it, or goes on with it."""
    digest: str | None = None
    seconds: float | None = None
    """That making it took."""
    figures: Mapping[str, float] = field(default_factory=dict)
    images: int | None = None
    """Budget of a training."""
    checkpoint: CheckpointState | None = None
    problem: str | None = None
    """Why it is damaged."""


@dataclass(frozen=True)
class PipelineState:
    """Everything."""

    root: str
    steps: tuple[StepState, ...]
    champion: str | None
    champion_from: str
    """Where the champion is known from, or why it is not."""
    report: str | None

    @property
    def next_command(self) -> str | None:
        """What goes on; None when everything is current."""
        waiting = next((step for step in self.steps if step.state != "current"), None)
        return None if waiting is None else f"{waiting.command} --root {self.root}"

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {**asdict(self), "next": self.next_command}


def pipeline_state(config: RunConfig, root: Store) -> PipelineState:
    """The state of a root that has been used with this configuration; nothing is written.

    Raises:
        InputError: there is no pipeline at the root.
        EnvironmentFailure: the root cannot be read.
    """
    present = root.children()
    if not set(present) & {*FOLDERS, "config.yaml"}:
        raise InputError(
            f"there is no pipeline at {mask(root.url)}\n"
            "hint: name the root of a run (its folder or URL); `hvqd run --root` begins one"
        )
    steps = tuple(_step(kind, config, root) for kind in FOLDERS)
    champion, known_from = _champion(config, root)
    report = f"{root.url}/report.html" if "report.html" in present else None
    return PipelineState(root.url, steps, champion, known_from, report)


def _step(kind: str, config: RunConfig, root: Store) -> StepState:
    command = STEPS[kind].command if kind in STEPS else "hvqd register"
    folder = artifact(root, kind)
    try:
        state, _ = state_of(kind, config, root)
        manifest = find_manifest(folder)
    except InputError as error:
        return StepState(kind, "damaged", command, problem=str(error).splitlines()[0])
    trains = kind in ("vq", "prior")
    budget = {"vq": config.vq.train.images, "prior": config.prior.train.images}.get(kind)
    checkpoint = _checkpoint(folder.child("checkpoints")) if trains else None
    if manifest is None:
        under_way = bool(folder.children())
        return StepState(kind, "under way" if under_way else "missing", command, images=budget, checkpoint=checkpoint)
    facts = manifest.facts
    figures = facts.get("figures", {name: value for name, value in facts.items() if name.startswith("val_")})
    if kind == "registration":
        figures = {"version": float(facts["version"])}
    return StepState(
        kind,
        "current" if state == "current" else "stale",
        command,
        manifest.digest,
        manifest.provenance.get("seconds"),
        figures,
        budget,
        checkpoint,
    )


def _checkpoint(store: Store) -> CheckpointState | None:
    """The newest checkpoint whose manifest can be read."""
    names = sorted(store.children(), reverse=True)
    unfinished = 0
    for name in names:
        try:
            value = store.child(name).read_json(MANIFEST)
            images_seen, history = int(value["images_seen"]), value["history"]
        except FileNotFoundError:
            unfinished += 1
            continue
        except (ValueError, KeyError, TypeError):
            continue
        last = {figure: number for record in history for figure, number in record.items() if figure != "images"}
        written_at = value.get("written_at") or None
        age = None
        if written_at is not None:
            moment = datetime.fromisoformat(written_at)
            moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
            age = max(0.0, (datetime.now(UTC) - moment).total_seconds())
        return CheckpointState(name, images_seen, written_at, age, last, unfinished)
    return None


def _champion(config: RunConfig, root: Store) -> tuple[str | None, str]:
    tracking = config.tracking
    if tracking.audit is not None:
        folder = open_store(tracking.audit)
    elif tracking.uri is None:
        folder = root.child("audit")
    else:
        return None, f"the tracking server {mask(tracking.uri)} keeps the journal: `hvqd models history`"
    store = folder.child(tracking.model_name)
    try:
        stack = champions(Journal(store, tracking.model_name).entries())
    except (InputError, json.JSONDecodeError) as error:
        return None, str(error).splitlines()[0]
    return (stack[-1] if stack else None), store.url


def status_text(state: PipelineState) -> str:
    """A line a step, then the champion, and what goes on."""
    rows = [[step.kind, step.state, _progress(step), _figures(step)] for step in state.steps]
    lines = [f"root      {mask(state.root)}", aligned(rows)]
    lines += [f"damaged   {step.problem}" for step in state.steps if step.problem]
    lines.append(f"champion  {state.champion or 'none known'} ({state.champion_from})")
    if state.report:
        lines.append(f"report    {mask(state.report)}")
    if state.next_command:
        lines.append(f"next      {mask(state.next_command)}")
    return "\n".join(lines)


def _progress(step: StepState) -> str:
    if step.state in ("current", "stale"):
        took = "" if step.seconds is None else f"  in {_duration(step.seconds)}"
        return f"{(step.digest or '')[:12]}{took}"
    found = step.checkpoint
    if found is None or step.images is None:
        return "" if step.state == "missing" else "no checkpoint yet" if step.images else ""
    age = "" if found.age_seconds is None else f", {_duration(found.age_seconds)} old"
    return f"checkpoint at {found.images_seen:,} of {step.images:,} images ({found.images_seen / step.images:.0%}){age}"


def _figures(step: StepState) -> str:
    figures = dict(step.figures)
    if not figures and step.checkpoint is not None:
        figures = {name: value for name, value in step.checkpoint.last.items() if name in ("loss", "val_psnr")}
    names = [name for name in _SHOWN.get(step.kind, tuple(figures)) if name in figures] or list(figures)[:2]
    return "  ".join(f"{name} {figures[name]:.5g}" for name in names)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
