"""`hvqd reconstruct` and `hvqd codes inspect`: seeing what the tokenizer does."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from workflows.commands.job import Job, with_options

codes_app = typer.Typer(help="See what codes mean.", no_args_is_help=True)


class Arithmetic(StrEnum):
    """What `--precision` allows."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


_Out = Annotated[Path, typer.Option("--out", help="PNG file of the sheet.")]
_Model = Annotated[
    str | None,
    typer.Option("--model", help="Model folder or version; default the champion, else the root's tokenizer."),
]
_Precision = Annotated[
    Arithmetic, typer.Option("--precision", help="Arithmetic; auto is bf16 where the processor is made for it.")
]


@with_options
def reconstruct(
    job: Job,
    path: Annotated[str, typer.Argument(help="A picture, a folder of pictures, or a split: train, val or test.")],
    out: _Out,
    levels: Annotated[
        str | None, typer.Option("--levels", help="Prefixes to show, as 2 or 1..3 (1 is the coarsest level alone).")
    ] = None,
    count: Annotated[int, typer.Option("-n", help="How many pictures at most, evenly spread.")] = 12,
    model: _Model = None,
    precision: _Precision = Arithmetic.auto,
) -> None:
    """Show pictures, what each prefix of the levels keeps of them, and where it errs."""
    from workflows.drawing.reconstruct import ReconstructRequest, as_text
    from workflows.drawing.reconstruct import reconstruct as make_sheet

    config = job.config  # before a log is begun: what is wrong with it leaves nothing behind
    request = ReconstructRequest(path, levels, count, model, precision.value, out)
    if job.dry_run:
        job.answer({"status": 0, "plan": request.as_json()}, f"would reconstruct {path} to {out}")
        return
    job.quiet()
    result = make_sheet(request, config)
    job.answer({"status": 0, **result}, as_text(result))


@codes_app.command("inspect")
@with_options
def inspect(
    job: Job,
    out: _Out,
    path: Annotated[
        str, typer.Argument(help="A picture, a folder of pictures, or a split: train, val or test.")
    ] = "val",
    codes: Annotated[int, typer.Option("--codes", help="How many codes of each level, most used first.")] = 24,
    pictures: Annotated[int, typer.Option("-n", help="How many pictures to encode at most, evenly spread.")] = 512,
    model: _Model = None,
    precision: _Precision = Arithmetic.auto,
) -> None:
    """Show what the most used codes of each level look like, and how much of each codebook is used."""
    from workflows.drawing.codes_inspection import InspectRequest, as_text, inspect_codes

    config = job.config
    request = InspectRequest(path, pictures, codes, model, precision.value, out)
    if job.dry_run:
        job.answer({"status": 0, "plan": request.as_json()}, f"would show the codes of {path} at {out}")
        return
    job.quiet()
    result = inspect_codes(request, config)
    job.answer({"status": 0, **result}, as_text(result))
