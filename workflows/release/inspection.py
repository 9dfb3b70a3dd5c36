"""A look at a version's files before it is promoted: are they what was registered, and do they work by themselves?

What the gates ask about files is answered here; what no gate asks is not looked at, because it costs a download or a
process.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from infra.errors import InputError
from infra.models import Registry
from workflows.config import GateSettings
from workflows.drawing.bundle import DESCRIPTION, load_bundle
from workflows.release.gates import Inspection
from workflows.release.registry import BUNDLE_PATH, LICENCES_TAG, version_problems

LINEAGE = ("dataset", "vq", "codes", "prior", "evaluation")
"""What a version must have been made from; its tags `hvqd.digest.KIND` say so."""
TRAINING_PACKAGES = ("ray", "deepspeed", "s3fs", "botocore")
"""What a version must not need in order to draw."""
_SCRIPT = Path(__file__).parents[2] / "infra" / "load_alone.py"
_SECONDS = 900.0


def inspect(registry: Registry, model: str, version: str, gates: GateSettings) -> Inspection:
    """What the gates want to know about a version's files.

    Raises:
        EnvironmentFailure: the registry or the store is away.
    """
    tags = registry.tags(model, version)
    problems: dict[str, str | None] = {}
    if gates.licences is not None:
        problems["licences"] = licence_problem(tags, gates.licences)
    measured = gates.max_latency_seconds is not None or gates.max_memory_gib is not None
    draws = gates.smoke_test or measured
    if not (draws or gates.bundle_integrity or gates.lineage_complete):
        return Inspection(problems)
    with tempfile.TemporaryDirectory(prefix="hvqd-inspection-") as scratch:
        try:
            registry.check_files(model, version)
            folder = registry.download(model, version, Path(scratch))
        except InputError as error:
            gone = str(error).splitlines()[0]
            return Inspection(
                {**problems, **dict.fromkeys(("bundle_integrity", "lineage_complete", "smoke_test"), gone)}
            )
        bundle = folder / BUNDLE_PATH
        if gates.bundle_integrity:
            problems["bundle_integrity"] = integrity_problem(folder, tags)
        if gates.lineage_complete:
            problems["lineage_complete"] = lineage_problem(bundle, tags, registry.card(model, version))
        if not draws:
            return Inspection(problems)
        problem, found = draw_alone(folder)
        if gates.smoke_test:
            problems["smoke_test"] = problem
    latency = float(found["latency_seconds"]) if found else None
    memory = float(found["memory_bytes"]) / 2**30 if found else None
    return Inspection(problems, latency, memory)


def integrity_problem(folder: Path, tags: Mapping[str, str]) -> str | None:
    """What in a version's folder is not as it was registered, or does not belong together; None when all is.

    Args:
        tags: the version's, with the digests that the registry keeps.
    """
    changed = version_problems(folder, tags)
    if changed:
        return "; ".join(changed)
    try:
        load_bundle(folder / BUNDLE_PATH)
    except ValueError as error:
        return str(error).splitlines()[0]
    return None


def lineage_problem(bundle: Path, tags: Mapping[str, str], card: str) -> str | None:
    """What is not known about where a version comes from, or told differently by its tags, bundle and card."""
    digests = {kind: tags.get(f"hvqd.digest.{kind}", "") for kind in LINEAGE}
    unknown = [kind for kind, digest in digests.items() if not digest]
    if unknown:
        return f"the registry does not name its {', '.join(unknown)}"
    try:
        described = json.loads((bundle / DESCRIPTION).read_text())["lineage"]
        told = (bundle / "README.md").read_text()
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"the bundle does not say: {' '.join(repr(error).split())}"
    for kind, digest in digests.items():
        if described.get(kind) != digest:
            return f"{DESCRIPTION} names another {kind}: {described.get(kind)}"
        for name, text in (("README.md", told), ("the registry's card", card)):
            if digest not in text:
                return f"{name} has no lineage: the {kind} {digest[:12]} is missing"
    return None


def licence_problem(tags: Mapping[str, str], allowed: tuple[str, ...]) -> str | None:
    """The licences of the training pictures that are not allowed, or that none is stated."""
    stated = json.loads(tags.get(LICENCES_TAG, "[]"))
    if not stated:
        return "the source of the training pictures states no licence"
    refused = [name for name in stated if name not in allowed]
    return f"not allowed: {', '.join(refused)} (allowed are {', '.join(allowed)})" if refused else None


def draw_alone(folder: Path) -> tuple[str | None, dict[str, Any]]:
    """Load a version's folder in a process of its own and draw a picture twice.

    Returns:
        What is wrong or None, and what `infra/load_alone.py` printed.
    """
    environment = {**os.environ, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-P", str(_SCRIPT), str(folder), *TRAINING_PACKAGES]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no picture within {_SECONDS:.0f} s", {}
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = next(iter(done.stderr.strip().splitlines()[-1:]), "it said nothing")
        return f"it does not load and draw by itself (status {done.returncode}): {last}", {}
    return _picture_problem(found), found


def _picture_problem(found: Mapping[str, Any]) -> str | None:
    if found["unwanted"]:
        return f"it needs training packages: {', '.join(found['unwanted'])}"
    first, second = found["pictures"]
    if first != second:
        return "the same seed drew two different pictures"
    try:
        Image.open(io.BytesIO(base64.b64decode(first, validate=True))).load()
    except (binascii.Error, UnidentifiedImageError, OSError) as error:
        return f"what it draws is no picture: {error}"
    return None
