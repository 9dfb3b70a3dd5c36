"""`hvqd plan`, `status`, `preflight`, `launch` and `jobs`: before, beside and after a job on other machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from workflows.commands.job import Job, with_options


def add_launch_commands(app: typer.Typer) -> None:
    """Give the front door these commands."""
    app.command("plan")(plan)
    app.command("status")(status)
    app.command("preflight")(preflight)
    app.command("launch", context_settings={"ignore_unknown_options": True})(launch)
    app.add_typer(jobs_app, name="jobs")


_Device = Annotated[str | None, typer.Option("--device", help="A device of the price table; `here` measures this CPU.")]


@with_options
def plan(
    job: Job,
    device: _Device = None,
    prices: Annotated[Path | None, typer.Option("--prices", help="YAML file with devices and prices.")] = None,
    bandwidth: Annotated[
        float, typer.Option("--bandwidth", min=1e-6, help="GB/s between a worker and the root.")
    ] = 1.0,
    pictures: Annotated[int | None, typer.Option("--pictures", min=1, help="How many pictures there are.")] = None,
    classes: Annotated[int | None, typer.Option("--classes", min=0, help="How many classes they have.")] = None,
) -> None:
    """Say what a configuration will take (memory, hours, traffic, storage, cost) before it is run."""
    from infra.storage import open_store
    from workflows.artifacts import find_manifest
    from workflows.planning.model_walk import Pictures
    from workflows.planning.planner import estimate, with_this_machine
    from workflows.planning.prices import read_prices
    from workflows.planning.text import plan_text

    table = read_prices(prices)
    config = job.config
    job.quiet()
    if device == "here":
        table = with_this_machine(table, config.compute.threads_per_worker)
    known = Pictures.of(config)
    manifest = find_manifest(open_store(config.root).quick().child("dataset")) if job.remembered is not None else None
    if manifest is not None:
        known = Pictures(sum(manifest.facts["rows"].values()), len(manifest.facts["classes"]))
    count = known.count if pictures is None else pictures
    found = estimate(
        config,
        prices=table,
        device=device,
        storage_gb_s=bandwidth,
        pictures=Pictures(count, known.classes if classes is None else classes),
    )
    job.answer({"status": 0, "plan": found.as_json()}, plan_text(found))


@with_options
def status(
    job: Job,
    where: Annotated[str | None, typer.Argument(metavar="ROOT", help="Root, where it lies; default --root.")] = None,
) -> None:
    """Tell the state of a pipeline from its root alone, also when the cluster is gone."""
    from infra.storage import open_store
    from workflows.status import pipeline_state, status_text

    job.root = where or job.root
    config = job.config
    job.quiet()
    found = pipeline_state(config, open_store(config.root).quick())
    job.answer({"status": 0, **found.as_json()}, status_text(found))


@with_options
def preflight(
    job: Job,
    expect: Annotated[
        list[str] | None, typer.Option("--expect", help="PACKAGE=VERSION that every node must have; repeatable.")
    ] = None,
) -> None:
    """Try the machines, the root and the tracker with this configuration, in a minute or two, before a job begins."""
    from dataclasses import asdict

    from infra.errors import EnvironmentFailure
    from infra.preflight import worst
    from workflows.launching.preflight_text import preflight_text

    config = job.config
    if job.dry_run:
        job.answer({"status": 0, "would_try": config.compute.address or "this machine"}, "nothing was tried")
        return
    job.quiet()
    from infra.cluster import disconnect
    from workflows.launching.preflight import run_preflight

    expected = dict(pair.split("=", 1) for pair in expect or [] if "=" in pair)
    findings = run_preflight(config, expected, job.progress)
    verdict = worst(findings)
    disconnect()
    table = preflight_text(findings)
    if verdict == "fail":
        failed = [finding for finding in findings if finding.verdict == "fail"]
        job.say(table)
        raise EnvironmentFailure(
            f"preflight found {len(failed)} that must be mended: "
            + "; ".join(f"{finding.check} ({finding.where})" for finding in failed)
            + f"\nhint: {failed[0].hint or 'see the table above'}"
        )
    job.answer({"status": 0, "verdict": verdict, "findings": [asdict(finding) for finding in findings]}, table)


_On = Annotated[str, typer.Option("--on", help="Target: local, ray, slurm, kuberay, vms, or a YAML file.")]
_JobName = Annotated[str, typer.Argument(metavar="NAME", help="The job's name (`hvqd jobs ls`).")]

jobs_app = typer.Typer(help="See, follow and stop jobs on a target.", no_args_is_help=True)


@with_options
def launch(
    job: Job,
    command: Annotated[
        list[str], typer.Argument(metavar="COMMAND…", help="run, train vq, encode, tune … and options.")
    ],
    on: _On,
    name: Annotated[str | None, typer.Option("--name", help="Name of the job; default from command and root.")] = None,
    preflight: Annotated[bool, typer.Option("--preflight/--no-preflight", help="Check the target first.")] = True,
    follow: Annotated[bool, typer.Option("--follow", help="Show the job's output until it ends.")] = False,
) -> None:
    """Run a command of the path on other machines; --dry-run prints exactly what would be submitted."""
    from infra.jobs import check_free, launcher_for
    from infra.targets import read_target
    from workflows.launching.command import shown, submission_for, tracking_note

    target = read_target(on)
    submission = submission_for(job, command, target, on, name, preflight=preflight)
    launcher = launcher_for(target)
    if job.dry_run:
        documents = launcher.render(submission)
        value = {"status": 0, "name": submission.name, "documents": {found.name: found.text for found in documents}}
        job.answer(value, shown(documents))
        return
    job.quiet()
    launcher.check(submission)
    check_free(launcher, submission.name, on)
    state = launcher.submit(submission)
    job.say(f"{state.name} is {state.state}: {state.where}")
    if (note := tracking_note(job.config, target)) is not None:
        job.say(note)
    if follow:
        _follow(job, on, submission.name)
        return
    text = f"hvqd jobs logs -f {state.name} --on {on}\nhvqd status {submission.root}"
    job.answer({"status": 0, "name": state.name, "state": state.state, "where": state.where}, text)


@jobs_app.command("ls")
@with_options
def jobs_ls(job: Job, on: _On) -> None:
    """List the target's jobs, newest first."""
    from dataclasses import asdict

    from infra.jobs import launcher_for
    from infra.targets import read_target
    from workflows.tables import aligned

    job.quiet()
    found = launcher_for(read_target(on)).jobs()
    rows = [[state.name, state.state, state.started, state.where, state.message] for state in found]
    job.answer({"status": 0, "jobs": [asdict(state) for state in found]}, aligned(rows) if rows else "no jobs")


