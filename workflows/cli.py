"""The front door: one verb per command. Heavy modules are loaded inside the commands, so that help answers at once."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infra.secrets import mask
from infra.signals import ignore_from_now_on
from tuning.commands import doctor, tune_app
from workflows.commands.checkpoints import checkpoints_app
from workflows.commands.drawing import augment, edit_app, interpolate, sample
from workflows.commands.job import Job, exit_status, with_options
from workflows.commands.launch import add_launch_commands
from workflows.commands.models import models_app
from workflows.commands.tokenizer import Arithmetic, codes_app, reconstruct

if TYPE_CHECKING:
    from workflows.pipeline import Pipeline

app = typer.Typer(
    name="hvqd",
    help="Train, search, track, promote and use hierarchical VQ-Diffusion image models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Make datasets.", no_args_is_help=True)
train_app = typer.Typer(help="Train one stage.", no_args_is_help=True)
config_app = typer.Typer(help="See and check configurations.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(train_app, name="train")
app.add_typer(config_app, name="config")
app.add_typer(models_app, name="models")
app.add_typer(checkpoints_app, name="checkpoints")
app.add_typer(codes_app, name="codes")
app.add_typer(edit_app, name="edit")
app.add_typer(tune_app, name="tune")
app.command("doctor")(doctor)


# ---- the path ----


@app.command("run")
@with_options
def run(job: Job) -> None:
    """The whole path: dataset, tokenizer, codes, prior, evaluation, registration, promotion and a report."""
    if _planned(job):
        return
    pipeline = _open(job, makes_dataset=True)
    result = pipeline.run()
    model = job.config.tracking.model_name
    text = "\n".join(
        [
            f"report    {result['report']}",
            f"champion  {model} version {result['champion']}",
            "next, try:",
            f"  {program('hvqd')} sample --root {job.config.root} -n 16 --out samples.png",
            f"  {program('hvqd')} promote --root {job.config.root} --dry-run",
            f"  {program('mlflow')} ui --backend-store-uri {mask(pipeline.tracker.uri)}",
        ]
    )
    job.answer({"status": 0, **result}, text)


def _step(job: Job, kind: str) -> None:
    if _planned(job, kind):
        return
    pipeline = _open(job, makes_dataset=kind == "dataset")
    manifest = pipeline.run_alone(kind)
    folder = f"{pipeline.root.url}/{kind}"
    job.answer({"status": 0, "artifact": folder, "digest": manifest.digest, "facts": dict(manifest.facts)}, folder)


@data_app.command("build")
@with_options
def data_build(
    job: Job,
    source: Annotated[str | None, typer.Argument(help="Folder, tar shards, parquet, or `emoji`.")] = None,
) -> None:
    """Make the dataset from pictures: a folder (class = sub-folder), tar/WebDataset shards, parquet, or `emoji`."""
    if source is not None:
        job.overrides.append(f"data.source={source}")
    _step(job, "dataset")


@train_app.command("vq")
@with_options
def train_vq(job: Job) -> None:
    """Train the tokenizer (stage 1)."""
    _step(job, "vq")


@app.command("encode")
@with_options
def encode(
    job: Job,
    precision: Annotated[
        Arithmetic | None,
        typer.Option("--precision", help="Arithmetic of the tokenizer: the setting encode.precision."),
    ] = None,
) -> None:
    """Turn the dataset into codes."""
    if precision is not None:
        job.overrides.append(f"encode.precision={precision.value}")
    _step(job, "codes")


@train_app.command("prior")
@with_options
def train_prior(job: Job) -> None:
    """Train the diffusion prior over the codes (stage 2)."""
    _step(job, "prior")


@app.command("evaluate")
@with_options
def evaluate(
    job: Job,
    model: Annotated[
        str | None, typer.Option("--model", help="A registered version to judge anew: its number or an alias.")
    ] = None,
    protocol: Annotated[
        Path | None, typer.Option("--protocol", help="File of a protocol (`hvqd protocol` writes one) to judge by.")
    ] = None,
) -> None:
    """Judge the models on the held-out test split; with --model a version, by this root's protocol and pictures."""
    from workflows.evaluation.protocol import read_protocol

    pinned = None if protocol is None else read_protocol(protocol)
    if model is None:
        if pinned is None:
            _step(job, "evaluation")
        else:
            _evaluate_by(job, pinned)
        return
    pipeline = _look(job) if job.dry_run else _open(job)
    if job.dry_run:
        from workflows.release.registry import find_version

        number = find_version(pipeline.tracker, job.config.tracking.model_name, model)
        job.answer({"status": 0, "version": number}, f"would judge version {number} by the settings of this root")
        return
    from workflows.evaluation.evaluate import evaluate_version

    context = _context(job, pipeline)
    if pinned is not None:
        context = replace(context, config=pinned.applied(context.config))
    found = evaluate_version(context, pipeline.tracker, model, pinned)
    value = {"version": found.version, "protocol": found.protocol_digest, "figures": found.values}
    job.answer({"status": 0, **value, "folder": found.folder}, found.folder)


