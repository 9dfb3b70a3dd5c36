"""`hvqd models copy`: a version goes from one registry to another, such as from staging to production.

MLflow's own copies are pointers: when the first registry's files go, so does production. Here the bytes go along. They
are compared with what was registered before they leave and again, read back, after they have arrived; only then is
there a version in the other registry. It becomes a candidate there: the other registry's gates decide.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from infra.errors import InputError
from infra.models import Registry
from infra.secrets import mask
from infra.storage import open_store
from infra.tracking import Tracker, open_tracker
from workflows.context import Context
from workflows.release.promotion import ENTRY_TAG
from workflows.release.registry import BUNDLE_TAG, find_version, version_problems
from workflows.release.version_gc import GONE_TAG
from workflows.release.versions import Report

ORIGIN_TAG = "hvqd.copied-from"
"""On a version: the registry and version that its bytes come from."""


def copy_version(context: Context, tracker: Tracker, name: str, *, to: str, dry_run: bool) -> Report:
    """Copy a version with its files, figures and lineage; the same one is copied once.

    Args:
        name: its number or an alias.
        to: the other registry: an MLflow server or database, or the root of a run with a store of its own.

    Raises:
        InputError: no such version, not what was registered, the same registry, or damaged on the way.
        EnvironmentFailure: one of the two is away.
    """
    source, model = Registry(tracker.uri), context.config.tracking.model_name
    number = find_version(tracker, model, name)
    other = _open(context, to)
    if other.uri == tracker.uri:
        raise InputError(f"--to names the registry that the version is in: {mask(to)}\nhint: name another one")
    tags = source.tags(model, number)
    if BUNDLE_TAG not in tags:
        raise InputError(
            f"version {number} of {model} was registered without digests, so a copy could not be verified\n"
            "hint: register it again"
        )
    if dry_run and not other.is_there:
        return Report(
            {"model": model, "from": number, "to": mask(other.uri), "version": None, "copied": False},
            f"would copy {model} version {number} to {mask(to)}",
        )
    origin = f"{mask(tracker.uri)} version {number} {tags[BUNDLE_TAG][:16]}"
    other.check_answers()
    target = Registry(other.uri)
    present = target.version_tagged(model, ORIGIN_TAG, origin)
    value = {"model": model, "from": number, "to": mask(other.uri), "version": present}
    if present is not None:
        return Report({**value, "copied": False}, f"{model} version {present} of {mask(to)} is that version already")
    if dry_run:
        return Report({**value, "copied": False}, f"would copy {model} version {number} to {mask(to)}")
    source.check_files(model, number)
    with tempfile.TemporaryDirectory(prefix="hvqd-copy-") as scratch:
        folder = source.download(model, number, Path(scratch) / "from")
        _check(folder, tags, f"version {number} of {model} is not what was registered")
        run = other.run(f"copy of {origin}", "copy", tags={"hvqd.step": "copy"})
        try:
            place = run.log_folder(folder, "model")
            arrived = target.download_from(place, Path(scratch) / "arrived")
            _check(arrived, tags, f"the copy of version {number} of {model} at {place} is damaged")
        except BaseException:
            run.end("FAILED")
            raise
        kept = {tag: text for tag, text in tags.items() if tag.startswith("hvqd.") and tag not in (ENTRY_TAG, GONE_TAG)}
        made = target.create(model, place, run.run_id, {**kept, ORIGIN_TAG: origin}, source.card(model, number))
        run.end("FINISHED")
    target.set_alias(model, "candidate", made)
    return Report(
        {**value, "version": made, "copied": True},
        f"{model} version {number} is version {made} of {mask(to)}, alias candidate: every byte was read back",
    )


def _open(context: Context, to: str) -> Tracker:
    """The tracker of another registry."""
    experiment = context.config.tracking.experiment
    if "://" in to and not to.startswith(("s3://", "s3a://", "file://")):
        return open_tracker(to, experiment, context.root)
    return open_tracker(None, experiment, open_store(to))


def _check(folder: Path, tags: Mapping[str, str], what: str) -> None:
    problems = version_problems(folder, tags)
    if problems:
        raise InputError(f"{what}: {'; '.join(problems)}\nhint: nothing was registered; copy or restore it again")
