"""`hvqd models …`: the registry's versions for release owners."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workflows.commands.job import Job, with_options

if TYPE_CHECKING:
    from workflows.release.versions import Report

models_app = typer.Typer(help="See, compare and check the registered versions.", no_args_is_help=True)

_Name = Annotated[str, typer.Argument(help="A version's number, or an alias such as champion.")]


@models_app.command("ls")
@with_options
def ls(job: Job) -> None:
    """List the versions with their aliases and main figures."""
    _answer(job, "list_versions")


@models_app.command("show")
@with_options
def show(job: Job, version: _Name) -> None:
    """Show a version's lineage, figures and card."""
    _answer(job, "show_version", version)


@models_app.command("diff")
@with_options
def diff(job: Job, first: _Name, second: _Name) -> None:
    """Show where two versions differ."""
    _answer(job, "compare_versions", first, second)


@models_app.command("history")
@with_options
def history(
    job: Job,
    verify: Annotated[bool, typer.Option("--verify", help="Also check that no entry was changed or removed.")] = False,
) -> None:
    """Show every promotion, refusal and rollback: who, when, from what to what, and why."""
    _answer(job, "history", verify=verify)


@models_app.command("verify")
@with_options
def verify(job: Job, version: _Name) -> None:
    """Check that every byte of a version is as it was registered."""
    _answer(job, "verify_version", version)


@models_app.command("repair")
@with_options
def repair(job: Job) -> None:
    """Put the aliases back to what the journal says, after somebody moved them by other means."""
    _answer(job, "repair", dry_run=job.dry_run)


@models_app.command("gc")
@with_options
def gc(
    job: Job,
    keep: Annotated[int, typer.Option("--keep", help="So many of the newest versions stay in any case.")] = 5,
    delete: Annotated[bool, typer.Option("--delete", help="Remove them; without it they are only named.")] = False,
) -> None:
    """Name the versions that nothing needs: no alias, no rollback, no other version; with --delete remove them."""
    _answer(job, "collect", module="version_gc", keep=keep, delete=delete and not job.dry_run)


@models_app.command("copy")
@with_options
def copy(
    job: Job,
    version: _Name,
    to: Annotated[str, typer.Option("--to", help="Another MLflow server, or the root of a run with its own store.")],
) -> None:
    """Copy a version with its files into another registry, verify every byte, and make it a candidate there."""
    _answer(job, "copy_version", version, module="version_copy", to=to, dry_run=job.dry_run)


def _answer(job: Job, question: str, *names: str, module: str = "versions", **options: Any) -> None:
    job.quiet()
    from infra.storage import open_store
    from workflows.context import Context
    from workflows.pipeline import tracker_for

    root = open_store(job.config.root)
    ask: Callable[..., Report] = getattr(importlib.import_module(f"workflows.release.{module}"), question)
    report = ask(Context(job.config, root, job.progress, None), tracker_for(job.config, root), *names, **options)
    job.answer({"status": 0, **report.value}, report.text)
