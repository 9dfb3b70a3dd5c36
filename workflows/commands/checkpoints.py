"""`hvqd checkpoints …`: what a training can go on from."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infra.errors import EnvironmentFailure, InputError
from workflows.commands.job import Job, with_options

if TYPE_CHECKING:
    from infra.storage import Store
    from workflows.training.inspection import Found
    from workflows.training.worker import StageName

checkpoints_app = typer.Typer(help="See, check, export and clear away checkpoints.", no_args_is_help=True)


class Stages(StrEnum):
    """What `--stage` allows."""

    vq = "vq"
    prior = "prior"


_Stage = Annotated[Stages | None, typer.Option("--stage", help="vq or prior; default both.")]
_One = Annotated[Stages, typer.Option("--stage", help="vq or prior.")]
_Name = Annotated[str | None, typer.Argument(help="A checkpoint's name; default the newest good one.")]


@checkpoints_app.command("ls")
@with_options
def ls(job: Job, stage: _Stage = None) -> None:
    """List the checkpoints, the newest first, with their state as far as manifests and sizes tell."""
    root, found = _found(job, stage, thorough=False)
    text = "\n".join(map(_line, found)) or f"no checkpoints under {root.url}"
    job.answer({"status": 0, "checkpoints": [each.as_json() for each in found]}, text)


@checkpoints_app.command("verify")
@with_options
def verify(job: Job, stage: _Stage = None) -> None:
    """Read every file of every checkpoint and compare its digest."""
    root, found = _found(job, stage, thorough=True)
    bad = [each for each in found if each.problem]
    if bad:
        for each in found:
            job.say(_line(each))
        raise EnvironmentFailure(
            f"{len(bad)} of {len(found)} checkpoints under {root.url} cannot be gone on from: {bad[0].name} is "
            f"{bad[0].problem}\nhint: a training passes over them; `hvqd checkpoints gc` shows what it would delete"
        )
    text = "\n".join(map(_line, found)) or f"no checkpoints under {root.url}"
    job.answer({"status": 0, "checkpoints": [each.as_json() for each in found]}, text)


@checkpoints_app.command("export")
@with_options
def export(
    job: Job,
    stage: _One,
    out: Annotated[Path, typer.Option("--out", help="Folder for config.json and weights.safetensors.")],
    name: _Name = None,
) -> None:
    """Write the model of a checkpoint to a folder that `load_model` and `hvqd sample` read."""
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise InputError(f"--out is there already and not empty: {out}\nhint: name a new folder")
    job.quiet()
    from workflows.training.inspection import export_checkpoint, find_checkpoint

    root = _root(job)
    if job.dry_run:
        found = find_checkpoint(root, _stage_name(stage), name)
        job.answer({"status": 0, "plan": {"checkpoint": found.name, "folder": str(out)}}, f"{found.name} -> {out}")
        return
    saved = export_checkpoint(job.config, root, _stage_name(stage), name, out)
    job.answer({"status": 0, "checkpoint": saved.name, "images_seen": saved.images_seen, "folder": str(out)}, str(out))


@checkpoints_app.command("reshape")
@with_options
def reshape(
    job: Job,
    stage: _One,
    parts: Annotated[int, typer.Option("--parts", min=1, help="Number of files.")] = 1,
    name: _Name = None,
) -> None:
    """Write a checkpoint again in another number of files, for example to hand on one instead of hundreds.

    Trainings need no reshaping: any number of workers reads any checkpoint.
    """
    job.quiet()
    from workflows.training.inspection import find_checkpoint, reshape_checkpoint

    root = _root(job)
    found = find_checkpoint(root, _stage_name(stage), name)
    if job.dry_run:
        job.answer({"status": 0, "plan": {"checkpoint": found.name, "parts": parts}}, f"{found.name} in {parts} files")
        return
    with _turn(root, _stage_name(stage), "rewriting a checkpoint"):
        written = reshape_checkpoint(root, _stage_name(stage), name, parts)
    job.answer({"status": 0, "checkpoint": written}, written)


@checkpoints_app.command("gc")
@with_options
def gc(
    job: Job,
    stage: _Stage = None,
    delete: Annotated[bool, typer.Option("--delete", help="Delete them; without it they are only named.")] = False,
) -> None:
    """Name what nothing needs: leftovers of crashes, damaged checkpoints, and what the settings do not keep.

    The newest good checkpoint always stays.
    """
    job.quiet()
    from workflows.training.inspection import delete_checkpoint, garbage

    root, doomed = _root(job), []
    for each in _stages(stage):
        if delete and not job.dry_run:
            with _turn(root, each, "clearing checkpoints away"):
                found = garbage(job.config, root, each)
                for one in found:
                    delete_checkpoint(root, one)
        else:
            found = garbage(job.config, root, each)
        doomed += found
    verb = "deleted" if delete and not job.dry_run else "would go"
    lines = [f"{verb}  {one.stage:<5}  {one.name:<40}  {one.why}" for one in doomed]
    hint = [] if delete or not doomed else ["nothing was deleted; --delete does"]
    value = [{"stage": one.stage, "name": one.name, "why": one.why} for one in doomed]
    text = "\n".join([*lines, *hint]) or "nothing to clear away"
    job.answer({"status": 0, "deleted": verb == "deleted", "checkpoints": value}, text)


def _root(job: Job) -> Store:
    from infra.storage import open_store

    return open_store(job.config.root)


def _stage_name(stage: Stages) -> StageName:
    return "vq" if stage is Stages.vq else "prior"


def _stages(stage: Stages | None) -> tuple[StageName, ...]:
    return ("vq", "prior") if stage is None else (_stage_name(stage),)


def _found(job: Job, stage: Stages | None, *, thorough: bool) -> tuple[Store, list[Found]]:
    job.quiet()
    from workflows.training.inspection import find_checkpoints

    root = _root(job)
    return root, [found for each in _stages(stage) for found in find_checkpoints(root, each, thorough=thorough)]


def _line(found: Found) -> str:
    if found.place is None or found.saved is None:
        return f"{found.stage:<5}  {found.name:<40}  {found.state}"
    size = f"{found.saved.bytes / 1e6:,.1f} MB"
    score = "" if found.saved.score is None else f"  score {found.saved.score:.4g}"
    images = f"{found.saved.images_seen:,} images"
    return f"{found.stage:<5}  {found.name:<40}  {images:>18}  {size:>12}{score}  {found.state}"


def _turn(root: Store, stage: StageName, what: str) -> Any:
    """The stage's lease: nobody trains meanwhile."""
    from workflows.training.turn import take_turn

    return take_turn(root.child(stage), f"{what} of {stage}")