def _evaluate_by(job: Job, pinned: Any) -> None:
    """This root's evaluation by the protocol of a file."""
    from infra.storage import open_store
    from workflows.artifacts import read_manifest
    from workflows.evaluation.features import FeatureExtractor

    job.overrides += pinned.overrides()
    root = open_store(job.config.root)
    pinned.check_dataset(read_manifest(root.child("dataset"), "hvqd data build"), root.child("dataset").url)
    if not job.dry_run:
        weights = FeatureExtractor(pinned.evaluation.feature_size).weights_digest
        pinned.check_digest(pinned.digest, weights)
    _step(job, "evaluation")
    if not job.dry_run:
        manifest = read_manifest(root.child("evaluation"), "hvqd evaluate")
        pinned.check_digest(manifest.facts["protocol_digest"], weights)


@app.command("protocol")
@with_options
def protocol(
    job: Job,
    name: Annotated[str, typer.Option("--name", help="What the protocol is called.")] = "test",
    out: Annotated[Path | None, typer.Option("--out", help="File to write; default: printed.")] = None,
) -> None:
    """Write the protocol by which a root was evaluated, to judge other versions by it."""
    from infra.storage import Store, open_store
    from workflows.evaluation.protocol import protocol_of

    found = protocol_of(job.config, open_store(job.config.root), name)
    text = found.as_yaml()
    if out is not None and not job.dry_run:
        Store(str(out.resolve().parent)).write_bytes(out.name, text.encode())
    where = "" if out is None else str(out)
    job.answer({"status": 0, "protocol": found.model_dump(mode="json"), "file": where}, where or text.rstrip("\n"))


@app.command("register")
@with_options
def register(job: Job) -> None:
    """Register the evaluated models as a version, alias `candidate`."""
    if _planned(job, "registration"):
        return
    pipeline = _open(job)
    from workflows.release.registry import register as register_version

    manifest = register_version(_context(job, pipeline), pipeline.tracker)
    name, version = manifest.facts["model_name"], manifest.facts["version"]
    job.answer({"status": 0, "model": name, "version": version}, f"{name} version {version}")


@app.command("promote")
@with_options
def promote(
    job: Job,
    version: Annotated[str | None, typer.Option("--version", help="The version; default the candidate.")] = None,
    override: Annotated[
        str | None, typer.Option("--override", help="Why it shall be champion although a gate refuses; recorded.")
    ] = None,
    gates: Annotated[Path | None, typer.Option("--gates", help="YAML file of gates: the setting gates.file.")] = None,
) -> None:
    """Move the alias `champion`, if every gate agrees (exit status 3 names those that do not)."""
    from workflows.release.promotion import promote as promote_version

    if gates is not None:
        job.overrides.append(f"gates.file={json.dumps(str(gates.resolve()))}")

    pipeline = _look(job)  # what is set for one decision is not what the root remembers
    if not job.dry_run and pipeline.tracker.is_there:
        pipeline.tracker.check_answers()
    context = _context(job, pipeline)
    result = promote_version(context, pipeline.tracker, version, dry_run=job.dry_run, override=override)
    job.answer({"status": 0, **result.as_json()}, result.as_text())


@app.command("rollback")
@with_options
def rollback(
    job: Job,
    reason: Annotated[str, typer.Option("--reason", help="Why; recorded.")],
    version: Annotated[str | None, typer.Option("--to", help="An earlier champion; default the last one.")] = None,
) -> None:
    """Make an earlier champion the champion again."""
    from workflows.release.promotion import plan_rollback
    from workflows.release.promotion import rollback as roll_back

    pipeline = _look(job)
    context = _context(job, pipeline)
    if job.dry_run:
        target = plan_rollback(context, pipeline.tracker, version)
        job.answer({"status": 0, "version": target}, f"would make version {target} champion again")
        return
    entry = roll_back(context, pipeline.tracker, version, reason)
    job.answer({"status": 0, **entry.as_json()}, entry.as_text())


@app.command("report")
@with_options
def report(job: Job) -> None:
    """Write the report anew: one HTML file in the root."""
    if _planned(job):
        return
    pipeline = _open(job)
    from workflows.reporting.report import write_report

    path = write_report(_context(job, pipeline))
    job.answer({"status": 0, "report": path}, path)


# ---- use ----


app.command("sample")(sample)
app.command("interpolate")(interpolate)
app.command("augment")(augment)
app.command("reconstruct")(reconstruct)


