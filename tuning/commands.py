"""`hvqd tune …`: the search over configurations; and `hvqd doctor`, which tidies up after jobs that are gone."""

from __future__ import annotations

import shutil
from enum import StrEnum
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from workflows.commands.job import Job, with_options


class Searcher(StrEnum):
    """How trials are proposed."""

    TPE = "tpe"
    RANDOM = "random"
    GRID = "grid"


class Scheduler(StrEnum):
    """Which trials are stopped early."""

    ASHA = "asha"
    NONE = "none"


class _SearchByDefault(TyperGroup):
    """`hvqd tune SPACE …` is the search itself; other verbs come first."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the search's name before arguments that name no other verb."""
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)


tune_app = typer.Typer(
    cls=_SearchByDefault,
    help="Search over configurations: `hvqd tune SPACE`, a ready space or a YAML file (`hvqd tune show SPACE`).",
    no_args_is_help=True,
)

SpaceArgument = Annotated[str, typer.Argument(metavar="SPACE", help="A ready space (vq, prior, joint) or a YAML file.")]


@tune_app.command("run", hidden=True)
@with_options
def tune(
    job: Job,
    space: SpaceArgument,
    trials: Annotated[
        int | None, typer.Option("--trials", min=1, help="How many in all; default: the space's budget.")
    ] = None,
    searcher: Annotated[Searcher, typer.Option("--searcher", help="Who proposes trials.")] = Searcher.TPE,
    scheduler: Annotated[Scheduler, typer.Option("--scheduler", help="Who stops trials early.")] = Scheduler.ASHA,
    max_concurrent: Annotated[
        int | None,
        typer.Option("--max-concurrent", min=1, help="Trials side by side; default: what the cluster has CPUs for."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="The sweep's name; default: the space's.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Only go on with a sweep that has begun (an error when there is none).")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Go on although the space or the code differs from the sweep's.")
    ] = False,
    warm_from: Annotated[
        str | None, typer.Option("--warm-from", help="Folder of a former sweep whose trials the searcher shall know.")
    ] = None,
) -> None:
    """Search over a space. The same command goes on with a sweep that was interrupted, as does --resume."""
    from tuning.identity import SweepIdentity
    from tuning.loading import load_space

    loaded = load_space(space, preset=job.preset, config=job.config_file, overrides=job.overrides, seed=job.seed)
    identity = SweepIdentity(loaded, searcher.value, scheduler.value, loaded.resolved_base.seed)
    asked = {"at_once": max_concurrent, "must_exist": resume, "force": force, "warm_from": warm_from}
    _search(job, identity, {"name": name or loaded.name, "trials": trials or loaded.budget.trials, **asked})


@tune_app.command("show")
@with_options
def show(
    job: Job,
    space: SpaceArgument,
    draws: Annotated[int, typer.Option("--draws", min=1, max=100, help="How many example draws.")] = 3,
    as_yaml: Annotated[bool, typer.Option("--yaml", help="Print the space's file, to edit.")] = False,
) -> None:
    """Show a search space: its parameters and constraints, how much of it is possible, and example draws."""
    from tuning.loading import load_space, space_path
    from tuning.show import describe

    loaded = load_space(space, preset=job.preset, config=job.config_file, overrides=job.overrides, seed=job.seed)
    if as_yaml:
        text = space_path(space).read_text(encoding="utf-8").rstrip()
        job.answer({"status": 0, "yaml": text}, text)
        return
    job.quiet()
    shown = describe(loaded, draws, job.seed or 0)
    job.answer({"status": 0, **shown.as_json()}, shown.as_text(shutil.get_terminal_size((110, 24)).columns))


@tune_app.command("report")
@with_options
def report(
    job: Job,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The sweep's name; the space's unless --name gave one.")],
) -> None:
    """Write a sweep's report anew, while it runs or later: one HTML file in its folder."""
    job.quiet()
    from infra.storage import open_store
    from tuning.sweep import read_sweep

    root = open_store(job.root or job.config.root)
    if job.dry_run:
        folder = root.child("tuning", name).url
        job.answer({"status": 0, "plan": folder}, f"would write the report of {folder}")
        return
    path = read_sweep(root, name).write_report()
    job.answer({"status": 0, "report": path}, path)


def _search(job: Job, identity: Any, asked: dict[str, Any]) -> None:
    from infra.storage import open_store
    from tuning.sweep import SweepRequest, run_sweep
    from workflows.pipeline import tracker_for

    base = identity.space.resolved_base
    root = open_store(job.root or base.root)
    request = SweepRequest(identity, root, **asked)
    if job.dry_run:
        job.answer({"status": 0, "plan": request.as_plan()}, request.as_text())
        return
    job.quiet()
    root.check_writable()
    tracker = tracker_for(base, root)
    tracker.check_answers()
    result = run_sweep(request, tracker, job.progress, job.streams.err)
    job.answer({"status": 0, **result.as_json()}, result.as_text())


@with_options
def doctor(
    job: Job,
    fix: Annotated[bool, typer.Option("--fix", help="Also free, end and delete what is listed.")] = False,
) -> None:
    """List what dead jobs left (CPUs held on a cluster, runs that never ended, folders of no use); --fix tidies up."""
    from infra.storage import open_store
    from tuning.doctor import examine
    from workflows.pipeline import tracker_for

    config = job.config
    job.quiet()
    root = open_store(config.root)
    found = examine(root, tracker_for(config, root), config.compute.address, fix=fix and not job.dry_run)
    job.answer({"status": 0, **found.as_json()}, found.as_text())
