"""Steps 6 and 7: an evaluated pipeline becomes a model version, and a version becomes champion if every gate agrees.

A version carries its lineage and its figures as tags, so that a promotion can be explained from the registry alone.
Every promotion and refusal is also written to `audit/` under the root, one JSON file each.
"""

from __future__ import annotations

import getpass
import json
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from infra.errors import GateRefusal, InputError
from infra.models import Registry, write_pyfunc
from infra.secrets import mask
from infra.storage import Store
from infra.tracking import Tracker
from workflows.artifacts import Manifest, check_files, find_manifest, read_manifest, write_manifest
from workflows.bundle import LoadedBundle, load_bundle, write_bundle
from workflows.card import model_card
from workflows.context import Context
from workflows.gates import GateResult, judge
from workflows.requests import PARENTS, request_of

_COMMANDS = {
    "dataset": "hvqd data build",
    "vq": "hvqd train vq",
    "codes": "hvqd encode",
    "prior": "hvqd train prior",
    "evaluation": "hvqd evaluate",
}
_REQUEST_TAG = "hvqd.request"
_REQUIREMENTS = ["torch", "numpy", "safetensors", "pydantic", "pyyaml", "pillow", "pandas", "mlflow"]
_PACKAGES = ("hvqd_model", "infra", "workflows")


def register(context: Context, tracker: Tracker) -> Manifest:
    """The artifact `registration/`: which version this pipeline is; made once, alias `candidate`.

    Raises:
        InputError: an artifact of the pipeline is missing.
    """
    root, config = context.root, context.config
    parents = {kind: read_manifest(root.child(kind), _COMMANDS[kind]) for kind in PARENTS["registration"]}
    request = request_of("registration", config, parents)
    registry, model = Registry(tracker.uri), config.tracking.model_name
    store = root.child("registration")
    present = find_manifest(store)
    if present is not None and present.request == request:
        check_files(store, present)
        version = str(present.facts["version"])
        if registry.version_tagged(model, _REQUEST_TAG, request) == version:
            return present
    # A version made just before a crash is found by its tag, so that there is never a second one.
    version = registry.version_tagged(model, _REQUEST_TAG, request) or _create(
        context, tracker, registry, request, parents
    )
    registry.set_alias(model, "candidate", version)
    lineage = {kind: manifest.digest for kind, manifest in parents.items()}
    if context.run is not None:
        context.run.set_tags({"hvqd.model": model, "hvqd.version": version})
    return write_manifest(
        store,
        "registration",
        request,
        lineage,
        facts={"model_name": model, "version": version},
        provenance={"registry": "sqlite" if tracker.uri.startswith("sqlite") else "server"},
    )


def _create(context: Context, tracker: Tracker, registry: Registry, request: str, parents: dict[str, Manifest]) -> str:
    config, root = context.config, context.root
    lineage = {kind: manifest.digest for kind, manifest in parents.items()}
    figures = dict(parents["evaluation"].facts["figures"])
    run = context.run or tracker.run(f"register-{request}", "register", tags={"hvqd.step": "register"})
    card = model_card(config, parents)
    with tempfile.TemporaryDirectory(prefix="hvqd-version-") as scratch:
        folder = Path(scratch)
        facts = parents["dataset"].facts
        write_bundle(
            folder / "bundle",
            root.child("vq", "model").download_folder(folder / "vq"),
            root.child("prior", "model").download_folder(folder / "prior"),
            facts["classes"],
            facts["class_rows"]["train"],
            config.sampling,
            lineage,
            card,
        )
        code = folder / "code"
        packages = [_copy_sources(name, code) for name in _PACKAGES]
        served = Path(__file__).with_name("served_model.py")
        write_pyfunc(folder / "model", served, {"bundle": folder / "bundle"}, packages, _REQUIREMENTS)
        source = run.log_folder(folder / "model", "model")
    tags = {
        _REQUEST_TAG: request,
        **{f"hvqd.digest.{kind}": digest for kind, digest in lineage.items()},
        "hvqd.figures": json.dumps(figures, sort_keys=True),
        "hvqd.protocol": str(parents["evaluation"].facts["protocol_digest"]),
        "hvqd.conditional": str(bool(facts["classes"])).lower(),
        "hvqd.root": root.url,
        "hvqd.commit": _commit(),
    }
    return registry.create(config.tracking.model_name, source, run.run_id, tags, card)


def _copy_sources(package: str, target: Path) -> Path:
    """A package's Python files and presets, without the bundled pictures."""
    source = Path(__file__).parents[1] / package
    return Path(
        shutil.copytree(source, target / package, ignore=shutil.ignore_patterns("bundled", "__pycache__", "*.pyc"))
    )