@app.command("serve")
@with_options
def serve(
    job: Job,
    host: Annotated[str | None, typer.Option("--host", help="Address to listen on: the setting serve.host.")] = None,
    port: Annotated[int | None, typer.Option("--port", help="Port to listen on: the setting serve.port.")] = None,
    version: Annotated[
        str | None, typer.Option("--version", help="A version that stays; default: follow the champion.")
    ] = None,
) -> None:
    """Serve the champion over HTTP (POST /draw, GET /health, GET /metrics) until it is stopped."""
    for key, value in (("host", host), ("port", port)):
        if value is not None:
            job.overrides.append(f"serve.{key}={value}")
    pipeline = _look(job)
    from workflows.commands.serve import Server, plan_serving, until_stopped

    served, first = plan_serving(job.config, pipeline.tracker, version)
    what = f"{served.model} version {first}" + ("" if served.version else ", following the champion")
    if job.dry_run:
        job.answer({"status": 0, "version": first}, f"would serve {what} at {served.settings.host}")
        return
    with Server(job.config, served) as address:
        job.answer({"status": 0, "address": address, "version": first}, f"{what} at {address} (Ctrl-C stops it)")
        until_stopped()


add_launch_commands(app)


# ---- configuration ----


@config_app.command("show")
@with_options
def config_show(job: Job) -> None:
    """Print the complete configuration as YAML, to edit and pass back with --config."""
    from workflows.loading import masked, to_yaml

    job.answer(
        {"status": 0, "config": masked(job.config).model_dump(mode="json")}, to_yaml(masked(job.config)).rstrip("\n")
    )


@app.command("presets")
@with_options
def presets(job: Job) -> None:
    """List the presets."""
    from workflows.loading import preset_names, preset_summary

    summaries = {name: preset_summary(name) for name in preset_names()}
    job.answer({"status": 0, "presets": summaries}, "\n".join(f"{name:<12} {text}" for name, text in summaries.items()))


# ---- plumbing ----


def _planned(job: Job, kind: str | None = None) -> bool:
    """With --dry-run: print the configuration and the plan, touch nothing."""
    if not job.dry_run:
        return False
    from infra.storage import open_store
    from workflows.loading import masked, to_yaml
    from workflows.pipeline import plan

    config = masked(job.config)
    states = plan(job.config, open_store(job.config.root).quick())
    shown = {name: state for name, state in states.items() if kind in (None, name)}
    lines = [
        f"{name:<13} {'skip, it is current' if state == 'current' else 'make, it is ' + state}"
        for name, state in shown.items()
    ]
    job.answer(
        {"status": 0, "config": config.model_dump(mode="json"), "plan": shown},
        to_yaml(config, documented=False) + "\n" + "\n".join(lines),
    )
    return True


def _open(job: Job, *, makes_dataset: bool = False) -> Pipeline:
    """The job's pipeline on a root that was found writable, with a tracker that was found to answer.

    Args:
        makes_dataset: look at the pictures' source first, so that a wrong one leaves nothing in the root.
    """
    config = job.config
    job.quiet()
    from infra.storage import open_store
    from workflows.loading import remember
    from workflows.pipeline import Pipeline, state_of, tracker_for

    root = open_store(config.root)
    if makes_dataset and state_of("dataset", config, root.quick())[0] != "current":
        from workflows.data.sources import check_source

        check_source(config.data)
    if job.preset is None and job.config_file is None:
        job.say(f"{job.settings_from}; root {root.url}")
    root.check_writable()
    tracker = tracker_for(config, root)
    tracker.check_answers()
    remember(config, root)
    return Pipeline(config, root, tracker, job.progress)


def _look(job: Job) -> Pipeline:
    """The job's pipeline for reading only: nothing is made on the root."""
    job.quiet()
    from infra.storage import open_store
    from workflows.pipeline import Pipeline, tracker_for

    root = open_store(job.config.root)
    return Pipeline(job.config, root, tracker_for(job.config, root), job.progress)


def program(name: str) -> str:
    """How to call a program of this environment: by its name where that finds it, else by its path."""
    here = Path(sys.executable).with_name(name)
    if shutil.which(name) == str(here):
        return name
    return str(here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else here)


def _context(job: Job, pipeline: Pipeline) -> Any:
    from workflows.context import Context

    return Context(pipeline.config, pipeline.root, job.progress, None)


def main() -> None:
    """Entry point of `hvqd`: exit statuses 0 done, 1 failed, 2 bad input, 3 a gate refused, 130 interrupted."""
    from typer._click.exceptions import NoArgsIsHelpError, UsageError

    try:
        status = app(standalone_mode=False, prog_name="hvqd")  # a command's own typer.Exit comes back as its status
        if status == exit_status(KeyboardInterrupt())[0]:
            ignore_from_now_on()
        sys.exit(status if isinstance(status, int) else 0)
    except NoArgsIsHelpError as error:
        print(error.format_message())  # noqa: T201
        sys.exit(2)
    except UsageError as error:
        where = error.ctx.command_path if error.ctx else "hvqd"
        problem, hint = " ".join(error.format_message().split()), f"`{where} --help` lists what is allowed"
        print(f"error: {problem}\nhint: {hint}", file=sys.stderr)  # noqa: T201
        if "--json" in sys.argv[1:]:  # the command never got to read its flags
            print(json.dumps({"status": 2, "error": problem, "hint": hint}, ensure_ascii=False))  # noqa: T201
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        status, text = exit_status(KeyboardInterrupt())
        print("error: " + text, file=sys.stderr)  # noqa: T201
        sys.exit(status)


if __name__ == "__main__":
    main()
