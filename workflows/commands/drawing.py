"""`hvqd sample`, `hvqd interpolate`, `hvqd edit` and `hvqd augment`: using a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infra.errors import InputError
from workflows.commands.job import Job, OptionGroup, with_options

if TYPE_CHECKING:
    from workflows.drawing.editing import EditRequest

edit_app = typer.Typer(help="Change pictures through their codes.", no_args_is_help=True)

_Style = Annotated[str | None, typer.Option("--style", help="Name of a style that the model has learned.")]
_Text = Annotated[str | None, typer.Option("--text", help="A caption.")]
_Model = Annotated[str | None, typer.Option("--model", help="Model folder or version; default the champion.")]
_Steps = Annotated[int | None, typer.Option("--steps", help="Steps of the reverse process.")]
_Guidance = Annotated[
    str | None,
    typer.Option("--guidance", help="Classifier-free guidance; 1 is none. One number, or class=3,style=1.5."),
]
_Keep = Annotated[
    int | None, typer.Option("--keep", help="Coarse levels that stay as they are. Default all but the finest.")
]
_Count = Annotated[int, typer.Option("-n", help="How many results.")]


@dataclass(frozen=True)
class _Edit(OptionGroup):
    """What every edit of a picture takes."""

    out: Annotated[Path, typer.Option("--out", help="PNG file of the sheet.")]
    label: Annotated[str | None, typer.Option("--class", help="Class name; without it, as the picture has it.")] = None
    style: _Style = None
    text: _Text = None
    model: _Model = None
    guidance: _Guidance = None


def _settings(job: Job, steps: int | None, guidance: str | None, sampler: str | None = None) -> None:
    """The settings that options name."""
    from workflows.drawing.sample import parse_guidance

    if guidance is not None:
        job.overrides.append(parse_guidance(guidance))
    of_latents = sampler in ("ddpm", "ddim", "dpm-solver++", "heun")
    for key, value in (("steps", steps), ("gaussian_sampler" if of_latents else "sampler", sampler)):
        if value is not None:
            job.overrides.append(f"sampling.{key}={value}")


@with_options
def sample(
    job: Job,
    out: Annotated[
        Path, typer.Option("--out", help="PNG file of the grid, or a folder; a JSON beside it reproduces it.")
    ],
    count: Annotated[int, typer.Option("-n", help="How many pictures.")] = 16,
    label: Annotated[
        str | None, typer.Option("--class", help="Class name; without it, classes as in the data.")
    ] = None,
    style: _Style = None,
    text: _Text = None,
    label_map: Annotated[
        Path | None, typer.Option("--map", help="PNG of the pictures' size with a label a pixel (255: none).")
    ] = None,
    model: _Model = None,
    steps: _Steps = None,
    guidance: _Guidance = None,
    sampler: Annotated[
        str | None,
        typer.Option("--sampler", help="confidence, ancestral, purity; Gaussian: ddpm, ddim, dpm-solver++, heun."),
    ] = None,
    preview: Annotated[
        bool, typer.Option("--preview", help="Also write NAME-preview.png: how the first pictures come into being.")
    ] = False,
    recipe: Annotated[
        Path | None, typer.Option("--from", help="JSON of an earlier sampling: draw the same pictures again.")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", help="Processes of a Ray cluster that draw; 1 draws here.")] = 1,
) -> None:
    """Draw pictures; the same seed gives the same pictures, however many are asked for."""
    from workflows.drawing.asking import Asked, read_map
    from workflows.drawing.sample import SampleRequest, draw_samples, read_recipe

    _settings(job, steps, guidance, sampler)
    config = job.config  # before a log is begun: what is wrong with it leaves nothing behind
    asked = Asked(label, style, text, None if label_map is None else read_map(label_map))
    request = SampleRequest(
        count, asked, model, job.seed or 0, out, guidance is not None, preview=preview, workers=workers
    )
    sampling = config.sampling
    if recipe is not None:
        if any(option is not None for option in (label, style, text, label_map, steps, guidance, sampler, job.seed)):
            raise InputError(
                f"--from {recipe} says all that is drawn, and another option says so, too\n"
                "hint: only --out, --model, --preview and --workers go with --from"
            )
        request, sampling = read_recipe(recipe, request)
    if job.dry_run:
        plan = request.as_json(sampling)
        job.answer({"status": 0, "plan": plan}, f"would draw {request.count} pictures to {out}")
        return
    job.quiet()
    written = draw_samples(request, config, job.progress, sampling)
    job.answer({"status": 0, **written}, "\n".join(written.values()))


@with_options
def interpolate(
    job: Job,
    first: Annotated[str, typer.Argument(help="A picture.")],
    second: Annotated[str, typer.Argument(help="Another picture.")],
    edit: _Edit,
    frames: Annotated[int, typer.Option("--steps", help="Frames, both ends included.")] = 8,
    redraw: Annotated[
        float, typer.Option("--redraw", help="Share of the differing codes that the middle frame draws anew, 0 to 1.")
    ] = 0.5,
) -> None:
    """Go from one picture to another through their codes; the ends are their reconstructions, bit for bit."""
    _settings(job, None, edit.guidance)

    def make(request: EditRequest) -> dict[str, Any]:
        from workflows.drawing.editing import interpolate as go_between

        return go_between(request, second, frames, redraw, job.config)

    _run(job, first, edit, 1, make)


@edit_app.command("inpaint")
@with_options
def inpaint(
    job: Job,
    path: Annotated[str, typer.Argument(help="A picture.")],
    mask: Annotated[str, typer.Option("--mask", help="A picture of the same size; what is white is the hole.")],
    edit: _Edit,
    dilation: Annotated[int, typer.Option("--dilation", help="Fine codes around the hole that are drawn with it.")] = 1,
    count: _Count = 4,
    steps: _Steps = None,
) -> None:
    """Fill a hole; every pixel outside it stays as it is."""
    _settings(job, steps, edit.guidance)

    def make(request: EditRequest) -> dict[str, Any]:
        from workflows.drawing.editing import fill

        return fill(request, mask, dilation, job.config)

    _run(job, path, edit, count, make)


@edit_app.command("upscale")
@with_options
def upscale(
    job: Job,
    path: Annotated[str, typer.Argument(help="A picture smaller than the model's, of the same shape.")],
    edit: _Edit,
    keep: _Keep = None,
    count: _Count = 4,
    steps: _Steps = None,
) -> None:
    """Make a small picture as large as the model's: coarse levels stay, details are drawn."""
    _settings(job, steps, edit.guidance)

    def make(request: EditRequest) -> dict[str, Any]:
        from workflows.drawing.editing import enlarge

        return enlarge(request, keep, job.config)

    _run(job, path, edit, count, make)


