"""From a command on this machine to a submission: the same command with its configuration, complete in itself.

A configuration file travels as its settings, `--set` by `--set`, so that no target needs the file; a root that
remembers its settings needs none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from infra.errors import InputError
from infra.jobs import Document, Submission, check_root, forwarded, job_name
from infra.targets import LocalTarget, Target
from workflows.job import Job

COMMANDS: tuple[tuple[str, ...], ...] = (
    ("run",),
    ("data", "build"),
    ("train", "vq"),
    ("train", "prior"),
    ("encode",),
    ("evaluate",),
    ("register",),
    ("tune",),
)
"""What can be launched."""


def submission_for(
    job: Job, words: Sequence[str], target: Target, on: str, name: str | None, *, preflight: bool
) -> Submission:
    """The command with the options that `launch` was given, ready for a target.

    Raises:
        InputError: no such command, or a root that the target cannot see.
    """
    verb = _verb(words)
    config = job.config
    check_root(config.root, target, on)
    options = [*settings_options(job), "--root", config.root]
    if not isinstance(target, LocalTarget):
        options += ["--set", "compute.address=auto"]
    rest = list(words[len(verb) :])
    if preflight:
        from infra.versions import versions

        expected = [f"--expect={part}={version}" for part, version in versions().items()]
    compute = config.compute
    return Submission(
        name=name or job_name(verb, config.root),
        command=(*verb, *rest, *options),
        root=config.root,
        workers=compute.most_workers,
        cpus_per_worker=compute.threads_per_worker,
        gpus_per_worker=compute.gpus_per_worker,
        preflight=preflight,
        preflight_options=(*options, *expected) if preflight else (),
        secrets=forwarded(target),
    )


def _verb(words: Sequence[str]) -> tuple[str, ...]:
    for command in COMMANDS:
        if tuple(words[: len(command)]) == command:
            return command
    known = ", ".join(" ".join(command) for command in COMMANDS)
    raise InputError(
        f"this command cannot be launched: {' '.join(words)} ({known})\n"
        "hint: hvqd launch run --preset small --root s3://bucket/prefix --on ray"
    )


def settings_options(job: Job) -> list[str]:
    """Options that give another machine this command's configuration."""
    options: list[str] = ["--preset", job.preset] if job.preset else []
    if job.config_file is not None:
        import yaml

        for key, value in _dotted("", yaml.safe_load(job.config_file.read_text(encoding="utf-8")) or {}):
            options += ["--set", f"{key}={json.dumps(value, ensure_ascii=False)}"]
    for override in job.overrides:
        options += ["--set", override]
    if not options and job.remembered is None:
        from workflows.job import DEFAULT_PRESET

        options += ["--preset", DEFAULT_PRESET]
    if job.seed is not None:
        options += ["--seed", str(job.seed)]
    return options


def _dotted(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _dotted(f"{prefix}.{key}" if prefix else str(key), child)
    else:
        yield prefix, value


def shown(documents: Sequence[Document]) -> str:
    """What would be submitted, for people."""
    return "\n".join(f"# {document.name}\n{document.text.rstrip()}\n" for document in documents).rstrip()