@jobs_app.command("logs")
@with_options
def jobs_logs(
    job: Job,
    name: _JobName,
    on: _On,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
) -> None:
    """Show a job's output; with -f until it ends, and then with the job's own success or failure."""
    job.quiet()
    if follow:
        _follow(job, on, name)
        return
    from infra.jobs import launcher_for
    from infra.targets import read_target

    for text in launcher_for(read_target(on)).logs(name, follow=False):
        job.streams.out.write(text)
    job.answer({"status": 0, "name": name})


@jobs_app.command("stop")
@with_options
def jobs_stop(job: Job, name: _JobName, on: _On) -> None:
    """Stop a job; what it has written to its root stays, and launching it again goes on."""
    from infra.jobs import find_job, launcher_for
    from infra.targets import read_target

    job.quiet()
    launcher = launcher_for(read_target(on))
    state = find_job(launcher, name) if job.dry_run else launcher.stop(name)
    job.answer({"status": 0, "name": name, "state": state.state}, f"{name} is {state.state}")


def _follow(job: Job, on: str, name: str) -> None:
    """Show the output of a job until it ends; it fails here as it failed there."""
    from infra.errors import EnvironmentFailure
    from infra.jobs import find_job, launcher_for
    from infra.targets import read_target

    launcher = launcher_for(read_target(on))
    stream = job.streams.err if job.as_json else job.streams.out
    for text in launcher.logs(name, follow=True):
        stream.write(text)
        stream.flush()
    state = find_job(launcher, name)
    if state.state != "succeeded":
        raise EnvironmentFailure(
            f"the job {name} has {state.state}: {state.message or state.where}\n"
            "hint: its output says why; launching the same again goes on from the root"
        )
    job.answer({"status": 0, "name": name, "state": state.state}, f"{name} has succeeded")