@edit_app.command("restyle")
@with_options
def restyle(
    job: Job,
    path: Annotated[str, typer.Argument(help="A picture.")],
    edit: _Edit,
    like: Annotated[str | None, typer.Option("--like", help="A picture whose style is taken.")] = None,
    strength: Annotated[float, typer.Option("--strength", help="Share of the fine codes drawn anew, 0 to 1.")] = 0.7,
    keep: _Keep = None,
    count: _Count = 4,
    steps: _Steps = None,
) -> None:
    """Show a picture in another style: its coarse levels stay, the fine ones follow the style."""
    _settings(job, steps, edit.guidance)

    def make(request: EditRequest) -> dict[str, Any]:
        from workflows.drawing.editing import restyle as show_in

        return show_in(request, like, strength, keep, job.config)

    _run(job, path, edit, count, make)


@with_options
def augment(
    job: Job,
    source: Annotated[
        str, typer.Argument(help="`dataset` (the root's), a split of it, or what `hvqd data build` takes.")
    ],
    out: Annotated[str, typer.Option("--out", help="Folder or URL of the new dataset.")],
    count: Annotated[int, typer.Option("-n", help="How many variants of each picture.")] = 2,
    strength: Annotated[float, typer.Option("--strength", help="Share of the fine codes drawn anew, to 1.")] = 0.5,
    keep: _Keep = None,
    originals: Annotated[
        bool, typer.Option("--originals/--no-originals", help="Whether the pictures themselves come along.")
    ] = True,
    sheet: Annotated[
        Path | None, typer.Option("--sheet", help="PNG file that shows the first pictures and their variants.")
    ] = None,
    model: _Model = None,
    steps: _Steps = None,
    guidance: _Guidance = None,
) -> None:
    """Make variants of pictures, as a dataset that `hvqd data build` reads; the same command resumes."""
    _settings(job, steps, guidance)
    config = job.config
    from workflows.drawing.augment import AugmentRequest
    from workflows.drawing.augment import augment as make_variants

    request = AugmentRequest(source, out, count, strength, keep, originals, model, job.seed or 0, sheet)
    if job.dry_run:
        plan = {**vars(request), "sheet": None if sheet is None else str(sheet)}
        job.answer({"status": 0, "plan": plan}, f"would write variants of {source} to {out}")
        return
    job.quiet()
    result = make_variants(request, config, job.progress)
    facts = result["facts"]
    job.say(f"  {facts['originals']:,} pictures, {facts['variants']:,} variants; {facts['unchanged']:,} unchanged")
    job.answer({"status": 0, **result}, str(result["folder"]))


def _run(job: Job, path: str, edit: _Edit, count: int, make: Callable[[EditRequest], dict[str, Any]]) -> None:
    """Run an edit and say what it wrote."""
    _ = job.config  # before a log is begun: what is wrong with it leaves nothing behind
    from workflows.drawing.asking import Asked
    from workflows.drawing.editing import EditRequest

    asked = Asked(edit.label, edit.style, edit.text)
    request = EditRequest(path, asked, edit.model, job.seed or 0, count, edit.out)
    if job.dry_run:
        plan = {**vars(request), "asked": asked.as_json(), "out": str(edit.out)}
        job.answer({"status": 0, "plan": plan}, f"would edit {path} to {edit.out}")
        return
    job.quiet()
    result = make(request)
    job.answer({"status": 0, **result}, str(result["image"]))