def _commit() -> str:
    """The source's git commit, or `unknown` for an installed package."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()


# ---- promotion ----


@dataclass(frozen=True)
class PromotionResult:
    """What a promotion did, or would do."""

    model: str
    version: str
    previous: str | None
    """The champion before."""
    gates: list[GateResult]
    moved: bool
    """Whether the alias has been moved now."""

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "model": self.model,
            "version": self.version,
            "previous": self.previous,
            "moved": self.moved,
            "gates": [gate.as_json() for gate in self.gates],
        }

    def as_text(self) -> str:
        """For people."""
        lines = [gate.as_text() for gate in self.gates]
        if self.moved:
            was = f" (was version {self.previous})" if self.previous else ""
            lines.append(f"champion  {self.model} version {self.version}{was}")
        elif self.previous == self.version:
            lines.append(f"champion  {self.model} version {self.version} already")
        else:
            lines.append(f"would make {self.model} version {self.version} champion")
        return "\n".join(lines)


def promote(
    context: Context, tracker: Tracker, version: str | None = None, *, dry_run: bool = False
) -> PromotionResult:
    """Move the alias `champion` to a version if every gate agrees; `previous` keeps the old champion.

    Args:
        version: default the candidate.
        dry_run: ask the gates, move nothing, record nothing.

    Raises:
        InputError: there is no such version.
        GateRefusal: a gate refused; it is named with its value and threshold.
    """
    model, registry = context.config.tracking.model_name, Registry(tracker.uri)
    wanted = (version or registry.alias(model, "candidate")) if _is_there(tracker) else None
    if wanted is None:
        raise InputError(f"the model {model} has no candidate to promote\nhint: `hvqd register` makes one")
    with nullcontext() if dry_run else _lock(context.root):
        champion = registry.alias(model, "champion")
        results = _judge(context, registry, model, wanted, champion)
        failed = [gate for gate in results if not gate.passed]
        moved = not failed and not dry_run and champion != wanted
        result = PromotionResult(model, wanted, champion, results, moved)
        if moved:
            if champion is not None:
                registry.set_alias(model, "previous", champion)
            registry.set_alias(model, "champion", wanted)
        if not dry_run and (moved or failed):
            _record(context, registry, result)
    if failed:
        lines = "; ".join(gate.as_text() for gate in failed)
        raise GateRefusal(
            f"version {wanted} of {model} is not promoted: {lines}\n"
            "hint: train longer, or change the gate if it asks for the wrong thing (--set gates.NAME=VALUE)"
        )
    return result


def _judge(context: Context, registry: Registry, model: str, wanted: str, champion: str | None) -> list[GateResult]:
    tags = registry.tags(model, wanted)
    against: dict[str, Any] | None = None
    comparable = True
    if champion is not None and champion != wanted:
        other = registry.tags(model, champion)
        against = json.loads(other.get("hvqd.figures", "{}"))
        comparable = other.get("hvqd.protocol") == tags.get("hvqd.protocol")
    return judge(
        json.loads(tags.get("hvqd.figures", "{}")),
        against,
        context.config.gates,
        conditional=tags.get("hvqd.conditional") == "true",
        comparable=comparable,
    )


def _record(context: Context, registry: Registry, result: PromotionResult) -> None:
    """Who moved what, when and why: a tag on the version and a file in the root's audit folder."""
    now = datetime.now(UTC)
    record = {**result.as_json(), "by": f"{_user()}@{socket.gethostname()}", "at": now.isoformat(timespec="seconds")}
    registry.set_tag(result.model, result.version, "hvqd.promotion", json.dumps(record, sort_keys=True))
    context.root.child("audit").write_json(f"{now:%Y%m%dT%H%M%S.%f}-version-{result.version}.json", record)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


@contextmanager
def _lock(root: Store) -> Iterator[None]:
    """One promoter at a time on this machine: MLflow's aliases have no compare-and-set."""
    import fcntl

    folder = root.path if root.is_local else Path(tempfile.gettempdir())
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".hvqd-promotion.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---- use ----


def _is_there(tracker: Tracker) -> bool:
    """Whether the tracking store exists: only to ask an sqlite store would make one."""
    return not tracker.uri.startswith("sqlite:///") or Path(tracker.uri.removeprefix("sqlite:///")).exists()


def load_version(tracker: Tracker, model: str, uri: str | None = None) -> LoadedBundle:
    """The champion, or the version that `models:/name@alias` or `models:/name/version` names.

    Raises:
        InputError: there is no such version.
    """
    registry = Registry(tracker.uri)
    if not _is_there(tracker):
        raise InputError(
            f"there is no registry at {mask(tracker.uri)}\n"
            "hint: name a run's root with --root, or a model's folder with --model"
        )
    name, version = _parse(uri, model, registry)
    with tempfile.TemporaryDirectory(prefix="hvqd-version-") as scratch:
        folder = registry.download(name, version, Path(scratch))
        return load_bundle(folder / "artifacts" / "bundle")


def _parse(uri: str | None, model: str, registry: Registry) -> tuple[str, str]:
    text = (uri or f"models:/{model}@champion").removeprefix("models:/")
    name, at, alias = text.partition("@")
    if at:
        version = registry.alias(name, alias)
        if version is None:
            raise InputError(
                f"no version of the model {name} has the alias {alias}\n"
                "hint: name the run's folder (--root FOLDER or --model FOLDER), or promote a version first"
            )
        return name, version
    name, slash, number = text.partition("/")
    if not slash or not number:
        raise InputError(
            f"a model is named models:/NAME@ALIAS or models:/NAME/VERSION: {uri}\nhint: models:/hvqd@champion"
        )
    return name, number
