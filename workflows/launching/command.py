"""From a command on this machine to a submission: the same command with its configuration, complete in itself.

A configuration file travels as its settings, `--set` by `--set`, so that no target needs the file; a root that
remembers its settings needs none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from infra.errors import InputError
from infra.jobs import Document, Submission, check_root, forwarded, is_seen, job_name
from infra.targets import LocalTarget, Target
from workflows.commands.job import Job
from workflows.config import RunConfig

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
_PICTURES = ("*.parquet",)
"""The bundled set, 19 MB; what trains and encodes reads the root's dataset."""
_NAME_LENGTH = 47  # KubeRay's limit for a RayJob


def submission_for(
    job: Job, words: Sequence[str], target: Target, on: str, name: str | None, *, preflight: bool
) -> Submission:
    """The command with the options that `launch` was given, ready for a target.

    Raises:
        InputError: no such command, a root that the target cannot see, or a name that no target takes.
    """
    verb = _verb(words)
    config = job.config
    check_root(config.root, target, on)
    root = _root_elsewhere(config.root, target)
    options = [*settings_options(job), "--root", root]
    if not isinstance(target, LocalTarget):
        options += ["--set", "compute.address=auto"]
    rest = [_word_elsewhere(word, target, on) for word in words[len(verb) :]]
    if config.gates.file is not None:
        options += ["--set", f"gates.file={json.dumps(_word_elsewhere(config.gates.file, target, on))}"]
    if preflight:
        from infra.versions import versions

        expected = [f"--expect={part}={version}" for part, version in versions().items()]
    compute = config.compute
    return Submission(
        name=job_name(verb, root) if name is None else _checked_name(name),
        command=(*verb, *rest, *options),
        root=root,
        workers=config.fewest_workers,
        cpus_per_worker=compute.threads_per_worker,
        gpus_per_worker=compute.gpus_per_worker,
        preflight=preflight,
        preflight_options=(*options, *expected) if preflight else (),
        without=_PICTURES if verb[0] in ("train", "encode") else (),
        secrets=forwarded(target),
    )


def tracking_note(config: RunConfig, target: Target) -> str | None:
    """What is said where the tracking store of a job would be a file that goes with the machine it runs on."""
    if isinstance(target, LocalTarget) or config.tracking.uri is not None or "://" not in config.root:
        return None
    return (
        "runs and versions would be tracked in a file of the job's own machine, and be lost with it: "
        "--set tracking.uri=http://… names a server"
    )


def _root_elsewhere(root: str, target: Target) -> str:
    """The root as the target must name it: a job there begins in another folder, where `runs/tiny` is another place."""
    return root if "://" in root or isinstance(target, LocalTarget) else str(Path(root).expanduser().resolve())


def _word_elsewhere(word: str, target: Target, on: str) -> str:
    """A word of the command; one that names a file or folder of this machine as the target must name it.

    Raises:
        InputError: it names one, and the target's machines do not see it.
    """
    is_path = "/" in word or word.endswith((".yaml", ".yml"))
    if word.startswith("-") or not is_path or isinstance(target, LocalTarget) or not Path(word).expanduser().exists():
        return word
    if not is_seen(word, target):
        raise InputError(
            f"{word} lies on this machine, and the nodes of {on} do not see it\n"
            "hint: a URL (s3://bucket/…), or a folder that all nodes mount, named in the target's shared_folders"
        )
    return str(Path(word).expanduser().resolve())


def _checked_name(name: str) -> str:
    """The name that the user gave, as `hvqd jobs` finds it again: it begins with hvqd-.

    Raises:
        InputError: it is no name for every target (a file's, a Kubernetes object's).
    """
    full = name if name.startswith("hvqd-") else f"hvqd-{name}"
    if re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", full) is None or len(full) > _NAME_LENGTH:
        raise InputError(
            f"a job's name has small letters, digits and dashes, at most {_NAME_LENGTH} with hvqd- before it: {name}\n"
            "hint: --name tokenizer-2, or leave --name out: the name then follows from command and root"
        )
    return full


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
        from workflows.commands.job import DEFAULT_PRESET
        from workflows.loading import load_config

        # A command without a file begins from a preset: it is named, and what the file has otherwise is set.
        base = job.preset or DEFAULT_PRESET
        here = load_config(job.preset, job.config_file).model_dump(mode="json")
        options = ["--preset", base]
        for key, value in _differences("", load_config(base).model_dump(mode="json"), here):
            options += ["--set", f"{key}={json.dumps(value, ensure_ascii=False)}"]
    for override in job.overrides:
        options += ["--set", override]
    if not options and job.remembered is None:
        from workflows.commands.job import DEFAULT_PRESET

        options += ["--preset", DEFAULT_PRESET]
    if job.seed is not None:
        options += ["--seed", str(job.seed)]
    return options


def _differences(prefix: str, base: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """Dotted keys of what is not as in `base`, with their values."""
    if isinstance(value, dict) and isinstance(base, dict) and value.keys() == base.keys():
        for key, child in value.items():
            yield from _differences(f"{prefix}.{key}" if prefix else str(key), base[key], child)
    elif value != base:
        yield prefix, value


def shown(documents: Sequence[Document]) -> str:
    """What would be submitted, for people."""
    return "\n".join(f"# {document.name}\n{document.text.rstrip()}\n" for document in documents).rstrip()
