"""What every command shares: its options, its surroundings, its exit status and its last line of JSON."""

from __future__ import annotations

import functools
import inspect
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from infra.errors import EnvironmentFailure, GateRefusal, InputError
from infra.quiet import Streams, divert_noise, switch_off_telemetry
from infra.secrets import mask
from infra.signals import held_back
from workflows.commands.console import ConsoleProgress

DEFAULT_PRESET = "tiny"

ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="YAML file with settings (see `hvqd config show`).")
]
PresetOption = Annotated[str | None, typer.Option("--preset", help="tiny, cpu, small, base, large or integration.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="One setting as a.b=value; repeatable.")]
RootOption = Annotated[
    str | None, typer.Option("--root", help="Folder or URL (s3://bucket/prefix) of the run's artifacts.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the configuration and the plan; touch nothing.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, last.")]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Seed of weights, data order and draws.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show tracebacks, and all output in the terminal.")]

_OPTIONS: dict[str, tuple[Any, Any]] = {
    "config_file": (ConfigOption, None),
    "preset": (PresetOption, None),
    "overrides": (SetOption, None),
    "root": (RootOption, None),
    "dry_run": (DryRunOption, False),
    "as_json": (JsonOption, False),
    "seed": (SeedOption, None),
    "debug": (DebugOption, False),
}


@dataclass
class Job:
    """One command under way."""

    config_file: Path | None
    preset: str | None
    overrides: list[str]
    root: str | None
    dry_run: bool
    as_json: bool
    seed: int | None
    debug: bool
    streams: Streams = field(default_factory=lambda: Streams(sys.stdout, sys.stderr))

    @functools.cached_property
    def progress(self) -> ConsoleProgress:
        """Where the user sees how it goes."""
        return ConsoleProgress(self.streams.err)

    @functools.cached_property
    def remembered(self) -> dict[str, Any] | None:
        """The settings that the root has been used with, where the command names a root and no others."""
        from infra.storage import open_store
        from workflows.loading import read_remembered

        if self.preset is not None or self.config_file is not None or self.root is None:
            return None
        return read_remembered(open_store(self.root))

    @functools.cached_property
    def config(self) -> Any:
        """The resolved configuration. A root that has been used before remembers its own."""
        from workflows.loading import load_config

        if self.remembered is not None:
            return load_config(None, None, self.overrides, self.root, self.seed, below=self.remembered)
        preset = self.preset or (DEFAULT_PRESET if self.config_file is None else None)
        return load_config(preset, self.config_file, self.overrides, self.root, self.seed)

    @property
    def settings_from(self) -> str:
        """What the settings come from when neither a preset nor a file is named."""
        return "settings of this root" if self.remembered is not None else f"settings of the preset {DEFAULT_PRESET}"

    def say(self, text: str) -> None:
        """One line for the user, on standard error."""
        self.progress.say(text)

    def quiet(self) -> None:
        """From here on, what outside systems print goes to a log file."""
        if self.dry_run:
            self.streams = divert_noise(Path(os.devnull))  # a log would be something touched
            self.__dict__.pop("progress", None)
        elif not self.debug:
            folder = Path(os.environ.get("HVQD_LOGS", ".hvqd/logs"))
            try:
                self.streams = divert_noise(folder / f"hvqd-{os.getpid()}.log")
            except OSError as error:
                raise EnvironmentFailure(
                    f"cannot write the log to {folder}: {error}\nhint: name another folder in HVQD_LOGS"
                ) from error
            self.__dict__.pop("progress", None)

    def answer(self, value: dict[str, Any], text: str = "") -> None:
        """The command's result: JSON for programs, text for people."""
        if self.as_json:
            print(json.dumps(value, ensure_ascii=False), file=self.streams.out, flush=True)
        elif text:
            print(text, file=self.streams.out, flush=True)


class OptionGroup:
    """Options that some commands share: a dataclass of annotated fields, taken by the commands as one argument."""


def with_options(body: Callable[..., None]) -> Callable[..., None]:
    """Give a command the common options: `body(job, …)` becomes a function that typer can read.

    An argument that is an OptionGroup becomes the options that are its fields.
    """
    own: list[inspect.Parameter] = []
    groups: dict[str, tuple[type[OptionGroup], list[str]]] = {}
    for parameter in inspect.signature(body, eval_str=True).parameters.values():
        kind = parameter.annotation
        if isinstance(kind, type) and issubclass(kind, OptionGroup):
            fields = list(inspect.signature(kind, eval_str=True).parameters.values())
            groups[parameter.name] = kind, [field.name for field in fields]
            own += fields
        elif parameter.name != "job":
            own.append(parameter)

    def command(**values: Any) -> None:
        common = {name: values.pop(name) for name in _OPTIONS}
        job = Job(**{**common, "overrides": common["overrides"] or []})
        for name, (kind, fields) in groups.items():
            values[name] = kind(**{field: values.pop(field) for field in fields})
        run_job(job, functools.partial(body, **values))

    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in _OPTIONS.items()
    ]
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own] + shared
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__name__, command.__doc__ = body.__name__, body.__doc__
    return command


def run_job(job: Job, body: Callable[[Job], None]) -> None:
    """Run a command and turn how it ended into an exit status and two lines."""
    switch_off_telemetry()
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        body(job)
    except BrokenPipeError:
        # Whoever reads the answer has seen enough (`hvqd … | head`); Python must not try to flush the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except BaseException as error:
        status = 130
        with suppress(KeyboardInterrupt), held_back():  # cut short by a second Ctrl-C, Ray would leave processes behind
            job.progress.finish()
            status = _ended_by(job, error)
        raise typer.Exit(status) from None
    finally:
        signal.signal(signal.SIGTERM, previous)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _ended_by(job: Job, error: BaseException) -> int:
    """Tell the user what ended the command, stop Ray, and return the exit status."""
    status, message = exit_status(error)
    details = mask("".join(traceback.format_exception(error)))
    if job.debug and not isinstance(error, KeyboardInterrupt):
        job.streams.err.write(details)
    elif status == 1 and not isinstance(error, EnvironmentFailure):
        sys.stderr.write(details)  # into the log
    lines = mask(message).splitlines()
    facts = error.facts if isinstance(error, GateRefusal) else {}
    if isinstance(error, GateRefusal) and error.shown and not job.as_json:
        print(error.shown, file=job.streams.out, flush=True)
    print("\n".join(["error: " + lines[0], *lines[1:]]), file=job.streams.err, flush=True)
    if job.as_json:
        hints = [line.removeprefix("hint: ") for line in lines if line.startswith("hint:")]
        problem = " ".join(line for line in lines if not line.startswith("hint:"))
        job.answer({**facts, "status": status, "error": problem, "hint": " ".join(hints)})
    with suppress(ImportError):
        if "ray" in sys.modules:
            from infra.cluster import disconnect

            disconnect()
    return status


def exit_status(error: BaseException) -> tuple[int, str]:
    """The exit status of an error and what the user is told."""
    text = str(error)
    match error:
        case KeyboardInterrupt():
            return 130, "interrupted\nhint: run the same command again, it goes on where it stood"
        case InputError():
            return 2, text
        case EnvironmentFailure():
            return 1, text
        case GateRefusal():
            return 3, text
        case ValueError() if "\nhint:" in text:
            return 2, text
        case MemoryError():
            return 1, "out of memory\nhint: lower micro_batch or sampling.batch"
    first = next(iter(text.splitlines()), "")
    return 1, f"{type(error).__name__}: {first}\nhint: the log in .hvqd/logs has the details; --debug shows them here"
